"""A decoder split at a site into a prefix and a suffix, as pure functions.

    prefix   token ids -> the stream there, the site's value, and what a dictionary reads        once per prompt
    suffix   a value of the site -> the stream leaving the last layer, and the readouts          once per edit

The suffix of an edit may run only the tokens from the first changed one on (``run_shared_suffix``): attention is
causal, so the keys and values of the tokens before it are those of the clean run. Of prompts that begin alike, it runs
the first tokens once. Logits are computed at each prompt's last position, two of them unless more readouts are asked
for.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from saejax.models import decoder
from saejax.models.attention import QKV, Attend, AttentionSpec, Layer, TablesByLayer, tables_by_layer
from saejax.models.config import GRADIENT, DecoderConfig, RunRules
from saejax.models.decoder import KEYS, VALUES, Hook, LayersOutput, run_layers
from saejax.models.sites import Site


class PrefixKV(NamedTuple):
    """Keys, after the rotary embedding, and values of whole prompts (P of S tokens) in L consecutive layers."""

    k_LxPxSxNxK: jax.Array
    v_LxPxSxNxK: jax.Array


class SharedPrefixBatch(NamedTuple):
    """Edited prompts, of which those that begin alike share their first tokens: S shards of R rows and N tokens.

    A row is the end of a prompt from its first changed token on, T tokens at most. Each shard is by itself.

    Attributes:
      prompt_SxR: which of the past's prompts each row continues.
      first_SxR: the position of its first token.
      token_index_SxRxT: which of the shard's N tokens stands there; any, where the row has ended.
      row_SxN, column_SxN: one of the places at which each token stands.
    """

    prompt_SxR: jax.Array
    first_SxR: jax.Array
    token_index_SxRxT: jax.Array
    row_SxN: jax.Array
    column_SxN: jax.Array

    @classmethod
    def unshared(cls, place_X: jax.Array, first_X: jax.Array, length: int, shards: int) -> "SharedPrefixBatch":
        """Rows of which each has ``length`` tokens of its own, in order."""
        count = len(place_X) // shards
        token_RxT = jnp.arange(count * length, dtype=jnp.int32).reshape(count, length)
        row_N, column_N = jnp.divmod(token_RxT.reshape(-1), length)
        shared = (jnp.broadcast_to(array[None], (shards, *array.shape)) for array in (token_RxT, row_N, column_N))
        return cls(place_X.reshape(shards, count), first_X.reshape(shards, count), *shared)

    def per_token(self, array_SxRx: jax.Array) -> jax.Array:
        """What holds for the row in which each token stands, [S, N, ...] of [S, R, ...]."""
        return jax.vmap(lambda array_Rx, row_N: array_Rx[row_N])(array_SxRx, self.row_SxN)

    @property
    def prompt_SxN(self) -> jax.Array:
        """The prompt of each token."""
        return self.per_token(self.prompt_SxR)

    @property
    def position_SxN(self) -> jax.Array:
        """The position of each token."""
        return self.per_token(self.first_SxR) + self.column_SxN

    def attention(self, config: DecoderConfig, past: PrefixKV, below: int) -> AttentionSpec:
        """How the tokens attend to the earlier ones of their rows and to those of the past before their first.

        All but attention acts on each token once, however many rows share it. A run gives the same as full runs of the
        rows in which nothing before their first tokens is changed.

        Args:
          past: keys and values of the prompts without an edit, in the layers of the run at least.
          below: the past's first layer.
        """

        def function(attend: Attend, layer: Layer, qkv: QKV, carried: tuple[()]) -> tuple[jax.Array, tuple[()]]:
            k_known, v_known = (lax.dynamic_index_in_dim(part, layer - below, keepdims=False) for part in past)
            q, k, v = (jax.vmap(lambda part, token: part[token])(part, self.token_index_SxRxT) for part in qkv)
            k = jnp.concatenate([k_known[self.prompt_SxR], k], axis=2)
            v = jnp.concatenate([v_known[self.prompt_SxR], v], axis=2)
            attended_SxRxTxHxK = attend(q, k, v)
            of_token = jax.vmap(lambda part, row, column: part[row, column])
            return of_token(attended_SxRxTxHxK, self.row_SxN, self.column_SxN), carried

        return AttentionSpec(self._tables(config, past.k_LxPxSxNxK.shape[2]), function)

    def _tables(self, config: DecoderConfig, known: int) -> TablesByLayer:
        """Rotary tables of the N tokens; masks [S, R, T, known + T] of rows, which see what is known before them."""
        first_SxRx1, new = self.first_SxR[..., None], self.token_index_SxRxT.shape[2]
        position_SxRxT = first_SxRx1 + jnp.arange(new)[None, None, :]
        known_SxRxC = jnp.broadcast_to(jnp.arange(known)[None, None, :], (*self.first_SxR.shape, known))
        slot_SxRxW = jnp.concatenate([known_SxRxC, position_SxRxT], axis=-1)
        relative_position_SxRxTxW = position_SxRxT[..., :, None] - slot_SxRxW[..., None, :]
        real_SxRxW = jnp.concatenate([known_SxRxC < first_SxRx1, jnp.ones_like(position_SxRxT, bool)], axis=-1)
        mask_SxRxTxW = (relative_position_SxRxTxW >= 0) & real_SxRxW[..., None, :]
        return tables_by_layer(config, self.position_SxN, relative_position_SxRxTxW, mask_SxRxTxW)


@dataclasses.dataclass(frozen=True)
class SplitPoint:
    """Where a decoder is split, and how it is run. Hashable, so that it can be a static argument of ``jax.jit``.

    Attributes:
      config: the decoder.
      site: the site whose value the suffix starts from.
      reads: the site that the dictionary reads: the same one, or one before it.
      mesh: the devices.
      rules: what differentiation goes by.
    """

    config: DecoderConfig
    site: Site
    reads: Site
    mesh: Mesh
    rules: RunRules = GRADIENT

    @property
    def in_stream(self) -> bool:
        """Whether the site is the whole stream between two layers; then nothing else enters the suffix."""
        return self.site.kind in ("resid_pre", "resid_post")

    @property
    def _start(self) -> int:
        """The suffix's first layer."""
        return self.site.layer + (self.site.kind == "resid_post")

    def run_prefix(self, params: decoder.Params, ids_BxT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Runs up to the site.

        Returns:
          The stream entering the suffix's first layer, the site's value, and what the dictionary reads, all [B, T, D];
          the same array where they are the same site.
        """
        x_BxTxD = decoder.embed(self.config, params, ids_BxT)
        if self.in_stream and self.reads == self.site:
            x_BxTxD = run_layers(self.config, params, x_BxTxD, 0, self._start, rules=self.rules).x
            return x_BxTxD, x_BxTxD, x_BxTxD
        seen: dict[Site, jax.Array] = {}

        def look(kind: str, layer: int | jax.Array, value_BxTxD: jax.Array) -> jax.Array:
            assert isinstance(layer, int)
            return seen.setdefault(Site(kind, layer), value_BxTxD)

        layers = {self.reads.layer, self.site.layer}
        run_layers(self.config, params, x_BxTxD, 0, self.site.layer + 1, look, layers, rules=self.rules)
        stream = self.site if self.in_stream else Site("resid_pre", self.site.layer)
        return seen[stream], seen[self.site], seen[self.reads]

    def run_suffix(self, params: decoder.Params, stream_BxTxD: jax.Array, value_BxTxD: jax.Array) -> jax.Array:
        """Runs on with another value of the site.

        Args:
          stream_BxTxD: from ``run_prefix``.
          value_BxTxD: the site's value, edited or not.

        Returns:
          The stream leaving the last layer, [B, T, D].
        """
        return self._run_on(params, stream_BxTxD, value_BxTxD).x

    def run_suffix_with_kv(
        self, params: decoder.Params, stream_BxTxD: jax.Array, value_BxTxD: jax.Array
    ) -> tuple[jax.Array, PrefixKV]:
        """As ``run_suffix``, and the keys and values of its layers too."""
        run = self._run_on(params, stream_BxTxD, value_BxTxD, collect=(KEYS, VALUES))
        return run.x, PrefixKV(run.collected[KEYS], run.collected[VALUES])

    def run_shared_suffix(
        self,
        params: decoder.Params,
        past: PrefixKV,
        tree: SharedPrefixBatch,
        stream_SxNxD: jax.Array,
        value_SxNxD: jax.Array,
    ) -> jax.Array:
        """``run_suffix`` of the tokens of edited prompts, those from the first changed one on.

        Args:
          past: from ``record``.
          tree: which tokens follow which.
          stream_SxNxD, value_SxNxD: as for ``run_suffix``, of these tokens.

        Returns:
          The stream leaving the last layer, [S, N, D].
        """
        attention = tree.attention(self.config, past, self._start)
        return self._run_on(params, stream_SxNxD, value_SxNxD, attention).x

    def _run_on(
        self,
        params: decoder.Params,
        stream: jax.Array,
        value: jax.Array,
        attention: AttentionSpec | None = None,
        collect: tuple[str, ...] = (),
    ) -> LayersOutput:
        """Runs the suffix. Unless the site is the stream, a hook in the first layer puts the value there."""
        put: Hook | None = None
        if not self.in_stream:
            put = lambda kind, layer, own: value if kind == self.site.kind else own  # noqa: E731
        return run_layers(
            self.config,
            params,
            value if self.in_stream else stream,
            self._start,
            self.config.n_layers,
            put,
            (self._start,),
            rules=self.rules,
            attention=attention,
            collect=collect,
        )

    def logit_difference(
        self, params: decoder.Params, x_BxTxD: jax.Array, last_B: jax.Array, answers_Bx2: jax.Array
    ) -> jax.Array:
        """The logit difference at each prompt's last position.

        Args:
          x_BxTxD: the stream leaving the last layer.
          last_B: index of each prompt's last token.
          answers_Bx2: token ids of the correct and the wrong answer.

        Returns:
          logit(correct) - logit(wrong), fp32 [B].
        """
        last_BxD = jnp.take_along_axis(x_BxTxD, last_B[:, None, None], axis=1)[:, 0]
        return self.readouts(params, last_BxD, answers_Bx2)[:, 0]

    def readouts(
        self, params: decoder.Params, x_RxD: jax.Array, answers_Rx2: jax.Array, logp_RxV: jax.Array | None = None
    ) -> jax.Array:
        """What the stream leaving the last layer says of the answers.

        Args:
          x_RxD: of R prompts, at their last positions.
          answers_Rx2: token ids of the correct and the wrong answer.
          logp_RxV: log-probabilities of the next token without an edit; None: they are not compared with.

        Returns:
          fp32 [R, 1] or [R, 4]: logit(correct) - logit(wrong); and, beside ``logp_RxV``, the log-likelihood of the
          correct answer's first token, whether that token is the likeliest of all, and the Kullback-Leibler divergence
          of the next token's probabilities from those without an edit, in nats.
        """
        if logp_RxV is None:
            logits_Rx2 = self.logits(params, x_RxD, answers_Rx2)
            return logits_Rx2[:, :1] - logits_Rx2[:, 1:]
        logits_RxV = decoder.unembed(self.config, params, x_RxD, self.rules)
        edited_RxV = jax.nn.log_softmax(logits_RxV)
        logits_Rx2 = jnp.take_along_axis(logits_RxV, answers_Rx2, axis=1)
        correct_Rx1 = answers_Rx2[:, :1]
        values = (
            logits_Rx2[:, 0] - logits_Rx2[:, 1],
            jnp.take_along_axis(edited_RxV, correct_Rx1, axis=1)[:, 0],
            jnp.argmax(logits_RxV, axis=1) == correct_Rx1[:, 0],
            jnp.sum(jnp.exp(logp_RxV) * (logp_RxV - edited_RxV), axis=1),
        )
        return jnp.stack([value.astype(logits_RxV.dtype) for value in values], axis=1)

    def logits(self, params: decoder.Params, x_RxD: jax.Array, ids_RxN: jax.Array) -> jax.Array:
        """The logits [R, N] of these ids only, from the stream x leaving the last layer."""

        def one(x_D: jax.Array, ids_N: jax.Array) -> jax.Array:
            head = decoder.restrict_unembedding(self.config, params, ids_N)
            return decoder.unembed(self.config, head, x_D[None, :], self.rules)[0]

        return jax.vmap(one)(x_RxD, ids_RxN)
