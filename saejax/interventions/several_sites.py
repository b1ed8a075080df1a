"""SAEs of several sites as one dictionary, so that features of several sites or layers are one tested set.

The joint site is the values of all sites, one after the other; features of the first SAE are numbered first. The value
of the first site is edited as ever. At every later site what ablation removes of the clean run,

    x'_s = x_s - sum_i (f_i - r_i) W_dec_i,

is subtracted from the value that the edited layers below have made of it: f is computed once, from the clean x_s.

The dose of a set counts the changes of every site relative to the size of its values: with n_s the root mean square
over positions of the norm of the clean values, it is n_1 sqrt(sum_s (|change_s| / n_s)^2), in units of the first site.
A position that is an attention sink at one of the sites is edited at none.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.dictionaries.rescale import to_output_units
from saejax.errors import UserError
from saejax.interventions import bases
from saejax.models.language_model import LanguageModel
from saejax.models.sites import KINDS, Site
from saejax.models.split import LaterSite
from saejax.parallel.mesh import fitting_sharding, place_on

_LARGEST = 8  # GiB of the matrix of all decoders, which is made anew for every untrained dictionary
_ORDER = ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")  # within a layer


class SeveralSites(Dictionary):
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
        self.W_dec_FxD = nnx.Param(jax.scipy.linalg.block_diag(*scaled))
        self.b_dec_D = nnx.Param(jnp.zeros(self.W_dec_FxD.shape[1], jnp.float32))
        self.matmul_dtype = nnx.static("float32")
        config = saes[0].config
        count, width = self.W_dec_FxD.shape
        plain = DictionaryConfig(kind="linear", site=config.site, d_in=width, n_features=count)
        self.config = nnx.static(plain)

    @property
    def saes(self) -> list[Dictionary]:
        """The SAEs in their order."""
        return [getattr(self, f"sae_{number}") for number in range(len(self.norms))]

    @property
    def later_sites(self) -> tuple[LaterSite, ...]:
        """The sites after the first one, with the factors that restore the size of stored changes there."""
        pairs = list(zip(self.saes, self.norms, strict=True))[1:]
        return tuple(LaterSite(Site.parse(sae.site), norm / self.norms[0]) for sae, norm in pairs)

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

    def _values(self, x_xD: jax.Array) -> list[jax.Array]:
        return jnp.split(x_xD, np.cumsum([sae.config.d_in for sae in self.saes])[:-1], axis=-1)

    def encode(self, x_xD: jax.Array, numbers: Any = None) -> jax.Array:
        """Return the activations of all SAEs, [..., F]."""
        return jnp.concatenate([sae.encode(x) for sae, x in zip(self.saes, self._values(x_xD), strict=True)], axis=-1)

    def fires(self, f_xF: jax.Array) -> jax.Array:
        """Return where activations count as active."""
        ends = np.cumsum([sae.config.n_features for sae in self.saes])[:-1]
        parts = jnp.split(f_xF, ends, axis=-1)
        return jnp.concatenate([sae.fires(f) for sae, f in zip(self.saes, parts, strict=True)], axis=-1)

    def is_not_sink(self, x_xD: jax.Array, y_xD: jax.Array | None = None) -> jax.Array:
        """Return True where a position is an attention sink at none of the sites."""
        each = [sae.is_not_sink(x) for sae, x in zip(self.saes, self._values(x_xD), strict=True)]
        return jnp.stack(each).all(axis=0)

    def with_sink_norms(self, sink_norm: Callable[[str], float], replace: bool = False) -> "SeveralSites":
        """Return the same with the sink rules of the sites."""
        return SeveralSites([sae.with_sink_norms(sink_norm, replace) for sae in self.saes], self.norms)

    def on_mesh(self, mesh: Mesh) -> "SeveralSites":
        """Return the same on a mesh's devices, features split over ``model``."""
        placed = SeveralSites([sae.on_mesh(mesh) for sae in self.saes], self.norms)
        W_dec_FxD = placed.W_dec_FxD[...]
        placed.W_dec_FxD = nnx.Param(place_on(W_dec_FxD, fitting_sharding(mesh, W_dec_FxD.shape, "model", None)))
        return placed


def join_saes(lm: LanguageModel, saes: Sequence[Dictionary], texts: Sequence[str]) -> SeveralSites:
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
    tokens = lm.tokenize(texts)
    values = lm(tokens, capture=sites, logits=False).sites
    norms = []
    for sae in ordered:
        x_BxTxD = values[sae.site]
        is_counted_BxT = np.asarray(sae.with_sink_norms(lm.sink_norm).is_not_sink(x_BxTxD)) & tokens.mask_BxT
        norm_N = np.linalg.norm(np.asarray(x_BxTxD, np.float64)[is_counted_BxT], axis=-1)
        norms.append(math.sqrt(np.mean(norm_N**2)) if len(norm_N) else 0.0)
        if not norms[-1] > 0:
            raise UserError(f"{sae.site} has no value but attention sinks on the train prompts")
    return SeveralSites(ordered, norms)


def _place(site: Site) -> tuple[int, int]:
    """Return the order of a site among all sites."""
    return site.layer, _ORDER.index(site.kind)


def untrained_saes(joint: SeveralSites, fires_F: np.ndarray, positions: int, seed: int) -> SeveralSites:
    """Return untrained dictionaries of the same sites; see ``bases.untrained``.

    Args:
      joint: SAEs that they are like.
      fires_F: at how many positions each feature fires: as many are active in each untrained dictionary.
      positions: number of positions.
      seed: seed of the directions.
    """
    saes = []
    for number, (sae, fires) in enumerate(zip(joint.saes, joint.split(fires_F), strict=True)):
        own_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        saes.append(bases.untrained(sae, round(fires.sum() / max(positions, 1)), own_seed))
    return SeveralSites(saes, joint.norms)
