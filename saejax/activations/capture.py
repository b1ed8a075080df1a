"""The capture stage: activations of the model at the wanted sites, into a store.

What is captured, in which batches and where it is stored does not depend on the backend that runs the model:
``torch_capture`` (hooks in the transformers model) or ``jax_capture`` (our decoder, on the mesh).
"""

import dataclasses
import functools
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from saejax.activations.backend import fastest, load_reader, ways
from saejax.activations.capture_shards import ShardCapture, missing_shards
from saejax.activations.cutter import SPLITS
from saejax.activations.documents import COLUMNS, Documents
from saejax.activations.manifest import CapturedModel, Manifest, StoredDocuments, StoredSite
from saejax.activations.plan import Plan
from saejax.activations.request import CaptureRequest, read_request
from saejax.activations.results import CapturedSite, CaptureResults, SiteNorms
from saejax.activations.stage import capture_version
from saejax.activations.store import ON_DISK
from saejax.activations.tokenize import text_documents
from saejax.activations.writer import StoreWriter
from saejax.config import identity
from saejax.errors import UserError
from saejax.models.sites import AnySite, ModuleSite
from saejax.settings import CaptureConfig, CorpusConfig, MeshConfig, TaskConfig
from saejax.tasks import corpora
from saejax.workspace import Run, fingerprint


def run_capture(run: Run) -> CaptureResults:
    """Records activations of the training text into a store in ``run.folder``.

    Finished shards of a run that was stopped or killed are kept; the store comes out the same. Where a run has several
    processes, each makes its part of the shards with its own devices, and the first one makes them a store.

    Raises:
      UserError: a site, the corpus or the model is not usable; activations are not finite; too many positions are
        attention sinks; the disk is full.
      Interrupted: asked to stop; finished shards are kept.
    """
    config = run.configs[CaptureConfig]
    request = read_request(run.configs)
    names = [str(site) for site in request.sites]
    documents, plan = _planned(run, request)
    run = _settled(run, request, plan)
    config = run.configs[CaptureConfig]
    reader, widths = None, request.widths()
    if widths is None:
        reader = load_reader(run, request, plan, config)
        widths = reader.widths
    writer = StoreWriter(run.folder, names, _work(run, request, documents))
    mesh = run.configs[MeshConfig]
    first = mesh.process_id == 0
    missing = missing_shards(writer, plan, mesh)
    _check_disk(run.folder, plan, missing, widths, config)
    if first:
        writer.begin(missing)
        writer.write_documents(documents)
    run.say(
        f"{len(documents):,} documents, {plan.rows:,} tokens at {', '.join(config.sites)}; "
        f"{plan.shards - len(missing)} of {plan.shards} shards are done"
    )
    rate = ShardCapture(run, request, plan, writer, widths, reader).make(missing) if missing else 0.0
    statistics = writer.site_statistics(plan.shards, documents, config.sink_factor)
    _check_sinks(statistics, config)
    counts = _counts(documents, plan)
    if first:
        stored = {str(site): StoredSite(**vars(statistics[str(site)]), d=width) for site, width in widths.items()}
        writer.finish(_manifest(run, request, plan, stored, counts))
    _say_sinks(run, statistics)
    size = ON_DISK[config.store_dtype].itemsize
    return CaptureResults(
        sites={
            str(site): CapturedSite(
                **vars(statistics[str(site)]), rows=plan.rows, bytes=plan.rows * width * size, d=width
            )
            for site, width in widths.items()
        },
        **counts,
        backend=config.backend,
        dtype=config.dtype,
        tokens_per_second=round(rate, 1),
        padding_share=plan.padding_share,
    )


def _planned(run: Run, request: CaptureRequest) -> tuple[Documents, Plan]:
    """The documents that are captured, and in which order."""
    config = run.configs[CaptureConfig]
    whole = text_documents(run, request)
    documents = whole.sample(config.tokens) if config.tokens else whole
    seed = run.configs[CorpusConfig].seed
    plan = Plan(documents, config.shard_rows, config.batch_tokens, config.last, seed, whole)
    if not plan.rows:
        raise UserError(
            f"the documents up to --capture.tokens={config.tokens} hold none of the last {config.last} positions of a "
            "text: raise --capture.tokens, or capture all positions with --capture.last=0"
        )
    return documents, plan


