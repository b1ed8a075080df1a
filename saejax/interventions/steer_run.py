"""The stage ``steer``: prompts steered to the answers of their counterparts.

Changes are learned on train prompts, which also choose the strength of each method among those that raise the
cross-entropy of held-out text little. Test prompts judge it, compared with random features or random directions at
equal dose.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from saejax.errors import UserError
from saejax.interventions import activity
from saejax.interventions.ablation import root_mean_square, spread_over_templates
from saejax.interventions.answers import CausalAnswer, VerdictConfig, mean_interval
from saejax.interventions.edits import FeatureEdits, mask
from saejax.interventions.split_model import SplitModel
from saejax.interventions.steering import (
    METHODS,
    MIN_TEXTS,
    AnswerSwap,
    AnswerTexts,
    Steered,
    choose_strength,
    group_by_swap,
    map_swaps,
    place_edits,
    random_directions,
    random_feature_vectors,
    steer,
    steering_edits,
    strengths_of,
    vector_edits,
)
from saejax.interventions.text import HeldOutText
from saejax.models.language_model import LanguageModel
from saejax.results import Interval
from saejax.runner import parts
from saejax.runner.workspace import Run
from saejax.settings import CorpusConfig, SteerConfig, TaskConfig
from saejax.statistics import bootstrap
from saejax.statistics.ranks import holm_by_key, min_controls, rank_p
from saejax.tasks import run_inputs
from saejax.tasks.behaviours import Prompt
from saejax.tasks.scoring import wilson

MIN_PROMPTS = 5  # prompts of a split; fewer are not steered
MAX_PROMPTS = 40  # test prompts of a behaviour that the stage steers: 99 controls at 9 strengths are run on each
TEXT_SWAPS = 4  # answer pairs whose changes are tried on held-out text
TEXT_DOCUMENTS = 16  # held-out documents on which the rise of cross-entropy is measured
# Nats per token: a larger rise means that text of any kind has become hard to predict, not that an answer was turned.
MAX_CE_RISE = 1.0
CONTROLS = dict(add="random sets of features", clamp="random sets of features", mean_difference="random directions")


@dataclasses.dataclass(frozen=True)
class SteeringPoint:
    """One strength of a method, on the test prompts."""

    strength: float  #: norm of what is added in mean norms of the site's values; of `clamp` the factor
    dose: float  #: root mean square over prompts of the norm of the change at the site
    drop: Interval  #: fall of logit(answer) - logit(target), 95 % bootstrap interval over prompts within templates
    turned: Interval  #: share of the prompts whose target has the higher logit, 95 % Wilson interval
    ce_rise: Interval | None  #: rise of cross-entropy on held-out text, nats per token; None without text


@dataclasses.dataclass(frozen=True)
class SteeringMethod:
    """A way to steer."""

    points: tuple[SteeringPoint, ...]  #: by rising strength
    chosen: int  #: the strength that was chosen on train prompts, counted from 0
    control: str  #: what it is compared with at equal dose: random sets of features, or random directions
    controls: tuple[float, ...]  #: drop of each control change, logits, mean over prompts
    control_turned: float | None  #: mean share of prompts that the controls turn; None without any
    answer: CausalAnswer  #: does it steer more than the controls at equal dose?


@dataclasses.dataclass(frozen=True)
class BehaviourSteering:
    """A behaviour steered; also in `<behaviour>.json`."""

    reason: str | None  #: why it is not steered; None where it is
    prompts: int  #: test prompts on which it is judged
    left_out: Mapping[str, int]  #: other test prompts, by reason
    clean: Interval | None  #: logit difference without a change
    methods: Mapping[str, SteeringMethod]  #: by name
    features: Mapping[str, tuple[int, ...]]  #: answer → target: the top features


@dataclasses.dataclass(frozen=True)
class SteerResults:
    """Steering of prompts to the answers of their counterparts."""

    dictionary: str  #: its name
    site: str  #: that is changed
    behaviours: Mapping[str, BehaviourSteering]  #: by name


def run_steer(run: Run) -> SteerResults:
    """Steer every behaviour.

    Args:
      run: of the unit.

    Returns:
      The results of the unit.

    Raises:
      UserError: the dictionary belongs to another model, there are no doses, or a logit is not finite.
    """
    config = run.configs[SteerConfig]
    prompts, dictionary = run_inputs.read_behaviours(run), run_inputs.load_run_dictionary(run)

    def begin() -> parts.Measure:
        lm = run_inputs.load_run_model(run)
        split = SplitModel(lm, dictionary)
        text = HeldOutText.of(run.configs[CorpusConfig], run.configs[TaskConfig], lm, TEXT_DOCUMENTS)

        def measure(name: str, on_progress: parts.OnProgress) -> parts.Measured:
            results = SteeringTest(lm, split, prompts[name], text, config, MAX_PROMPTS, on_progress).results()
            return parts.Measured(results, _line(results))

        return measure

    measured = parts.each_part(run, list(prompts), begin, BehaviourSteering, "tokens")
    site = dictionary.config.target or dictionary.site
    return SteerResults(config.dictionary, site, judge(measured))


class SteeringTest:
    """A behaviour on a model and a dictionary.

    Args:
      lm: the model.
      split: the model, split at the dictionary's site.
      prompts: prompts of both splits.
      text: held-out text, if there is any.
      config: settings of the stage.
      max_prompts: test prompts that are steered, at most, spread evenly over templates; 0: all.
      on_progress: called with the tokens done and in total of each measurement; may raise to stop.

    Raises:
      UserError: there are no doses.
    """

    def __init__(
        self,
        lm: LanguageModel,
        split: SplitModel,
        prompts: Sequence[Prompt],
        text: HeldOutText | None,
        config: SteerConfig,
        max_prompts: int = 0,
        on_progress: parts.OnProgress = parts.silent,
    ):
        if not config.doses:
            raise UserError("--steer.doses is empty: name at least one, such as 0.4")
        config = dataclasses.replace(config, doses=tuple(sorted(set(config.doses))))
        self._lm, self._split, self._text, self._config, self._on_progress = lm, split, text, config, on_progress
        self._nothing = mask(split.dictionary, [[]])
        train, test = ([prompt for prompt in prompts if prompt.split == name] for name in ("train", "test"))
        on_progress(0, 0)
        self._texts = AnswerTexts.read(lm, split, train) if train else None
        self._train, _ = self._fitting(train)
        # What the model gets wrong cannot be turned from right.
        tests, self._left_out = self._fitting(test)
        self._test = spread_over_templates(tests, max_prompts)
        self._left_out[f"beyond {max_prompts} prompts"] = len(tests) - len(self._test)
        self._train_groups, self._groups = group_by_swap(lm, self._train), group_by_swap(lm, self._test)
        swaps = {**self._groups, **self._train_groups} if self._texts else {}
        self._tops = {swap: self._texts.top(swap, config.top) for swap in swaps if self._texts}

    def results(self) -> BehaviourSteering:
        """Measure every method at every strength, and the controls of the chosen ones."""
        if reason := self._reason():
            return BehaviourSteering(reason, len(self._test), self._left_out, None, {}, {})
        templates = [prompt.template for prompt in self._test]
        weight_RxP = bootstrap.resampling_weights(templates, self._config.bootstrap, self._config.seed)
        clean_P = self._steer(self._test, self._groups, lambda swap: self._nothing).diff_SxP[0]
        methods = {
            method: self._measure(method, clean_P, weight_RxP)
            for method in METHODS
            if method == "mean_difference" or any(self._tops.values())
        }
        decode = self._lm.tokenizer.decode
        return BehaviourSteering(
            reason=None,
            prompts=len(self._test),
            left_out=self._left_out,
            clean=mean_interval(clean_P, weight_RxP),
            methods=methods,
            features={
                " → ".join(decode([token]).strip() for token in swap): tuple(self._tops[swap]) for swap in self._groups
            },
        )

    def _reason(self) -> str:
        """Return why the behaviour is not steered; "" if it is."""
        if self._texts is None:
            return "it has no train prompts"
        if not self._texts.norm > 0:
            return "no position of its train prompts may be changed"
        for split, prompts in (("train", self._train), ("test", self._test)):
            if len(prompts) < MIN_PROMPTS:
                return (
                    f"{len(prompts)} of its {split} prompts are answered correctly and have two answers that "
                    f"at least {MIN_TEXTS} train texts have, too; expected at least {MIN_PROMPTS}"
                )
        return ""

    def _fitting(self, prompts: Sequence[Prompt]) -> tuple[list[Prompt], dict[str, int]]:
        """Return prompts answered correctly whose answers the texts have, and the number of others by reason."""
        swaps, texts = group_by_swap(self._lm, prompts), self._texts
        covered = sorted(p for swap, places in swaps.items() if texts and texts.covers(swap) for p in places)
        chosen = [prompts[place] for place in covered]
        diff_P = steer(self._lm, self._split, chosen, self._nothing).diff_SxP[0] if chosen else np.zeros(0)
        right = [prompt for prompt, diff in zip(chosen, diff_P, strict=True) if diff > 0]
        return right, {"unknown answers": len(prompts) - len(chosen), "answered wrongly": len(chosen) - len(right)}

    def _steer(
        self,
        prompts: Sequence[Prompt],
        groups: Mapping[AnswerSwap, Sequence[int]],
        edits_of: Callable[[AnswerSwap], FeatureEdits],
    ) -> Steered:
        """Run the edits that ``edits_of(swap)`` gives, as many for each swap, on the prompts of that swap."""
        options = self._config.batch_rows, self._on_progress
        return map_swaps(
            groups, prompts, lambda swap, group: steer(self._lm, self._split, group, edits_of(swap), *options)
        )

    def _edits(self, method: str, swap: AnswerSwap) -> FeatureEdits:
        assert self._texts
        strengths = strengths_of(method, self._config.doses)
        return steering_edits(self._texts, self._split.dictionary, method, swap, self._tops[swap], strengths)

    def _measure(self, method: str, clean_P: np.ndarray, weight_RxP: np.ndarray) -> SteeringMethod:
        edits_of = functools.partial(self._edits, method)
        steered, rises = self._steer(self._test, self._groups, edits_of), self._text_rises(method)
        points = tuple(
            SteeringPoint(
                strength=strength,
                dose=root_mean_square(steered.norm_SxP[s]),
                drop=mean_interval(clean_P - steered.diff_SxP[s], weight_RxP),
                turned=wilson(steered.diff_SxP[s] < 0),
                ce_rise=rises[s] if rises else None,
            )
            for s, strength in enumerate(strengths_of(method, self._config.doses))
        )
        # A strength that breaks the model turns many prompts, too: text has to stay as likely as it was.
        allowed_S = np.array([not p.ce_rise or p.ce_rise.mean <= MAX_CE_RISE for p in points])
        # On train prompts, or the best of several strengths would look better than it is.
        chosen = choose_strength(self._steer(self._train, self._train_groups, edits_of).diff_SxP, allowed_S)
        controls = self._steer_controls(method, points[chosen].dose)
        drop_N, effect = (clean_P - controls.diff_SxP).mean(axis=1), points[chosen].drop
        p_value = rank_p(effect.mean, drop_N) if len(drop_N) else None
        return SteeringMethod(
            points=points,
            chosen=chosen,
            control=CONTROLS[method],
            controls=tuple(drop_N.tolist()),
            control_turned=float((controls.diff_SxP < 0).mean()) if len(drop_N) else None,
            answer=CausalAnswer("not tested", "Not tested: the run has not ended.", effect, p_value),
        )

    def _steer_controls(self, method: str, dose: float) -> Steered:
        """Run the controls of a method, scaled so that their dose is the method's."""
        assert self._texts
        texts, config = self._texts, self._config
        # The method changes nothing in prompts of a swap without top features, and neither do its controls.
        drawn: dict[AnswerSwap, list[np.ndarray]] = {}
        for swap in self._groups:
            if CONTROLS[method] == "random directions":
                drawn[swap] = random_directions(texts, swap, config.random_sets, config.seed)
            elif top := self._tops[swap]:
                drawn[swap] = random_feature_vectors(texts, self._firing_share_F, top, config.random_sets, config.seed)
        # As many for each swap, since a control is one change on all prompts.
        count = min(map(len, drawn.values()), default=0)
        if not count:
            return Steered(*np.zeros((2, 0, len(self._test))))

        def controls(vectors_of: Callable[[AnswerSwap], list[np.ndarray]], count: int) -> Steered:
            dictionary = self._split.dictionary
            nothing = mask(dictionary, [[]] * count)
            return self._steer(
                self._test,
                self._groups,
                lambda swap: vector_edits(dictionary, vectors_of(swap)[:count]) if swap in drawn else nothing,
            )

        # A vector of norm 1 has the dose sqrt(n) on a prompt with n positions that may change.
        unit_D = np.eye(1, texts.value_NxD.shape[1])[0]
        norm = dose / max(root_mean_square(controls(lambda swap: [unit_D], 1).norm_SxP[0]), 1e-6)
        return controls(lambda swap: [norm * vector_D for vector_D in drawn[swap]], count)

    @functools.cached_property
    def _firing_share_F(self) -> np.ndarray:
        """Return the share of the test prompts on which each feature fires."""
        return activity.statistics(self._split, self._split.run(self._test)).prompts_F / len(self._test)

    def _text_rises(self, method: str) -> list[Interval] | None:
        """Return the rise of cross-entropy at each strength, mean over the most frequent swaps; None without text."""
        if self._text is None:
            return None
        swaps = [swap for swap in self._groups if method == "mean_difference" or self._tops[swap]] or list(self._groups)
        rises = []
        for swap in swaps[:TEXT_SWAPS]:
            ce_ExN = self._text.effects(*place_edits(self._lm, self._split, self._edits(method, swap)))["ce"]
            rises.append(ce_ExN[1:] - ce_ExN[0])
        rise_SxN = np.mean(rises, axis=0)
        documents = [""] * rise_SxN.shape[1]
        weight_RxN = bootstrap.resampling_weights(documents, self._config.bootstrap, self._config.seed)
        return [mean_interval(rise_N, weight_RxN) for rise_N in rise_SxN]


