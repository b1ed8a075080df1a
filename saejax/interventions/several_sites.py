"""Features of several sites as one tested set: of SAEs of different sites, or of a crosscoder, whose features have all.

The joint site is the values of all sites, one after the other; features of the first SAE are numbered first. The value
of the first site is edited as ever. At every later site what ablation removes of the clean run,

    x'_s = x_s - sum_i (f_i - r_i) W_dec_i,

is subtracted from the value that the edited layers below have made of it: f is computed once, from the clean x_s.

The dose of a set counts the changes of every site relative to the size of its values: with n_s the root mean square
over positions of the norm of the clean values, it is n_1 sqrt(sum_s (|change_s| / n_s)^2), in units of the first site.
A position that is an attention sink at one of the sites is edited at none.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from saejax.dictionaries import Dictionary, DictionaryConfig, joined
from saejax.dictionaries.rescale import to_output_units
from saejax.errors import UserError
from saejax.interventions import bases
from saejax.models.language_model import LanguageModel
from saejax.models.sites import KINDS, OtherSite, Site, site_parts
from saejax.models.split import LaterSite
from saejax.parallel.mesh import fitting_sharding, place_on
from saejax.tasks.behaviours import Prompt

_LARGEST = 8  # GiB of the matrix of all decoders, which is made anew for every untrained dictionary
_ORDER = ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")  # within a layer


class SeveralSites(Dictionary):
    """Features at several sites, whose values are read one after the other; ``JointSAEs`` or ``SitesOfCrosscoder``."""

    norms: tuple[float, ...]  #: root mean square of the norm of each site's values

    @property
    def parts(self) -> list[DictionaryConfig]:
        """The configuration of an SAE of each site, in their order."""
        raise NotImplementedError

    def split_values(self, x_xD: jax.Array) -> list[jax.Array]:
        """Return the value of each site, given all values one after the other."""
        return jnp.split(x_xD, np.cumsum([part.d_in for part in self.parts])[:-1], axis=-1)

    @property
    def later_sites(self) -> tuple[LaterSite, ...]:
        """The sites after the first one, with the factors that restore the size of stored changes there."""
        pairs = list(zip(self.parts, self.norms, strict=True))[1:]
        return tuple(LaterSite(Site.parse(part.site), norm / self.norms[0]) for part, norm in pairs)

    def untrained(self, fires_F: np.ndarray, positions: int, seed: int) -> "SeveralSites":
        """Return an untrained dictionary of the same sites; see ``bases.untrained``.

        Args:
          fires_F: at how many positions each feature fires: as many are active in the untrained dictionary.
          positions: number of positions.
          seed: seed of the directions.
        """
        raise NotImplementedError

    def _change_parts(self, change: Callable[[Any], Any]) -> Self:
        """Return the same, made of changed dictionaries; ``change`` takes a dictionary and returns the changed one."""
        raise NotImplementedError

    def with_sink_norms(self, sink_norm: Callable[[str], float], replace: bool = False) -> Self:
        """Return the same with the sink rules of the sites."""
        return self._change_parts(lambda dictionary: dictionary.with_sink_norms(sink_norm, replace))

    def on_mesh(self, mesh: Mesh) -> Self:
        """Return the same on a mesh's devices, features split over ``model``."""
        placed = self._change_parts(lambda dictionary: dictionary.on_mesh(mesh))
        W_dec_FxD = placed.W_dec_FxD[...]
        placed.W_dec_FxD = nnx.Param(place_on(W_dec_FxD, fitting_sharding(mesh, W_dec_FxD.shape, "model", None)))
        return placed

    def _set_decoder(self, W_dec_FxD: jax.Array) -> None:
        """Set the decoder rows, of which each site's part is relative to the size of its values, and the config."""
        self.W_dec_FxD = nnx.Param(W_dec_FxD)
        self.b_dec_D = nnx.Param(jnp.zeros(W_dec_FxD.shape[1], jnp.float32))
        self.matmul_dtype = nnx.static("float32")
        count, width = W_dec_FxD.shape
        plain = DictionaryConfig(kind="linear", site=self.parts[0].site, d_in=width, n_features=count)
        self.config = nnx.static(plain)


