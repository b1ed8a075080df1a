"""A language model cut in two at a dictionary's site.

    head   token ids -> the stream there, and the site's value      once per prompt
    tail   a value of the site -> logit(correct) - logit(wrong)     once per edit

Prompts are sorted by length and run in batches of a fixed shape, so that few programs are compiled and
little of the work is padding. The tail computes two logits, at each prompt's last position.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from saejax.dictionaries.modules import Dictionary
from saejax.errors import UserError
from saejax.models import decoder
from saejax.models.config import DecoderConfig
from saejax.models.language_model import LanguageModel
from saejax.models.sites import Site
from saejax.parallel import fitting_sharding, sharding
from saejax.tasks.behaviours import Prompt

PROMPTS = 16  # prompts per batch of the head
LENGTH_STEP = 2  # batches are padded to a multiple of this many tokens


@dataclasses.dataclass(frozen=True)
class Cut:
    """Where the model is cut. Hashable, so that it can be a static argument of ``jax.jit``.

    Attributes:
      config: the decoder.
      site: the site whose value the tail starts from.
      mesh: the devices.
    """

    config: DecoderConfig
    site: Site
    mesh: Mesh

    @property
    def _in_stream(self) -> bool:
        """Whether the site is the whole stream between two layers; then nothing else enters the tail."""
        return self.site.kind in ("resid_pre", "resid_post")

    @property
    def _start(self) -> int:
        """The tail's first layer."""
        return self.site.layer + (self.site.kind == "resid_post")

    def head(self, params: decoder.Params, ids_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Runs up to the site.

        Returns:
          The stream entering the tail's first layer and the site's value, both [B, T, D]; the same array
          where the site is that stream.
        """
        stream_BxTxD = decoder.embed(self.config, params, ids_BxT)
        stream_BxTxD = decoder.run_layers(self.config, params, stream_BxTxD, 0, self._start)
        if self._in_stream:
            return stream_BxTxD, stream_BxTxD
        seen = []

        def look(site: Site, value_BxTxD: jax.Array) -> jax.Array:
            if site == self.site:
                seen.append(value_BxTxD)
            return value_BxTxD

        layer = self.site.layer
        decoder.run_layers(self.config, params, stream_BxTxD, layer, layer + 1, look, (layer,))
        return stream_BxTxD, seen[0]

    def tail(
        self,
        params: decoder.Params,
        stream_BxTxD: jax.Array,
        value_BxTxD: jax.Array,
        last_B: jax.Array,
        answers_Bx2: jax.Array,
    ) -> jax.Array:
        """Runs on with ``value_BxTxD`` as the site's value.

        Args:
          stream_BxTxD: from ``head``.
          value_BxTxD: the site's value, edited or not.
          last_B: index of each prompt's last token.
          answers_Bx2: token ids of the correct and the wrong answer.

        Returns:
          logit(correct) - logit(wrong) at the last position, fp32 [B].
        """

        def put(site: Site, own_BxTxD: jax.Array) -> jax.Array:
            return value_BxTxD if site == self.site else own_BxTxD

        run = functools.partial(decoder.run_layers, self.config, params, start=self._start, stop=self.config.n_layers)
        x_BxTxD = run(value_BxTxD) if self._in_stream else run(stream_BxTxD, hook=put, hook_layers=(self.site.layer,))
        last_BxD = jnp.take_along_axis(x_BxTxD, last_B[:, None, None], axis=1)[:, 0]
        logits_Bx2 = self._logits(params, last_BxD, answers_Bx2)
        return logits_Bx2[:, 0] - logits_Bx2[:, 1]

    def _logits(self, params: decoder.Params, x_BxD: jax.Array, ids_BxN: jax.Array) -> jax.Array:
        """The logits of ``ids_BxN`` only: the rest of the head's columns are not multiplied."""

        def one(x_D: jax.Array, ids_N: jax.Array) -> jax.Array:
            return decoder.unembed(self.config, decoder.head_of(self.config, params, ids_N), x_D[None, :])[0]

        return jax.vmap(one)(x_BxD, ids_BxN)


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompts that were run up to the site; B is ``PROMPTS``, of which the first P are prompts, the rest copies.

    Attributes:
      index_P: the prompts' places in the list they came from.
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

    def run(self, prompts: Sequence[Prompt]) -> list[PromptBatch]:
        """Runs prompts up to the site, sorted by length, in batches of ``PROMPTS``.

        Raises:
          UserError: a prompt is too long, or the site's value is not finite.
        """
        tokens = self._model.tokenize([prompt.text for prompt in prompts])
        answers_Nx2 = np.array(
            [[self._model.token_id(answer) for answer in (prompt.correct, prompt.wrong)] for prompt in prompts],
            np.int32,
        )
        order_N = np.argsort(tokens.lengths_B, kind="stable")
        batches = []
        for first in range(0, len(prompts), PROMPTS):
            index_P = order_N[first : first + PROMPTS]
            rows_B = np.resize(index_P, PROMPTS)  # the batch is filled up with copies
            length = -(-int(tokens.lengths_B[index_P].max()) // LENGTH_STEP) * LENGTH_STEP
            ids_BxT = np.zeros((PROMPTS, length), np.int32)
            kept = min(length, tokens.ids_BxT.shape[1])
            ids_BxT[:, :kept] = tokens.ids_BxT[rows_B, :kept]
            last_B = tokens.last_B[rows_B]
            stream_BxTxD, value_BxTxD, domain_BxT, finite_B = run_head(
                self.cut, self.graph, self.params, self.state, *self.by_row(ids_BxT, last_B)
            )
            for row in np.flatnonzero(~np.asarray(finite_B)[: len(index_P)])[:1]:
                raise UserError(
                    f"the value of {self.cut.site} is not finite in the prompt {prompts[index_P[row]].text!r}: the "
                    "model's weights hold NaN or it overflows; try --model.dtype=float32 or another model"
                )
            answers_Bx2 = answers_Nx2[rows_B]
            batches.append(PromptBatch(index_P, stream_BxTxD, value_BxTxD, domain_BxT, last_B, answers_Bx2))
        return batches

    def by_row(self, *arrays: np.ndarray) -> list[jax.Array]:
        """Puts arrays on the devices, their rows split over the mesh's ``data`` axis where it divides them."""
        mesh = self.cut.mesh
        return [jax.device_put(a, fitting_sharding(mesh, a.shape, "data", *[None] * (a.ndim - 1))) for a in arrays]


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_head(
    cut: Cut, graph: nnx.GraphDef, params: decoder.Params, state: nnx.State, ids_BxT: jax.Array, last_B: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The program of the head: stream and value [B, T, D], where the dictionary reads [B, T], which are finite [B]."""
    stream_BxTxD, value_BxTxD = cut.head(params, ids_BxT)
    real_BxT = jnp.arange(ids_BxT.shape[1])[None, :] <= last_B[:, None]
    domain_BxT = real_BxT & nnx.merge(graph, state).in_domain(value_BxTxD)
    finite_B = (jnp.isfinite(value_BxTxD).all(axis=-1) | ~real_BxT).all(axis=-1)
    everywhere = sharding(cut.mesh)  # later batches pick their rows from all of these
    return jax.lax.with_sharding_constraint((stream_BxTxD, value_BxTxD, domain_BxT, finite_B), everywhere)


@functools.partial(jax.jit, static_argnums=0)
def active_features(graph: nnx.GraphDef, state: nnx.State, value_BxTxD: jax.Array, domain_BxT: jax.Array) -> jax.Array:
    """Feature activations [B, T, F]; 0 outside the dictionary's domain."""
    f_BxTxF = nnx.merge(graph, state).encode(value_BxTxD)
    return jnp.where(domain_BxT[:, :, None], f_BxTxF, jnp.zeros_like(f_BxTxF))
