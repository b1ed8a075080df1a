"""Features of a dictionary that are ablated one by one, beside directions drawn at random."""

from collections.abc import Mapping, Sequence

import numpy as np

from saejax.dictionaries import Dictionary
from saejax.ground_truth.results import AblatedFeatures
from saejax.ground_truth.scores import over_seeds
from saejax.interventions.edits import mask
from saejax.interventions.engine import effects
from saejax.models.language_model import LanguageModel
from saejax.tasks.behaviours import Prompt
from saejax.tasks.scoring import wilson

TRAINED, RANDOM = "trained", "random directions"
_LEVEL = 0.95  # share of the random directions below which the effect of a feature may be chance


def ablate_each(lm: LanguageModel, dictionary: Dictionary, prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
    """Ablate each feature of a dictionary alone.

    Returns:
      For each of N features that fire: whether an answer becomes right or wrong, bool [N]; the absolute change of the
      logit difference, mean over the prompts on which it fires, [N].
    """
    # The first edit ablates nothing: its answers are those of the transformer itself.
    edits = mask(dictionary, [[], *([feature] for feature in range(dictionary.config.n_features))])
    readouts = effects(lm, prompts, edits, ("top1", "logit_diff", "change_norm"))
    live_E = (readouts[..., 2] > 0).any(axis=1)
    # Where a feature is silent nothing changes.
    change_NxPxR = np.abs(readouts - readouts[:1])[live_E]
    fires_N = (change_NxPxR[..., 2] > 0).sum(axis=1)
    return change_NxPxR[..., 0].any(axis=1), change_NxPxR[..., 1].sum(axis=1) / fires_N


def compare(ablated: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, AblatedFeatures]:
    """Compare what ``ablate_each`` returns for each dictionary with the random directions."""
    level = np.quantile(ablated[RANDOM][1], _LEVEL)
    return {
        name: AblatedFeatures(
            len(effect_N), wilson(changed_N), wilson(effect_N > level), over_seeds(effect_N.tolist(), (0.0, np.inf))
        )
        for name, (changed_N, effect_N) in ablated.items()
    }