class JointSAEs(SeveralSites):
    """SAEs of several sites.

    Args:
      saes: SAEs of different sites, the first site first.
      norms: root mean square of the norm of each site's values.
    """

    def __init__(self, saes: Sequence[Dictionary], norms: Sequence[float]):
        self.norms = nnx.static(tuple(norms))
        for number, sae in enumerate(saes):
            # In output units, in which the change of a site is activations times decoder rows.
            setattr(self, f"sae_{number}", to_output_units(sae))
        scaled = [sae.W_dec_FxD[...] * (norms[0] / norm) for sae, norm in zip(saes, norms, strict=True)]
        self._set_decoder(jax.scipy.linalg.block_diag(*scaled))

    @property
    def saes(self) -> list[Dictionary]:
        """The SAEs in their order."""
        return [getattr(self, f"sae_{number}") for number in range(len(self.norms))]

    @property
    def parts(self) -> list[DictionaryConfig]:
        """The SAEs' configurations."""
        return [sae.config for sae in self.saes]

    def locate(self, feature: int) -> tuple[str, int]:
        """Return the site of a feature, and its index in the site's SAE."""
        for sae in self.saes:
            if feature < sae.config.n_features:
                break
            feature -= sae.config.n_features
        return sae.site, feature

    def split(self, array_xF: np.ndarray) -> list[np.ndarray]:
        """Return the parts of an array of features that belong to the SAEs."""
        return np.split(array_xF, np.cumsum([sae.config.n_features for sae in self.saes])[:-1], axis=-1)

    def encode(self, x_xD: jax.Array, numbers: Any = None) -> jax.Array:
        """Return the activations of all SAEs, [..., F]."""
        values = self.split_values(x_xD)
        return jnp.concatenate([sae.encode(x) for sae, x in zip(self.saes, values, strict=True)], axis=-1)

    def fires(self, f_xF: jax.Array) -> jax.Array:
        """Return where activations count as active."""
        ends = np.cumsum([sae.config.n_features for sae in self.saes])[:-1]
        parts = jnp.split(f_xF, ends, axis=-1)
        return jnp.concatenate([sae.fires(f) for sae, f in zip(self.saes, parts, strict=True)], axis=-1)

    def is_not_sink(self, x_xD: jax.Array, y_xD: jax.Array | None = None) -> jax.Array:
        """Return True where a position is an attention sink at none of the sites."""
        inside = [sae.is_not_sink(x) for sae, x in zip(self.saes, self.split_values(x_xD), strict=True)]
        return jnp.stack(inside).all(axis=0)

    def _change_parts(self, change: Callable[[Any], Any]) -> "JointSAEs":
        return JointSAEs([change(sae) for sae in self.saes], self.norms)

    def untrained(self, fires_F: np.ndarray, positions: int, seed: int) -> "JointSAEs":
        """Return untrained dictionaries of the same sites."""
        saes = []
        for number, (sae, fires) in enumerate(zip(self.saes, self.split(fires_F), strict=True)):
            own_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
            saes.append(bases.untrained(sae, round(fires.sum() / max(positions, 1)), own_seed))
        return JointSAEs(saes, self.norms)