def judge(behaviours: Mapping[str, BehaviourSteering]) -> dict[str, BehaviourSteering]:
    """Answer, for each method and behaviour, whether it steers more than its controls at equal dose.

    p-values are corrected by Holm's method over the behaviours, for each method by itself.
    """
    judged = dict(behaviours)
    # Methods are not corrected for each other: each is a question by itself.
    for method in METHODS:
        measured = {name: result.methods[method] for name, result in behaviours.items() if method in result.methods}
        p_values = {name: each.answer.p_value for name, each in measured.items() if each.answer.p_value is not None}
        p_holm = holm_by_key(p_values)
        for name, each in measured.items():
            answered = dataclasses.replace(each, answer=_conclude(each, p_holm.get(name), len(p_holm)))
            judged[name] = dataclasses.replace(judged[name], methods={**judged[name].methods, method: answered})
    return judged


def _conclude(result: SteeringMethod, p_holm: float | None, tests: int) -> CausalAnswer:
    """Return the answer of a method on a behaviour, given its corrected p-value and the number of tests."""
    effect, point, p_value = result.answer.effect, result.points[result.chosen], result.answer.p_value
    if p_holm is None or effect is None:
        reason = f"Not tested: there are no {result.control} to compare with."
        return CausalAnswer("not tested", reason, effect)
    level = VerdictConfig().level
    answer, needed = "yes" if p_holm <= level and effect.low > 0 else "no", min_controls(tests, level)
    sentence = (
        f"At strength {point.strength:g} (dose {point.dose:.3g}) the logit difference changes by {-effect.mean:+.2f} "
        f"logits [{-effect.high:+.2f}, {-effect.low:+.2f}], and {100 * point.turned.mean:.0f} % of the prompts "
        f"[{100 * point.turned.low:.0f}, {100 * point.turned.high:.0f}] are turned. "
    )
    if point.ce_rise:
        sentence += f"The cross-entropy of held-out text rises by {point.ce_rise.mean:.2f} nats per token. "
    count = len(result.controls)
    if count < needed:
        answer = "not testable"
        sentence += f"Not testable: {count} controls ({result.control}) of {needed} needed."
    else:
        corrected = f", {p_holm:.2g} after correction for {tests} behaviours" if tests > 1 else ""
        verb = "more than" if answer == "yes" else "not shown to be more than"
        sentence += (
            f"The drop is {verb} that of {count} {result.control} of equal dose (mean {np.mean(result.controls):.2f}, "
            f"maximum {max(result.controls):.2f}; p = {p_value:.2g}{corrected}), which turn "
            f"{100 * (result.control_turned or 0):.0f} % of the prompts."
        )
    numbers = dict(controls=float(count), needed=float(needed))
    return CausalAnswer(answer, sentence, effect, p_value, p_holm, numbers)


def _line(result: BehaviourSteering) -> str:
    if result.reason:
        return f"not steered: {result.reason}"
    chosen = {name: each.points[each.chosen] for name, each in result.methods.items()}
    listed = [f"{name} turns {100 * p.turned.mean:.0f} % at strength {p.strength:g}" for name, p in chosen.items()]
    return f"{result.prompts} test prompts: {', '.join(listed)}"
