"""Causal tests of a dictionary's features, and patching, on prompts with two answers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from saejax.causal.ablate import verdict
from saejax.causal.ablate.experiment import ModelExperiment
from saejax.causal.ablate.results import BehaviourAblation
from saejax.causal.patching.pairs import fitting_pairs
from saejax.causal.patching.sites import Patched, patch_sites
from saejax.dictionaries import Dictionary
from saejax.errors import UserError, one_of
from saejax.interventions.split_model import SplitModel
from saejax.library.settings import configured
from saejax.models.language_model import LanguageModel
from saejax.models.sites import KINDS
from saejax.settings import AblateConfig
from saejax.tasks import draw
from saejax.tasks.behaviours import Prompt


@dataclasses.dataclass(frozen=True)
class Ablation:
    """What removing features does to a behaviour's logit differences, logit(correct) - logit(wrong), on test prompts.

    Attributes:
      features: the K features that were removed.
      clean_P: with nothing removed.
      single_KxP: with each feature removed by itself.
      joint_P: with all removed together.
      controls_NxP: with each of N sets of matched random features removed.
      results: what the stage saves: verdict and reason, intervals, how well the controls match.
    """

    features: Sequence[int]
    clean_P: np.ndarray
    single_KxP: np.ndarray
    joint_P: np.ndarray
    controls_NxP: np.ndarray
    results: BehaviourAblation


def make_prompts(lm: LanguageModel, behaviour: str, train: int = 80, test: int = 100, seed: int = 42) -> list[Prompt]:
    """Draws the prompts of a behaviour that comes with saejax, as the stage ``baseline`` does.

    Args:
      lm: the model, whose tokenizer must keep the answers apart from the text and from each other.
      behaviour: one of ``saejax.settings.BEHAVIOURS``.
      train, test: how many prompts of each split.
      seed: of the choice.
    """
    return draw.make_prompts(behaviour, train, test, seed, lm.tokenizer).prompts


def ablate(
    lm: LanguageModel,
    dictionary: Dictionary,
    prompts: Sequence[Prompt],
    *,
    features: Sequence[int] | None = None,
    **settings: Any,
) -> Ablation:
    """Removes features from the prompts of a behaviour, beside matched random ones, as the stage ``ablate`` does.

    Args:
      lm: the model that the dictionary was trained on.
      dictionary: whose features are removed.
      prompts: of one behaviour: "train" prompts choose features, "test" prompts judge them.
      features: which to remove. None: the first ``top`` by attribution on the train prompts.
      **settings: fields of ``saejax.settings.AblateConfig``, such as top=20, draws=100, replacement="mean".

    Raises:
      UserError: a setting is unknown or out of range, a split has no prompts, or too few other features fire for
        matched controls.
    """
    name = prompts[0].behaviour if prompts else ""
    if features is not None:
        settings["top"] = len(features)
    config = configured(AblateConfig, **settings)
    split = SplitModel(lm, dictionary, config.positions, config.error)
    if features is None:
        experiment = ModelExperiment(split, name, prompts, config)
    else:
        experiment = _NamedFeatures(features, dictionary.config.n_features, split, name, prompts, config)
    results, measured = verdict.judge(name, experiment, config)
    sets = measured.top_KxP, measured.joint_P, measured.controls_NxQ
    return Ablation(measured.top, measured.clean_P, *sets, results)


class _NamedFeatures(ModelExperiment):
    """Chooses named features, in their order, not by their attribution; further arguments are its parent's."""

    def __init__(self, features: Sequence[int], count: int, *args: Any):
        super().__init__(*args)
        self._falling_F = np.zeros(count)
        self._falling_F[list(features)] = np.arange(len(features), 0, -1)

    def attribution(self) -> np.ndarray:
        """Falls along the named features and is 0 for all others, [F]."""
        return self._falling_F


def patch(lm: LanguageModel, prompts: Sequence[Prompt], kind: str = "resid_post", split: str = "test") -> Patched:
    """Patches a kind of site between prompts and their counterparts, at every layer and position.

    Args:
      prompts: those of ``split`` with a counterpart of as many tokens are used.
      kind: one of ``saejax.models.sites.KINDS``.
      split: "train" or "test".

    Raises:
      UserError: no prompt has such a counterpart.
    """
    pairs, left_out = fitting_pairs(lm, prompts, split)
    if not pairs:
        raise UserError(f"no {split} prompt has a counterpart of as many tokens: {left_out}")
    return patch_sites(lm, one_of(kind, KINDS, "kind of site"), pairs)
