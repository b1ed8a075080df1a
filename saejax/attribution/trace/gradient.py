"""Graphs with SAEs, where there are no transcoders: edges are activation x gradient.

An SAE writes its site's value as x = sum over features of f W_dec + b_dec + error. The edge from one of these terms to
a target is its dot product with the gradient of the target with respect to x, taken through all that the model
computes: the first-order estimate of what the target loses without the term (attribution patching; Nanda, 2023; with
features, Marks et al., 2024, arXiv 2403.19647). A target is the pre-activation of a feature at a later site, or a
logit; one backward pass gives its edges from all sites. Two kinds of edges:

    total    the gradient goes through the sites between, so what a term does through their features is counted here
             and again in the edges from these: a row adds up to more than the target
    direct   the sites between are frozen at their values: what goes through them is counted there alone, and
             influences, which follow paths, count each once

Edges are estimates: rows do not add up to their targets (``Graph.unexplained_R`` says by how much), with one exception:
direct edges with ``estimate="relp"`` in a model without biases do, since its rules make of every layer what is linear
(``DecoderConfig.backward``).

``SaeRun`` is a model that was run on a prompt with SAEs at some of its sites: their features, and runs with edits.
``GradientRows`` reads the rows of a graph off its gradients.
"""

import dataclasses
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import lax

from saejax.attribution.graph.data import BIAS, ERROR, TOKEN, Nodes
from saejax.attribution.local.dictionaries import FeatureOutputs, LayerSaes
from saejax.attribution.local.edits import CHUNK, Change, Readings, as_rows, placed_changes
from saejax.attribution.local.rows import Put, Readouts, chunk_size
from saejax.attribution.local.state import (
    Active,
    FrozenModel,
    LocalRun,
    PromptRun,
    active_features,
    embed,
    padded,
)
from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.models import decoder
from saejax.models.attention import whole_prompt_tables
from saejax.models.config import DecoderConfig, RunRules
from saejax.models.edits import ForwardPass
from saejax.models.language_model import LanguageModel
from saejax.models.layers import Taps
from saejax.models.sites import INNER_KINDS, Site
from saejax.models.tokens import Tokens
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import by_row
from saejax.progress import OnProgress, silent


