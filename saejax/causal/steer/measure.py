"""One behaviour steered: every method at every strength, the one chosen on train prompts, and what stands beside."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from saejax.causal.clustered import Resampling, of_prompts
from saejax.causal.results import EqualDose
from saejax.causal.steer import fluency
from saejax.causal.steer.directions import AnswerTexts, Turn, last_values
from saejax.causal.steer.draws import RandomDraws
from saejax.causal.steer.equal_dose import equal_dose
from saejax.causal.steer.methods import MethodOf, best, methods_of
from saejax.causal.steer.programs import Steered, SteeredTexts, steer_prompts
from saejax.causal.steer.prompting import SHOTS, prefixed, prefixes, text_rise
from saejax.causal.steer.results import BehaviourSteering, PromptingEffect, SteeringMethod, SteeringPoint
from saejax.interventions.split_model import CleanRun, SplitModel, in_order
from saejax.interventions.text import HeldOutText, TextDiffs
from saejax.models.language_model import LanguageModel
from saejax.results import Interval
from saejax.runner.parts import OnProgress
from saejax.settings import SteerConfig
from saejax.tasks.answer_tokens import first_answer_ids
from saejax.tasks.behaviours import Prompt
from saejax.tasks.scoring import bootstrap_means

LEAST_PROMPTS = 5  # test prompts, of fewer nothing is said


class Judged(NamedTuple):
    """A behaviour's results, and the logit differences that they were derived from.

    Attributes:
      results: without the answers of the run, which ``settled`` adds.
      prompts: the P test prompts.
      clean_P: without a change.
      steered: under each method at each strength, [S, P].
      draws: under random directions at each method's chosen dose, [N, Q].
      chosen_Q: the prompts to which these were added.
    """

    results: BehaviourSteering
    prompts: Sequence[Prompt]
    clean_P: np.ndarray
    steered: Mapping[str, np.ndarray]
    draws: Mapping[str, np.ndarray]
    chosen_Q: np.ndarray


class SteeringTest:
    """A behaviour on a model and a dictionary.

    Args:
      prompts: of the behaviour, of both splits.
      text: held-out text, if there is any.
      on_progress: called with the rows done and to do; may raise to stop.
    """

    def __init__(
        self,
        model: LanguageModel,
        split: SplitModel,
        prompts: Sequence[Prompt],
        text: HeldOutText | None,
        config: SteerConfig,
        on_progress: OnProgress,
    ):
        self._model, self._split, self._text, self._config, self._on_progress = model, split, text, config, on_progress
        halves = ([p for p in prompts if p.split == half] for half in ("train", "test"))
        self._examples, test = halves
        on_progress(0, 0)
        self._texts = AnswerTexts.of(split, self._examples) if self._examples else None
        self._train, _ = self._fitting(self._examples)
        self._test, self._left_out = self._fitting(test)

    def judge(self) -> Judged:
        """Everything there is to say of the behaviour."""
        if reason := self._reason():
            found = BehaviourSteering(reason, len(self._test), self._left_out, 0, None, None, {}, (), {}, None, {})
            return Judged(found, [], np.zeros(0), {}, {}, np.zeros(0, int))
        assert self._texts
        own_turns, config, texts = self._turns(self._test), self._config, self._texts
        turns = sorted(set(own_turns))
        over = of_prompts(self._test, config.bootstrap, config.seed)
        clean_P = self._clean(self._test)
        draws = RandomDraws(self._split, texts, self._test, own_turns, clean_P, config, self._on_progress)
        tops = {turn: texts.top(turn, config.top) for turn in {*turns, *self._turns(self._train)}}
        methods, steered, drawn = {}, {}, {}
        for name, method_of in methods_of(texts, tops, config).items():
            method = method_of(own_turns)
            measured = self._steer(self._split.run(self._test), method.changes)
            on_text = fluency.on_text(self._split, self._text, method_of(turns).changes) if self._text else None
            points = self._points(method.strengths, clean_P, measured, over, on_text)
            chosen = self._choose(points, method_of)
            steered[name] = measured.diff_SxP
            drawn[name], beside = draws.beside(measured.diff_SxP[chosen], points[chosen].dose)
            text = self._continued(draws.chosen_Q, method.changes[chosen])
            methods[name] = SteeringMethod(points, chosen, beside, *text)
        results = BehaviourSteering(
            reason=None,
            prompts=len(self._test),
            left_out=self._left_out,
            templates=over.templates,
            clean=over.mean(clean_P),
            clean_ce=self._continued(draws.chosen_Q, self._none(len(self._test)))[0],
            methods=methods,
            random=draws.curve(),
            equal_dose=_equal_dose(methods, clean_P, steered, over),
            prompting=self._prompting(clean_P, own_turns, over),
            features={self._named(turn): tuple(tops[turn]) for turn in turns},
        )
        return Judged(results, self._test, clean_P, steered, drawn, draws.chosen_Q)

    def _reason(self) -> str:
        """Why the behaviour is not steered; "" if it is."""
        if self._texts is None:
            return "it has no train prompts"
        if not self._texts.length > 0:
            return "the site's values have no length where they may be changed"
        for half, prompts in (("train", self._train), ("test", self._test)):
            if len(prompts) < LEAST_PROMPTS:
                return (
                    f"of its {half} prompts {len(prompts)} are answered rightly and turn one answer that some train "
                    "texts have into another one that some have"
                )
        return ""

    def _turns(self, prompts: Sequence[Prompt]) -> list[Turn]:
        if not prompts:
            return []
        return [Turn(own, target) for own, target in first_answer_ids(self._model.tokenizer, prompts).tolist()]

    def _fitting(self, prompts: Sequence[Prompt]) -> tuple[list[Prompt], dict[str, int]]:
        """Prompts that are answered rightly and whose turn the texts know; how many others there are, by why."""
        turns = self._turns(prompts)
        known = [p for p, turn in zip(prompts, turns, strict=True) if self._texts and self._texts.known(turn)]
        right = [p for p, diff in zip(known, self._clean(known), strict=True) if diff > 0] if known else []
        return right, {"unknown answers": len(prompts) - len(known), "answered wrongly": len(known) - len(right)}

    def _none(self, rows: int) -> SteeredTexts:
        return SteeredTexts.adding(np.zeros((rows, self._split.dictionary.W_dec_FxD[...].shape[1])))

    def _clean(self, prompts: Sequence[Prompt]) -> np.ndarray:
        return self._steer(self._split.run(prompts), [self._none(len(prompts))]).diff_SxP[0]

    def _steer(self, runs: Sequence[CleanRun], changes: Sequence[SteeredTexts]) -> Steered:
        return steer_prompts(self._split, runs, changes, self._config.batch_rows, self._on_progress)

    def _points(
        self,
        strengths: Sequence[float],
        clean_P: np.ndarray,
        found: Steered,
        over: Resampling,
        text: TextDiffs | None,
    ) -> tuple[SteeringPoint, ...]:
        """What each strength does on the test prompts."""
        assert self._texts
        rises = _rises(text, self._config) if text else [None] * len(strengths)
        kls = (text.kl_SxN.sum(axis=1) / text.tokens_N.sum()).tolist() if text else [None] * len(strengths)
        return tuple(
            SteeringPoint(
                strength=strength,
                dose=float(found.length_SxP[s].mean()) / self._texts.length,
                flipped=over.share(found.diff_SxP[s] < 0),
                drop=over.mean(clean_P - found.diff_SxP[s]),
                first=float(found.first_SxP[s].mean()),
                ce_rise=rises[s],
                kl=kls[s],
            )
            for s, strength in enumerate(strengths)
        )

    def _choose(self, points: Sequence[SteeringPoint], method_of: MethodOf) -> int:
        """The strength that flips most train prompts, of those that raise cross-entropy little; else the weakest."""
        found = self._steer(self._split.run(self._train), method_of(self._turns(self._train)).changes)
        fits_S = np.array([not p.ce_rise or p.ce_rise.mean <= self._config.max_ce_rise for p in points])
        return best(found.diff_SxP, fits_S)

    def _continued(self, chosen_Q: np.ndarray, change: SteeredTexts) -> tuple[float | None, str]:
        prompts = [self._test[place] for place in chosen_Q]
        config = self._config
        return fluency.continued(self._model, self._split, prompts, change[chosen_Q], config.positions, config.seed)

    def _prompting(self, clean_P: np.ndarray, own_turns: Sequence[Turn], over: Resampling) -> PromptingEffect | None:
        """Examples of the target in front, and the same ones with their right answers."""
        assert self._texts
        targets, wrong_N = (
            [turn.target for turn in own_turns],
            np.array([t.target for t in self._turns(self._examples)]),
        )
        found = []
        for side in ("wrong", "correct"):
            examples = prefixes(self._examples, wrong_N, side, self._config.seed)
            prompts = prefixed(self._model, self._test, targets, examples)
            if prompts is None:
                return None
            runs = self._split.run(prompts)
            steered = self._steer(runs, [self._none(len(prompts))])
            moved_PxD = _last(runs) - _last(self._split.run(self._test))
            steered = steered._replace(length_SxP=np.linalg.norm(moved_PxD, axis=1)[None])
            (point,) = self._points([SHOTS], clean_P, steered, over, None)
            found.append(point if self._text is None else self._with_text(point, sorted(examples.items())))
        return PromptingEffect(*found)

    def _with_text(self, point: SteeringPoint, examples: Sequence[tuple[int, str]]) -> SteeringPoint:
        assert self._text
        behind = [examples[n % len(examples)][1] for n in range(len(self._text.documents))]
        rise_N, tokens_N = text_rise(self._model, self._text, behind)
        text = TextDiffs(tokens_N, 0 * rise_N, rise_N[None], 0 * rise_N[None])
        return dataclasses.replace(point, ce_rise=_rises(text, self._config)[0])

    def _named(self, turn: Turn) -> str:
        own, target = (self._model.tokenizer.decode([token]) for token in turn)
        return f"{own} → {target}"


def _rises(text: TextDiffs, config: SteerConfig) -> list[Interval]:
    """The rise of cross-entropy with each change, nats per token."""
    tokens_N = text.tokens_N.astype(np.float64)
    mean_S = text.rise_SxN.sum(axis=1) / tokens_N.sum()
    low_S, high_S = bootstrap_means(text.rise_SxN, config.bootstrap, config.seed, whole_P=tokens_N)
    return [Interval(*map(float, ends)) for ends in zip(mean_S, low_S, high_S, strict=True)]


def _last(runs: Sequence[CleanRun]) -> np.ndarray:
    """The site's last value of every prompt, in their order, [P, D]."""
    return in_order((last_values(run.value_BxTxD, run) for run in runs), runs)


def _equal_dose(
    methods: Mapping[str, SteeringMethod], clean_P: np.ndarray, steered: Mapping[str, np.ndarray], over: Resampling
) -> dict[str, dict[str, EqualDose]]:
    """Areas under curves of drop against dose of features and of every other method, in two kinds of dose."""
    found: dict[str, dict[str, EqualDose]] = {}
    for other in methods if "features" in methods else ():
        for kind, of in (("norm", "dose"), ("kl", "kl")):
            pair = ("features", other)
            doses = [[getattr(point, of) for point in methods[name].points] for name in pair]
            if other == "features" or None in doses[0]:
                continue
            own, beside = ((np.array(d), clean_P[None, :] - steered[name]) for d, name in zip(doses, pair, strict=True))
            if equal := equal_dose(own, beside, over.mean):
                found.setdefault(other, {})[kind] = equal
    return found
