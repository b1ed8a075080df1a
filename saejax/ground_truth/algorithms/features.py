"""Features of a dictionary: ablated one by one, beside random directions, and compared with known variables."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from saejax.activations.in_memory import capture
from saejax.dictionaries import Dictionary
from saejax.ground_truth.results import AblatedFeatures, VariableFeature
from saejax.ground_truth.scores import over_seeds
from saejax.interventions.edits import mask
from saejax.interventions.engine import effects
from saejax.models.language_model import LanguageModel
from saejax.statistics.intervals import wilson
from saejax.statistics.ranks import holm_by_key
from saejax.tasks.behaviours import Prompt

TRAINED, RANDOM = "trained", "random directions"
_LEAST = 6  # prompts with a value, and without it, in each split; fewer are not compared
_PERMUTATIONS, _SEED = 19_999, 789  # of the labels of test prompts
_LEVEL = 0.95  # share of the random directions below which the effect of a feature may be chance


def ablate_each(lm: LanguageModel, dictionary: Dictionary, prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
    """Ablate each feature of a dictionary alone.

    Returns:
      For each of N features that fire: whether an answer becomes right or wrong, bool [N]; the absolute change of the
      logit difference, mean over the prompts on which it fires, [N].
    """
    # The first edit ablates nothing: it leaves the transformer's own answers.
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


def match_variables(
    lm: LanguageModel, dictionaries: Mapping[str, Dictionary], prompts: Sequence[Prompt]
) -> tuple[VariableFeature, ...]:
    """Compare features with the values of the variables that label the prompts; of yes and no with yes alone.

    Args:
      lm: the transformer.
      dictionaries: the trained one and the control; both have the same activations.
      prompts: train prompts choose a feature for each value, and test prompts judge it.
    """
    trained = dictionaries[TRAINED]
    acts = capture(lm, [prompt.text for prompt in prompts], trained.site)
    last_P = np.flatnonzero(np.diff(acts.index_Nx3[:, 0], append=-1))
    f_PxF = np.asarray(trained.encode(jnp.asarray(acts.values[trained.site][last_P])), np.float64)
    judges_P = np.array([prompt.split == "test" for prompt in prompts])
    chosen: list[tuple[VariableFeature, np.ndarray]] = []
    for name in dict.fromkeys(name for prompt in prompts for name, _ in prompt.labels):
        values = [dict(prompt.labels).get(name) for prompt in prompts]
        known_P = np.array([value is not None for value in values])
        for value in sorted({value for value in values if value not in (None, "no")}):
            has_P = np.array([prompt_value == value for prompt_value in values])
            halves = [known_P & ~judges_P, known_P & judges_P]
            if min(min(has_P[half].sum(), (~has_P[half]).sum()) for half in halves) >= _LEAST:
                best = _match_value(f_PxF[halves[0]], has_P[halves[0]], f_PxF[halves[1]], has_P[halves[1]])
                chosen.append((VariableFeature(name, value, int(has_P[halves[1]].sum()), *best, 0.0, 0.0), has_P))
    p_holm = holm_by_key({place: match.p_holm for place, (match, _) in enumerate(chosen)})
    tests, edits = [prompt for prompt in prompts if prompt.split == "test"], [[match.feature] for match, _ in chosen]
    drops = {}
    for name, dictionary in dictionaries.items():
        clean_1xPx1, edited_NxPx1 = np.split(effects(lm, tests, mask(dictionary, [[], *edits])), [1])
        drops[name] = (clean_1xPx1 - edited_NxPx1)[..., 0]
    return tuple(
        dataclasses.replace(
            match,
            p_holm=p_holm[place],
            drop=float(drops[TRAINED][place, has_P[judges_P]].mean()),
            random_drop=float(drops[RANDOM][place, has_P[judges_P]].mean()),
        )
        for place, (match, has_P) in enumerate(chosen)
    )


def _match_value(
    train_PxF: np.ndarray, has_P: np.ndarray, test_QxF: np.ndarray, has_Q: np.ndarray
) -> tuple[int, float, float]:
    """Return the feature that is most correlated with a value on train prompts, its AUC on test prompts, and p."""
    from scipy.stats import rankdata

    centred_PxF = train_PxF - train_PxF.mean(axis=0)
    correlation_F = (has_P - has_P.mean()) @ centred_PxF / np.maximum(np.linalg.norm(centred_PxF, axis=0), 1e-12)
    feature = int(correlation_F.argmax())
    # Mann and Whitney's sum of ranks, with labels permuted: its normal limit is too small a p-value where a feature is
    # silent on most prompts.
    rank_Q, count = rankdata(test_QxF[:, feature]), int(has_Q.sum())
    order_SxQ = np.random.default_rng(_SEED).permuted(np.tile(has_Q, (_PERMUTATIONS, 1)), axis=1)
    seen, as_large = float(rank_Q[has_Q].sum()), int((order_SxQ @ rank_Q >= rank_Q[has_Q].sum() - 1e-9).sum())
    auc = (seen - count * (count + 1) / 2) / (count * (len(has_Q) - count))
    return feature, auc, (1 + as_large) / (1 + _PERMUTATIONS)
