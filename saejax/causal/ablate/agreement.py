"""Do other dictionaries say the same? The effects of all features of several, compared pair by pair (``stability``).

Another seed, another kind or another site gives other features. Where two dictionaries write to one site their
features are matched by direction, elsewhere by activity on the test prompts.
"""

import itertools
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

from saejax.causal.ablate.importance import Importance, measure_importance
from saejax.causal.ablate.importance_results import DictionaryAgreement
from saejax.causal.experiment import Experiment
from saejax.causal.stability import compare, match_by_activity, match_by_direction
from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.interventions.split_model import SplitModel
from saejax.models.language_model import LanguageModel
from saejax.settings import AblateConfig


class Effects(NamedTuple):
    """What the features of a dictionary do on the test prompts, and how strongly each fires on each at most, [P, F]."""

    dictionary: Dictionary
    importance: Importance
    largest_PxF: np.ndarray


def check(config: AblateConfig) -> None:
    """A ``UserError`` if dictionaries are to be compared that cannot be, or one that is tested is named twice."""
    if config.compare and config.effects != "all":
        raise UserError(
            "--ablate.compare compares the effects of all features: give --ablate.effects=all, or leave it out"
        )
    for flag, others in (("compare", config.compare), ("repeats", config.repeats)):
        if len({config.dictionary, *others}) < 1 + len(others):
            raise UserError(f"--ablate.{flag}={','.join(others)}: name each dictionary once, the tested one never")


def measure_agreement(
    experiment: Experiment,
    importance: Importance,
    model: LanguageModel,
    dictionary: Dictionary,
    others: Mapping[str, Dictionary],
    config: AblateConfig,
) -> tuple[DictionaryAgreement, ...]:
    """Compares the tested dictionary and others on a behaviour.

    Args:
      experiment: of the tested dictionary.
      importance: of its features.
      dictionary: the tested one.
      others: by name.

    Returns:
      For each pair.

    Raises:
      UserError: a dictionary belongs to another model, or something is not finite.
    """
    found = {config.dictionary: Effects(dictionary, importance, experiment.max_activations())}
    for name, other in others.items():
        moved = experiment.on(SplitModel(model, other, config.positions, config.error), name)
        found[name] = Effects(other, measure_importance(moved, config)[0], moved.max_activations())
    return tuple(
        compare_effects(first, second, found[first], found[second], config)
        for first, second in itertools.combinations(found, 2)
    )


def compare_effects(
    name: str, other: str, first: Effects, second: Effects, config: AblateConfig
) -> DictionaryAgreement:
    """An entry of ``measure_agreement``: of the dictionary ``name`` and the ``other`` one."""
    sites = [effects.dictionary.config.target or effects.dictionary.site for effects in (first, second)]
    by: Literal["direction", "activity"] = "direction" if sites[0] == sites[1] else "activity"
    if by == "direction":
        first_FxD, second_GxD = (np.asarray(effects.dictionary.W_dec_FxD[...]) for effects in (first, second))
        matches = match_by_direction(first_FxD, second_GxD)
    else:
        matches = match_by_activity(first.largest_PxF, second.largest_PxF)
    found = compare(first.importance, second.importance, matches, seed=config.seed)
    return DictionaryAgreement(first=name, second=other, by=by, **vars(found))
