"""Whether the method finds a planted circuit: attribution graphs, and what carries a variable over.

Graphs are of transcoders that are trained as on any model, beside hardly trained and random ones. A node of the circuit
is an MLP at a position, all features and the error there together, or a word; an edge counts by the influence that goes
through it to the logit, which is how graphs are pruned. Nodes that are the same in every text, "<s>" and "=", are left
out.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from sklearn.metrics import roc_auc_score

from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import FEATURE, TOKEN
from saejax.attribution.graph.pruning import source_influence
from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.attribution.trace.prompt import trace
from saejax.causal.patching.disentangle import PairsJudge, compare
from saejax.causal.patching.features import FeaturePatching
from saejax.dictionaries import Dictionary, save_dictionary
from saejax.ground_truth.algorithms.planted import CIRCUIT, LAYERS, Planted
from saejax.ground_truth.algorithms.results import CarriedOver, PlantedScores
from saejax.ground_truth.circuits.edges import Edges, possible
from saejax.ground_truth.edge_circuits import edge_curves
from saejax.ground_truth.run import over_seeds
from saejax.interventions.bases import Neurons
from saejax.interventions.split_model import SplitModel
from saejax.library.activations import capture
from saejax.library.dictionaries import train
from saejax.models.language_model import LanguageModel
from saejax.runner.workspace import Run
from saejax.settings import PatchConfig
from saejax.tasks.behaviours import Prompt
from saejax.tasks.scoring import wilson

_RATES = dict(trained=3e-3, untrained=1e-6)  # learning rates of the sets
_GRAPHS, _TOP, _DRAWS, _DIMENSIONS, _STEPS = 20, 8, 100, 2, 300
_TRAIN: dict[str, Any] = dict(form="transcoder", k=8, expansion=4, batch=256, epochs=20, auxk=0.03, log_every=500)


def judge(run: Run, model: LanguageModel, texts: Sequence[str], prompts: Sequence[Prompt], seed: int) -> PlantedScores:
    """What graphs and interchange say of a transformer with a planted circuit.

    Args:
      run: of the stage; transcoders are left in its folder.
      model: the transformer.
      texts: from which transcoders learn.
      prompts: of ``Planted``, of both splits.
      seed: of transcoders and draws.
    """
    sets = _transcoders(run, model, texts, seed)
    tests = [prompt for prompt in prompts if prompt.split == "test"]
    traced, others = tests[::2][:_GRAPHS], tests[1::2][::2]
    auroc, strongest, orders = {}, {}, {}
    for name, own in sets.items():
        found = [_traced_edges(model, own, prompt) for prompt in traced]
        auroc[name], strongest[name] = map(over_seeds, zip(*map(edge_scores, found), strict=True))
        orders[name] = dataclasses.replace(found[0], weight_SxR=np.mean([one.weight_SxR for one in found], axis=0))
        run.say(f"{name} transcoders: AUROC of edges {auroc[name].mean:.3f}, strongest {strongest[name].mean:.3f}")
    orders["planted edges"] = dataclasses.replace(found[0], weight_SxR=_planted_edges(found[0]).astype(float))
    circuits = edge_curves(model, others, orders, sets, seed)
    bases: dict[str, Dictionary] = {**{name: own[0] for name, own in sets.items()}, "neurons": Neurons(model, 0)}
    return PlantedScores(len(traced), auroc, strongest, _carried(model, bases, prompts, seed), circuits)


def _transcoders(run: Run, model: LanguageModel, texts: Sequence[str], seed: int) -> dict[str, list[Dictionary]]:
    """Sets of a transcoder for each layer, also written to ``transcoders/<set>/layer<L>``."""
    sites = [f"mlp_{part}.{layer}" for layer in range(LAYERS) for part in ("in", "out")]
    store = capture(model, texts, sites).save(run.folder / "capture")
    sets: dict[str, list[Dictionary]] = {
        name: [
            train(store, f"mlp_in.{layer}", on_progress=lambda line: None, learning_rate=rate, seed=seed, **_TRAIN)
            for layer in range(LAYERS)
        ]
        for name, rate in _RATES.items()
    }
    sets["random"] = [
        Dictionary.initial(own.config, jax.random.fold_in(jax.random.key(seed), layer))
        for layer, own in enumerate(sets["trained"])
    ]
    for name, own in sets.items():
        for layer, dictionary in enumerate(own):
            save_dictionary(run.folder / "transcoders" / name / f"layer{layer}", dictionary)
    return sets


def _traced_edges(model: LanguageModel, transcoders: Sequence[Dictionary], prompt: Prompt) -> Edges:
    answers = model.token_id(prompt.correct), model.token_id(prompt.wrong)
    return place_edges(trace(model, LayerTranscoders.of(transcoders), prompt.text, targets=[answers]))


def _planted_edges(edges: Edges) -> np.ndarray:
    """Which are planted, bool [S, R]."""
    return np.array([[(s[:2], r[:2]) in CIRCUIT for r in edges.targets] for s in edges.sources])


def edge_scores(edges: Edges) -> tuple[float, float]:
    """AUROC of the influence through edges as a sign of which are planted, and the planted share of the strongest.

    Of the strongest there are as many as are planted. Most pairs of nodes are without any influence, whatever the
    transcoders, so that the AUROC is high for all of them.
    """
    there_SxR = possible(edges)
    truth_E, weight_E = _planted_edges(edges)[there_SxR], edges.weight_SxR[there_SxR]
    strongest = np.argsort(-weight_E, kind="stable")[: len(CIRCUIT)]
    return float(roc_auc_score(truth_E, weight_E)), float(truth_E[strongest].mean())


def place_edges(graph: Graph) -> Edges:
    """The influence that goes through the edges between words, MLPs at a position, and the logit, whatever their sizes.

    Words are layer -1; what is not in the graph has edges of 0. The first and the last word are left out.
    """
    last = len(graph.ids_P) - 1
    mlps = [(layer, position, -1) for layer in range(graph.n_layers) for position in range(1, last + 1)]
    sources = [*((-1, position, -1) for position in range(1, last)), *mlps]
    targets = [*mlps, (graph.n_layers, last, -1)]
    influence_S, nodes = source_influence(graph), graph.nodes
    weight_R = np.concatenate([influence_S[graph.slice_of(FEATURE)], graph.probability_K])
    size_RxS = np.abs(graph.adjacency_RxS[:, : len(influence_S)].astype(np.float64))
    through_RxS = size_RxS * (weight_R / np.maximum(size_RxS.sum(axis=1), 1e-30))[:, None]
    layers = np.where(nodes.kind_N == TOKEN, -1, nodes.layer_N).tolist()
    row = {node: place for place, node in enumerate(targets)}
    column = {node: place for place, node in enumerate(sources)}

    def at(node: int, places: Mapping[tuple[int, int, int], int]) -> int:
        return places.get((layers[node], int(nodes.position_N[node]), -1), len(places))

    summed_NxM = np.zeros((len(sources) + 1, len(targets) + 1))  # the last ones are of nodes that are left out
    logit = len(graph.target_R) - graph.count(FEATURE)
    of_row = [*(at(node, row) for node in graph.target_R[: len(graph.target_R) - logit]), *[len(targets) - 1] * logit]
    of_column = [at(node, column) for node in range(len(influence_S))]
    np.add.at(summed_NxM, np.ix_(of_column, of_row), through_RxS.T)
    return Edges(tuple(sources), tuple(targets), summed_NxM[:-1, :-1])


def _carried(
    model: LanguageModel, bases: Mapping[str, Dictionary], prompts: Sequence[Prompt], seed: int
) -> dict[str, dict[str, CarriedOver]]:
    """By behaviour, what carries its answers over at MLP 0: features, neurons, learned and random subspaces, all."""
    found: dict[str, dict[str, CarriedOver]] = {}
    own = {
        name: {
            split: [one for one in prompts if (one.behaviour, one.split) == (name, split)]
            for split in ("train", "test")
        }
        for name in Planted.behaviours
    }
    for name, pairs in own.items():
        found[name] = {}
        for basis_name, basis in bases.items():
            das = _DIMENSIONS if basis_name == "trained" else 0
            config = PatchConfig(
                dictionary="planted", top=_TOP, draws=_DRAWS, seed=seed, bootstrap=1000, das=das, das_steps=_STEPS
            )
            split = SplitModel(model, basis)
            patching = FeaturePatching(split, name, pairs["train"], pairs["test"], config)
            judge = PairsJudge(split, pairs["test"], config)
            carried_P, random_P = judge.sets([patching.top]), judge.sets(patching.drawn_NxK)
            found[name][basis_name] = CarriedOver(_TOP, wilson(carried_P > 0), float(random_P.mean()))
            if das:
                features = patching.top, patching.drawn_NxK
                rows = compare(split, name, pairs["train"], {name: judge}, features, config)
                by_method = {row.method: row for row in rows if row.cause}
                random = by_method["random subspace"].cause
                learned, whole = by_method["DAS"], by_method["whole site"]
                assert random and learned.cause and whole.cause
                found[name]["DAS"] = CarriedOver(learned.size, learned.cause, random.mean)
                found[name]["whole site"] = CarriedOver(whole.size, whole.cause, None)
    return found
