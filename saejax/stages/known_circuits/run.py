"""The stage ``known_circuits``: attribution graphs and causal tests on a transformer whose weights are set by hand.

Its folder is in the hub's format and its transcoders are in the project's, so that every other binary takes them, too.
The causal tests are those of ``saejax.ablate``, with the features of one layer.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from saejax.attribution.local.transcoders import LayerTranscoders, open_transcoders
from saejax.dictionaries import Dictionary, load_dictionary
from saejax.errors import Interrupted
from saejax.files import write_text
from saejax.ground_truth.circuits.cases import Case, make_case
from saejax.ground_truth.circuits.dictionaries import write_sets
from saejax.ground_truth.circuits.edges import judge_edges
from saejax.ground_truth.circuits.handset import checkpoint, frame, neuron_arrays
from saejax.ground_truth.hub_folder import save_model
from saejax.ground_truth.results import CausalScores, JudgedSet, KnownCircuitResults
from saejax.ground_truth.scores import RECOVERED, Matching
from saejax.interventions.in_memory import Ablation, ablate
from saejax.interventions.table import TESTED
from saejax.models.language_model import LanguageModel
from saejax.models.loading import load_model
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.runner.workspace import Run
from saejax.stages.known_circuits.settings import KnownConfig
from saejax.tasks.behaviours import Prompt
from saejax.tasks.own_prompts import as_line
from saejax.tasks.scoring import wilson

# The vocabulary is small and mostly answers, so there are no placebo targets.
_ABLATION: Mapping[str, Any] = dict(bootstrap=1000, baselines=(), placebo_targets=0, untrained=False)


def judge_features(
    model: LanguageModel, dictionary: Dictionary, case: Case, idle: Mapping[str, Sequence[int]]
) -> CausalScores:
    """Return what ablating and patching a transcoder's features does, compared with the known variables.

    Args:
      model: the transformer.
      dictionary: the transcoder of the layer whose neurons represent the variables.
      case: the case.
      idle: idle variable -> the features that represent it.
    """
    top = max(map(len, case.causes.values()))
    prompts = {name: [prompt for prompt in case.prompts if prompt.behaviour == name] for name in case.causes}
    run: Callable[..., Ablation] = functools.partial(ablate, model, dictionary, **_ABLATION)
    ablated = run(case.prompts, top=top)
    claimed = {name for name in case.causes if _has_effect(ablated, name)}
    # Patching is ablation with the counterpart's activations in place of zeros. One behaviour at a time: in one call,
    # each would be measured on the prompts of the others as well.
    flips = {name: _flips(run(some, top=top, replacement="counterpart"), name) for name, some in prompts.items()}
    # A layer's few features leave too few random sets to compare with: most answers must turn.
    carried = {name for name, (top_P, _) in flips.items() if wilson(top_P).low > 0.5}
    random = [random_ExP.mean() for _, random_ExP in flips.values() if len(random_ExP)]
    first = next(iter(prompts))
    return CausalScores(
        behaviours=len(case.causes),
        interchange=wilson(np.concatenate([top_P for top_P, _ in flips.values()])),
        interchange_random=float(np.mean(random)) if random else None,
        claimed=len(claimed),
        carried=len(carried),
        shown=len(claimed & carried),
        idle=len(idle),
        idle_claimed=sum(_has_effect(run(prompts[first], features=features), first) for features in idle.values()),
    )


def _has_effect(ablated: Ablation, behaviour: str) -> bool:
    """Return whether two-way accuracy falls. A layer's few features leave too few random sets to compare with."""
    return ablated.verdict.dictionaries[TESTED][behaviour].ablation["two_way"].answer == "yes"


