"""Edits of features inside a forward pass of the language model."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from saejax.dictionaries.joined import join, unjoin
from saejax.dictionaries.kinds.base import Dictionary
from saejax.dictionaries.matmul import matmul
from saejax.models.edits import ForwardPass, Positions, SiteEdit, Values, check_width, fit_values
from saejax.models.sinks import position_norms
from saejax.models.sites import Site
from saejax.short_reprs import has_short_repr

_FIRST = 8  # tokens at the start of a text among which sinks are looked for; chat templates begin with up to four


@has_short_repr
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FeatureEdit:
    """A change of K features where a dictionary writes; made by the methods of ``Dictionary``.

        g_i = factor_i f_i(x) + offset_i
        y' = y + sum_i (g_i - f_i(x)) W_dec_i           the dictionary's error term stays
        y' = decode(f(x) with g in place of f) + e      the error term becomes e

    For a sparse autoencoder y is x; for a transcoder it is the value at the site that it predicts; for a crosscoder the
    joined value, and the model makes the edits of ``at_parts``.
    """

    dictionary: Dictionary  #: the dictionary whose features are changed
    features_K: jax.Array  #: the feature indices
    #: factor_1x1xK and offset: as above; the offset's N is K.
    factor_1x1xK: jax.Array
    offset: Values
    error: Values | None  #: e, its N is the width of y; None: the error term stays
    positions: Positions  #: where it acts; never at padding and attention sinks
    reads: Site = dataclasses.field(metadata=dict(static=True))  #: the site of x (static)
    site: Site = dataclasses.field(metadata=dict(static=True))  #: the site of y (static)
    #: sites of a crosscoder's parts, of which ``site`` is the first; (): it is none (static).
    parts: tuple[Site, ...] = dataclasses.field(default=(), metadata=dict(static=True))
    #: True where prompts have no attention sink without edits, N is 1; None: sinks are told by the edited run.
    no_sink: Values | None = None

    def with_sink_norms(self, sink_norm: Callable[[str], float]) -> "FeatureEdit":
        """Return the edit with the sink rule of its dictionary's sites; see ``Dictionary.with_sink_norms``."""
        return dataclasses.replace(self, dictionary=self.dictionary.with_sink_norms(sink_norm))

    def with_sinks_of(self, values: Mapping[str, jax.Array]) -> "FeatureEdit":
        """Return the edit with the attention sinks of an unedited run, given its values [B, T, D] at the two sites."""
        no_sink_BxT = self.dictionary.is_not_sink(*(values[str(site)] for site in (self.reads, self.site)))
        return dataclasses.replace(self, no_sink=Values(no_sink_BxT[..., None], True))

    def first_tokens(self, shortest: int) -> slice | None:
        """Return the tokens at which it acts if these are among the first ones of texts, which may be attention sinks.

        Args:
          shortest: tokens of the shortest prompt; an edit that goes beyond may act at new tokens.

        Returns:
          The positions; None: it acts elsewhere, too.
        """
        start, stop = int(self.positions.start), int(self.positions.stop)
        return slice(start, stop) if not self.positions.only and stop <= min(_FIRST, shortest) else None

    def is_at_sinks(self, values: Mapping[str, jax.Array], positions: slice) -> bool:
        """Return whether all these tokens of every text are attention sinks.

        Args:
          values: [B, T, D] at the sites ``reads`` and ``site``, of a crosscoder at its parts.
          positions: of the tokens.
        """
        if self.parts:
            joined = join(self.dictionary.config, {site: value[:, positions] for site, value in values.items()})
            return not bool(self.dictionary.is_not_sink(joined).any())
        tokens = (values[str(site)][:, positions] for site in (self.reads, self.site))
        return not bool(self.dictionary.is_not_sink(*tokens).any())

    def __call__(self, value_BxTxO: jax.Array, run: ForwardPass) -> jax.Array:
        """Return the edited value of ``site``."""
        dictionary = self.dictionary
        check_width(self.site, value_BxTxO.shape[-1], "a dictionary", dictionary.config.d_out)
        x_BxTxD = value_BxTxO if self.reads == self.site else run.values[self.reads]
        f_BxTxK = dictionary.encode_features(x_BxTxD, self.features_K)
        offset_xK, known_BxT = self.offset.at(run)
        # Without earlier edits here: a position that one of them made longer is no attention sink of the model.
        unedited = run.unedited.get(self.reads, x_BxTxD), run.unedited.get(self.site, value_BxTxO)
        no_sink_BxT = dictionary.is_not_sink(*unedited)
        if self.no_sink is not None:  # nor one that was made longer by edits of other sites
            clean_BxTx1, given_BxT = self.no_sink.at(run)
            no_sink_BxT = jnp.where(given_BxT, clean_BxTx1[..., 0], no_sink_BxT)
        where_BxT = self.positions.at(run) & known_BxT & no_sink_BxT
        change_BxTxK = (self.factor_1x1xK - 1) * f_BxTxK + offset_xK
        if self.positions.only == "fires":
            fires_BxTxK = dictionary.fires(f_BxTxK)
            # A feature that is silent stays so, though an offset would be added to its 0.
            change_BxTxK = jnp.where(fires_BxTxK, change_BxTxK, 0.0)
            where_BxT &= fires_BxTxK.any(axis=-1)
        if self.error is None:
            # K rows of the decoder instead of F: what is not edited need not be decoded.
            change_BxTxO = matmul(change_BxTxK, dictionary.W_dec_FxD[...][self.features_K])
            scale_BxTx1 = dictionary.output_scale(x_BxTxD)
            new_BxTxO = value_BxTxO + (change_BxTxO if scale_BxTx1 is None else change_BxTxO * scale_BxTx1)
        else:
            error, known_BxT = self.error.at(run)
            where_BxT &= known_BxT
            f_BxTxF = dictionary.encode(x_BxTxD)
            new_BxTxO = dictionary.decode(f_BxTxF.at[..., self.features_K].add(change_BxTxK), x_BxTxD) + error
        return jnp.where(where_BxT[..., None], new_BxTxO.astype(value_BxTxO.dtype), value_BxTxO)

    def at_parts(self, values: Mapping[str, jax.Array], run: ForwardPass) -> list[SiteEdit]:
        """Return an edit for each part of a crosscoder, given the parts' values [B, T, width] in a pass ``run``.

        Some parts come before others, so that features are read in a pass without edits. What the edit makes of the
        joined value is added at each part, x_p' = x_p + delta_p, which keeps what earlier parts do to it. New tokens of
        a generation stay unchanged: see ``at_parts_of_new_tokens``.
        """
        config = self.dictionary.config
        x_BxTxD = join(config, values)
        (edit,) = fit_values([self], run.position_BxT.shape, x_BxTxD.shape[1])
        deltas, everywhere = unjoin(config, edit(x_BxTxD, run) - x_BxTxD), Positions.parse("all")
        changes = zip(deltas.values(), self.parts, strict=True)
        return [SiteEdit(jnp.float32(1), Values(delta, True), everywhere, site) for delta, site in changes]

    def at_parts_of_new_tokens(self) -> list["NewTokensEdit"]:
        """Return an edit of a generation's new tokens for each part of a crosscoder; none but for steering.

        What is added to features changes the parts whatever the features are. Any other edit would have to read them,
        and so a second pass over each new token, up to the last part, before the first part can be changed.
        """
        config, dictionary = self.dictionary.config, self.dictionary
        is_constant = not self.offset.by_position and self.offset.values_BxTxN.shape[:2] == (1, 1)
        reads = self.positions.only == "fires" or not bool((self.factor_1x1xK == 1).all())
        # What a dictionary that normalises tokens writes has another scale at each of them.
        reads |= dictionary.output_scale(jnp.ones((1, 1, config.d_in))) is not None
        if reads or not is_constant or self.error is not None:
            return []
        delta_1x1xD = matmul(self.offset.values_BxTxN, dictionary.W_dec_FxD[...][self.features_K])
        where = dataclasses.replace(self.positions, only="new")
        parts = zip(unjoin(config, delta_1x1xD).values(), config.max_norms, self.parts, strict=True)
        return [
            NewTokensEdit(SiteEdit(jnp.float32(1), Values(delta, False), where, site), jnp.float32(max_norm))
            for delta, max_norm, site in parts
        ]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NewTokensEdit:
    """Steering of a generation's new tokens at one part of a crosscoder; attention sinks of the part stay."""

    edit: SiteEdit  #: what is added, at new tokens alone
    max_norm: jax.Array  #: norm above which a position of the part is an attention sink

    @property
    def site(self) -> Site:
        """The site of the part."""
        return self.edit.site

    def __call__(self, value_BxTxD: jax.Array, run: ForwardPass) -> jax.Array:
        """Return the edited value of the part."""
        is_sink_BxT = position_norms(run.unedited.get(self.site, value_BxTxD)) > self.max_norm
        return jnp.where(is_sink_BxT[..., None], value_BxTxD, self.edit(value_BxTxD, run))
