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
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from saejax.errors import UserError
from saejax.models import decoder, torch_bridge
from saejax.models.attention import (
    QKV,
    Attend,
    AttentionSpec,
    AttentionTables,
    Layer,
    PatternInputs,
    TablesByLayer,
    tables_by_layer,
)
from saejax.models.config import GRADIENT, DecoderConfig, RunRules, TorchConfig
from saejax.models.decoder import KEYS, VALUES, LayersOutput, run_layers
from saejax.models.layers import Hook, Taps
from saejax.models.sites import INNER_KINDS, PATTERN, Site
from saejax.parallel.mesh import fitting_sharding
from saejax.reductions import index_of_highest, log_sum_exp, over_last


class PrefixKV(NamedTuple):
    """Keys, after the rotary embedding, and values of P whole prompts of S tokens, in L consecutive layers."""

    k_LxPxSxNxK: jax.Array
    v_LxPxSxNxK: jax.Array

    def placements(self, mesh: Mesh) -> "PrefixKV":
        """Return where they are on a mesh: heads split over ``model``, as their weights are, where it divides them."""
        return jax.tree.map(lambda kv: fitting_sharding(mesh, kv.shape, None, None, None, "model", None), self)


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

    def take(self, array_PxTx: jax.Array) -> jax.Array:
        """Return an array of the clean prompts at the tokens, [S, N, ...]."""
        return array_PxTx[self.prompt_SxN, self.position_SxN]

    def last_positions(self, end_SxE: jax.Array, ends: int) -> jax.Array:
        """Return the position of each row's last token, [S * R], given the index of its last ``ends`` tokens."""
        return jnp.take_along_axis(self.position_SxN, end_SxE, axis=1).reshape(-1, ends)[:, -1]

    @property
    def prompt_SxN(self) -> jax.Array:
        """Return the index of each token's clean prompt."""
        return self.per_token(self.prompt_SxR)

    @property
    def position_SxN(self) -> jax.Array:
        """Return the position of each token."""
        return self.per_token(self.first_SxR) + self.column_SxN

    def attention(
        self, config: DecoderConfig, prefix: PrefixKV, first_layer: int, end_SxRxC: jax.Array
    ) -> AttentionSpec:
        """Return how tokens attend to the earlier ones of their rows and to the clean prompt before these.

        Everything but attention computes each token once, however many rows share it. The result equals full runs of
        the rows in which nothing before their first tokens is changed.

        Args:
          config: the decoder.
          prefix: keys and values of the clean prompts, in the layers from ``first_layer`` on.
          first_layer: the first layer that is run.
          end_SxRxC: index among its shard's tokens of each row's last ones, whose attention patterns are collected.
        """

        def row_keys(layer: Layer, clean: jax.Array, edited: jax.Array) -> jax.Array:
            """Return keys or values of each row: of the clean prompt, then of the row's tokens."""
            of_layer = lax.dynamic_index_in_dim(clean, layer - first_layer, keepdims=False)
            of_rows = jax.vmap(lambda part, token: part[token])(edited, self.token_index_SxRxT)
            return jnp.concatenate([of_layer[self.prompt_SxR], of_rows], axis=2)

        def function(attend: Attend, layer: Layer, qkv: QKV, carried: tuple[()]) -> tuple[jax.Array, tuple[()]]:
            """Attend to the clean prompt before a row and to the row's own tokens."""
            q = jax.vmap(lambda part, token: part[token])(qkv[0], self.token_index_SxRxT)
            k, v = (row_keys(layer, *pair) for pair in zip(prefix, qkv[1:], strict=True))
            attended_SxRxTxHxK = attend(q, k, v)
            take_tokens = jax.vmap(lambda rows, row, column: rows[row, column])
            return take_tokens(attended_SxRxTxHxK, self.row_SxN, self.column_SxN), carried

        def pattern_inputs(layer: Layer, q: jax.Array, k: jax.Array, tables: AttentionTables) -> PatternInputs:
            """Return the queries of the rows' last tokens, all keys of the rows, and the mask between them."""
            assert isinstance(tables.mask, jax.Array)
            at_ends = jax.vmap(lambda part, end: part[end])
            column_SxRxC = at_ends(self.column_SxN, end_SxRxC)
            mask_SxRxCxW = jnp.take_along_axis(tables.mask, column_SxRxC[..., None], axis=2)
            return at_ends(q, end_SxRxC), row_keys(layer, prefix.k_LxPxSxNxK, k), tables._replace(mask=mask_SxRxCxW)

        tables = self._tables(config, prefix.k_LxPxSxNxK.shape[2])
        return AttentionSpec(tables, function, pattern_inputs=pattern_inputs)

    def patterns_by_position(self, pattern_LxSxRxHxCxW: jax.Array) -> jax.Array:
        """Return a ``pattern`` over clean keys and the row's keys as one over the tokens of the prompt, [..., T]."""
        new = self.token_index_SxRxT.shape[2]
        clean, edited = jnp.split(pattern_LxSxRxHxCxW, [pattern_LxSxRxHxCxW.shape[-1] - new], axis=-1)
        place_SxRxT = jnp.arange(clean.shape[-1])[None, None, :] - self.first_SxR[..., None]
        place = place_SxRxT[None, :, :, None, None, :]
        edited = jnp.take_along_axis(edited, jnp.clip(place, 0, new - 1), axis=-1)
        return jnp.where((place >= 0) & (place < new), edited, clean)

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
    positions, the logits at the last C tokens, [B, C, V]; with layers, a ``ReadoutInputs``.
    """

    functions: tuple[Callable[[Any], jax.Array], ...]  #: one that is measured, or several to rank features by
    positions: int = 1  #: C
    layers: tuple[int, ...] = ()  #: rising; the layers whose attention patterns they read, too


@dataclasses.dataclass(frozen=True)
class ReadoutInputs:
    """Logits and attention of B prompts: what a readout takes that reads attention."""

    logits: jax.Array  #: of the next token after the last one, fp32 [B, V], or after the last C tokens, [B, C, V]
    #: by layer, the share of each head's attention from the last C tokens to every token, fp32.
    patterns_BxHxCxT: Mapping[int, jax.Array]
    last_B: jax.Array  #: index of each prompt's last token
    keys: list[int] = dataclasses.field(default_factory=list)  #: those that the readout has asked for so far

    def attention(self, layer: int, head: int, query: int, key: int) -> jax.Array:
        """Return the share of a head's attention that goes from one token to another, fp32 [B], 0 to 1.

        Args:
          layer: one of the layers that the readout was said to read.
          head: the head, counted from 0.
          query: the token that attends, counted from the end of each prompt: -1 is the last one.
          key: the token that is attended to: counted from the first one, 0, which may be a BOS token; or from the end.

        Returns:
          The shares; 0 in a prompt without the key.

        Raises:
          UserError: the readout does not read the layer, or there is no such head or query.
        """
        if layer not in self.patterns_BxHxCxT:
            read = ", ".join(map(str, self.patterns_BxHxCxT))
            raise UserError(f"the readout reads the attention of layer {layer}, and readout_layers names {read}")
        pattern_BxHxCxT = self.patterns_BxHxCxT[layer]
        heads, positions = pattern_BxHxCxT.shape[1:3]
        if not 0 <= head < heads:
            raise UserError(f"the readout reads head {head} of layer {layer}, which has heads 0 to {heads - 1}")
        if not -positions <= query <= -1:
            raise UserError(
                f"the readout reads the attention of token {query}: expected one of the last readout_positions, "
                f"{-positions} to -1"
            )
        place_B = jnp.full_like(self.last_B, key) if key >= 0 else self.last_B + 1 + key
        exists_B = (place_B >= 0) & (place_B <= self.last_B)
        share_BxT = pattern_BxHxCxT[:, head, query]
        share_B = jnp.take_along_axis(share_BxT, jnp.clip(place_B, 0, share_BxT.shape[1] - 1)[:, None], axis=1)[:, 0]
        self.keys.append(key)
        return jnp.where(exists_B, share_B, 0.0)


class Ends(NamedTuple):
    """Output of the layers at the last tokens of R prompts, from which readouts are computed."""

    x_Rx: jax.Array  #: the stream leaving the last layer, at the last token [R, D] or at the last C [R, C, D]
    #: attention of the last C tokens in the layers that the user's readout reads; None if it reads none.
    pattern_LxRxHxCxT: jax.Array | None = None


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

    def least_tokens(self) -> int:
        """Return how many tokens a prompt must have for the user's readout, 1 without one.

        Raises:
          UserError: the readout reads attention that the model does not have, or that edits of the site do not reach.
        """
        layers = self.readout.layers if self.readout else ()
        if not layers:
            return self.positions
        if isinstance(self.config, TorchConfig):
            raise torch_bridge.not_in_torch_error(self.config)
        first = self.site.layer + (self.site.kind not in ("resid_pre", "attn_q", "attn_k"))
        for layer in layers:
            Site(PATTERN, layer).check(self.config)
            if layer < first:
                raise UserError(
                    f"the readout reads the attention of layer {layer}, which edits of {self.site} do not reach: "
                    f"expected layers {first} to {self.config.n_layers - 1}"
                )
        keys: list[int] = []
        # Called with zeros for two prompts, to see which keys it asks for.
        logits_shape = (2, self.config.vocab) if self.positions == 1 else (2, self.positions, self.config.vocab)
        logits, pattern = jnp.zeros(logits_shape), jnp.zeros((2, self.config.n_heads, self.positions, self.positions))
        inputs = ReadoutInputs(logits, dict.fromkeys(layers, pattern), jnp.zeros(2, jnp.int32), keys)
        for function in self.readout.functions if self.readout else ():
            function(inputs)
        return max(self.positions, *(key + 1 if key >= 0 else -key for key in keys), 1)

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
        end_SxR = batch.token_index_SxRxT[..., -1]
        return self._run_shared(params, prefix, batch, stream_SxNxD, value_SxNxX, end_SxR).x

    def _run_shared(
        self,
        params: decoder.Params,
        prefix: PrefixKV,
        batch: SharedPrefixBatch,
        stream_SxNxD: jax.Array,
        value_SxNxX: jax.Array,
        end_SxE: jax.Array,
    ) -> LayersOutput:
        """Run ``run_shared_suffix``; patterns that are collected are of the tokens with the indices ``end``."""
        if isinstance(self.config, TorchConfig):
            run = functools.partial(self.run_suffix, params)
            x = torch_bridge.run_rows(run, prefix, batch, (stream_SxNxD, value_SxNxX))
            return LayersOutput(x, {}, None)
        end_SxRxC = end_SxE.reshape(*batch.prompt_SxR.shape, -1)
        attention = batch.attention(self.config, prefix, self._start, end_SxRxC)
        return self._run_on(params, stream_SxNxD, value_SxNxX, attention, self._patterns)

    def _run_on(
        self,
        params: decoder.Params,
        stream: jax.Array,
        value: jax.Array,
        attention: AttentionSpec | None = None,
        collect: Collection[str] | Mapping[str, Sequence[int]] = (),
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
        return jnp.take_along_axis(x_BxTxD, self._last_positions(last_B)[..., None], axis=1)

    def _last_positions(self, last_B: jax.Array) -> jax.Array:
        """Return the positions of each prompt's last C tokens, [B, C]."""
        return last_B[:, None] - jnp.arange(self.positions - 1, -1, -1)[None, :]

    @property
    def _patterns(self) -> dict[str, tuple[int, ...]]:
        """The attention patterns that runs of the suffix collect."""
        return {PATTERN: self.readout.layers} if self.readout and self.readout.layers else {}

    def run_shared_ends(
        self,
        params: decoder.Params,
        prefix: PrefixKV,
        batch: SharedPrefixBatch,
        stream_SxNxD: jax.Array,
        value_SxNxX: jax.Array,
        end_SxE: jax.Array,
    ) -> Ends:
        """Run the rest of the model on edited prompts; return its output at the last tokens of all shards' rows.

        ``prefix``, ``batch``, ``stream`` and ``value`` are as for ``run_shared_suffix``; ``end`` has the index of the
        last tokens among the shard's, row after row.
        """
        output = self._run_shared(params, prefix, batch, stream_SxNxD, value_SxNxX, end_SxE)
        # Last tokens are picked before the unembedding, the logits of all others are not needed.
        last = jnp.take_along_axis(output.x, end_SxE[..., None], axis=1).reshape(-1, self.positions, output.x.shape[-1])
        last = last if self.positions > 1 else last[:, 0]
        if not self._patterns:
            return Ends(last)
        pattern = batch.patterns_by_position(output.collected[PATTERN])
        return Ends(last, pattern.reshape(len(pattern), -1, *pattern.shape[3:]))

    def logit_difference(
        self, params: decoder.Params, x_BxTxD: jax.Array, last_B: jax.Array, answers_Bx2: jax.Array
    ) -> jax.Array:
        """Return logit(correct) - logit(wrong) at each prompt's last position, fp32 [B].

        Columns of ``answers`` are token ids of the correct and the wrong answer; x is the stream leaving the model.
        """
        return self.readouts(params, Ends(self.ends(x_BxTxD, last_B)), last_B, answers_Bx2)[:, 0]

    def readouts(
        self,
        params: decoder.Params,
        ends: Ends,
        last_R: jax.Array,
        answers_Rx2: jax.Array,
        logp_RxV: jax.Array | None = None,
    ) -> jax.Array:
        """Return readouts of R prompts from what the layers leave at their last tokens.

        Args:
          params: parameters of the decoder.
          ends: from ``run_shared_ends``.
          last_R: index of each prompt's last token.
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
        x_Rx = ends.x_Rx
        if self.readout:
            width = x_Rx.shape[-1]
            logits_XxV = decoder.unembed(self.config, params, x_Rx.reshape(-1, width), self.rules)
            logits = logits_XxV.reshape(*x_Rx.shape[:-1], -1)
            (function,) = self.readout.functions
            inputs: Any = logits
            if ends.pattern_LxRxHxCxT is not None:
                patterns = dict(zip(self.readout.layers, ends.pattern_LxRxHxCxT, strict=True))
                inputs = ReadoutInputs(logits, patterns, last_R)
            value = jnp.asarray(function(inputs))
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
        edited_RxV = logits_RxV - log_sum_exp(logits_RxV)
        logits_Rx2 = jnp.take_along_axis(logits_RxV, answers_Rx2, axis=1)
        correct_Rx1 = answers_Rx2[:, :1]
        values = (
            logits_Rx2[:, 0] - logits_Rx2[:, 1],
            jnp.take_along_axis(edited_RxV, correct_Rx1, axis=1)[:, 0],
            index_of_highest(logits_RxV) == correct_Rx1[:, 0],
            over_last(jnp.sum, jnp.exp(logp_RxV) * (logp_RxV - edited_RxV))[:, 0],
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
