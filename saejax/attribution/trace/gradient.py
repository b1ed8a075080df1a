"""Graphs with SAEs, where there are no transcoders: edges are activation x gradient.

An SAE writes its site's value as x = sum over features of f W_dec + b_dec + error. The edge from one of these terms to
a target is its dot product with the gradient of the target with respect to x, taken through all that the model
computes: the first-order estimate of what the target loses without the term (attribution patching; Nanda, 2023; with
features, Marks et al., 2024, arXiv 2403.19647). A target is the pre-activation of a feature at a later site, or a
logit; one backward pass gives its edges from all sites. Two kinds of edges:

    total    the gradient goes through the sites between, so what a term does through their features is counted here
             and again in the edges from these: a row adds up to more than the target
    direct   the sites between are held at their values: what goes through them is counted there alone, and
             influences, which follow paths, count each once

Edges are estimates: rows do not add up to their targets (``Graph.unexplained_T`` says by how much), with one exception:
direct edges with ``estimate="relp"`` in a model without biases do, since its rules make of every layer what is linear
(``DecoderConfig.backward``).

Letters: S SAEs, A active features, P tokens, T positions (P and padding), D width, F features, B targets of a batch, N
sources.
"""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saejax.attribution.graph.graph import BIAS, ERROR, FEATURE, TOKEN, Graph, Nodes
from saejax.attribution.local.active import Active, active_features
from saejax.attribution.local.frozen import FrozenModel
from saejax.attribution.local.replacement import embed, padded_length, placed
from saejax.attribution.local.saes import SaeSet
from saejax.attribution.trace import perturbed
from saejax.attribution.trace.perturbed import IN_STREAM, Places, Readings
from saejax.attribution.trace.prompt import attributed, check_max_features, graph_of, prompt_ids
from saejax.attribution.trace.row_store import Put
from saejax.attribution.trace.rows import TOKENS
from saejax.attribution.trace.targets import Readouts, Target, read_targets
from saejax.dictionaries import Dictionary
from saejax.errors import UserError, one_of
from saejax.models import decoder
from saejax.models.language_model import LanguageModel
from saejax.models.rules import RunRules
from saejax.parallel import by_row, to_host
from saejax.settings import GRAPH_ESTIMATES

Saes = SaeSet | Dictionary | str | Path | Sequence[Dictionary | str | Path]


@dataclasses.dataclass(frozen=True)
class SaeRun:
    """A model that was run on a prompt, and what its SAEs say of it; a ``PromptRun``.

    Attributes:
      model, saes: of which it is made.
      rules: those by which gradients go through it.
      places: where the SAEs stand.
      ids_P: int32 token ids.
      active: the active features.
      logits_V: fp32 logits at the last position.
      last_D, stream_LxTxD, read_SxTxD: what ``perturbed.run`` gave.
      error_SxTxD: fp32, what the SAEs do not explain; at attention sinks all but b_dec.
      direct: whether sites are held at their values.
    """

    model: LanguageModel
    saes: SaeSet
    rules: RunRules
    places: Places
    ids_P: np.ndarray
    active: Active
    logits_V: np.ndarray
    last_D: jax.Array
    stream_LxTxD: jax.Array
    read_SxTxD: jax.Array
    error_SxTxD: np.ndarray
    direct: bool

    @classmethod
    def of(
        cls, model: LanguageModel, saes: SaeSet, ids_P: np.ndarray, estimate: str = "gradient", direct: bool = False
    ) -> "SaeRun":
        """Runs the model on a prompt and each SAE on its site.

        Raises:
          UserError: SAEs and model do not go together, a value is not finite, or no feature is active.
        """
        saes.check(model)
        rules = RunRules(backward=one_of(estimate, GRAPH_ESTIMATES, "estimate"))
        places = Places.of(saes.sites, model.config.n_layers)
        length = padded_length(len(ids_P))
        x_TxD = embed(FrozenModel(model.config), model.params, np.pad(ids_P, (0, length - len(ids_P))))
        none_SxTxD = jnp.zeros((len(saes.sites), *x_TxD.shape), x_TxD.dtype)
        last = np.int32(len(ids_P) - 1)
        ran = perturbed.run(model.config, rules, model.params, places, x_TxD, last, none_SxTxD)
        logits_V = to_host(decoder.unembed(model.config, model.params, ran.last_D[None], rules)[0])
        if not np.isfinite(logits_V).all():
            raise UserError(f"the logits of {model.source.name} are not finite: try --model.dtype=float32")
        found, errors = [], []
        for site, read_TxD in zip(saes.sites, ran.read_SxTxD, strict=True):
            sae = placed(saes.load(site.layer), model)
            own, part = active_features(sae, read_TxD, read_TxD, np.arange(length) < len(ids_P))
            found.append((np.full(len(own[0]), site.layer, np.int32), *own))
            errors.append(to_host(part["error_LxTxD"]))
        active = Active(*map(np.concatenate, zip(*found, strict=True)))
        if not len(active):
            raise UserError(f"no feature of {saes.name} is active in this prompt: is it of this model?")
        made: dict[str, Any] = dict(
            model=model, saes=saes, rules=rules, places=places, ids_P=ids_P, active=active, logits_V=logits_V
        )
        return cls(**made, **ran._asdict(), error_SxTxD=np.stack(errors), direct=direct)

    @property
    def held_SxTxD(self) -> jax.Array | None:
        """The values at which sites are held; None: they are not."""
        return self.read_SxTxD if self.direct else None

    def constants(self, chosen_F: np.ndarray) -> np.ndarray:
        """The encoder's bias of some of the active features, fp32 [F]."""
        return self.active.b_enc_A[chosen_F]

    @property
    def dictionaries(self) -> SaeSet:
        """The SAEs, as every ``PromptRun`` names its dictionaries."""
        return self.saes


