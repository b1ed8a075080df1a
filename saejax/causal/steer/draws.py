"""Random directions beside a steered prompt, at the dose that was chosen and at every other."""

from collections.abc import Sequence

import numpy as np

from saejax.causal.claims import Rule, SetEffects, run_draws, spread_over
from saejax.causal.steer.directions import AnswerTexts, Turn
from saejax.causal.steer.programs import SteeredTexts, steer_prompts
from saejax.causal.steer.results import RandomDirections
from saejax.interventions.split_model import SplitModel
from saejax.runner.parts import OnProgress
from saejax.settings import SteerConfig
from saejax.tasks.behaviours import Prompt
from saejax.tasks.scoring import middle

CURVE_DRAWS = 10  # at a dose that is not judged


def rule(config: SteerConfig) -> Rule:
    """The numbers of the rule of ``claims``; what is lost is the prompt's own answer."""
    return Rule(resamples=config.bootstrap, seed=config.seed)


class RandomDraws:
    """Differences of means of shuffled texts, added to Q of the test prompts.

    Args:
      texts: whose answers are shuffled, anew for each draw.
      prompts: P test prompts.
      turns: of each.
      clean_P: their logit differences.
      on_progress: called with the rows done and to do; may raise to stop.
    """

    def __init__(
        self,
        split: SplitModel,
        texts: AnswerTexts,
        prompts: Sequence[Prompt],
        turns: Sequence[Turn],
        clean_P: np.ndarray,
        config: SteerConfig,
        on_progress: OnProgress,
    ):
        templates = [prompt.template for prompt in prompts]
        self.chosen_Q = spread_over(templates, config.draw_prompts)
        self._split, self._texts, self._config, self._on_progress = split, texts, config, on_progress
        self._runs = split.run([prompts[place] for place in self.chosen_Q])
        self._turns = [turns[place] for place in self.chosen_Q]
        self._clean_Q, self._template_Q = clean_P[self.chosen_Q], np.asarray(templates)[self.chosen_Q]

    def beside(self, steered_P: np.ndarray, dose: float) -> tuple[np.ndarray, RandomDirections]:
        """Logit differences of the draws, [N, Q], no more than can change an answer; and what is said of them.

        Args:
          steered_P: logit differences of the test prompts under a method.
          dose: of that method, which the draws have too.
        """
        own = self._clean_Q, steered_P[self.chosen_Q]
        diff_NxQ, _ = run_draws(
            lambda block: self._at(dose, block),
            lambda diff_NxQ: SetEffects.of(*own, diff_NxQ, self._template_Q, None),
            self._config.draws,
            rule(self._config),
        )
        return diff_NxQ, self._said(dose, diff_NxQ)

    def curve(self) -> tuple[RandomDirections, ...]:
        """Some draws at every dose."""
        some = slice(0, min(CURVE_DRAWS, self._config.draws))
        return tuple(self._said(dose, self._at(dose, some)) for dose in self._config.doses)

    def _at(self, dose: float, draws: slice) -> np.ndarray:
        """Logit differences under draws of these numbers, [N, Q]; a number's direction is the same at all doses."""
        changes = []
        for number in range(draws.start, draws.stop):
            dealt = self._texts.shuffled(np.random.default_rng([self._config.seed, number]))
            changes.append(SteeredTexts.adding(dose * self._texts.length * dealt.between("difference", self._turns)))
        return steer_prompts(self._split, self._runs, changes, self._config.batch_rows, self._on_progress).diff_SxP

    def _said(self, dose: float, diff_NxQ: np.ndarray) -> RandomDirections:
        flipped_N, drop_N = (diff_NxQ < 0).mean(axis=1), (self._clean_Q[None, :] - diff_NxQ).mean(axis=1)
        draws, prompts = diff_NxQ.shape
        return RandomDirections(dose, draws, prompts, middle(flipped_N), middle(drop_N))
