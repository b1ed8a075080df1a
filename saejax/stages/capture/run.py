"""The capture stage: activations of the model at the wanted sites, into a store.

What is captured, in which batches and where it is stored does not depend on the backend that runs the model:
``torch_capture`` (hooks in the transformers model) or ``jax_capture`` (our decoder, on the mesh).
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from saejax.activations.buffers import THREADS, ShardBuffers
from saejax.activations.chunker import SPLITS
from saejax.activations.documents import Documents
from saejax.activations.manifest import CapturedModel
from saejax.activations.plan import Batch, CapturedValues, Plan, Reader
from saejax.activations.progress import TextProgress
from saejax.activations.request import CaptureRequest, batch_devices, begins_with_bos, load_reader, read_request
from saejax.activations.results import CapturedSite, CaptureResults, SiteNorms
from saejax.activations.settings import CaptureConfig
from saejax.activations.store import INDEX, ON_DISK, shard_file
from saejax.activations.writer import SiteShard, StoreWriter
from saejax.errors import Interrupted, UserError
from saejax.files import fingerprint
from saejax.models.sites import AnySite, OtherSite
from saejax.parallel.cluster import joined_processes
from saejax.parallel.collectives import alone, wait_for_all
from saejax.parallel.processes import ProcessShare
from saejax.parallel.settings import MeshConfig
from saejax.parallel.stopping import interruptible
from saejax.runner.registry import all_stages
from saejax.runner.workspace import Run
from saejax.stages.tokenize.run import text_documents
from saejax.tasks import corpora
from saejax.tasks.settings import CorpusConfig, TaskConfig

Missing = Mapping[int, tuple[str, ...]]  # the sites, and ``INDEX``, that a shard lacks


def run_capture(run: Run) -> CaptureResults:
    """Record activations of the training text into a store in ``run.folder``.

    Finished shards of a run that was stopped or killed are kept, and shards of other stores of the workdir that were
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
    reader: Reader | None = None
    site_widths = request.widths()
    if site_widths is None:  # modules tell their width only when they run
        with _alone_of_several(mesh):
            reader = load_reader(mesh, request, config)
        site_widths = reader.widths
    backend = "torch" if request.in_torch else "jax"
    widths = {str(site): width for site, width in site_widths.items()}
    writer = StoreWriter(run.folder, plan, widths, config.store_dtype, _work(run, request, plan.documents))
    # Shards of other runs are taken before anything is counted as missing, by one process, as they are hard links.
    is_first = mesh.process_id == 0
    if is_first:
        for store in sorted(run.folder.parent.glob(f"{run.stage}-*")):
            if store != run.folder:
                writer.adopt(store)
    missing = _missing_shards(writer, mesh)
    _check_disk(run.folder, plan, missing, widths, config)
    if is_first:
        writer.begin((part, shard) for shard, parts in missing.items() for part in parts)
        writer.write_documents()
    documents = plan.documents.describe(run.configs[CorpusConfig].pack)
    run.say(
        f"{documents}, {plan.rows:,} tokens at {', '.join(config.sites)}; "
        f"{plan.shards - len(missing)} of {plan.shards} shards are done"
    )
    make = functools.partial(_make_shards, run, request, plan, writer, site_widths, reader)
    rate = _share_shards(plan, writer, mesh, missing, make) if missing else 0.0
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
        backend=backend,
        dtype=config.dtype,
        tokens_per_second=round(rate, 1),
    )


def _alone_of_several(mesh: MeshConfig) -> contextlib.AbstractContextManager[None]:
    """Return the context in which a process of several uses its own devices alone, as it does to make its shards."""
    return alone() if mesh.processes > 1 else contextlib.nullcontext()


def _plan_capture(run: Run, request: CaptureRequest) -> Plan:
    """Return the plan of the documents that are captured."""
    config = run.configs[CaptureConfig]
    whole = text_documents(run, request)
    documents = whole.sample(config.tokens) if config.tokens else whole
    seed, mesh = run.configs[CorpusConfig].seed, run.configs[MeshConfig]
    with _alone_of_several(mesh):
        devices = batch_devices(mesh, request)
    plan = Plan(documents, config.shard_rows, config.batch_tokens, config.last, seed, whole, devices)
    if not all(plan.tokens.values()):
        raise UserError(
            f"the documents up to --capture.tokens={config.tokens} hold, in one split, none of the last {config.last} "
            "positions of a text: raise --capture.tokens, or capture all positions with --capture.last=0"
        )
    return plan


def _work(run: Run, request: CaptureRequest, documents: Documents) -> dict[str, str]:
    """Return a hash of what the shards of the index, and of each site, depend on."""
    config = run.configs[CaptureConfig]
    hashes = [hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() for array in documents.arrays().values()]
    index = [config.shard_rows, config.last, run.configs[CorpusConfig].seed, hashes]
    # A change of any of these would make other values; the mesh and the batch size do not belong here.
    # A new revision of the stage has other values, too.
    backend, revision = "torch" if request.in_torch else "jax", all_stages()[run.stage].revision
    vectors = [backend, config.dtype, config.store_dtype, revision]
    work = {INDEX: fingerprint(index)}
    for site in request.sites:
        captured = request.second if isinstance(site, OtherSite) and request.second else request
        work[str(site)] = fingerprint([*index, *vectors, captured.source.fingerprint])
    return work


