"""Features of transcoders beside the known neurons and variables of a transformer set by hand.

The causal tests are the tests of ``saejax.ablate``, with the features of one layer.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from saejax.attribution.local.dictionaries import LayerTranscoders
from saejax.dictionaries import Dictionary
from saejax.ground_truth.circuits.cases import Case
from saejax.ground_truth.circuits.handset import frame, neuron_arrays
from saejax.ground_truth.results import CausalScores
from saejax.ground_truth.scores import RECOVERED, Matching
from saejax.interventions.in_memory import Ablation, ablate
from saejax.interventions.table import TESTED
from saejax.models.language_model import LanguageModel
from saejax.statistics.intervals import wilson

# The vocabulary is small and mostly answers, so there are no placebo targets.
_ABLATION: Mapping[str, Any] = dict(
    bootstrap=1000,
    baselines=(),
    placebo_targets=0,
    untrained_dictionaries=0,
    attribution_prompts=0,  # all train prompts: of some alone, not every value of a variable is there
)


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
    patched = {name: run(some, top=top, replacement="counterpart") for name, some in prompts.items()}
    # The transformer is right about all prompts and counterparts: any answer can turn, and each wrong one is a loss.
    flips = {name: [diff_xP < 0 for diff_xP in _differences(runs, name)] for name, runs in patched.items()}
    losses = [[diff_xP <= 0 for diff_xP in _differences(ablated, name)] for name in case.causes]
    carried = {name for name, (top_P, random_NxP) in flips.items() if _carries(top_P, random_NxP)}
    first = next(iter(prompts))
    return CausalScores(
        behaviours=len(case.causes),
        interchange=wilson(np.concatenate([top_P for top_P, _ in flips.values()])),
        interchange_random=_mean_of_lists(flips.values()),
        accuracy_drop=float(np.mean([top_P.mean() for top_P, _ in losses])),
        accuracy_drop_random=_mean_of_lists(losses),
        claimed=len(claimed),
        carried=len(carried),
        shown=len(claimed & carried),
        idle=len(idle),
        idle_claimed=sum(_has_effect(run(prompts[first], features=features), first) for features in idle.values()),
    )


def _has_effect(ablated: Ablation, behaviour: str) -> bool:
    """Return whether two-way accuracy falls. A layer's few features leave too few random lists for a rank test."""
    return ablated.verdict.dictionaries[TESTED][behaviour].ablation["two_way"].answer == "yes"


def _carries(top_P: np.ndarray, random_NxP: np.ndarray) -> bool:
    """Return whether the top features turn most answers, and more answers than 95 % of random lists do.

    Where no list reaches their dose, most answers are enough.
    """
    return wilson(top_P).low > 0.5 and (random_NxP.mean(axis=1) >= top_P.mean()).sum() <= 0.05 * len(random_NxP)


def _mean_of_lists(answers: Iterable[Sequence[np.ndarray]]) -> float | None:
    """Return the mean share of prompts that random lists change; None where no behaviour has any."""
    means = [random_NxP.mean() for _, random_NxP in answers if len(random_NxP)]
    return float(np.mean(means)) if means else None


def _differences(edited: Ablation, behaviour: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the logit differences with the top features edited [P], and with each of N random lists [N, P].

    Random lists are of other features that fire, each built to the dose of the top ones (``interventions.controls``).
    """
    table = edited.table
    prompts = table.select_prompts(behaviour)
    top_1xP, random_NxP = (
        table.values(table.select_whole_edits(behaviour, group), prompts, "logit_diff") for group in ("top", "random")
    )
    return top_1xP[-1], random_NxP


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
