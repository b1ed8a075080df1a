"""Features of transcoders beside the known neurons and variables of a transformer set by hand.

The causal tests are the tests of ``saejax.ablate``, with the features of one layer.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from saejax.attribution.local.transcoders import LayerTranscoders
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
_ABLATION: Mapping[str, Any] = dict(bootstrap=1000, baselines=(), placebo_targets=0, untrained_dictionaries=0)


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
