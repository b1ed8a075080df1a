"""Activations of the training text, made by the model as they are needed and stored nowhere.

The text goes through the model in *buffers* of ``train.buffer_rows`` tokens, which are planned like the shards of a
store: documents in seeded random order, the rows of a buffer permuted. One buffer is in memory at a time. Each is made
by itself, so any of them can be made again, with the same values: a run that goes on needs no more than a number.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from saejax.activations.batches import Parts, sites_of
from saejax.activations.buffers import ShardBuffers
from saejax.activations.device_buffers import DeviceBuffers
from saejax.activations.documents import Documents
from saejax.activations.jax_capture import DecoderReader
from saejax.activations.joined import single_sites
from saejax.activations.manifest import CapturedModel
from saejax.activations.plan import Batch, Plan, Reader
from saejax.activations.progress import SAY_EVERY, TextProgress
from saejax.activations.request import CaptureRequest, batch_devices, begins_with_bos, load_reader, read_request
from saejax.activations.settings import CaptureConfig
from saejax.activations.store import DTYPES
from saejax.config import Configs
from saejax.errors import UserError
from saejax.models.sites import is_joined
from saejax.parallel.settings import MeshConfig
from saejax.tasks.settings import CorpusConfig


class _Stopped(Exception):
    """Raised when the process was asked to stop while a buffer was made."""


def _device_buffers(reader: Reader, parts: Parts, rows: int, dtype: str) -> DeviceBuffers | None:
    """Return buffers on the devices where the JAX decoder fills them; None where values go to the host's memory."""
    # Joined sites are put together on the host, and torch's values are there already.
    if isinstance(reader, DecoderReader) and not any(map(is_joined, sites_of(parts))):
        return DeviceBuffers(reader, parts, rows, dtype)
    return None


