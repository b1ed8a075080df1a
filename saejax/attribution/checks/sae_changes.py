"""A prompt run with features of its SAEs changed, each at a position of its own, and nothing held."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saejax.attribution.local.active import activations
from saejax.attribution.local.edits import Change
from saejax.attribution.trace.sae_run import SaeRun
from saejax.dictionaries import Dictionary
from saejax.models import decoder
from saejax.models.edits import ForwardPass
from saejax.models.sites import Site
from saejax.models.tokens import Tokens
from saejax.parallel.collectives import to_host


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PlacedEdit:
    """Sets features of an SAE to activations; the error term stays. An ``Edit``.

    Attributes:
      dictionary: the SAE.
      row_M, position_M, feature_M: int32, where and which, each once.
      value_M: fp32 activations.
      site: of the SAE (static).
    """

    dictionary: Dictionary
    row_M: jax.Array
    position_M: jax.Array
    feature_M: jax.Array
    value_M: jax.Array
    site: Site = dataclasses.field(metadata=dict(static=True))

    def __call__(self, value_BxTxD: jax.Array, run: ForwardPass) -> jax.Array:
        """Return the edited value of ``site``; attention sinks, where no feature is used, stay as they are."""
        x_MxD = value_BxTxD[self.row_M, self.position_M]
        own_M = jnp.take_along_axis(activations(self.dictionary, x_MxD), self.feature_M[:, None], axis=1)[:, 0]
        # At a sink the SAE has no features that could be set.
        change_M = jnp.where(self.dictionary.is_not_sink(x_MxD), self.value_M - own_M, 0)
        added_MxD = change_M[:, None] * self.dictionary.W_dec_FxD[...][self.feature_M]
        return value_BxTxD.at[self.row_M, self.position_M].add(added_MxD.astype(value_BxTxD.dtype))


def changed_logits(run: SaeRun, rows: Sequence[Sequence[Change]]) -> np.ndarray:
    """Return the logits after the last token when features are changed, fp32 [R, V].

    Each activation is set in the changed run: SAEs of later layers read the effects of changes in earlier layers.

    Args:
      run: the run of the prompt.
      rows: R lists of changes that are made together; positions are numbers.
    """
    model, row_changes = run.model, [(row, *change) for row, changes in enumerate(rows) for change in changes]
    edits = []
    for site in run.dictionaries.sites:
        at_site = [
            (row, position, feature, value)
            for row, layer, position, feature, value in row_changes
            if layer == site.layer
        ]
        if at_site:
            row_M, position_M, feature_M = jnp.asarray(np.array([change[:3] for change in at_site], np.int32).T)
            value_M = jnp.asarray([change[3] for change in at_site], jnp.float32)
            sae = run.dictionaries.load(site.layer, model.mesh)
            edits.append(PlacedEdit(sae, row_M, position_M, feature_M, value_M, site))
    tokens = Tokens(np.tile(run.ids_P, (len(rows), 1)), np.full(len(rows), len(run.ids_P), np.int32))
    leaving = Site("resid_post", model.config.n_layers - 1)
    last_RxD = model(tokens, capture=[leaving], edits=edits, logits=False).sites[str(leaving)][:, len(run.ids_P) - 1]
    return to_host(decoder.unembed(model.config, model.params, jnp.asarray(last_RxD), run.rules))
