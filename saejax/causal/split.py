"""A language model cut at a dictionary's site, and its prompts run without an edit."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from saejax.causal.cut import Cut
from saejax.dictionaries.modules import Dictionary
from saejax.errors import UserError
from saejax.models import decoder
from saejax.models.incremental import Past
from saejax.models.language_model import LanguageModel
from saejax.models.sites import Site
from saejax.parallel import by_row, sharding
from saejax.tasks.behaviours import Prompt

PROMPTS = 16  # prompts per run of the head
LENGTH_STEP = 2  # prompts are padded to a multiple of this many tokens
GROUP_TOKENS = 8192  # most tokens, padding included, of the prompts whose clean run is kept at once


@dataclasses.dataclass(frozen=True)
class CleanRun:
    """Prompts and what the model makes of them without an edit; B is a multiple of ``PROMPTS``.

    Attributes:
      index_P: the prompts' places in the list they came from; the first P of the B rows, the rest are copies.
      stream_BxTxD, value_BxTxD: what the head gave.
      domain_BxT: True where the dictionary reads: at real positions that are not attention sinks.
      last_B: index of each prompt's last token, int32.
      answers_Bx2: token ids of the correct and the wrong answer, int32.
    """

    index_P: np.ndarray
    stream_BxTxD: jax.Array
    value_BxTxD: jax.Array
    domain_BxT: jax.Array
    last_B: np.ndarray
    answers_Bx2: np.ndarray


class SplitModel:
    """A language model cut at the site of a dictionary.

    Attributes:
      cut: where, static.
      params: of the decoder.
      graph, state: the dictionary, split; its arrays are on the model's devices.

    Raises:
      UserError: the dictionary belongs to another model, its site does not exist there, or it is a transcoder.
    """

    def __init__(self, model: LanguageModel, dictionary: Dictionary):
        if dictionary.config.target:
            raise UserError(
                f"the dictionary is a transcoder from {dictionary.site} to {dictionary.config.target}: features of "
                "transcoders cannot be ablated yet, name an SAE"
            )
        site = Site.parse(dictionary.site).check(model.config)
        width = site.width(model.config)
        if dictionary.config.d_in != width:
            raise UserError(f"the dictionary reads {dictionary.config.d_in} dimensions, but {site} has {width}")
        if dictionary.config.fingerprint != model.source.fingerprint:
            raise UserError(
                f"the dictionary was trained on {dictionary.config.model} (fingerprint "
                f"{dictionary.config.fingerprint}), but the model is {model.source.name} ({model.source.fingerprint}): "
                "use the model it was trained on, or train one for this model"
            )
        self.cut = Cut(model.config, site, model.mesh)
        self.params = model.params
        self.graph, state = nnx.split(dictionary)
        # By way of the host: the mesh may reach over processes that each loaded the dictionary.
        self.state = jax.device_put(jax.tree.map(np.asarray, state), sharding(model.mesh))
        self._model = model

    def run(self, prompts: Sequence[Prompt]) -> list[CleanRun]:
        """Runs prompts without an edit, sorted by length, in groups of at most ``GROUP_TOKENS`` tokens.

        Raises:
          UserError: a prompt is too long, or the site's value is not finite.
        """
        tokens = self._model.tokenize([prompt.text for prompt in prompts])
        answers_Nx2 = np.array(
            [[self._model.token_id(answer) for answer in (prompt.correct, prompt.wrong)] for prompt in prompts],
            np.int32,
        )
        order_N = np.argsort(tokens.lengths_B, kind="stable")
        runs = []
        while len(order_N):
            length_N = -(-tokens.lengths_B[order_N] // LENGTH_STEP) * LENGTH_STEP
            rows_N = -(-np.arange(1, len(order_N) + 1) // PROMPTS) * PROMPTS
            count = max(int(np.sum(rows_N * length_N <= GROUP_TOKENS)), min(PROMPTS, len(order_N)))
            index_P, order_N = order_N[:count], order_N[count:]
            rows_B = np.resize(index_P, rows_N[count - 1])  # filled up with copies
            ids_BxT = np.zeros((len(rows_B), length_N[count - 1]), np.int32)
            kept = min(ids_BxT.shape[1], tokens.ids_BxT.shape[1])
            ids_BxT[:, :kept] = tokens.ids_BxT[rows_B, :kept]
            last_B = tokens.last_B[rows_B]
            stream, value, domain = self._run_head(ids_BxT, last_B, [prompts[index].text for index in rows_B])
            runs.append(CleanRun(index_P, stream, value, domain, last_B, answers_Nx2[rows_B]))
        return runs

    def run_counterparts(self, prompts: Sequence[Prompt]) -> list[CleanRun]:
        """Runs the prompts' counterparts: row by row those of ``run(prompts)``.

        Raises:
          UserError: a prompt has no counterpart, or one of another number of tokens; and as ``run``.
        """
        for prompt in prompts:
            if not prompt.counterpart:
                raise UserError(
                    f"{prompt.behaviour}, prompt {prompt.text!r}, has no counterpart: give it one in --task.prompts, "
                    "or use another --ablate.replacement"
                )
        texts = [prompt.text for prompt in prompts], [prompt.counterpart for prompt in prompts]
        lengths, others = (self._model.tokenize(side).lengths_B for side in texts)
        for row in np.flatnonzero(lengths != others)[:1]:
            raise UserError(
                f"{prompts[row].behaviour}: {prompts[row].text!r} has {lengths[row]} tokens and its counterpart "
                f"{prompts[row].counterpart!r} {others[row]}: --ablate.replacement=counterpart takes pairs of one "
                "length"
            )
        return self.run([dataclasses.replace(prompt, text=prompt.counterpart) for prompt in prompts])

    def past(self, run: CleanRun) -> Past:
        """Keys and values of the tail's layers in a clean run."""
        chunks = range(0, len(run.last_B), PROMPTS)
        parts = [record(self.cut, self.params, *self.by_row(run.stream_BxTxD[i : i + PROMPTS])) for i in chunks]
        return parts[0] if len(parts) == 1 else jax.tree.map(lambda *p: jnp.concatenate(p, axis=1), *parts)

    def _run_head(self, ids_BxT: np.ndarray, last_B: np.ndarray, texts: Sequence[str]) -> list[jax.Array]:
        """The parts of a ``CleanRun`` that the devices compute, ``PROMPTS`` prompts at a time."""
        parts = []
        for first in range(0, len(ids_BxT), PROMPTS):
            own = slice(first, first + PROMPTS)
            *part, finite_B = run_head(
                self.cut, self.graph, self.params, self.state, *self.by_row(ids_BxT[own], last_B[own])
            )
            for row in np.flatnonzero(~np.asarray(finite_B))[:1]:
                raise UserError(
                    f"the value of {self.cut.site} is not finite in the prompt {texts[first + row]!r}: the "
                    "model's weights hold NaN or it overflows; try --model.dtype=float32 or another model"
                )
            parts.append(part)
        return parts[0] if len(parts) == 1 else [jnp.concatenate(part) for part in zip(*parts, strict=True)]

    def by_row(self, *arrays: np.ndarray) -> list[jax.Array]:
        """Puts arrays on the devices, their rows split over the mesh's ``data`` axis where it divides them."""
        return by_row(self.cut.mesh, *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_head(
    cut: Cut, graph: nnx.GraphDef, params: decoder.Params, state: nnx.State, ids_BxT: jax.Array, last_B: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The program of the head: stream and value [B, T, D], where the dictionary reads [B, T], which are finite [B]."""
    stream_BxTxD, value_BxTxD = cut.head(params, ids_BxT)
    real_BxT = jnp.arange(ids_BxT.shape[1])[None, :] <= last_B[:, None]
    domain_BxT = real_BxT & nnx.merge(graph, state).in_domain(value_BxTxD)
    finite_B = (jnp.isfinite(value_BxTxD).all(axis=-1) | ~real_BxT).all(axis=-1)
    everywhere = sharding(cut.mesh)  # edited rows pick theirs from all of these
    return jax.lax.with_sharding_constraint((stream_BxTxD, value_BxTxD, domain_BxT, finite_B), everywhere)


@functools.partial(jax.jit, static_argnums=0)
def record(cut: Cut, params: decoder.Params, stream_BxTxD: jax.Array) -> Past:
    """The program of ``SplitModel.past``."""
    return jax.lax.with_sharding_constraint(cut.record(params, stream_BxTxD), sharding(cut.mesh))


def of_features(graph: nnx.GraphDef, state: nnx.State, arrays: Sequence[jax.Array], use: Callable) -> Any:
    """``use(f_PxTxF, *rest)`` of ``PROMPTS`` prompts at a time, put together: all features of all take gigabytes.

    Args:
      arrays: value [B, T, D] and domain [B, T], and others with B rows, of which ``use`` is given P at a time.
      use: gives arrays with P rows.
    """
    chunks = [array.reshape(-1, PROMPTS, *array.shape[1:]) for array in arrays]
    found = jax.lax.map(lambda chunk: use(active_features(graph, state, *chunk[:2]), *chunk[2:]), chunks)
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), found)


@functools.partial(jax.jit, static_argnums=0)
def active_features(graph: nnx.GraphDef, state: nnx.State, value_BxTxD: jax.Array, domain_BxT: jax.Array) -> jax.Array:
    """Feature activations [B, T, F]; 0 outside the dictionary's domain."""
    f_BxTxF = nnx.merge(graph, state).encode(value_BxTxD)
    return jnp.where(domain_BxT[:, :, None], f_BxTxF, jnp.zeros_like(f_BxTxF))
