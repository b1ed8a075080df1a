"""Fitting a Jacobian lens: the mean over prompts of how the last layer's stream depends on each earlier one.

    J_l = mean over prompts of 1/|V| sum over t in V and t' in V, t' >= t of d x_last[t'] / d x_l[t]

x_l is the stream leaving layer l, V a prompt's positions but the first ``skip`` and the last. Targets are summed and
sources averaged (Gurnee et al., 2026), so a lens belongs to prompts of about one length.

Rows of the Jacobians are pulled back together: cotangents that are one-hot in a dimension of the last stream, at all of
V at once, go down layer by layer through the transposed layer, a block of them as one batch. Attention weights and
norms are differentiated through.
"""

import functools
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.errors import UserError
from saejax.files import whole_file
from saejax.models import decoder
from saejax.models.attention import whole_prompts
from saejax.models.config import GRADIENT, DecoderConfig
from saejax.models.decoder import run_layers
from saejax.models.language_model import LanguageModel
from saejax.models.lens import JacobianLens
from saejax.models.lens_files import save_lens
from saejax.models.tokens import Tokens
from saejax.parallel.mesh import by_row
from saejax.workspace import fingerprint

_VALUES = {"cpu": 2**24}  # of the widest activations of a block of rows
_MANY = 2**28  # the same on accelerators
_SAVE_EVERY = 60.0  # seconds
_STEP = 16  # prompts are padded to a multiple of this