def _settled(run: Run, request: CaptureRequest, plan: Plan) -> Run:
    """The run with backend and dtype in place of ``auto``: those whose shards are there, or the fastest.

    Raises:
      UserError: there are several processes, which must all take the same.
    """
    choices = ways(run.configs[CaptureConfig], any(isinstance(site, ModuleSite) for site in request.sites))
    if len(choices) > 1 and run.configs[MeshConfig].processes > 1:
        raise UserError("auto is for one process: with several, name --capture.backend and --capture.dtype")
    names = [str(site) for site in request.sites]
    runs = [dataclasses.replace(run, configs=run.configs | choice) for choice in choices]
    if len(runs) == 1:
        return runs[0]
    for settled in runs:
        writer = StoreWriter(run.folder, names, _work(settled, request, plan.documents))
        if any(writer.has(shard, read=False) for shard in range(plan.shards)):
            return settled
    batches = plan.batches(0)
    load = functools.partial(load_reader, run, request, plan)
    return runs[choices.index(fastest(load, choices, batches[len(batches) // 2], run.say))]


def _work(run: Run, request: CaptureRequest, documents: Documents) -> str:
    """Identifies what the shards depend on."""
    hashes = [hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() for array in documents.arrays().values()]
    models = "+".join(each.source.fingerprint for each in (request, request.other) if each is not None)
    version = capture_version(run.configs)
    parts = [identity(run.configs[CaptureConfig]), models, run.configs[CorpusConfig].seed, hashes]
    return fingerprint(parts + [version] * (version > 1))  # the first is not named, so that shards of before stay


def _check_disk(
    folder: Path, plan: Plan, missing: Sequence[int], widths: dict[AnySite, int], config: CaptureConfig
) -> None:
    size = ON_DISK[config.store_dtype].itemsize
    needed = sum(plan.size(shard) for shard in missing) * (12 + sum(width * size + 4 for width in widths.values()))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the disk is full: the store needs {needed / 2**20:,.0f} MiB more and {free / 2**20:,.0f} are free in "
            f"{folder}: free space, use another --workdir or a smaller --corpus.max_tokens"
        )


def _check_sinks(statistics: Mapping[str, SiteNorms], config: CaptureConfig) -> None:
    for site, facts in statistics.items():
        share = facts.sinks.share_beyond
        if share > config.max_sink_share:
            raise UserError(
                f"at {site}, {share:.2%} of the tokens beyond position 0 have a norm above {facts.max_norm:.4g}, "
                f"{config.sink_factor:g} times the median, and would be dropped as attention sinks; expected at most "
                f"{config.max_sink_share:.2%}: raise --capture.sink_factor, or allow more by --capture.max_sink_share"
            )


def _say_sinks(run: Run, sites: Mapping[str, SiteNorms]) -> None:
    for name, facts in sites.items():
        run.say(
            f"{name}: median norm {facts.median_norm:.4g}; norms above {facts.max_norm:.4g} are attention sinks: "
            f"{facts.sinks.position_0:,} at position 0, {facts.sinks.share_beyond:.2%} of the others"
        )


def _manifest(
    run: Run,
    request: CaptureRequest,
    plan: Plan,
    sites: Mapping[str, StoredSite],
    counts: Mapping[str, Mapping[str, int]],
) -> Manifest:
    """The manifest but for its files."""
    config = run.configs[CaptureConfig]
    return Manifest(
        sites=sites,
        dtype=config.store_dtype,
        rows=plan.rows,
        shards=plan.shards,
        shard_rows=config.shard_rows,
        model=CapturedModel.of(request.source, config.dtype),
        sink_factor=config.sink_factor,
        documents=StoredDocuments(COLUMNS, plan.documents.groups, **counts["documents"]),
        files={},
        corpus=corpora.identity(run.configs[CorpusConfig], run.configs[TaskConfig]),
        last=config.last,
        tokens=counts["tokens"],
        other=CapturedModel.of(request.other.source) if request.other else None,
    )


def _counts(documents: Documents, plan: Plan) -> dict[str, dict[str, int]]:
    """Documents, and recorded tokens, of each split."""
    inside = {name: documents.split_N == index for index, name in enumerate(SPLITS)}
    return dict(
        documents={name: int(inside_N.sum()) for name, inside_N in inside.items()},
        tokens={name: int(plan.recorded_N[inside_N].sum()) for name, inside_N in inside.items()},
    )