class TracedSaes(NamedTuple):
    """A graph, the run that it is of, and what it explains."""

    graph: Graph
    run: SaeRun
    readouts: Readouts


def trace_gradient(model: LanguageModel, saes: Saes, prompt: str | Sequence[int], **options: Any) -> Graph:
    """The graph of a prompt with SAEs: that of ``trace_saes``, which has the same arguments."""
    return trace_saes(model, saes, prompt, **options).graph


def trace_saes(
    model: LanguageModel,
    saes: Saes,
    prompt: str | Sequence[int],
    *,
    targets: Sequence[Target] = (),
    max_logits: int = 10,
    logit_mass: float = 0.95,
    max_features: int | None = None,
    estimate: str = "gradient",
    direct: bool = False,
    prepend: bool = True,
    round_rows: int = 2048,
) -> TracedSaes:
    """Traces a prompt with SAEs.

    Args:
      model: the language model.
      saes: SAEs, or folders of such or of trained stacks; at most one of each layer, at any of its sites.
      prompt, targets, max_logits, logit_mass, max_features, prepend, round_rows: as in ``trace_prompt``. Features are
        used at all positions but attention sinks.
      estimate: "gradient", or "relp", by the rules of relevance patching.
      direct: whether edges are direct; see the top of this module.

    Raises:
      UserError: SAEs, model, prompt or targets do not go together; the message says why.
    """
    check_max_features(max_features)
    ids_P = prompt_ids(model, prompt, prepend)
    run = SaeRun.of(model, SaeSet.of(saes), ids_P, estimate, direct)
    readouts = read_targets(run, targets, max_logits, logit_mass)
    rows, active = _Rows(run), run.active
    kind_A = run.places.kind_S[_slots(run, active.layer_A)]

    def fill(new_F: np.ndarray | None, put: Put) -> None:
        if new_F is None:
            stream_K = np.full(len(readouts.labels), IN_STREAM, np.int32)
            readings = Readings(readouts.vector_KxD, readouts.layer_K, stream_K, readouts.position_K)
            rows(readings, readouts.layer_K, put)
        else:
            layer_F, position_F = active.layer_A[new_F], active.position_A[new_F]
            vector_FxD = run.saes.rows_of("W_enc", layer_F, active.feature_A[new_F])
            rows(Readings(vector_FxD, layer_F, kind_A[new_F], position_F), layer_F + 1, put)

    count = min(max_features or len(active), len(active))
    chosen_F, store = attributed(run, len(rows.nodes), readouts, fill, count, round_rows)
    if not np.isfinite(store.row_TxC).all():
        raise UserError(f"gradients of {model.source.name} are not finite: try --model.dtype=float32")
    settings: dict[str, Any] = dict(max_logits=max_logits, logit_mass=logit_mass, max_features=max_features)
    settings |= dict(edges=f"{'direct' if direct else 'total'} {estimate} x activation, first-order estimates")
    return TracedSaes(graph_of(run, rows.nodes, readouts, chosen_F, store, prompt, settings), run, readouts)