class ModelStream:
    """The buffers of the corpus's training documents.

    ``rows``, ``read``, ``d``, ``max_norm``, ``model`` and ``dtype`` are those of a ``Store`` that holds the current
    buffer. The first buffer defines sinks: ``sink_factor`` times its median norm. With the JAX backend values stay on
    the devices (``on_devices``); those of torch, of a second model and of joined sites pass through the host.

    Args:
      configs: settings of model, corpus, capture and mesh; the backend is ``model.backend``, the values are of
        ``capture.store_dtype``.
      parts: the sites of every part of a batch.
      rows: number of rows of a buffer.
      documents: returns the documents of the corpus, given the request for the sites.
      say: logs how fast buffers are made.
      stopping: returns whether the process was asked to stop.

    Attributes:
      sites: single sites of the parts.
      bos: whether documents begin with BOS, as in ``DictionaryConfig``.
      documents: all documents of the corpus.

    Raises:
      UserError: the corpus, the model or a site is not usable, or a buffer does not fit on the devices.
    """

    def __init__(
        self,
        configs: Configs,
        parts: Parts,
        rows: int,
        documents: Callable[[CaptureRequest], Documents],
        say: Callable[[str], None] = print,
        stopping: Callable[[], bool] = lambda: False,
    ):
        self.sites = tuple(single_sites(sites_of(parts)))
        config = dataclasses.replace(configs[CaptureConfig], sites=self.sites, tokens=0)
        request = read_request(configs | config)
        self._say, self._stopping, self._source = say, stopping, request.source
        self._sink_factor = config.sink_factor
        self.bos = "always" if begins_with_bos(request, config.bos) else "never"
        self.documents, devices = documents(request), batch_devices(configs[MeshConfig], request)
        self._batch_tokens, self._last = config.batch_tokens, config.last
        self._seed, self._devices = configs[CorpusConfig].seed, devices
        self._plan = self._make_plan(self.documents.training(), rows)
        self._reader = load_reader(configs[MeshConfig], request, config)
        self._dtype, largest = DTYPES[config.store_dtype].name, max(map(self.size, range(len(self))))
        self._on_devices = _device_buffers(self._reader, parts, largest, self._dtype)
        self._buffers = self._on_devices or ShardBuffers(self._reader.widths, largest, self._dtype)
        self._norms: dict[str, np.ndarray] = {}
        self._held_out: dict[str, np.ndarray] = {}  # vectors at every site
        self._held_out_norms: dict[str, np.ndarray] = {}
        self._max_norms: dict[str, float] = {}
        self._last_logged = -math.inf

    def __len__(self) -> int:
        """Return the number of buffers."""
        return self._plan.shards

    def size(self, buffer: int) -> int:
        """Return the number of rows of a buffer."""
        return self._plan.size(buffer)

    @property
    def model(self) -> CapturedModel:
        """The model."""
        return CapturedModel.of(self._source)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the values: float32 or ml_dtypes.bfloat16."""
        return DTYPES[self._dtype]

    @property
    def on_devices(self) -> tuple[jax.Array, ...] | None:
        """The buffer at hand if it is on the devices, of every part [sites, rows, d]; ``fill`` takes their memory."""
        return self._on_devices.parts if self._on_devices else None

    def d(self, site: str) -> int:
        """Return the width of a site."""
        return next(width for read_site, width in self._reader.widths.items() if str(read_site) == site)

    def max_norm(self, site: str) -> float:
        """Return the sink rule: rows with a larger norm are attention sinks."""
        return self._max_norms[site]

    def fill(self, buffer: int) -> bool:
        """Make a buffer, the first with number 0; return False if the process was asked to stop meanwhile.

        Raises:
          UserError: activations are not finite.
        """
        start = time.monotonic()
        if not self._fill(self._plan, buffer):
            return False
        # The first buffer is a fair sample of the text, and later ones must keep its rule.
        if not self._max_norms:
            self._max_norms = {site: self._sink_factor * float(np.median(self._norms[site])) for site in self.sites}
        now = time.monotonic()
        if now - self._last_logged >= SAY_EVERY:  # not for each, as small models make several a second
            self._last_logged, rate = now, self.size(buffer) / (now - start)
            self._say(f"buffer {buffer + 1} of {len(self)}: {self.size(buffer):,} tokens, {rate:,.0f} tokens/s")
        return True

    def read_held_out(self, count: int) -> bool:
        """Read at most ``count`` held-out tokens for ``held_out``; before the first buffer, whose memory they take.

        Returns False if the process was asked to stop meanwhile.

        Raises:
          UserError: activations are not finite.
        """
        count = min(count, self.size(0))  # there is memory for one buffer
        sample = self.documents.sample(count)
        if sample.train_count == len(sample):
            return True
        held_out = sample.select(np.arange(sample.train_count, len(sample)))
        plan = self._make_plan(held_out, count)
        if not self._fill(plan, 0):
            return False
        # Copied to the host, because the first training buffer takes this memory.
        rows_R = np.arange(plan.size(0))
        self._held_out = {site: self._buffers.read(site, rows_R) for site in self.sites}
        self._held_out_norms = {site: norm_R.copy() for site, norm_R in self._norms.items()}
        return True

    def _make_plan(self, documents: Documents, rows: int) -> Plan:
        """Return the plan of buffers of ``rows`` rows that documents make."""
        batches = self._batch_tokens, self._last, self._seed
        return Plan(documents, rows, *batches, whole=self.documents, devices=self._devices)

    def _fill(self, plan: Plan, buffer: int) -> bool:
        """Make a buffer of a plan; return False if the process was asked to stop meanwhile."""
        try:
            if isinstance(self._buffers, ShardBuffers):
                self._reader.read(self._batches(plan, buffer), self._buffers.take)  # norms say if values are finite
            else:
                self._buffers.fill(self._batches(plan, buffer))
        except _Stopped:
            return False
        self._norms = {site: norm_R[: plan.size(buffer)] for site, norm_R in self._buffers.norms().items()}
        self._check(plan, buffer)
        return True

    def rows(self, split: str, *sites: str) -> np.ndarray:
        """Return the current buffer's rows, all of the split "train", that are sinks at none of the sites, rising."""
        return self._no_sinks(self._norms, sites)

    def held_out(self, count: int, *sites: str) -> dict[str, np.ndarray]:
        """Return the vectors [n, d] of at most ``count`` of the tokens of ``read_held_out`` that are sinks at no site.

        There are none (n = 0) unless that was called.
        """
        if not self._held_out:
            return {site: np.zeros((0, self.d(site)), self.dtype) for site in sites}
        rows_N = self._no_sinks(self._held_out_norms, sites)[:count]
        return {site: self._held_out[site][rows_N] for site in sites}

    def _no_sinks(self, norms: Mapping[str, np.ndarray], sites: Sequence[str]) -> np.ndarray:
        """Return the rows that are sinks at none of the sites, given the norms of all rows at each."""
        # In float32, as in a store: a threshold in float64 would decide ties otherwise.
        inside = [norms[site] <= np.float32(self.max_norm(site)) for site in sites]
        return np.flatnonzero(np.all(inside, axis=0))

    def read(self, site: str, rows: np.ndarray) -> np.ndarray:
        """Return the vectors [n, d] of rows of the current buffer."""
        return self._buffers.read(site, rows)

    def close(self) -> None:
        """Give the model's memory back."""
        self._reader.close()

    def _batches(self, plan: Plan, buffer: int) -> Iterator[Batch]:
        """Yield the batches of a buffer; raise ``_Stopped`` when the process is asked to stop."""
        name = f"buffer {buffer + 1} of {len(self)}" if plan is self._plan else "held-out text"
        done, progress = 0, TextProgress(lambda line: self._say(f"{name}: {line}"), plan.size(buffer))
        for batch in plan.batches(buffer):
            if self._stopping():
                raise _Stopped
            yield batch
            done += batch.rows
            if done < plan.size(buffer):  # the whole buffer has a line of its own
                progress.add(batch.rows)

    def _check(self, plan: Plan, buffer: int) -> None:
        """Raise a ``UserError`` if a value of the current buffer is not finite."""
        for site, norm_R in self._norms.items():
            if not np.isfinite(norm_R).all():
                document, position, _ = plan.index(buffer)[np.argmin(np.isfinite(norm_R))].tolist()
                raise UserError(
                    f"activations at {site} are NaN or infinite: {plan.documents.place(document, position)}: "
                    "expected finite numbers; check the model's weights, or use --capture.dtype=float32"
                )