@dataclasses.dataclass(eq=False, repr=False)
class SaeRun(PromptRun):
    """A model that was run on a prompt, and what its SAEs say of it; see also ``PromptRun``."""

    dictionaries: LayerSaes
    error_SxTxD: np.ndarray  #: fp32, what the SAEs do not explain; at attention sinks all but b_dec
    b_dec_SxD: np.ndarray  #: biases of the decoders
    sink_SxT: np.ndarray  #: True at attention sinks, where no feature is used

    @classmethod
    def of(cls, model: LanguageModel, saes: LayerSaes, ids_P: np.ndarray) -> "SaeRun":
        """Run the model on a prompt, and each SAE on its site.

        Args:
          model: the language model.
          saes: of some of its sites.
          ids_P: int32 token ids of the prompt.

        Raises:
          UserError: SAEs and model do not go together, a value is not finite, or no feature is active.
        """
        saes.check(model)
        rules = RunRules(backward=saes.estimate)
        kinds, length = tuple(sorted({"resid_pre", *(site.kind for site in saes.sites)})), padded(len(ids_P))
        x_TxD = embed(FrozenModel(model.config, model.params), np.pad(ids_P, (0, length - len(ids_P))))
        leaving_TxD, values = _run(model.config, rules, kinds, model.params, x_TxD)
        last_D = leaving_TxD[len(ids_P) - 1]
        logits_V = to_host(decoder.unembed(model.config, model.params, last_D[None], rules)[0])
        active_by_site, errors, biases, sinks, outputs = [], [], [], [], FeatureOutputs(saes, length)
        for site in saes.sites:
            sae, read_TxD = saes.load(site.layer, model.mesh), values[site.kind][site.layer]
            # Padding has no features; attention sinks are left out by the SAE's own rule.
            used_T = np.arange(length) < len(ids_P)
            active = active_features(sae, site.layer, read_TxD, used_T)
            outputs.add(site.layer, active.position_A, active.feature_A, active.value_A)
            active_by_site.append(active)
            biases.append(to_host(sae.b_dec_D[...]))
            sinks.append(~to_host(sae.is_not_sink(read_TxD)))
            errors.append(np.where(used_T[:, None], to_host(read_TxD) - biases[-1] - outputs.pop(site.layer), 0))
        run = cls(
            model, saes, rules, ids_P, Active.concatenate(active_by_site), logits_V, last_D, values["resid_pre"],
            np.stack(errors), np.stack(biases), np.stack(sinks),
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
          UserError: ``freeze`` is another mode, a change is of no layer with an SAE, of no feature or position, or a
            row makes it twice.
        """
        edits = as_rows(edits)
        if freeze != "none":
            raise UserError(f"freeze is {freeze!r}: expected none, as this graph is of SAEs")
        model, n_layers, last = self.model, self.model.config.n_layers, len(self.ids_P) - 1
        pairs = zip(self.dictionaries.sites, self.dictionaries.configs, strict=True)
        change_Nx5 = placed_changes(edits, last + 1, {site.layer: config.n_features for site, config in pairs})
        self._warn_of_sinks(change_Nx5)
        self.dictionaries.resolve_sinks(model)  # another model may have used the SAEs meanwhile
        readings = Readings(self, len(edits), readouts, features, logits)
        site_of = {site.layer: site for site in self.dictionaries.sites}
        leaving = Site("resid_post", n_layers - 1)
        capture = list(dict.fromkeys([*(site_of[layer] for layer in readings.layers), leaving]))
        size = max(CHUNK // (len(self.ids_P) * model.config.d_model), 1)
        for start in range(0, len(edits), size):
            on_progress(start, len(edits))
            rows = slice(start, min(start + size, len(edits)))
            # The prompt goes along as the first row: a small effect is a difference of values of one program.
            count, here_N = 1 + rows.stop - start, (change_Nx5[:, 0] >= start) & (change_Nx5[:, 0] < rows.stop)
            edits_here = self._edits(change_Nx5[here_N] - [start - 1, 0, 0, 0, 0])
            tokens = Tokens(np.tile(self.ids_P, (count, 1)), np.full(count, last + 1, np.int32))
            sites = model(tokens, capture=capture, edits=edits_here, logits=False).sites
            for layer in readings.layers:
                readings.read_layer(rows, layer, sites[str(site_of[layer])].astype(jnp.float32))
            last_BxD = sites[str(leaving)][:, last]
            x_BxD = last_BxD.astype(jnp.float32)
            readings.read_last(rows, FrozenModel(model.config, model.params), freeze, x_BxD[0], x_BxD[1:])
            if readings.logits_RxV is not None:
                logits_RxV = decoder.unembed(model.config, model.params, last_BxD[1:], self.rules)
                readings.logits_RxV[rows] = to_host(logits_RxV)
        return readings.checked()

    def _warn_of_sinks(self, change_Nx5: np.ndarray) -> None:
        """Count the rows that change nothing, since they act at attention sinks alone."""
        row_N, layer_N, position_N = change_Nx5[:, :3].T.astype(np.int64)
        site_N = np.searchsorted([site.layer for site in self.dictionaries.sites], layer_N)
        idle = {*row_N.tolist()} - {*row_N[~self.sink_SxT[site_N, position_N]].tolist()}
        if idle:
            logging.warning(
                "%d of %d rows of changes change nothing: they act at attention sinks alone, where no feature is used",
                len(idle), len({*row_N.tolist()}),
            )  # fmt: skip

    def _edits(self, change_Nx5: np.ndarray) -> list["PlacedEdit"]:
        edits = list[PlacedEdit]()
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
        old_M = jnp.take_along_axis(self.dictionary.encode(x_MxD), self.feature_M[:, None], axis=1)[:, 0]
        # At a sink the SAE has no features that could be set. Sinks are the prompt's, which is the first row: a change
        # of another layer may have made a position longer.
        no_sink_M = self.dictionary.is_not_sink(value_BxTxD[0, self.position_M])
        change_M = jnp.where(no_sink_M, self.value_M - old_M, 0)
        added_MxD = change_M[:, None] * self.dictionary.W_dec_FxD[...][self.feature_M]
        return value_BxTxD.at[self.row_M, self.position_M].add(added_MxD.astype(value_BxTxD.dtype))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    config: DecoderConfig, rules: RunRules, kinds: tuple[str, ...], params: decoder.Params, x_TxD: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the stream leaving the last layer, and the values at kinds of sites in all layers, each [L, T, D]."""
    return decoder.run_layers(config, params, x_TxD, 0, config.n_layers, Taps(collect=kinds), rules=rules)[:2]


class GradientRows:
    """Reads the sources' contributions off gradients.

    Args:
      run: of the prompt.
      readouts: the targets that are no features.

    Attributes:
      nodes: the sources: features, errors, tokens, and a bias for each SAE.
    """

    def __init__(self, run: SaeRun, readouts: Readouts):
        self._run, self._readouts, active, tokens = run, readouts, run.active, len(run.ids_P)
        layer_S, every_P = np.array([site.layer for site in run.dictionaries.sites]), np.arange(tokens)
        self.nodes = Nodes.joined(
            active.nodes,
            Nodes.of(ERROR, np.repeat(layer_S, tokens), np.tile(every_P, len(layer_S))),
            Nodes.of(TOKEN, -1, every_P, run.ids_P),
            Nodes.of(BIAS, layer_S, 0),
        )
        # A feature that is active at many positions has one row here.
        key_A = active.layer_A.astype(np.int64) << 32 | active.feature_A
        _, first_U, self._row_A = np.unique(key_A, return_index=True, return_inverse=True)
        self._table_UxD = run.dictionaries.rows_of("W_dec", active.layer_A[first_U], active.feature_A[first_U])
        # The features of each site and position, which stand together.
        group_A = np.searchsorted(layer_S, active.layer_A) * tokens + active.position_A
        self._starts = np.searchsorted(group_A, np.arange(len(layer_S) * tokens + 1))
        self._token_PxD = to_host(run.stream_LxTxD[0, :tokens])

    def __call__(self, new_F: np.ndarray | None, put: Put) -> None:
        """Compute the rows of some active features, or (None) of the readouts; see ``prompt.FillRows``."""
        run, readouts, mesh = self._run, self._readouts, self._run.model.mesh
        if new_F is None:
            vector_RxD, position_R = readouts.vector_KxD, np.full(len(readouts), len(run.ids_P) - 1)
            layer_R = np.full(len(readouts), run.model.config.n_layers)
        else:
            layer_R, position_R = run.active.layer_A[new_F], run.active.position_A[new_F]
            vector_RxD = run.dictionaries.rows_of("W_enc", layer_R, run.active.feature_A[new_F])
        size = chunk_size(mesh.devices.flat[0].platform, run.stream_LxTxD.shape[1], mesh)
        order_R = np.argsort(-layer_R, kind="stable")  # targets of one layer go together, and no higher than it

        def fill(start: int) -> None:
            chosen_B = order_R[start : start + size]
            # Filled up with copies, so that one program serves all batches.
            filled_X = np.resize(chosen_B, size)
            gradients = self._gradients(layer_R[filled_X], position_R[filled_X], vector_RxD[filled_X])
            row_BxN = self._contributions(*gradients)[: len(chosen_B)]
            if not np.isfinite(row_BxN).all():
                raise UserError(f"gradients of {run.model.source.name} are not finite: try --model.dtype=float32")
            put(chosen_B, row_BxN)

        with ThreadPoolExecutor(2 if mesh.size == 1 else 1) as pool:  # as in ``rows.RowTracer``
            list(pool.map(fill, range(0, len(order_R), size)))

    def _gradients(
        self, layer_B: np.ndarray, position_B: np.ndarray, vector_BxD: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the gradients of targets with respect to changes at sites and to the embedded tokens.

        Args:
          layer_B: the layer at whose site each reads, or the number of layers: it reads the stream leaving the last.
          position_B: where.
          vector_BxD: the directions that are read.

        Returns:
          [S, B, T, D] and [B, T, D].
        """
        run, (n_layers, length, width) = self._run, self._run.stream_LxTxD.shape

        def read_at(layer: int) -> jax.Array:
            """Return the directions that are read at a layer, each at its position, else 0, [B, T, D]."""
            read_BxTxD, here = np.zeros((len(layer_B), length, width), np.float32), np.flatnonzero(layer_B == layer)
            read_BxTxD[here, position_B[here]] = vector_BxD[here]
            return by_row(run.model.mesh, read_BxTxD)[0]

        kind_of, of_sites = {site.layer: site.kind for site in run.dictionaries.sites}, list[jax.Array]()
        above_BxTxD = read_at(n_layers)
        nothing_BxTxD, layers = jnp.zeros_like(above_BxTxD), set(layer_B.tolist())
        is_zero = n_layers not in layers
        # Layer by layer from the top, as few streams are then kept.
        for layer in reversed(range(n_layers)):
            site_BxTxD, kind = nothing_BxTxD, kind_of.get(layer, "")
            if layer in layers or not is_zero:
                read_BxTxD = read_at(layer) if layer in layers else nothing_BxTxD
                inputs = np.int32(layer), run.stream_LxTxD[layer], above_BxTxD, read_BxTxD
                static = run.model.config, run.rules, kind, run.dictionaries.direct
                above_BxTxD, site_BxTxD = _pull_layer(*static, run.model.params, *inputs)
                # All of the stream goes through such a site: frozen, it lets nothing through, unless it is read itself.
                is_zero = run.dictionaries.direct and kind in ("resid_pre", "resid_post") and layer not in layers
            if layer in kind_of:
                of_sites.append(site_BxTxD)
        return np.stack([to_host(site_BxTxD) for site_BxTxD in reversed(of_sites)]), to_host(above_BxTxD)

    def _contributions(self, site_SxBxTxD: np.ndarray, token_BxTxD: np.ndarray) -> np.ndarray:
        """Dot products of gradients with the sources' directions, fp32 [B, N]."""
        run, tokens = self._run, len(self._run.ids_P)
        at_SxPxBxD = np.moveaxis(site_SxBxTxD[:, :, :tokens], 2, 1)
        into_NxB = np.empty((len(self.nodes), len(token_BxTxD)), np.float32)
        starts, gradient_GxBxD = self._starts, at_SxPxBxD.reshape(-1, *at_SxPxBxD.shape[2:])
        # The features of a site and position share a gradient: one product for all of them.
        for start, stop, gradient_BxD in zip(starts, starts[1:], gradient_GxBxD, strict=False):
            into_NxB[start:stop] = self._table_UxD[self._row_A[start:stop]] @ gradient_BxD.T
        features = len(run.active)
        into_NxB[:features] *= run.active.value_A[:, None]
        errors_GxDx1 = run.error_SxTxD[:, :tokens].reshape(len(gradient_GxBxD), -1, 1)
        products = [
            np.matmul(gradient_GxBxD, errors_GxDx1)[..., 0],
            np.matmul(np.moveaxis(token_BxTxD[:, :tokens], 1, 0), self._token_PxD[..., None])[..., 0],
            np.matmul(at_SxPxBxD.sum(axis=1), run.b_dec_SxD[..., None])[..., 0],
        ]
        into_NxB[features:] = np.concatenate(products)
        return into_NxB.T


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _pull_layer(
    config: DecoderConfig,
    rules: RunRules,
    kind: str,
    direct: bool,
    params: decoder.Params,
    layer: jax.Array,
    x_TxD: jax.Array,
    above_BxTxD: jax.Array,
    read_BxTxD: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Pull gradients through a layer, from its output to its input; and to changes at its site, each [B, T, D].

    Args:
      config: of the decoder (static).
      rules: how gradients go through the model (static).
      kind: of the layer's site; "": it has none (static).
      direct: whether gradients stop at the site (static).
      params: of the model.
      layer: its number.
      x_TxD: the stream entering it.
      above_BxTxD: gradients with respect to the stream leaving it.
      read_BxTxD: directions that are read at the site, before changes.
    """
    tables = whole_prompt_tables(config, len(x_TxD))

    def run_layer(x_TxD: jax.Array, delta_TxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        read = [jnp.zeros_like(delta_TxD)]

        def hook(hook_kind: str, value_TxD: jax.Array) -> jax.Array:
            if hook_kind != kind:
                return value_TxD
            read.append(value_TxD)
            # Frozen, the model goes on with this value, whatever comes from below.
            return (lax.stop_gradient(value_TxD) if direct else value_TxD) + delta_TxD

        inner = kind in INNER_KINDS
        return decoder.run_layer(config, rules, params, layer, x_TxD, tables, hook, inner_sites=inner), read[-1]

    width = Site(kind, 0).width(config) if kind else config.d_model
    _, pull = jax.vjp(run_layer, x_TxD, jnp.zeros((len(x_TxD), width), x_TxD.dtype))
    return jax.vmap(lambda *both: pull(both))(above_BxTxD, read_BxTxD)
