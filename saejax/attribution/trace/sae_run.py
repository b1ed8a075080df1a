"""A model that was run on a prompt, and what SAEs at some of its sites make of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from saejax.attribution.local.active import AT_ONCE, Active, active_features, encode_used
from saejax.attribution.local.frozen import FrozenModel
from saejax.attribution.local.layers import embed
from saejax.attribution.local.prompt_run import PromptRun
from saejax.attribution.local.readouts import padded
from saejax.attribution.local.saes import LayerSaes
from saejax.attribution.trace import perturbed
from saejax.attribution.trace.perturbed import Places
from saejax.dictionaries import Dictionary
from saejax.errors import UserError, one_of
from saejax.models import decoder
from saejax.models.config import RunRules
from saejax.models.language_model import LanguageModel
from saejax.parallel.collectives import to_host
from saejax.settings import GRAPH_ESTIMATES


@dataclasses.dataclass(frozen=True)
class SaeRun(PromptRun):
    """A model that was run on a prompt, and what its SAEs say of it.

    Attributes:
      places: where the SAEs stand.
      read_SxTxD: fp32, what they read.
      error_SxTxD: fp32, what the SAEs do not explain; at attention sinks all but b_dec.
      direct: whether sites are frozen at their values.
    """

    model: LanguageModel
    dictionaries: LayerSaes
    rules: RunRules
    ids_P: np.ndarray
    active: Active
    logits_V: np.ndarray
    last_D: jax.Array
    stream_LxTxD: jax.Array
    places: Places
    read_SxTxD: jax.Array
    error_SxTxD: np.ndarray
    direct: bool

    @classmethod
    def of(
        cls, model: LanguageModel, saes: LayerSaes, ids_P: np.ndarray, estimate: str = "gradient", direct: bool = False
    ) -> "SaeRun":
        """Run the model on a prompt, and each SAE on its site.

        Args:
          model: the language model.
          saes: of some of its sites.
          ids_P: int32 token ids of the prompt.
          estimate: one of ``GRAPH_ESTIMATES``: the rules by which gradients go through the model.
          direct: whether sites are frozen at their values.

        Raises:
          UserError: SAEs and model do not go together, a value is not finite, or no feature is active.
        """
        saes.check(model)
        rules = RunRules(backward=one_of(estimate, GRAPH_ESTIMATES, "estimate"))
        places = Places.of(saes.sites, model.config.n_layers)
        length = padded(len(ids_P))
        x_TxD = embed(FrozenModel(model.config), model.params, np.pad(ids_P, (0, length - len(ids_P))))
        # Nothing is added at the sites: this is the clean run, read where the SAEs read.
        none_SxTxD = jnp.zeros((len(saes.sites), *x_TxD.shape), x_TxD.dtype)
        last = np.int32(len(ids_P) - 1)
        ran = perturbed.run(model.config, rules, model.params, places, x_TxD, last, none_SxTxD)
        logits_V = to_host(decoder.unembed(model.config, model.params, ran.last_D[None], rules)[0])
        if not np.isfinite(logits_V).all():
            raise UserError(f"the logits of {model.source.name} are not finite: try --model.dtype=float32")
        active_by_site, errors = [], []
        for site, read_TxD in zip(saes.sites, ran.read_SxTxD, strict=True):
            sae = saes.load(site.layer, model.mesh)
            # Padding has no features; attention sinks are left out by the SAE's own rule.
            used_T = np.arange(length) < len(ids_P)
            site_active = active_features(sae, site.layer, read_TxD, used_T)
            active_by_site.append(site_active)
            size = max(1, min(length, AT_ONCE // sae.config.n_features))
            # Chunk by chunk: the activations of all positions would exceed the memory with a wide SAE.
            chunks = [slice(start, start + size) for start in range(0, length, size)]
            errors.append(np.concatenate([to_host(_errors(sae, read_TxD[chunk], used_T[chunk])) for chunk in chunks]))
        active = Active.concatenate(active_by_site)
        if not len(active):
            raise UserError(f"no feature of {saes.name} is active in this prompt: is it of this model?")
        return cls(
            model, saes, rules, ids_P, active, logits_V, ran.last_D, ran.stream_LxTxD, places, ran.read_SxTxD,
            np.stack(errors), direct,
        )  # fmt: skip

    @property
    def frozen_SxTxD(self) -> jax.Array | None:
        """The values at which sites are frozen; None: they are not."""
        return self.read_SxTxD if self.direct else None


@jax.jit
def _errors(sae: Dictionary, read_TxD: jax.Array, used_T: jax.Array) -> jax.Array:
    """Return what an SAE does not explain of what it reads, 0 where it is not used."""
    error_TxD = read_TxD - sae.decode(encode_used(sae, read_TxD, used_T), read_TxD)
    return jnp.where(used_T[:, None], error_TxD, jnp.zeros_like(error_TxD))