class BufferOrder:
    """The order of batches: which rows of which buffer make each.

    Epoch 0 takes the buffers in their order, each later one in a random order of its own; a buffer gives as many
    batches as it would without sinks.

    Args:
      sizes: rows of every buffer.
      batch: number of rows per batch.
      seed: seed of the orders.
    """

    def __init__(self, sizes: Sequence[int], batch: int, seed: int):
        self._batch, self._seed = batch, seed
        self._steps_N = np.array(sizes) // batch

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch."""
        return int(self._steps_N.sum())

    def locate(self, step: int) -> tuple[int, int, int, int]:
        """Return epoch and buffer of batch ``step``, from 0, and the range of the buffer's batches (end exclusive)."""
        epoch, inside = divmod(step, self.per_epoch)
        # Documents are in random order already, so the first pass needs none.
        order_N = np.arange(len(self._steps_N))
        if epoch:
            order_N = np.random.default_rng([self._seed, epoch]).permutation(order_N)
        ends_N = np.cumsum(self._steps_N[order_N])
        place = int(np.searchsorted(ends_N, inside, side="right"))
        buffer, stop = int(order_N[place]), epoch * self.per_epoch + int(ends_N[place])
        return epoch, buffer, stop - int(self._steps_N[buffer]), stop

    def places(self, epoch: int, buffer: int, rows: int) -> np.ndarray:
        """Return the batches of a buffer in an epoch, [batches, batch]: indices among its rows that are no sinks.

        Every index occurs before one occurs twice, which makes up for the sinks.
        """
        order_R = np.random.default_rng([self._seed, epoch, buffer]).permutation(rows)
        return np.resize(order_R, (int(self._steps_N[buffer]), self._batch))
