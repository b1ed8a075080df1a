"""The shards of a store: the model is run over their batches and its values are written, each process its share."""

import dataclasses
import time
from collections.abc import Iterator, Mapping

import numpy as np

from saejax.activations.backend import load_reader
from saejax.activations.buffers import ShardBuffers
from saejax.activations.plan import Batch, Plan
from saejax.activations.progress import TextProgress
from saejax.activations.reader import Reader
from saejax.activations.request import CaptureRequest
from saejax.activations.store import INDEX
from saejax.activations.writer import StoreWriter
from saejax.errors import Interrupted, UserError
from saejax.models.sites import AnySite
from saejax.runner.workspace import Run
from saejax.settings import CaptureConfig, MeshConfig

_POLL_SECONDS = 0.2  # between looks for the shards of other processes

Missing = Mapping[int, tuple[str, ...]]  # the sites, and ``INDEX``, that a shard lacks


def missing_shards(writer: StoreWriter, mesh: MeshConfig) -> Missing:
    """Return the shards that are missing or of other work; the first process checks, and broadcasts the result."""
    shards, parts = range(writer.plan.shards), writer.parts
    missing_SxP = np.zeros((len(shards), len(parts)), np.int32)
    # Checking reads every file, and processes must agree on what is missing.
    if mesh.process_id == 0:
        missing_SxP[:] = [[not writer.has(part, shard) for part in parts] for shard in shards]
    if mesh.processes > 1:
        from saejax.parallel.collectives import from_first_process

        missing_SxP = from_first_process(missing_SxP)
    return {
        shard: tuple(part for part, is_missing in zip(parts, row_P, strict=True) if is_missing)
        for shard, row_P in zip(shards, missing_SxP, strict=True)
        if row_P.any()
    }


@dataclasses.dataclass(frozen=True)
class ShardCapture:
    """A run of a model over the batches of shards, whose values are written.

    Attributes:
      run: the run of the stage.
      request: what is captured.
      plan: the plan of its batches.
      writer: the writer of the store.
      widths: width of each site.
      reader: the reader that runs the model; None: it is loaded when needed.
    """

    run: Run
    request: CaptureRequest
    plan: Plan
    writer: StoreWriter
    widths: Mapping[AnySite, int]
    reader: Reader | None

    def make(self, missing: Missing) -> float:
        """Make the missing shards, each process its share of them; return the speed in tokens per second."""
        mesh = self.run.configs[MeshConfig]
        if mesh.processes == 1:
            return self._make(missing)
        from saejax.parallel.collectives import alone, wait_for_all

        wait_for_all("store begun")  # which removes what other runs left half-written
        start = time.monotonic()
        share = {shard: missing[shard] for shard in list(missing)[mesh.process_id :: mesh.processes]}
        with alone():
            rate = self._make(share) if share else 0.0
        # Each process waits for the files themselves, so that nothing of the store is read before it is there.
        waited_for = [(part, shard) for shard, parts in missing.items() for part in parts]
        while waited_for := [
            (part, shard) for part, shard in waited_for if not self.writer.has(part, shard, read=False)
        ]:
            time.sleep(_POLL_SECONDS)
        return sum(map(self.plan.size, missing)) / (time.monotonic() - start) if rate else 0.0

    def _make(self, missing: Missing) -> float:
        """Make shards in this process; return the speed in tokens per second."""
        config, plan = self.run.configs[CaptureConfig], self.plan
        reader = self.reader or load_reader(self.run, self.request, plan, config)
        buffers = ShardBuffers(self.widths, max(map(plan.size, missing)), config.store_dtype)
        progress = TextProgress(self.run.say, sum(map(plan.size, missing)))

        def take(batch: Batch, site: AnySite, value_BxTxD: np.ndarray) -> None:
            """Store a batch's values at a site; refuse what is not finite."""
            bad = buffers.take(site, value_BxTxD, batch)
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
                if self.run.stopping():
                    finished = f"{plan.shards - len(missing) + done} of {plan.shards} shards"
                    raise Interrupted(f"stopped; {finished} are finished and kept: run the same command to go on")
                yield batch
                progress.add(batch.rows)

        for done, (shard, parts) in enumerate(missing.items()):
            buffers.begin(plan.train_size(shard))
            # The index needs no model: it follows from the documents.
            if parts != (INDEX,):
                reader.read(batches(shard, done), take)
            self.writer.write_index(shard)
            for site in self.widths:
                if str(site) in parts:  # the other sites' files stay as they are
                    self.writer.write_site(str(site), shard, buffers.shard(site, plan.size(shard)))
        reader.close()
        return progress.rate