class SitesOfCrosscoder(SeveralSites):
    """A crosscoder at its sites: a feature is read at all of them, and an edit of it changes each by its row there.

    Args:
      crosscoder: a crosscoder of one model's sites.
      norms: root mean square of the norm of each site's values, in the order of ``parts``.
    """

    def __init__(self, crosscoder: Dictionary, norms: Sequence[float]):
        self.norms = nnx.static(tuple(norms))
        self.crosscoder = crosscoder
        # Rows are for scaled values, and what an edit changes are the sites' own ones.
        rows = joined.unjoin(crosscoder.config, crosscoder.W_dec_FxD[...])
        scaled = [rows[part.site] * (norms[0] / norm) for part, norm in zip(self.parts, norms, strict=True)]
        self._set_decoder(jnp.concatenate(scaled, axis=1))

    @property
    def parts(self) -> list[DictionaryConfig]:
        """The configuration of an SAE of each part, in the order of the model."""
        return crosscoder_parts(self.crosscoder.config)

    def _joined(self, x_xD: jax.Array) -> jax.Array:
        """Return what the crosscoder reads, its parts scaled and in its own order."""
        by_site = {part.site: x for part, x in zip(self.parts, self.split_values(x_xD), strict=True)}
        return joined.join(self.crosscoder.config, by_site)

    def encode(self, x_xD: jax.Array, numbers: Any = None) -> jax.Array:
        """Return the crosscoder's activations, [..., F]."""
        return self.crosscoder.encode(self._joined(x_xD))

    def fires(self, f_xF: jax.Array) -> jax.Array:
        """Return where activations count as active."""
        return self.crosscoder.fires(f_xF)

    def is_not_sink(self, x_xD: jax.Array, y_xD: jax.Array | None = None) -> jax.Array:
        """Return True where a position is an attention sink at none of the sites."""
        return joined.is_not_sink(self.crosscoder.config, self._joined(x_xD))

    def _change_parts(self, change: Callable[[Any], Any]) -> "SitesOfCrosscoder":
        return SitesOfCrosscoder(change(self.crosscoder), self.norms)

    def untrained(self, fires_F: np.ndarray, positions: int, seed: int) -> "SitesOfCrosscoder":
        """Return an untrained crosscoder of the same sites."""
        active = round(fires_F.sum() / max(positions, 1))
        return SitesOfCrosscoder(bases.untrained(self.crosscoder, active, seed), self.norms)


class DirectionsAtSites(SeveralSites):
    """Directions of the joint value of several sites, of which each site's part is relative to the size of its values.

    A direction's activation is its product with the joint value.

    Args:
      like: features of the same sites, whose sinks are left alone.
      directions_FxD: the directions.
    """

    def __init__(self, like: SeveralSites, directions_FxD: Any):
        self.norms, self.like = nnx.static(like.norms), like
        self._set_decoder(jnp.asarray(directions_FxD, jnp.float32))

    @property
    def parts(self) -> list[DictionaryConfig]:
        """The configuration of an SAE of each site, in their order."""
        return self.like.parts

    def encode(self, x_xD: jax.Array, numbers: Any = None) -> jax.Array:
        """Return the product of each direction with the joint value, [..., F]."""
        pairs = zip(self.split_values(x_xD), self.norms, strict=True)
        relative_xD = jnp.concatenate([value * (self.norms[0] / norm) for value, norm in pairs], axis=-1)
        # Accelerators multiply float32 in fewer digits by default, which would round the values themselves.
        return jnp.matmul(relative_xD, self.W_dec_FxD[...].T, precision=jax.lax.Precision.HIGHEST)

    def fires(self, f_xF: jax.Array) -> jax.Array:
        """Return where activations are not 0."""
        return f_xF != 0

    def is_not_sink(self, x_xD: jax.Array, y_xD: jax.Array | None = None) -> jax.Array:
        """Return True where a position is an attention sink at none of the sites."""
        return self.like.is_not_sink(x_xD)

    def _change_parts(self, change: Callable[[Any], Any]) -> "DirectionsAtSites":
        return DirectionsAtSites(change(self.like), self.W_dec_FxD[...])


def crosscoder_parts(config: DictionaryConfig) -> list[DictionaryConfig]:
    """Return the configuration of an SAE of each part of a crosscoder, in the order of the model."""
    parts = [
        dataclasses.replace(config, site=name, d_in=width, widths=(), scales=(), max_norms=())
        for name, width in zip(site_parts(config.site), config.widths, strict=True)
    ]
    return sorted(parts, key=lambda part: _place(Site.parse(part.site)))


