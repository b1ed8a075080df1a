"""The firings of all features on a store: one pass over its rows, and files from which they are read by feature.

A *firing* is a feature, a place and an activation. A *place* is a token of the store's documents, counted through all
of them: ``documents.ids_T[place]`` is its token. The pass reads the shards in order, encodes a batch on the devices
(f [B, F], dense), and copies a bit for each activation and the activations that fire to the host. They are appended to
a file for every ``BLOCK`` features and read back by feature, so that statistics of a feature use all of its firings.
Memory holds a batch, two million firings, and some hundred bytes for each token of the text.

The floor for T tokens, F features, d dimensions, L0 firings a token: 2 T d F operations to encode; T d x 2 bytes
(bfloat16) read, 10 T L0 bytes written and read once. At T = 1e8, F = 131,072, d = 2,304, L0 = 64: 6e16 operations, 0.46
TB, 64 GB. The bits take a further pass over f on the device; what is made of a firing takes the host some 3 us.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from scipy import sparse

from saejax.activations.store import Store
from saejax.dictionaries import Dictionary
from saejax.errors import Interrupted, UserError
from saejax.evaluation.member_data import MemberData, compiled_in
from saejax.parallel.mesh import BY_DOCUMENT, by_row, document_devices, fitting_sharding, sharding

BLOCK = 512  # features of a file
_RECORD = np.dtype([("feature", "<u2"), ("place", "<u4"), ("value", "<f4")])  # the feature counted in its block
_MOST = 2**21  # largest number of firings of a block, unless a single feature has more
_WORD = 32  # rows of a batch in a word of bits

Encoded = tuple[jax.Array, jax.Array]  # the results of ``_encode_batch``


def priority(place: np.ndarray) -> np.ndarray:
    """Return a fixed random number for every place, uint64 (splitmix64: Steele, Lea and Flood, OOPSLA 2014)."""
    z = place.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)


def places_of(store: Store, rows: np.ndarray) -> np.ndarray:
    """Return the places of rows of a store, int64."""
    document, position, _ = store.tokens(rows)
    return store.documents.starts_N[document] + position


def used_rows(store: Store, split: str, site: str, target: str = "") -> np.ndarray:
    """Return the rows of a split at which features are used: those that training and edits use, int64, ascending.

    These are attention sinks neither at the site nor at a transcoder's target. A store without the target has the rule
    of the site alone: then rows that are sinks at the target are among them.

    Args:
      store: activations of the site.
      split: "train" or "held_out".
      site: the site that is read.
      target: the site that a transcoder predicts; empty: none.
    """
    return store.rows(split, *dict.fromkeys(name for name in (site, target) if name == site or name in store.sites))


def record(
    store: Store,
    split: str,
    dictionaries: Mapping[Path, Dictionary],
    mesh: Mesh,
    batch: int,
    *,
    stopping: Callable[[], bool] = lambda: False,
    features: Sequence[int] | None = None,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """Write the firings of dictionaries of one site, and of one target, on a split of a store.

    Args:
      store: activations of the dictionaries' site, and of the target of transcoders: see ``used_rows``.
      split: "train" or "held_out".
      dictionaries: dictionaries by the folder of their files, which is made.
      mesh: tokens are split over ``member`` and ``data``, features over ``model``.
      batch: tokens in a batch, rounded up to a multiple of 32 and of the devices over which they are split.
      stopping: returns whether the process was asked to stop.
      features: features whose firings are written; None: all.
      on_tokens: called with the number of tokens of each batch.

    Returns:
      The encoded places (no attention sinks), ascending, int64.

    Raises:
      UserError: the split has no activations, or the store has more tokens than a place can count.
      Interrupted: asked to stop.
    """
    ((site, target),) = {(dictionary.site, dictionary.config.target) for dictionary in dictionaries.values()}
    rows, step = used_rows(store, split, site, target), math.lcm(_WORD, document_devices(mesh))
    batch += -batch % step
    if not len(rows):
        raise UserError(f"the {split} split of {store.folder} has no activations of {site}: capture more text")
    if len(store.documents.ids_T) >= 2**32:
        raise UserError(f"{store.folder} has {len(store.documents.ids_T):,} tokens: at most 2^32 are supported")
    members = [MemberData.of([dictionary], mesh)[0] for dictionary in dictionaries.values()]
    with contextlib.ExitStack() as opened:
        files: list[list[BinaryIO]] = []  # of each dictionary, one for each block of features
        for folder, dictionary in dictionaries.items():
            folder.mkdir(parents=True, exist_ok=True)
            paths = [_file(folder, first) for first in range(0, dictionary.config.n_features, BLOCK)]
            files.append([opened.enter_context(path.open("wb")) for path in paths])
        waiting: list[tuple[np.ndarray, list[Encoded]]] = []  # is written while the devices work on the next batch
        for start in range(0, len(rows), batch):
            if stopping():
                raise Interrupted("stopped: finished dictionaries are kept; run the same command again to continue")
            rows_N = rows[start : start + batch]
            # The last batch is filled up, so that one program serves all batches.
            x_BxD = np.pad(store.read(site, rows_N), ((0, batch - len(rows_N)), (0, 0)))
            placed_BxD = jax.device_put(x_BxD, place_vectors(mesh, x_BxD.shape))
            encoded = [_encode_batch(mesh, member, placed_BxD, len(rows_N)) for member in members]
            waiting.append((places_of(store, rows_N), encoded))
            if len(waiting) > 1:
                _write(files, *waiting.pop(0), features)
            on_tokens(len(rows_N))
        _write(files, *waiting.pop(), features)
    return np.sort(places_of(store, rows))


@functools.partial(jax.jit, static_argnums=0)
def _encode_batch(mesh: Mesh, member: MemberData, x_BxD: jax.Array, count: jax.Array) -> Encoded:
    """Return absolute activations [B, F], and firings as bits of words [F, B / 32], whole on each device.

    Rows from ``count`` on have no firings.
    """
    f_BxF = _encode_in_parts(mesh, member, x_BxD)
    batch, features = f_BxF.shape
    fires_BxF = member.fires(f_BxF) & (jnp.arange(batch)[:, None] < count)
    size_BxF = lax.with_sharding_constraint(jnp.abs(f_BxF), fitting_sharding(mesh, f_BxF.shape, BY_DOCUMENT, "model"))
    # A bit for each activation, then the activations that fire: the dense array never leaves the device.
    fires_XxWxF = fires_BxF.reshape(batch // _WORD, _WORD, features).astype(jnp.uint32)
    bit = jnp.arange(_WORD, dtype=jnp.uint32)[None, :, None]
    words_XxF = jnp.sum(fires_XxWxF << bit, axis=1, dtype=jnp.uint32)
    return size_BxF, lax.with_sharding_constraint(words_XxF.T, sharding(mesh))


def place_vectors(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """Return where a batch of vectors is: rows split over ``member`` and ``data``, and vectors over ``model``."""
    return fitting_sharding(mesh, shape, BY_DOCUMENT, "model")


def _encode_in_parts(mesh: Mesh, member: MemberData, x_BxD: jax.Array) -> jax.Array:
    """Encode a batch; rows of which devices along ``model`` have parts are put together some at a time."""
    shares, parts = document_devices(mesh), mesh.shape["model"]
    if parts == 1 or len(x_BxD) % (shares * parts):
        return member.encode(x_BxD)

    def encode(x_SxCxD: jax.Array) -> jax.Array:
        return member.encode(lax.with_sharding_constraint(x_SxCxD, sharding(mesh, BY_DOCUMENT)))

    x_SxPxCxD = x_BxD.reshape(shares, parts, -1, x_BxD.shape[1])
    f_PxSxCxF = lax.map(encode, jnp.moveaxis(x_SxPxCxD, 1, 0))
    return jnp.moveaxis(f_PxSxCxF, 0, 1).reshape(len(x_BxD), -1)


def _write(
    files: list[list[BinaryIO]], place_N: np.ndarray, encoded: list[Encoded], features: Sequence[int] | None
) -> None:
    """Append the firings of a batch to each dictionary's files, block by block."""
    for of_dictionary, (size_BxF, words) in zip(files, encoded, strict=True):
        words_FxX = np.asarray(words)
        if features is not None:
            words_FxX = np.where(np.isin(np.arange(len(words_FxX)), features)[:, None], words_FxX, np.uint32(0))
        for number, file in enumerate(of_dictionary):
            first = number * BLOCK
            feature_A, row_A = _unpack(words_FxX[first : first + BLOCK])
            # A power of two, so that batches with different numbers of firings share a few programs.
            spare = (1 << len(feature_A).bit_length()) - len(feature_A)
            taken = _take(size_BxF, np.pad(row_A, (0, spare)), np.pad(first + feature_A, (0, spare)))
            firings = np.empty(len(feature_A), _RECORD)
            firings["feature"], firings["place"] = feature_A, place_N[row_A]
            firings["value"] = np.asarray(taken)[: len(feature_A)]
            file.write(firings.view(np.uint8).data)  # numpy's tofile loses the error of a full disk