@interruptible()
def _missing_shards(writer: StoreWriter, mesh: MeshConfig) -> Missing:
    """Return the shards that are missing or of other work; the first process checks, and broadcasts the result."""
    shards, parts = range(writer.plan.shards), writer.parts
    missing = ""
    # Checking reads every file, and processes must agree on what is missing.
    if mesh.process_id == 0:
        missing = "".join("01"[not writer.has(part, shard)] for shard in shards for part in parts)
    if processes := joined_processes():
        missing = processes.broadcast("shards that are missing", missing)  # takes minutes in a large store
    of_shards = [missing[shard * len(parts) : (shard + 1) * len(parts)] for shard in shards]
    return {
        shard: tuple(part for part, is_missing in zip(parts, of_shard, strict=True) if is_missing == "1")
        for shard, of_shard in zip(shards, of_shards, strict=True)
        if "1" in of_shard
    }


def _share_shards(
    plan: Plan, writer: StoreWriter, mesh: MeshConfig, missing: Missing, make: Callable[[Missing], float]
) -> float:
    """Make the missing shards, each process its share of them; return the speed in tokens per second."""
    processes = joined_processes()
    if processes is None:
        return make(missing)
    wait_for_all("store begun")  # which removes what other runs left half-written
    start = time.monotonic()
    share = {shard: missing[shard] for shard in list(missing)[mesh.process_id :: mesh.processes]}
    with alone():
        rate = make(share) if share else 0.0
    # Nothing of the store is read before it is there.
    records = [writer.folder / shard_file(part, "record", shard) for shard, parts in missing.items() for part in parts]
    ProcessShare(processes).join(records, last=False)
    return sum(map(plan.size, missing)) / (time.monotonic() - start) if rate else 0.0


def _make_shards(
    run: Run,
    request: CaptureRequest,
    plan: Plan,
    writer: StoreWriter,
    widths: Mapping[AnySite, int],
    reader: Reader | None,
    missing: Missing,
) -> float:
    """Run the model over the batches of shards and write its values; return the speed in tokens per second."""
    reader = reader or load_reader(run.configs[MeshConfig], request, run.configs[CaptureConfig])
    buffers = ShardBuffers(widths, max(map(plan.size, missing)), writer.dtype, sets=2)
    progress = TextProgress(run.say, sum(map(plan.size, missing)))

    def take(batch: Batch, site: AnySite, values: CapturedValues) -> None:
        """Store a batch's values at a site; refuse what is not finite."""
        bad = buffers.take(batch, site, values)
        if bad is not None:
            place = plan.documents.place(int(batch.documents_B[bad[0]]), bad[1])
            raise UserError(
                f"activations at {site} are NaN or infinite: {place}, token id {batch.ids_BxT[bad]}: expected "
                f"finite numbers; check the model's weights, or use --capture.dtype=float32; nothing of this "
                "shard was stored"
            )

    def batches(shard: int, done: int) -> Iterator[Batch]:
        """Yield the batches of a shard until the run is asked to stop."""
        for batch in plan.batches(shard):
            forget_written()
            if run.stopping():
                finished = f"{plan.shards - len(missing) + done} of {plan.shards} shards"
                raise Interrupted(f"stopped; {finished} are finished and kept: run the same command to go on")
            yield batch
            progress.add(batch.rows)

    def write_site(site: str, shard: int, rows: SiteShard) -> None:
        """Write a shard of a site in a thread; its memory is free again whether or not that succeeds."""
        try:
            writer.write_site(site, shard, rows)
        finally:
            buffers.give_back(rows)

    writes: list[concurrent.futures.Future[None]] = []

    def forget_written() -> None:
        """Forget the writes that are done; raise the error of one that failed."""
        for write in [write for write in writes if write.done()]:
            write.result()
            writes.remove(write)

    # Written while the next shard is filled. On an error or a signal the shards that are complete are finished first.
    with concurrent.futures.ThreadPoolExecutor(THREADS, "write") as threads:
        try:
            for done, (shard, parts) in enumerate(missing.items()):
                # The index needs no model: it follows from the documents.
                if parts != (INDEX,):
                    reader.read(batches(shard, done), take)
                writes.append(threads.submit(writer.write_index, shard))
                for site in filter(parts.__contains__, map(str, widths)):  # the other sites' files stay as they are
                    writes.append(threads.submit(write_site, site, shard, buffers.shard(site, plan.size(shard))))
                buffers.begin()
                forget_written()
        finally:
            # A write that failed takes the place of a signal, whose message says that these shards are finished.
            for write in writes:
                write.result()
    reader.close()
    return progress.rate


def _check_disk(folder: Path, plan: Plan, missing: Missing, widths: Mapping[str, int], config: CaptureConfig) -> None:
    """Raise a ``UserError`` unless the missing shards fit on the disk."""
    size = ON_DISK[config.store_dtype].itemsize
    # A row of the index is three int32, a site's row its vector, an fp32 norm, and in 8 bits a scale.
    needed = sum(
        plan.size(shard) * sum(12 if part == INDEX else widths[part] * size + 8 for part in parts)
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
