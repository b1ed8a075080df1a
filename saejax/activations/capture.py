"""The capture stage: activations of the model at the wanted sites, into a store.

What is captured, in which batches and where it is stored does not depend on the backend that runs the model:
``torch_capture`` (hooks in the transformers model) or ``jax_capture`` (our decoder, on the mesh).
"""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from saejax.activations.backend import load_reader
from saejax.activations.capture_shards import Missing, ShardCapture, missing_shards
from saejax.activations.chunker import SPLITS
from saejax.activations.documents import Documents
from saejax.activations.manifest import CapturedModel
from saejax.activations.plan import Plan
from saejax.activations.request import CaptureRequest, begins_with_bos, read_request
from saejax.activations.results import CapturedSite, CaptureResults, SiteNorms
from saejax.activations.store import INDEX, ON_DISK
from saejax.activations.tokenize import text_documents
from saejax.activations.writer import StoreWriter
from saejax.errors import UserError
from saejax.models.sites import OtherSite
from saejax.runner.workspace import Run, fingerprint
from saejax.settings import CaptureConfig, CorpusConfig, MeshConfig, TaskConfig
from saejax.tasks import corpora


def run_capture(run: Run) -> CaptureResults:
    """Record activations of the training text into a store in ``run.folder``.

    Finished shards of a run that was stopped or killed are kept, and those of other stores of the workdir that were
    made in the same way are taken: another site costs that site alone. The store comes out the same. Where a run has
    several processes, each makes its share of the shards with its own devices, and the first one makes them a store.

    Raises:
      UserError: a site, the corpus or the model is not usable; activations are not finite; too many positions are
        attention sinks; the disk is full.
      Interrupted: asked to stop; finished shards are kept.
    """
    config, mesh = run.configs[CaptureConfig], run.configs[MeshConfig]
    request = read_request(run.configs)
    plan = _plan_capture(run, request)
    reader, site_widths = None, request.widths()
    if site_widths is None:  # modules tell their width only when they run
        reader = load_reader(run, request, plan, config)
        site_widths = reader.widths
    widths = {str(site): width for site, width in site_widths.items()}
    writer = StoreWriter(run.folder, plan, widths, config.store_dtype, _work(run, request, plan.documents))
    # Shards of other runs are taken before anything is counted as missing, by one process, as they are hard links.
    is_first = mesh.process_id == 0
    if is_first:
        for store in sorted(run.folder.parent.glob(f"{run.stage}-*")):
            if store != run.folder:
                writer.adopt(store)
    missing = missing_shards(writer, mesh)
    _check_disk(run.folder, plan, missing, widths, config)
    if is_first:
        writer.begin((part, shard) for shard, parts in missing.items() for part in parts)
        writer.write_documents()
    run.say(
        f"{len(plan.documents):,} documents, {plan.rows:,} tokens at {', '.join(config.sites)}; "
        f"{plan.shards - len(missing)} of {plan.shards} shards are done"
    )
    rate = ShardCapture(run, request, plan, writer, site_widths, reader).make(missing) if missing else 0.0
    norms = writer.site_norms(config.sink_factor)
    _check_sinks(norms, config)
    if is_first:
        writer.finish(
            norms,
            config.sink_factor,
            CapturedModel.of(request.source, config.dtype),
            begins_with_bos(request, config.bos),
            corpora.identity(run.configs[CorpusConfig], run.configs[TaskConfig]),
            config.last,
            CapturedModel.of(request.second.source) if request.second else None,
        )
    _say_sinks(run, norms)
    size = ON_DISK[config.store_dtype].itemsize
    train = plan.documents.train_count
    return CaptureResults(
        sites={
            site: CapturedSite(**vars(norms[site]), rows=plan.rows, bytes=plan.rows * width * size, d=width)
            for site, width in widths.items()
        },
        documents=dict(zip(SPLITS, (train, len(plan.documents) - train), strict=True)),
        tokens=plan.tokens,
        backend="torch" if request.needs_torch else config.backend,
        dtype=config.dtype,
        tokens_per_second=round(rate, 1),
        padding_share=plan.padding_share,
    )


def _plan_capture(run: Run, request: CaptureRequest) -> Plan:
    """Return the plan of the documents that are captured."""
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
    return plan


def _work(run: Run, request: CaptureRequest, documents: Documents) -> dict[str, str]:
    """Return a hash of what the shards of the index, and of each site, depend on."""
    config = run.configs[CaptureConfig]
    hashes = [hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() for array in documents.arrays().values()]
    index = [config.shard_rows, config.last, run.configs[CorpusConfig].seed, hashes]
    # A change of any of these would make other values; the mesh and the batch size do not belong here.
    vectors = ["torch" if request.needs_torch else config.backend, config.dtype, config.store_dtype]
    work = {INDEX: fingerprint(index)}
    for site in request.sites:
        captured = request.second if isinstance(site, OtherSite) and request.second else request
        work[str(site)] = fingerprint([*index, *vectors, captured.source.fingerprint])
    return work


def _check_disk(folder: Path, plan: Plan, missing: Missing, widths: Mapping[str, int], config: CaptureConfig) -> None:
    """Raise a ``UserError`` unless the missing shards fit on the disk."""
    size = ON_DISK[config.store_dtype].itemsize
    # A row of the index is three int32, that of a site its vector and an fp32 norm.
    needed = sum(
        plan.size(shard) * sum(12 if part == INDEX else widths[part] * size + 4 for part in parts)
        for shard, parts in missing.items()
    )
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the disk is full: the store needs {needed / 2**20:,.0f} MiB more and {free / 2**20:,.0f} are free in "
            f"{folder}: free space, use another --workdir or a smaller --corpus.max_tokens"
        )


def _check_sinks(norms: Mapping[str, SiteNorms], config: CaptureConfig) -> None:
    """Raise a ``UserError`` if the sink rule would drop more tokens beyond position 0 than the settings allow."""
    for site, facts in norms.items():
        # Position 0 is left out: it is a sink in most models, so that its share would only tell the texts' length.
        share = facts.sinks.share_beyond
        if share > config.max_sink_share:
            raise UserError(
                f"at {site}, {share:.2%} of the tokens beyond position 0 have a norm above {facts.max_norm:.4g}, "
                f"{config.sink_factor:g} times the median, and would be dropped as attention sinks; expected at most "
                f"{config.max_sink_share:.2%}: raise --capture.sink_factor, or allow more by --capture.max_sink_share"
            )


def _say_sinks(run: Run, norms: Mapping[str, SiteNorms]) -> None:
    """Log the norms of each site and how many tokens are attention sinks."""
    for site, facts in norms.items():
        run.say(
            f"{site}: median norm {facts.median_norm:.4g}; norms above {facts.max_norm:.4g} are attention sinks: "
            f"{facts.sinks.position_0:,} at position 0, {facts.sinks.share_beyond:.2%} of the others"
        )
