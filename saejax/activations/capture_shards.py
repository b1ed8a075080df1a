"""The shards of a store: the model is run over their batches, and what is read is written, each process its part."""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from saejax.activations.backend import load_reader
from saejax.activations.buffers import ShardBuffers
from saejax.activations.plan import Batch, Plan
from saejax.activations.progress import TextProgress
from saejax.activations.reader import Reader
from saejax.activations.request import CaptureRequest
from saejax.activations.writer import StoreWriter
from saejax.errors import Interrupted, UserError
from saejax.models.sites import AnySite
from saejax.settings import CaptureConfig, MeshConfig
from saejax.workspace import Run

_LOOK_EVERY = 0.2  # seconds, for the shards of other processes


def missing_shards(writer: StoreWriter, plan: Plan, mesh: MeshConfig) -> list[int]:
    """The shards that are not there, whole and of this work: read by the first process, which tells the others."""
    missing_S = np.zeros(plan.shards, np.int32)
    if mesh.process_id == 0:
        missing_S[:] = [not writer.has(shard) for shard in range(plan.shards)]
    if mesh.processes > 1:
        from saejax.parallel.collectives import from_first_process

        missing_S = from_first_process(missing_S)
    return np.flatnonzero(missing_S).tolist()


@dataclasses.dataclass(frozen=True)
class ShardCapture:
    """Runs a model over the batches of shards, and writes what is read.

    Attributes:
      run: of the stage; ``request``: what is captured; ``plan``: in which batches; ``writer``: of the store.
      widths: of each site.
      reader: that runs the model; None: it is loaded when it is needed.
    """

    run: Run
    request: CaptureRequest
    plan: Plan
    writer: StoreWriter
    widths: Mapping[AnySite, int]
    reader: Reader | None

    def make(self, missing: Sequence[int]) -> float:
        """Makes the missing shards, each process its part of them; returns the speed in tokens per second."""
        mesh = self.run.configs[MeshConfig]
        if mesh.processes == 1:
            return self._make(missing)
        from saejax.parallel.collectives import alone, wait_for_all

        wait_for_all("store begun")  # which takes away what other runs left half-written
        start = time.monotonic()
        own = missing[mesh.process_id :: mesh.processes]
        with alone():
            rate = self._make(own) if own else 0.0
        left = list(missing)
        while left := [shard for shard in left if not self.writer.has(shard, read=False)]:
            time.sleep(_LOOK_EVERY)
        return sum(map(self.plan.size, missing)) / (time.monotonic() - start) if rate else 0.0

    def _make(self, shards: Sequence[int]) -> float:
        """Makes shards in this process; returns the speed in tokens per second."""
        config = self.run.configs[CaptureConfig]
        plan, sizes = self.plan, [self.plan.size(shard) for shard in shards]
        reader = self.reader or load_reader(self.run, self.request, plan, config)
        buffers = ShardBuffers(self.widths, max(sizes), config.store_dtype)
        progress = TextProgress(self.run.say, sum(sizes))

        def take(batch: Batch, site: AnySite, value_BxTxD: np.ndarray) -> None:
            bad = buffers.take(site, value_BxTxD, batch)
            if bad is not None:
                place = plan.documents.place(int(batch.documents_B[bad[0]]), bad[1])
                raise UserError(
                    f"activations at {site} are NaN or infinite: {place}, token id {batch.ids_BxT[bad]}: expected "
                    f"finite numbers; check the model's weights, or use --capture.dtype=float32; nothing of this "
                    "shard was stored"
                )

        def batches(shard: int, done: int) -> Iterator[Batch]:
            for batch in plan.batches(shard):
                if self.run.stopping():
                    kept = f"{plan.shards - len(shards) + done} of {plan.shards} shards"
                    raise Interrupted(f"stopped; {kept} are finished and kept: run the same command to go on")
                yield batch
                progress.add(batch.rows)

        for done, (shard, size) in enumerate(zip(shards, sizes, strict=True)):
            reader.read(batches(shard, done), take)
            self.writer.write_shard(shard, dict(index=plan.index(shard), **buffers.parts(size)))
        reader.close()
        return progress.rate