def _unpack(words_FxX: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the feature and the row of each bit that is set, sorted by feature, then by row."""
    feature_U, word_U = np.nonzero(words_FxX)
    # Few words have any firing: only their bits are unpacked.
    octets_Ux4 = words_FxX[feature_U, word_U].astype("<u4").view(np.uint8).reshape(-1, 4)
    at_A, bit_A = np.nonzero(np.unpackbits(octets_Ux4, axis=1, bitorder="little"))
    return feature_U[at_A], word_U[at_A] * _WORD + bit_A


@jax.jit
def _take(size_BxF: jax.Array, row_A: jax.Array, feature_A: jax.Array) -> jax.Array:
    """Return the activations of features on rows of a batch."""
    return size_BxF[row_A, feature_A]


def encode_tokens(
    dictionary: Dictionary, x_NxD: np.ndarray, batch: int, y_NxO: np.ndarray | None = None
) -> tuple[sparse.csr_array, np.ndarray]:
    """Return a dictionary's activations on values in memory, as sparse rows, and which rows are no attention sinks.

    Activations are 0 where a feature does not fire and at attention sinks.

    Args:
      dictionary: with its rule for attention sinks.
      x_NxD: values of its site.
      batch: tokens that are encoded at a time; the last batch is padded, so that one program serves all.
      y_NxO: values at a transcoder's target, of which sinks are left out, too; None: the site's alone are.
    """
    # Without its place, so that dictionaries of one shape share the program, which takes 50 MB each.
    numbers: dict[str, Any] = dictionary.numbers
    placeless = dictionary.with_config(dataclasses.replace(compiled_in(dictionary.config), **numbers))
    parts, real = [sparse.csr_array((0, dictionary.config.n_features), dtype=np.float32)], [np.zeros(0, bool)]
    batch += -batch % (document_devices(dictionary.mesh) if dictionary.mesh else 1)
    for start in range(0, len(x_NxD), batch):
        batch_XxD = x_NxD[start : start + batch]
        spare = ((0, batch - len(batch_XxD)), (0, 0))
        padded_BxD = np.pad(batch_XxD, spare)
        target_BxO = None if y_NxO is None else np.pad(y_NxO[start : start + batch], spare)
        real_B = np.asarray(dictionary.is_not_sink(padded_BxD, target_BxO))
        placed = by_row(dictionary.mesh, padded_BxD, real_B) if dictionary.mesh else (padded_BxD, real_B)
        f_BxF = np.asarray(_encode_tokens(placeless, *placed))
        parts.append(sparse.csr_array(f_BxF[: len(batch_XxD)]))
        real.append(real_B[: len(batch_XxD)])
    return sparse.vstack(parts, format="csr"), np.concatenate(real)


@jax.jit
def _encode_tokens(dictionary: Dictionary, x_BxD: jax.Array, real_B: jax.Array) -> jax.Array:
    f_BxF = dictionary.encode(x_BxD)
    return jnp.where(dictionary.fires(f_BxF) & real_B[:, None], f_BxF, 0.0)


class Block:
    """All firings of some features, sorted by feature, then by place.

    Attributes:
      first: the first feature.
      size: number of features, from ``first`` on.
      feature: of each firing, counted from ``first``; int64.
      place: of each firing, int64.
      value: its activation, positive (absolute where activations are signed), float32.
      starts: index of the first firing of each feature, and the end of the last; int64 [size + 1].
    """

    def __init__(self, first: int, size: int, feature: np.ndarray, place: np.ndarray, value: np.ndarray):
        self.first, self.size = first, size
        # A single key of 64 bits sorts faster than two columns, and finds a pair of feature and place by one search.
        self._key = feature.astype(np.int64) << 32 | place.astype(np.int64)
        order = np.argsort(self._key)
        self._key, self.value = self._key[order], value[order]
        self.feature, self.place = self._key >> 32, self._key & (2**32 - 1)
        self.starts = np.searchsorted(self.feature, np.arange(size + 1))

    @property
    def counts(self) -> np.ndarray:
        """Number of firings of each feature."""
        return np.diff(self.starts)

    def of(self, feature: int) -> slice:
        """Return the slice of a feature's firings; the feature is counted from ``first``."""
        return slice(int(self.starts[feature]), int(self.starts[feature + 1]))

    def at(self, feature: np.ndarray, place: np.ndarray) -> np.ndarray:
        """Return the activations of features (counted from ``first``) at places; 0 where they do not fire."""
        wanted = feature.astype(np.int64) << 32 | place.astype(np.int64)
        if not len(self._key):
            return np.zeros(wanted.shape, np.float32)
        index = np.minimum(np.searchsorted(self._key, wanted), len(self._key) - 1)
        return np.where(self._key[index] == wanted, self.value[index], np.float32(0))


def blocks(folder: Path, features: int) -> Iterator[Block]:
    """Yield the firings that ``record`` wrote to a folder, in blocks of consecutive features.

    A block has at most ``BLOCK`` features, and at most ``_MOST`` firings unless a single feature has more.
    """
    for first in range(0, features, BLOCK):
        size, path = min(BLOCK, features - first), _file(folder, first)
        # An empty file cannot be mapped.
        firings = np.memmap(path, _RECORD, "r") if path.stat().st_size else np.zeros(0, _RECORD)
        pieces = [firings[start : start + _MOST] for start in range(0, len(firings), _MOST)]
        counts = sum((np.bincount(piece["feature"], minlength=size) for piece in pieces), np.zeros(size, np.int64))
        start = 0
        while start < size:
            # At least one feature, even if it alone has more firings than a block should.
            stop = min(size, start + max(1, int(np.searchsorted(np.cumsum(counts[start:]), _MOST, side="right"))))
            kept = [piece[(piece["feature"] >= start) & (piece["feature"] < stop)] for piece in pieces]
            records = np.concatenate([np.zeros(0, _RECORD), *kept])
            yield Block(
                first + start,
                stop - start,
                records["feature"].astype(np.int64) - start,
                records["place"],
                records["value"],
            )
            start = stop


def _file(folder: Path, first: int) -> Path:
    return folder / f"firings-{first // BLOCK:05d}.bin"
