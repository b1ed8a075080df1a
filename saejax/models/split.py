"""A decoder split at a site into a prefix and a suffix, as pure functions.

    prefix   token ids -> the stream there, the site's value, and what a dictionary reads        once per prompt
    suffix   a value of the site -> the stream leaving the last layer, and the readouts          once per edit

The suffix of an edit may run only the tokens from the first changed one on (``run_shared_suffix``): attention is
causal, so the tokens before it have the keys and values of the clean run. Of prompts that begin alike, it runs
the first tokens once. Logits are computed at each prompt's last position, two of them unless more readouts are asked
for.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from saejax.errors import UserError
from saejax.models import decoder, torch_bridge
from saejax.models.attention import QKV, Attend, AttentionSpec, Layer, TablesByLayer, tables_by_layer
from saejax.models.config import GRADIENT, DecoderConfig, RunRules, TorchConfig
from saejax.models.decoder import KEYS, VALUES, LayersOutput, run_layers
from saejax.models.layers import Hook, Taps
from saejax.models.sites import INNER_KINDS, Site


class PrefixKV(NamedTuple):
    """Keys, after the rotary embedding, and values of P whole prompts of S tokens, in L consecutive layers."""

    k_LxPxSxNxK: jax.Array
    v_LxPxSxNxK: jax.Array


class SharedPrefixBatch(NamedTuple):
    """Edited prompts as S independent shards of R rows and N tokens, where rows share equal first tokens.

    A row is the end of a prompt from its first changed token on, at most T tokens.
    """

    prompt_SxR: jax.Array  #: index of the clean prompt that each row continues
    first_SxR: jax.Array  #: position of the row's first token
    #: index among the shard's N tokens of the token at each place of a row; any after its end.
    token_index_SxRxT: jax.Array
    #: row_SxN and column_SxN: one of the places at which each token stands.
    row_SxN: jax.Array
    column_SxN: jax.Array

    @classmethod
    def unshared(cls, prompt_X: jax.Array, first_X: jax.Array, length: int, shards: int) -> "SharedPrefixBatch":
        """Return ``shards`` times as many rows, of ``length`` tokens each, that share none.

        Row x continues the clean prompt ``prompt[x]`` from the position ``first[x]`` on.
        """
        count = len(prompt_X) // shards
        token_RxT = jnp.arange(count * length, dtype=jnp.int32).reshape(count, length)
        row_N, column_N = jnp.divmod(token_RxT.reshape(-1), length)
        shared = (jnp.broadcast_to(array[None], (shards, *array.shape)) for array in (token_RxT, row_N, column_N))
        return cls(prompt_X.reshape(shards, count), first_X.reshape(shards, count), *shared)

    def per_token(self, array_SxRx: jax.Array) -> jax.Array:
        """Return the value of each token's row, [S, N, ...], given the rows' values [S, R, ...]."""
        return jax.vmap(lambda array_Rx, row_N: array_Rx[row_N])(array_SxRx, self.row_SxN)

    @property
    def prompt_SxN(self) -> jax.Array:
        """Return the index of each token's clean prompt."""
        return self.per_token(self.prompt_SxR)

    @property
    def position_SxN(self) -> jax.Array:
        """Return the position of each token."""
        return self.per_token(self.first_SxR) + self.column_SxN

    def attention(self, config: DecoderConfig, prefix: PrefixKV, first_layer: int) -> AttentionSpec:
        """Return how tokens attend to the earlier ones of their rows and to the clean prompt before these.

        Everything but attention computes each token once, however many rows share it. The result equals full runs of
        the rows in which nothing before their first tokens is changed. ``prefix`` is of the layers from ``first_layer``
        on.
        """

        def function(attend: Attend, layer: Layer, qkv: QKV, carried: tuple[()]) -> tuple[jax.Array, tuple[()]]:
            """Attend to the clean prompt before a row and to the row's own tokens."""
            k_clean, v_clean = (lax.dynamic_index_in_dim(kv, layer - first_layer, keepdims=False) for kv in prefix)
            q, k, v = (jax.vmap(lambda part, token: part[token])(part, self.token_index_SxRxT) for part in qkv)
            k = jnp.concatenate([k_clean[self.prompt_SxR], k], axis=2)
            v = jnp.concatenate([v_clean[self.prompt_SxR], v], axis=2)
            attended_SxRxTxHxK = attend(q, k, v)
            take_tokens = jax.vmap(lambda rows, row, column: rows[row, column])
            return take_tokens(attended_SxRxTxHxK, self.row_SxN, self.column_SxN), carried

        return AttentionSpec(self._tables(config, prefix.k_LxPxSxNxK.shape[2]), function)

    def _tables(self, config: DecoderConfig, clean: int) -> TablesByLayer:
        """Return rotary tables of the N tokens and masks [S, R, T, clean + T] of rows over clean and own keys."""
        first_SxRx1, new = self.first_SxR[..., None], self.token_index_SxRxT.shape[2]
        position_SxRxT = first_SxRx1 + jnp.arange(new)[None, None, :]
        clean_SxRxC = jnp.broadcast_to(jnp.arange(clean)[None, None, :], (*self.first_SxR.shape, clean))
        slot_SxRxW = jnp.concatenate([clean_SxRxC, position_SxRxT], axis=-1)
        relative_position_SxRxTxW = position_SxRxT[..., :, None] - slot_SxRxW[..., None, :]
        # A clean prompt's keys count up to the row's first token; from there on the row has its own.
        real_SxRxW = jnp.concatenate([clean_SxRxC < first_SxRx1, jnp.ones_like(position_SxRxT, bool)], axis=-1)
        mask_SxRxTxW = (relative_position_SxRxTxW >= 0) & real_SxRxW[..., None, :]

        def mask(window: int) -> jax.Array:
            return mask_SxRxTxW & (relative_position_SxRxTxW < window)

        return tables_by_layer(config, self.position_SxN, mask)


