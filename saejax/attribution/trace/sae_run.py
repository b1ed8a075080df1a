"""A model that was run on a prompt with SAEs at some of its sites: their features, and runs with edits."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saejax.attribution.local.dictionaries import LayerSaes
from saejax.attribution.local.directions import FeatureOutputs
from saejax.attribution.local.edits import CHUNK, Change
from saejax.attribution.local.layers import FrozenModel, embed
from saejax.attribution.local.prompt_run import (
    Active,
    LocalRun,
    PromptRun,
    activations_of,
    active_features,
)
from saejax.attribution.local.readouts import Readouts, padded, read_changes, read_values
from saejax.dictionaries import Dictionary
from saejax.errors import UserError, one_of
from saejax.models import decoder
from saejax.models.config import DecoderConfig, RunRules
from saejax.models.edits import ForwardPass
from saejax.models.language_model import LanguageModel
from saejax.models.sites import Site
from saejax.models.tokens import Tokens
from saejax.parallel.collectives import to_host
from saejax.runner.parts import OnProgress, silent
from saejax.settings import GRAPH_ESTIMATES


@dataclasses.dataclass(eq=False, repr=False)
class SaeRun(PromptRun):
    """A model that was run on a prompt, and what its SAEs say of it; see also ``PromptRun``."""

    dictionaries: LayerSaes
    error_SxTxD: np.ndarray  #: fp32, what the SAEs do not explain; at attention sinks all but b_dec
    b_dec_SxD: np.ndarray  #: biases of the decoders
    direct: bool  #: whether gradients stop at the sites, as if these were frozen

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
          direct: whether gradients stop at sites.

        Raises:
          UserError: SAEs and model do not go together, a value is not finite, or no feature is active.
        """
        saes.check(model)
        rules = RunRules(backward=one_of(estimate, GRAPH_ESTIMATES, "estimate"))
        kinds, length = tuple(sorted({"resid_pre", *(site.kind for site in saes.sites)})), padded(len(ids_P))
        x_TxD = embed(FrozenModel(model.config, model.params), np.pad(ids_P, (0, length - len(ids_P))))
        leaving_TxD, values = _run(model.config, rules, kinds, model.params, x_TxD)
        last_D = leaving_TxD[len(ids_P) - 1]
        logits_V = to_host(decoder.unembed(model.config, model.params, last_D[None], rules)[0])
        active_by_site, errors, biases, outputs = [], [], [], FeatureOutputs(saes, length)
        for site in saes.sites:
            sae, read_TxD = saes.load(site.layer, model.mesh), values[site.kind][site.layer]
            # Padding has no features; attention sinks are left out by the SAE's own rule.
            used_T = np.arange(length) < len(ids_P)
            active = active_features(sae, site.layer, read_TxD, used_T)
            outputs.add(site.layer, active.position_A, active.feature_A, active.value_A)
            active_by_site.append(active)
            biases.append(to_host(sae.b_dec_D[...]))
            errors.append(np.where(used_T[:, None], to_host(read_TxD) - biases[-1] - outputs.pop(site.layer), 0))
        run = cls(
            model, saes, rules, ids_P, Active.concatenate(active_by_site), logits_V, last_D, values["resid_pre"],
            np.stack(errors), np.stack(biases), direct,
        )  # fmt: skip
        run.check()
        return run

    def run(
        self,
        edits: Sequence[Sequence[Change]],
        freeze: str = "none",
        *,
        readouts: Readouts | None = None,
        features: Sequence[int] | np.ndarray = (),
        logits: bool = True,
        on_progress: OnProgress = silent,
    ) -> LocalRun:
        """Run the prompt with each row of changes, nothing frozen; see ``LocalModel.run``.

        Each activation is set in the changed run: SAEs of later layers read the effects of changes in earlier layers.
        What a changed site itself reads is read after the change.

        Raises:
          UserError: ``freeze`` is another mode.
        """
        if freeze != "none":
            raise UserError(f"freeze is {freeze!r}: expected none, as this graph is of SAEs")
        model, n_layers, last = self.model, self.model.config.n_layers, len(self.ids_P) - 1
        index_J = np.asarray(features, np.int64)
        wanted = self.active[index_J]
        encoder_JxD = self.dictionaries.rows_of("W_enc", wanted.layer_A, wanted.feature_A)
        site_of = {site.layer: site for site in self.dictionaries.sites}
        leaving = Site("resid_post", n_layers - 1)
        capture = list(dict.fromkeys([*(site_of[layer] for layer in np.unique(wanted.layer_A).tolist()), leaving]))
        feature_RxJ = np.tile(wanted.value_A, (len(edits), 1))
        readout_RxK = np.tile(readouts.value_K if readouts else np.empty(0, np.float32), (len(edits), 1))
        logits_RxV = np.tile(self.logits_V, (len(edits), 1))
        size = max(CHUNK // (len(self.ids_P) * model.config.d_model), 1)
        for start in range(0, len(edits), size):
            on_progress(start, len(edits))
            rows = slice(start, min(start + size, len(edits)))
            # The prompt goes along as the first row: a small effect is a difference of values of one program.
            batch = [[], *edits[rows]]
            tokens = Tokens(np.tile(self.ids_P, (len(batch), 1)), np.full(len(batch), last + 1, np.int32))
            sites = model(tokens, capture=capture, edits=self._edits(batch), logits=False).sites
            for layer in np.unique(wanted.layer_A).tolist():
                value, here = sites[str(site_of[layer])].astype(jnp.float32), np.flatnonzero(wanted.layer_A == layer)
                places = wanted.position_A[here], encoder_JxD[here]
                feature_RxJ[rows, here] += read_changes(value[0], value[1:], *places)
            last_BxD = sites[str(leaving)][:, last]
            if readouts:
                at_last = last_BxD.astype(jnp.float32), readouts.pair_Kx2
                value_BxK = read_values(model.config, self.rules, model.params, *at_last)
                readout_RxK[rows] += value_BxK[1:] - value_BxK[:1]
            if logits:
                logits_RxV[rows] = to_host(decoder.unembed(model.config, model.params, last_BxD[1:], self.rules))
        return LocalRun(feature_RxJ, readout_RxK, logits_RxV if logits else None)

    def _edits(self, rows: Sequence[Sequence[Change]]) -> list["PlacedEdit"]:
        changes = [(row, *change) for row, row_changes in enumerate(rows) for change in row_changes]
        change_Nx5, edits = np.array(changes, np.float64).reshape(-1, 5), []
        for site in self.dictionaries.sites:
            here_Mx5 = change_Nx5[change_Nx5[:, 1] == site.layer]
            if len(here_Mx5):
                row_M, _, position_M, feature_M = jnp.asarray(here_Mx5[:, :4].T, jnp.int32)
                value_M = jnp.asarray(here_Mx5[:, 4], jnp.float32)
                sae = self.dictionaries.load(site.layer, self.model.mesh)
                edits.append(PlacedEdit(sae, row_M, position_M, feature_M, value_M, site))
        return edits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PlacedEdit:
    """Sets features of an SAE to activations; the error term stays. An ``Edit``."""

    dictionary: Dictionary  #: the SAE
    #: row_M, position_M, feature_M: int32, where and which, each once.
    row_M: jax.Array
    position_M: jax.Array
    feature_M: jax.Array
    value_M: jax.Array  #: fp32 activations
    site: Site = dataclasses.field(metadata=dict(static=True))  #: of the SAE (static)

    def __call__(self, value_BxTxD: jax.Array, run: ForwardPass) -> jax.Array:
        """Return the edited value of ``site``; attention sinks, where no feature is used, stay as they are."""
        x_MxD = value_BxTxD[self.row_M, self.position_M]
        old_M = activations_of(self.dictionary, x_MxD, self.feature_M)
        # At a sink the SAE has no features that could be set.
        change_M = jnp.where(self.dictionary.is_not_sink(x_MxD), self.value_M - old_M, 0)
        added_MxD = change_M[:, None] * self.dictionary.W_dec_FxD[...][self.feature_M]
        return value_BxTxD.at[self.row_M, self.position_M].add(added_MxD.astype(value_BxTxD.dtype))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    config: DecoderConfig, rules: RunRules, kinds: tuple[str, ...], params: decoder.Params, x_TxD: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the stream leaving the last layer, and the values at kinds of sites in all layers, each [L, T, D]."""
    return decoder.run_layers(config, params, x_TxD, 0, config.n_layers, rules=rules, collect=kinds)[:2]