def _flips(patched: Ablation, behaviour: str) -> tuple[np.ndarray, np.ndarray]:
    """Return whose answer becomes the counterpart's, with the top features [P], and with each of N random sets [N, P].

    The transformer is right about all prompts and counterparts, so any answer can turn.
    """
    table = patched.table
    prompts = table.select_prompts(behaviour)
    top_1xP, random_NxP = (
        table.values(table.select_whole_edits(behaviour, group), prompts, "logit_diff") < 0
        for group in ("top", "random")
    )
    return top_1xP[-1], random_NxP


def run_known_circuits(run: Run) -> KnownCircuitResults:
    """Write the transformer ``run.name`` and its transcoders, and compare graphs and causal tests with the truth.

    Raises:
      Interrupted: asked to stop; transcoders are kept.
    """
    config = run.configs[KnownConfig]
    case = make_case(run.name, config.prompts, config.seed)
    write_text(run.folder / "prompts.jsonl", "".join(map(as_line, case.prompts)))
    # Written and loaded again, so that the tests meet it as they meet any model.
    save_model(run.folder / "model", *checkpoint(case.model, config.seed), list(case.model.words))
    model = load_model(str(run.folder / "model"), mesh=make_mesh(run.configs[MeshConfig]))
    traced = _traced(case, config.graphs)
    judged = {}
    for name, folder in write_sets(run, case, model, config.seed).items():
        if run.stopping():
            raise Interrupted("stopped while transcoders were tested: run the same command again to continue")
        transcoders = open_transcoders(folder)
        neuron_of, recovered = matched_neurons(case, transcoders, config.seed)
        edges = judge_edges(model, transcoders, case.model, traced, neuron_of)
        feature_of = {neuron: feature for (layer, feature), neuron in neuron_of.items() if layer == case.layer}
        idle = {variable: [feature_of[neuron] for neuron in neurons] for variable, neurons in case.idle.items()}
        causal = judge_features(model, load_dictionary(folder / f"layer{case.layer}"), case, idle)
        judged[name] = JudgedSet(recovered, edges, causal)
        run.say(_line(name, judged[name]))
    return KnownCircuitResults(
        layers=len(case.model.layers),
        neurons=sum(len(layer.neurons) for layer in case.model.layers),
        sets=judged,
    )


def _traced(case: Case, count: int) -> list[Prompt]:
    """Return the first test prompts of each behaviour."""
    tests = [prompt for prompt in case.prompts if prompt.split == "test"]
    return [prompt for _, some in itertools.groupby(tests, lambda test: test.behaviour) for prompt in [*some][:count]]


def matched_neurons(case: Case, transcoders: LayerTranscoders, seed: int) -> tuple[dict[tuple[int, int], int], float]:
    """Return (layer, feature) -> the neuron with the matching decoder, and the share of neurons that are recovered."""
    matched: dict[tuple[int, int], int] = {}
    cosines: list[np.ndarray] = []
    for layer, spec in enumerate(case.model.layers):
        count = len(spec.neurons)
        neurons = neuron_arrays(case.model, layer, frame(case.model, seed))
        W_dec_FxD = np.asarray(transcoders.load(layer).arrays["W_dec_FxD"], np.float64)
        # Without the neurons that only fill up a layer: they write nothing, and any feature would match them.
        matching = Matching.of(W_dec_FxD, neurons["W_dec_FxD"][:count])
        matched |= {(layer, int(feature)): neuron for neuron, feature in enumerate(matching.feature_J) if feature >= 0}
        cosines.append(matching.matched_J)
    return matched, float((np.concatenate(cosines) > RECOVERED).mean())


def _line(name: str, judged: JudgedSet) -> str:
    edges, causal = judged.edges, judged.causal
    return (
        f"{name}: {100 * judged.recovered:.0f} % of the neurons; edges off by {edges.error:.1e}, AUROC "
        f"{edges.auroc.mean:.3f}, precision {edges.precision.mean:.2f}, recall {edges.recall.mean:.2f}; of "
        f"{causal.behaviours} behaviours ablation has an effect on {causal.claimed}, and patching carries over "
        f"{causal.shown} of them"
    )