@dataclasses.dataclass(frozen=True)
class Readout:
    """A user's readouts: pure functions of logits, measured in place of the logit difference.

    Each maps the logits of the next token after B prompts, fp32 [B, V], to a number for each prompt, [B]; with several
    positions, the logits at the last C tokens, [B, C, V].
    """

    functions: tuple[Callable[[jax.Array], jax.Array], ...]  #: one that is measured, or several to rank features by
    positions: int = 1  #: C


class LaterSite(NamedTuple):
    """A site after the one at which a decoder is split, whose value edits change, too."""

    site: Site
    scale: float  #: the factor that multiplies a change before it is added there


@dataclasses.dataclass(frozen=True)
class SplitPoint:
    """The site at which a decoder is split, and its settings. Hashable: it can be a static argument of ``jax.jit``."""

    config: DecoderConfig  #: the decoder
    site: Site  #: the site whose value the suffix starts from
    reads: Site  #: the site that the dictionary reads: the same one, or one before it
    mesh: Mesh  #: the devices
    rules: RunRules = GRADIENT  #: rules of differentiation
    readout: Readout | None = None  #: what is measured in place of the logit difference; None: the difference itself
    #: sites after it, which edits change, too: the value is then the site's, followed by a change of each of them
    later: tuple[LaterSite, ...] = ()

    @property
    def positions(self) -> int:
        """The number of last positions at which logits are read."""
        return self.readout.positions if self.readout else 1

    @property
    def in_stream(self) -> bool:
        """Return whether the site is the whole stream between two layers; then nothing else enters the suffix."""
        return self.site.kind in ("resid_pre", "resid_post")

    @property
    def _start(self) -> int:
        """Return the suffix's first layer."""
        return self.site.layer + (self.site.kind == "resid_post")

    @property
    def _ends(self) -> list[int]:
        """Return where the parts of the value but the last end."""
        widths = [site.width(self.config) for site in (self.site, *(later.site for later in self.later))]
        return [sum(widths[:count]) for count in range(1, len(widths))]

    @property
    def _has_inner_sites(self) -> bool:
        """Return whether a site within attention or the MLP is changed."""
        return any(site.kind in INNER_KINDS for site in (self.site, *(later.site for later in self.later)))

    def run_prefix(self, params: decoder.Params, ids_BxT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Run the prompts, token ids ``ids``, up to the site.

        Returns:
          The stream entering the suffix's first layer, the site's value, and what the dictionary reads, [B, T, width of
          the site]; the same array where they are the same site. Of several sites the width is that of all.
        """
        x_BxTxD = decoder.embed(self.config, params, ids_BxT)
        if self.in_stream and self.reads == self.site and not self.later:
            x_BxTxD = run_layers(self.config, params, x_BxTxD, 0, self._start, rules=self.rules).x
            return x_BxTxD, x_BxTxD, x_BxTxD
        seen: dict[Site, jax.Array] = {}
        # Values are recorded while tracing, so that one run gives the stream, the site and what is read.

        def look(kind: str, layer: int | jax.Array, value_BxTxD: jax.Array) -> jax.Array:
            """Record a site's value and leave it unchanged."""
            assert isinstance(layer, int)
            return seen.setdefault(Site(kind, layer), value_BxTxD)

        sites = [self.reads, *(later.site for later in self.later)]
        layers = {site.layer for site in (self.site, *sites)}
        inner_sites = self._has_inner_sites or self.reads.kind in INNER_KINDS
        taps = Taps(look, layers, inner_sites)
        run_layers(self.config, params, x_BxTxD, 0, max(layers) + 1, taps, rules=self.rules)
        stream = self.site if self.in_stream else Site("resid_pre", self.site.layer)
        # Of several sites all three are as wide: zeros stand for the changes, and beside the stream.
        unchanged = [jnp.zeros_like(seen[later.site]) for later in self.later]
        wide = [jnp.concatenate([seen[site], *unchanged], axis=-1) for site in (stream, self.site)]
        return wide[0], wide[1], jnp.concatenate([seen[site] for site in sites], axis=-1)

    def run_suffix(self, params: decoder.Params, stream_BxTxD: jax.Array, value_BxTxX: jax.Array) -> jax.Array:
        """Run the rest of the model from a value of the site, edited or not; return the stream leaving the last layer.

        The ``stream`` comes from ``run_prefix``, [B, T, D], and so does the result's shape; X is the site's width.
        """
        return self._run_on(params, stream_BxTxD, value_BxTxX).x

    def run_suffix_with_kv(
        self, params: decoder.Params, stream_BxTxD: jax.Array, value_BxTxX: jax.Array
    ) -> tuple[jax.Array, PrefixKV]:
        """Return the result of ``run_suffix`` and the keys and values of its layers; see ``run_suffix``."""
        if isinstance(self.config, TorchConfig):
            clean = torch_bridge.as_prefix(stream_BxTxD, value_BxTxX)
            return self.run_suffix(params, stream_BxTxD, value_BxTxX), PrefixKV(*clean)
        output = self._run_on(params, stream_BxTxD, value_BxTxX, collect=(KEYS, VALUES))
        return output.x, PrefixKV(output.collected[KEYS], output.collected[VALUES])

    def run_shared_suffix(
        self,
        params: decoder.Params,
        prefix: PrefixKV,
        batch: SharedPrefixBatch,
        stream_SxNxD: jax.Array,
        value_SxNxX: jax.Array,
    ) -> jax.Array:
        """Run the rest of the model on edited prompts, from the first changed token of each on.

        ``stream`` and ``value`` are as for ``run_suffix``, of the batch's tokens; ``prefix`` is the result of
        ``run_suffix_with_kv``. Returned is the stream leaving the last layer, [S, N, D].
        """
        if isinstance(self.config, TorchConfig):
            run = functools.partial(self.run_suffix, params)
            return torch_bridge.run_rows(run, prefix, batch, (stream_SxNxD, value_SxNxX))
        attention = batch.attention(self.config, prefix, self._start)
        return self._run_on(params, stream_SxNxD, value_SxNxX, attention).x

    def _run_on(
        self,
        params: decoder.Params,
        stream: jax.Array,
        value: jax.Array,
        attention: AttentionSpec | None = None,
        collect: tuple[str, ...] = (),
    ) -> LayersOutput:
        """Run the suffix. Unless the site is the stream, a hook in the first layer puts the value there."""
        hook: Hook | None = None
        value, *changes = jnp.split(value, self._ends, axis=-1) if self.later else (value,)
        changed = {site: scale * change for (site, scale), change in zip(self.later, changes, strict=True)}

        def edit(kind: str, layer: int | jax.Array, clean: jax.Array) -> jax.Array:
            """Put the value at the site, and add the changes at later ones."""
            assert isinstance(layer, int)
            site = Site(kind, layer)
            if site == self.site and not self.in_stream:
                return value
            return clean + changed[site].astype(clean.dtype) if site in changed else clean

        # A site within a layer is replaced on the way: the layer's earlier parts run again, for nothing.
        if self.later or not self.in_stream:
            hook = edit
        return run_layers(
            self.config,
            params,
            value if self.in_stream else stream[..., : self.config.d_model],
            self._start,
            self.config.n_layers,
            Taps(hook, {self._start, *(later.site.layer for later in self.later)}, self._has_inner_sites, collect),
            rules=self.rules,
            attention=attention,
        )

    def ends(self, x_BxTxD: jax.Array, last_B: jax.Array) -> jax.Array:
        """Return the stream where logits are read: at each prompt's last position [B, D], or at the last C [B, C, D].

        Args:
          x_BxTxD: the stream leaving the last layer.
          last_B: index of each prompt's last token; it has at least C.
        """
        if self.positions == 1:
            return jnp.take_along_axis(x_BxTxD, last_B[:, None, None], axis=1)[:, 0]
        position_BxC = last_B[:, None] - jnp.arange(self.positions - 1, -1, -1)[None, :]
        return jnp.take_along_axis(x_BxTxD, position_BxC[..., None], axis=1)

    def logit_difference(
        self, params: decoder.Params, x_BxTxD: jax.Array, last_B: jax.Array, answers_Bx2: jax.Array
    ) -> jax.Array:
        """Return logit(correct) - logit(wrong) at each prompt's last position, or the user's readout, fp32 [B].

        Columns of ``answers`` are token ids of the correct and the wrong answer; x is the stream leaving the model.
        """
        return self.readouts(params, self.ends(x_BxTxD, last_B), answers_Bx2)[:, 0]

    def readouts(
        self, params: decoder.Params, x_Rx: jax.Array, answers_Rx2: jax.Array, logp_RxV: jax.Array | None = None
    ) -> jax.Array:
        """Return readouts of the answers from the stream leaving the last layer.

        Args:
          params: parameters of the decoder.
          x_Rx: the stream of R prompts at their last positions; see ``ends``.
          answers_Rx2: token ids of the correct and the wrong answer.
          logp_RxV: the clean run's log-probabilities of the next token; None: for the logit difference alone.

        Returns:
          fp32 [R, 1], logit(correct) - logit(wrong), or with ``logp_RxV`` [R, 4]: the same, the log-probability of the
          correct answer's first token, whether that token is the argmax, and the Kullback-Leibler divergence of the
          next-token distribution from the clean one, in nats.
          With a readout of the user's fp32 [R, 1], its value.

        Raises:
          UserError: the user's readout returns something else than a number for each prompt.
        """
        if self.readout:
            width = x_Rx.shape[-1]
            logits_XxV = decoder.unembed(self.config, params, x_Rx.reshape(-1, width), self.rules)
            logits = logits_XxV.reshape(*x_Rx.shape[:-1], -1)
            (function,) = self.readout.functions
            value = jnp.asarray(function(logits))
            if value.shape != x_Rx.shape[:1]:
                raise UserError(
                    f"the readout returns an array {list(value.shape)} of logits {list(logits.shape)}: expected one "
                    "number for each prompt"
                )
            return value.astype(jnp.float32)[:, None]
        # Two rows of the unembedding suffice here; only top-1, log-probabilities and KL need the whole vocabulary.
        if logp_RxV is None:
            logits_Rx2 = self.logits(params, x_Rx, answers_Rx2)
            return logits_Rx2[:, :1] - logits_Rx2[:, 1:]
        logits_RxV = decoder.unembed(self.config, params, x_Rx, self.rules)
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
        """Return the logits [R, N] of these ids only, from the stream x leaving the last layer."""

        def prompt_logits(x_D: jax.Array, ids_N: jax.Array) -> jax.Array:
            """Return the logits of one prompt's ids."""
            restricted = decoder.restrict_unembedding(self.config, params, ids_N)
            return decoder.unembed(self.config, restricted, x_D[None, :], self.rules)[0]

        # Each prompt has answers of its own, so the columns of the unembedding are gathered for each.
        return jax.vmap(prompt_logits)(x_RxD, ids_RxN)