class _Rows:
    """Reads the sources' contributions off gradients.

    Attributes:
      nodes: the sources: features, errors, tokens, and a bias for each SAE.
    """

    def __init__(self, run: SaeRun):
        self._run, active, tokens = run, run.active, len(run.ids_P)
        layer_S, every_P = run.places.layer_S, np.arange(tokens)
        self.nodes = Nodes.joined(
            Nodes.of(FEATURE, active.layer_A, active.position_A, active.feature_A, active.value_A),
            Nodes.of(ERROR, np.repeat(layer_S, tokens), np.tile(every_P, len(layer_S))),
            Nodes.of(TOKEN, -1, every_P, run.ids_P),
            Nodes.of(BIAS, layer_S, 0),
        )
        # A feature that is active at many positions has one row here.
        key_A = active.layer_A.astype(np.int64) << 32 | active.feature_A
        _, first_U, self._row_A = np.unique(key_A, return_index=True, return_inverse=True)
        self._table_UxD = run.saes.rows_of("W_dec", active.layer_A[first_U], active.feature_A[first_U])
        # The features of each site and position, which stand together.
        group_A = _slots(run, active.layer_A) * tokens + active.position_A
        self._start_G = np.searchsorted(group_A, np.arange(len(layer_S) * tokens + 1))
        self._token_PxD = to_host(run.stream_LxTxD[0, :tokens])
        self._bias_SxD = np.stack([to_host(run.saes.load(layer).b_dec_D[...]) for layer in layer_S])

    def __call__(self, readings: Readings, top_B: np.ndarray, put: Put) -> None:
        """Gives what each source contributes to each target.

        Args:
          readings: any number of targets.
          top_B: for each the layer whose entering stream it does not reach above.
          put: takes targets and their rows, in any order and from more than one thread.
        """
        run, mesh = self._run, self._run.model.mesh
        length = run.stream_LxTxD.shape[1]
        size = max(TOKENS[mesh.devices.flat[0].platform] // length, 1) * mesh.shape["data"]
        order_B = np.argsort(-top_B, kind="stable")  # targets of one layer go together, and no higher than it

        def read(start: int) -> None:
            own_B = order_B[start : start + size]
            batch = Readings(*by_row(mesh, *(part[np.resize(own_B, size)] for part in readings)))
            fixed = run.model.params, run.places, run.stream_LxTxD, run.held_SxTxD
            of = perturbed.gradients(run.model.config, run.rules, *fixed, batch, np.int32(top_B[own_B[0]]))
            put(own_B, self._contributions(*(to_host(part) for part in of))[: len(own_B)])

        with ThreadPoolExecutor(2 if mesh.size == 1 else 1) as pool:  # as in ``rows.Rows``
            list(pool.map(read, range(0, len(order_B), size)))

    def _contributions(self, site_SxBxTxD: np.ndarray, token_BxTxD: np.ndarray) -> np.ndarray:
        """Dot products of gradients with the sources' directions, fp32 [B, N]."""
        run, tokens = self._run, len(self._run.ids_P)
        at_SxPxBxD = np.moveaxis(site_SxBxTxD[:, :, :tokens], 2, 1)
        into_NxB = np.empty((len(self.nodes), len(token_BxTxD)), np.float32)
        start_G, gradient_GxBxD = self._start_G, at_SxPxBxD.reshape(-1, *at_SxPxBxD.shape[2:])
        for start, stop, gradient_BxD in zip(start_G, start_G[1:], gradient_GxBxD, strict=False):
            into_NxB[start:stop] = self._table_UxD[self._row_A[start:stop]] @ gradient_BxD.T
        features = len(run.active)
        into_NxB[:features] *= run.active.value_A[:, None]
        errors_GxDx1 = run.error_SxTxD[:, :tokens].reshape(len(gradient_GxBxD), -1, 1)
        others = [
            np.matmul(gradient_GxBxD, errors_GxDx1)[..., 0],
            np.matmul(np.moveaxis(token_BxTxD[:, :tokens], 1, 0), self._token_PxD[..., None])[..., 0],
            np.matmul(at_SxPxBxD.sum(axis=1), self._bias_SxD[..., None])[..., 0],
        ]
        into_NxB[features:] = np.concatenate(others)
        return into_NxB.T


def _slots(run: SaeRun, layer_A: np.ndarray) -> np.ndarray:
    """Which of the SAEs are those of these layers."""
    return np.searchsorted(run.places.layer_S, layer_A)