def fit_lens(
    lm: LanguageModel,
    tokens: Tokens,
    path: str | Path,
    *,
    skip: int = 16,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> JacobianLens:
    """Fits a Jacobian lens and writes it; what is done is kept beside the file, and the same call goes on there.

    Args:
      tokens: prompts of about one length, such as the first 128 tokens of 100 texts; at least ``skip`` + 2 each.
      path: the file, see ``lens_files``. What has been summed up is in ``<path>.partial.npz`` until it is there.
      skip: positions at the beginning of each prompt that are left out, at least 0: the first one is an attention sink.
      on_progress: called with the prompts done and of all; may raise to stop.

    Returns:
      The lens, in the precision in which it was computed.

    Raises:
      UserError: a prompt is too short, the file is there already, the model has one layer, or the sum that was kept is
        of another fit.
    """
    path, config = Path(path), lm.config
    tokens.check(config.vocab, config.context)
    if path.exists():
        raise UserError(f"{path} exists already: name another file for the lens, or delete it")
    if config.n_layers < 2:
        raise UserError("a Jacobian lens is of the layers before the last, and the model has one layer")
    if (short := int(tokens.lengths_B.min())) < skip + 2:
        raise UserError(f"a prompt of {short} tokens is too short for the lens: expected at least {skip + 2}")
    mark = fingerprint([lm.source.fingerprint, skip, tokens.ids_BxT.tolist(), tokens.lengths_B.tolist()])
    partial = path.with_name(f"{path.name}.partial.npz")
    total, done = _kept(partial, mark)
    prompts, saved = len(tokens.lengths_B), time.monotonic()
    on_progress(done, prompts)
    try:
        while done < prompts:
            chosen = np.arange(done, min(done + lm.mesh.shape["data"], prompts))
            total = total + _of_prompts(lm, tokens, chosen, skip)
            done += len(chosen)
            if not np.isfinite(total).all():
                raise UserError("the Jacobians are not finite: try dtype float32, or another model")
            if time.monotonic() - saved > _SAVE_EVERY:
                _keep(partial, mark, total, done)
                saved = time.monotonic()
            on_progress(done, prompts)
    except (KeyboardInterrupt, Exception):
        if done and np.isfinite(total).all():
            _keep(partial, mark, total, done)
        raise
    lens = JacobianLens(total / prompts, prompts)
    save_lens(path, lens)
    partial.unlink(missing_ok=True)
    return lens


def _of_prompts(lm: LanguageModel, tokens: Tokens, chosen: np.ndarray, skip: int) -> np.ndarray:
    """The sum over some prompts, at most as many as the mesh's data axis has, of their Jacobians, [L - 1, D, D]."""
    rows_B = np.resize(chosen, lm.mesh.shape["data"])
    length = -(-int(tokens.lengths_B[rows_B].max()) // _STEP) * _STEP
    ids_BxT = np.zeros((len(rows_B), length), np.int32)
    kept = min(length, tokens.ids_BxT.shape[1])
    ids_BxT[:, :kept] = tokens.ids_BxT[rows_B, :kept]
    position_1xT = np.arange(length)[None]
    valid_BxT = (position_1xT >= skip) & (position_1xT < tokens.lengths_B[rows_B, None] - 1)
    share_BxT = valid_BxT / valid_BxT.sum(axis=1, keepdims=True) * (np.arange(len(rows_B)) < len(chosen))[:, None]
    ids, valid, share = by_row(lm.mesh, ids_BxT, valid_BxT, share_BxT.astype(np.float32))
    stream_LxBxTxD = _streams(lm.config, lm.params, ids)
    width, most = lm.config.d_model, _VALUES.get(lm.mesh.devices.flat[0].platform, _MANY)
    size = int(np.clip(most // (length * max(lm.config.d_mlp, width)), 1, width))
    blocks = []
    for first in range(0, width, size):
        dims_R = np.minimum(np.arange(first, first + size), width - 1)  # the last block repeats its last row
        block = _pull(lm.config, lm.params, stream_LxBxTxD, valid, share, dims_R)
        blocks.append(np.asarray(block)[:, : width - first])
    return np.concatenate(blocks, axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _streams(config: DecoderConfig, params: decoder.Params, ids_BxT: jax.Array) -> jax.Array:
    """The streams entering all layers, [L, B, T, D]."""
    x_BxTxD = decoder.embed(config, params, ids_BxT)
    return run_layers(config, params, x_BxTxD, 0, config.n_layers, collect=("resid_pre",)).collected["resid_pre"]


@functools.partial(jax.jit, static_argnums=0)
def _pull(
    config: DecoderConfig,
    params: decoder.Params,
    stream_LxBxTxD: jax.Array,
    valid_BxT: jax.Array,
    share_BxT: jax.Array,
    dims_R: jax.Array,
) -> jax.Array:
    """Some rows of the Jacobians of all layers but the last, [L - 1, R, D]."""
    dtype, tables = stream_LxBxTxD.dtype, whole_prompts(config, valid_BxT.shape[1])
    one_hot_RxD = jax.nn.one_hot(dims_R, config.d_model, dtype=dtype)
    last_RxBxTxD = one_hot_RxD[:, None, None, :] * valid_BxT.astype(dtype)[None, :, :, None]

    def below(into_RxBxTxD: jax.Array, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        def run(x_BxTxD: jax.Array) -> jax.Array:
            return decoder.run_layer(config, GRADIENT, params, layer, x_BxTxD, tables, lambda kind, value: value)

        _, transposed = jax.vjp(run, lax.dynamic_index_in_dim(stream_LxBxTxD, layer, keepdims=False))
        from_RxBxTxD = jax.vmap(lambda row_BxTxD: transposed(row_BxTxD)[0])(into_RxBxTxD)
        wide = jnp.promote_types(dtype, jnp.float32)
        mean_RxD = jnp.einsum("rbtd,bt->rd", from_RxBxTxD.astype(wide), share_BxT.astype(wide), precision="highest")
        return from_RxBxTxD, mean_RxD

    _, falling = lax.scan(below, last_RxBxTxD, jnp.arange(config.n_layers - 1, 0, -1))
    return falling[::-1]


def _keep(partial: Path, mark: str, total_LxDxD: np.ndarray, done: int) -> None:
    with whole_file(partial) as beside, open(beside, "wb") as file:
        np.savez(file, mark=mark, total=total_LxDxD, done=done)


def _kept(partial: Path, mark: str) -> tuple[np.ndarray, int]:
    """The sum of an earlier run and the prompts in it; 0 where there is none."""
    if not partial.exists():
        return np.zeros((), np.float32), 0
    try:
        with np.load(partial, allow_pickle=False) as kept:
            if str(kept["mark"]) == mark:
                return kept["total"], int(kept["done"])
    except (OSError, ValueError, KeyError, EOFError):
        pass
    raise UserError(f"{partial} is damaged, or of a lens of another model or other prompts: delete it")