def place_at_sites(lm: LanguageModel, dictionary: Dictionary, prompts: Sequence[Prompt]) -> Dictionary:
    """Return a crosscoder at its sites, and any other dictionary itself.

    Args:
      lm: the model.
      dictionary: if it is a crosscoder, one of one model's sites.
      prompts: those of the train split, or all if there are none, say how large values of each site are.

    Raises:
      UserError: a part is of a second model, within attention or the MLP, or no site of the decoder, or has no values
        but attention sinks.
    """
    if not dictionary.config.widths:
        return dictionary
    for name in site_parts(dictionary.site):
        if OtherSite.names(name):
            raise UserError(f"the crosscoder reads {name}, a site of a second model: expected one of one model's sites")
        if Site.parse(name).kind not in KINDS:
            raise UserError(
                f"the crosscoder reads {name}, which lies within attention or the MLP: of crosscoders, features of "
                f"sites as wide as the stream are tested, {', '.join(KINDS)}"
            )
    parts = crosscoder_parts(dictionary.config)
    for part in parts:
        Site.parse(part.site).check(lm.config)
    crosscoder = dictionary.with_sink_norms(lm.sink_norm)
    texts = [p.text for p in prompts if p.split == "train"] or [p.text for p in prompts]

    def is_counted(values: Mapping[str, jax.Array]) -> np.ndarray:
        return np.asarray(joined.is_not_sink(crosscoder.config, joined.join(crosscoder.config, values)))

    return SitesOfCrosscoder(crosscoder, _value_norms(lm, [part.site for part in parts], texts, is_counted))


def join_saes(lm: LanguageModel, saes: Sequence[Dictionary], texts: Sequence[str]) -> JointSAEs:
    """Return SAEs of several sites as one dictionary.

    Args:
      lm: the model.
      saes: SAEs of different sites, in any order.
      texts: texts whose values say how large values of each site are.

    Raises:
      UserError: one is a transcoder or a crosscoder, two are of one site, or a site has no values but attention sinks.
    """
    for sae in saes:
        if sae.config.target or sae.config.widths or Site.parse(sae.site).kind not in KINDS:
            raise UserError(f"{sae!r} is no SAE of one site of the stream: sets over several sites are of SAEs")
    count, width = (
        sum(sizes) for sizes in zip(*((sae.config.n_features, sae.config.d_in) for sae in saes), strict=True)
    )
    if (size := 4 * count * width / 2**30) > _LARGEST:
        raise UserError(
            f"the decoders of {len(saes)} sites would be one matrix of {size:.0f} GiB, more than {_LARGEST}: give "
            "fewer sites, or narrower dictionaries"
        )
    ordered = sorted(saes, key=lambda sae: _place(Site.parse(sae.site)))
    sites = [sae.site for sae in ordered]
    if len(set(sites)) < len(sites):
        raise UserError(f"the dictionaries are of {', '.join(sites)}: expected a different site for each")
    norms = []
    for sae in ordered:
        with_rule = sae.with_sink_norms(lm.sink_norm)
        norms += _value_norms(lm, [sae.site], texts, lambda values, sae=with_rule: sae.is_not_sink(values[sae.site]))
    return JointSAEs(ordered, norms)


def _value_norms(lm: LanguageModel, sites: Sequence[str], texts: Sequence[str], is_counted: Callable) -> list[float]:
    """Return the root mean square of the norm of each site's values, where ``is_counted`` of them by site is True."""
    tokens = lm.tokenize(texts)
    values = lm(tokens, capture=list(sites), logits=False).sites
    is_counted_BxT = np.asarray(is_counted(values)) & tokens.mask_BxT
    norms = []
    for site in sites:
        norm_N = np.linalg.norm(np.asarray(values[site], np.float64)[is_counted_BxT], axis=-1)
        norms.append(math.sqrt(np.mean(norm_N**2)) if len(norm_N) else 0.0)
        if not norms[-1] > 0:
            raise UserError(f"{site} has no value but attention sinks on the train prompts")
    return norms


def _place(site: Site) -> tuple[int, int]:
    """Return the order of a site among all sites."""
    return site.layer, _ORDER.index(site.kind)
