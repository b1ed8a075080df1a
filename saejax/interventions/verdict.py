"""Verdicts on whether features cause a behaviour: six questions, answered from the effects table alone.

T is the set of the k features with the largest attribution for the behaviour's answer on train prompts; E(S) is the
mean drop of the logit difference on test prompts when the set S is ablated. Every control was built to T's dose, the
root mean square over prompts of the norm of the change at the site, and measured there
(``saejax.interventions.controls``); nothing is interpolated. On a benchmark the log-likelihood of the reference answer
takes the logit difference's place (``EffectsTable.objective``). The questions are not nested and not combined:

1. Does ablation have an effect? On logit difference, log-probability, two-way and top-1 accuracy, each by itself; on
   a benchmark on log-likelihood and accuracy, with features set to zero and resampled.
2. More than random features that change the site as much? Against random lists.
3. Specific to this answer? Other sets on this answer: against placebo sets, the top features of two tokens that are
   likely in these contexts and no answers. And T on other answers: the share that T takes from the logit difference is
   larger than its shares of the differences of other likely tokens. A yes needs both. On a benchmark T must lower
   the margin of the final answer, its log-probability minus a corrupted answer's; the other side is not asked.
4. Did training matter? Against untrained dictionaries, from whose directions a list is made by the same attribution.
   Dictionaries of other seeds are compared with the same lists. Beside it simpler bases, one by one.
5. Selective? Other behaviours and held-out text change by less than a margin, in either direction.
6. Enough? The share of the logit difference that is left where the top features alone are kept; no yes or no.

Intervals are bootstrap intervals over prompts within templates. p-values are corrected by Holm's method over the
behaviours of a run within each question. Beside question 2 stands how many placebo sets pass it: how often "more than
random features" says yes to features that were chosen for an unrelated answer.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from saejax.arguments import check_classes
from saejax.errors import UserError
from saejax.interventions import answers as wording
from saejax.interventions.answers import BehaviourVerdict, CausalAnswer, CausalVerdict, Kept, VerdictConfig
from saejax.interventions.controls import check_controls, lists_differ
from saejax.interventions.table import (
    BASIS,
    KEPT,
    KEPT_CONTROLS,
    NO_ERROR,
    RANKS,
    SPARING,
    TESTED,
    TEXT,
    EditDefinition,
    EffectsTable,
    PromptDefinition,
)
from saejax.results import Interval
from saejax.statistics import bootstrap
from saejax.statistics.intervals import wilson
from saejax.statistics.ranks import holm_by_key, min_controls, rank_p
from saejax.wording import counted


@check_classes
def verdict(table: EffectsTable, config: VerdictConfig | None = None) -> CausalVerdict:
    """Answer the six questions for every dictionary and behaviour of a table.

    Args:
      table: effects table of a run; see ``saejax.load_effects``.
      config: the numbers of the rule.

    Returns:
      The verdict: a pure function of the table's rows, in whatever order they stand.

    Raises:
      UserError: no behaviour has tested features, one has fewer than 2 test prompts, an edit was not measured on some
        of them, or the controls are none (``saejax.interventions.controls.check_controls``).
    """
    config = config or VerdictConfig()
    if table.untested and not table.behaviours:
        raise UserError(wording.explain_no_top_features(table.untested))
    judged = {dictionary: _judge_dictionary(table, dictionary, config) for dictionary in table.dictionaries}
    seeds = [answers for name, answers in judged.items() if name != TESTED]
    if seeds and TESTED in judged:
        judged[TESTED] = {
            behaviour: dataclasses.replace(result, replication=wording.replication(behaviour, result, seeds))
            for behaviour, result in judged[TESTED].items()
        }
    untested = {behaviour: wording.explain_no_top_features([behaviour]) for behaviour in table.untested}
    return CausalVerdict(config.rule, judged, untested or None)


@dataclasses.dataclass(frozen=True)
class MeasuredBehaviour:
    """Measurements of one dictionary on one behaviour."""

    table: EffectsTable  #: the effects table of the run
    behaviour: str  #: name of the behaviour
    dictionary: str  #: name of the dictionary
    prompts: list[PromptDefinition]  #: the P test prompts of the behaviour
    objective: str  #: the readout whose drop is the effect
    top: EditDefinition  #: T, ablated whole
    drop_P: np.ndarray  #: by how much T lowers the objective
    dose: float  #: dose of T
    weight_RxP: np.ndarray  #: weight of each prompt in each bootstrap sample of a mean; see ``resampling_weights``

    @classmethod
    def read(cls, table: EffectsTable, behaviour: str, dictionary: str, config: VerdictConfig) -> "MeasuredBehaviour":
        """Read the top features of a behaviour, check their controls, and draw bootstrap samples.

        Raises:
          UserError: there are fewer than 2 test prompts, T was not measured on some, or see ``check_controls``.
        """
        prompts = table.select_prompts(behaviour)
        if len(prompts) < 2:
            count = counted(len(prompts), "test prompt")
            raise UserError(f"{behaviour} has {count}: expected at least 2; raise --task.test_prompts")
        weight_RxP = bootstrap.resampling_weights(
            [prompt.template for prompt in prompts], config.resamples, config.seed
        )
        check_controls(table, behaviour, dictionary)
        top, objective = table.select_edits(behaviour, "top", dictionary)[-1], table.objective(behaviour)
        (dose,) = table.doses([top], prompts)
        draft = cls(table, behaviour, dictionary, prompts, objective, top, np.zeros(0), float(dose), weight_RxP)
        return dataclasses.replace(draft, drop_P=draft.drops([top])[0])

    def on_final_answers(self, config: VerdictConfig) -> "MeasuredBehaviour":
        """Return the measurements that question 3 compares: of a benchmark the margin of the final answer.

        On the items where it was measured: some answers cannot be corrupted.
        """
        if self.objective != "answer_log_prob":
            return self
        margin_P = self.table.drops([self.top], self.prompts, "answer_margin")[0]
        prompts = [prompt for prompt, margin in zip(self.prompts, margin_P, strict=True) if np.isfinite(margin)]
        strata = [prompt.template for prompt in prompts]
        weight_RxP = (
            bootstrap.resampling_weights(strata, config.resamples, config.seed)
            if prompts
            else np.zeros((config.resamples, 0))
        )
        return dataclasses.replace(
            self,
            prompts=prompts,
            objective="answer_margin",
            drop_P=margin_P[np.isfinite(margin_P)],
            weight_RxP=weight_RxP,
        )

    @property
    def k(self) -> int:
        """The number of top features."""
        return len(self.top.features)

    @property
    def templates(self) -> list[str]:
        """The template of each prompt."""
        return [prompt.template for prompt in self.prompts]

    def edits(self, group: str) -> list[EditDefinition]:
        """Return the edits of a group of this dictionary; untrained dictionaries are the same for all seeds."""
        is_shared = group in ("untrained", "uncentred")
        return self.table.select_edits(self.behaviour, group, TESTED if is_shared else self.dictionary)

    def reaching(self, edits: list[EditDefinition]) -> list[EditDefinition]:
        """Return those edits that change the site as much as the tested dictionary's T does, within one percent."""
        tested = self.table.select_edits(self.behaviour, "top")
        wanted = self.table.doses(tested[-1:], self.prompts)[0] if tested else self.dose
        return self.table.reaching(edits, self.prompts, wanted)

    def drops(self, edits: list[EditDefinition]) -> np.ndarray:
        """Return by how much each of E edits lowers the objective of each prompt, ``[E, P]``.

        Raises:
          UserError: an edit was not measured on some of the prompts.
        """
        drop_ExP = self.table.drops(edits, self.prompts, self.objective)
        for place in np.flatnonzero(~np.isfinite(drop_ExP).all(axis=1))[:1]:
            raise UserError(
                f"edit {edits[place].id} of {self.behaviour} was not measured on all its test prompts: run the stage "
                "again"
            )
        return drop_ExP

    def interval(self, value_P: np.ndarray) -> tuple[Interval, np.ndarray]:
        """Return the mean of a number per prompt with its interval, and its bootstrap samples."""
        sample_R = self.weight_RxP @ value_P
        return Interval(float(value_P.mean()), *bootstrap.percentile_interval(sample_R)), sample_R

    @property
    def readouts(self) -> list[str]:
        """The readouts of question 1 (``answers.ABLATION_READOUTS``), the objective first."""
        if self.objective == "logit_diff":
            return ["logit_diff", "log_prob", "two_way", "top1"]
        if self.objective == "readout":
            return ["readout"]
        readouts = ["answer_log_prob", "accuracy"]
        return readouts + [name + wording.RESAMPLED for name in readouts if self.edits("resample")]


class _Test(NamedTuple):
    """A question about one behaviour before correction: its p-value, and the answer given the corrected one."""

    p_value: float | None  # None: not tested, and not counted by the correction
    conclude: Callable[[float | None], CausalAnswer]


def _judge_dictionary(table: EffectsTable, dictionary: str, config: VerdictConfig) -> dict[str, BehaviourVerdict]:
    names = [name for name in table.behaviours if table.select_edits(name, "top", dictionary)]
    measured = {name: MeasuredBehaviour.read(table, name, dictionary, config) for name in names}
    readouts_of = {name: measured[name].readouts for name in names}
    ablation: dict[str, dict[str, CausalAnswer]] = {}
    for readout in dict.fromkeys(readout for readouts in readouts_of.values() for readout in readouts):
        with_readout = [name for name in names if readout in readouts_of[name]]
        ablation[readout] = _correct(
            {name: _test_ablation(measured[name], readout, config) for name in with_readout}, config
        )

    def among(group: str) -> dict[str, CausalAnswer]:
        compared = {
            name: measured[name].on_final_answers(config) if group == "placebo" else measured[name] for name in names
        }
        tests: dict[str, _Test] = {}

        def tested() -> int:
            # Behaviours that are not testable have no p-value, and are not corrected for.
            return sum(test.p_value is not None for test in tests.values())

        tests.update((name, _test_among(compared[name], group, tested, config)) for name in names)
        return _correct(tests)

    random, placebo, trained = map(among, ("random", "placebo", "untrained"))
    bases = _judge_bases(table, measured, config)
    selective = _correct({name: _test_selective(table, measured[name], config) for name in names}, config)
    return {
        name: BehaviourVerdict(
            features=measured[name].top.features,
            dose=measured[name].dose,
            ablation={readout: ablation[readout][name] for readout in readouts_of[name]},
            held_out=tuple(sorted({prompt.template for prompt in measured[name].prompts if prompt.held_out})),
            templates=bootstrap.stratum_means(measured[name].drop_P, measured[name].templates),
            random=random[name],
            placebo=placebo[name],
            trained=trained[name],
            bases=bases[name],
            selective=selective[name],
            fooled=_count_fooled(measured[name], config),
            placebo_sets=len(measured[name].edits("placebo")),
            enough=_measure_enough(measured[name]),
        )
        for name in names
    }


def _correct(tests: Mapping[Any, _Test], config: VerdictConfig | None = None) -> dict[Any, CausalAnswer]:
    """Correct the p-values of one question over its tests, and conclude.

    Args:
      tests: the tests of the question, by behaviour, or by behaviour and basis.
      config: numbers of the rule if the p-values come from a bootstrap; None if they are ranks among sets.
    """
    p_values = {key: test.p_value for key, test in tests.items() if test.p_value is not None}
    # Within a question, as each question is answered by itself; a test that was not made is none of its hypotheses.
    adjusted = holm_by_key(p_values)
    answers = {key: test.conclude(adjusted.get(key)) for key, test in tests.items()}
    # The p-value of a bootstrap is at least 2 / (1 + resamples), which the correction multiplies by the tests.
    if config is None or config.resamples >= (needed := math.ceil(2 * len(p_values) / config.level) - 1):
        return answers
    sentence = wording.too_few_resamples(config.resamples, needed)
    return {
        # What the correction alone denies.
        key: answer
        if tests[key].conclude(tests[key].p_value).answer == answer.answer
        else dataclasses.replace(answer, answer="not testable", sentence=sentence)
        for key, answer in answers.items()
    }


def _unanswered(sentence: str, answer: str = "not testable") -> _Test:
    """Return a question that was not tested, which has no p-value."""
    return _Test(None, lambda _: CausalAnswer(answer, sentence))


def _not_tested(reason: str) -> _Test:
    return _unanswered(f"Not tested: {reason}.", "not tested")


def _test_ablation(measured: MeasuredBehaviour, readout: str, config: VerdictConfig) -> _Test:
    """Test question 1: does ablation have an effect on this readout?"""
    name, table = readout.removesuffix(wording.RESAMPLED), measured.table
    edits = measured.edits("resample") if readout != name else [measured.top]
    clean_P, drop_P = table.clean_values(measured.prompts, name), table.drops(edits, measured.prompts, name)[0]
    if np.isnan(drop_P).any():
        return _not_tested(f"{name.replace('_', ' ')} was not measured")
    effect, sample_R = measured.interval(drop_P)
    p_value = bootstrap.two_sided_p(sample_R)
    means = bootstrap.stratum_means(drop_P, measured.templates)
    lacks = wording.too_few_prompts(len(drop_P), config.least_prompts)
    if name in ("two_way", "top1", "accuracy"):
        # Where the model is hardly ever right, no ablation could make it wrong as often as counts.
        if clean_P.mean() <= config.min_accuracy_drop:
            least = f"{100 * config.min_accuracy_drop:g}"
            lacks = lacks or f"not testable, it is not above the {least} points by which it would have to fall"
        is_large = effect.mean > config.min_accuracy_drop
        # At 0 or 100 % the accuracy of a template may stay where it is: only a rise contradicts.
        templates_agree = min(means.values()) >= 0
    else:
        is_large, templates_agree = True, bootstrap.has_same_sign(list(means.values()))

    def conclude(p_holm: float | None) -> CausalAnswer:
        is_sure = p_holm is not None and p_holm <= config.level and effect.low > 0
        answer = "not testable" if lacks else "yes" if is_sure and is_large and templates_agree else "no"
        disagreeing = {} if templates_agree else means
        sentence = wording.ablation_sentence(
            measured.k, readout, effect, float(clean_P.mean()), is_sure, is_large, disagreeing, lacks
        )
        return CausalAnswer(answer, sentence, effect, p_value, p_holm)

    return _Test(None if lacks else p_value, conclude)


def _test_among(measured: MeasuredBehaviour, group: str, tested: Callable[[], int], config: VerdictConfig) -> _Test:
    """Test whether T has a larger effect than controls of the same dose: questions 2, 3 (both sides) and 4.

    Args:
      measured: the behaviour.
      group: random, placebo or untrained.
      tested: returns on how many behaviours the question is tested, over which it is corrected.
      config: numbers of the rule.
    """
    controls = measured.edits(group)
    if group == "untrained":
        # A list of all directions may change the site less than T does: then it is no control of the same dose.
        controls = measured.reaching(controls) if measured.reaching(measured.edits("trained")) else []
    if not measured.dose:
        return _unanswered(wording.NO_CHANGE)
    if not controls:
        return _without_controls(measured, group)
    too_few = wording.too_few_prompts(len(measured.prompts), config.least_prompts)
    # Ranks among sets need no prompts, but shares of other answers are compared by a bootstrap over prompts.
    if too_few and group == "placebo" and measured.objective != "readout":
        if measured.objective == "answer_margin":
            return _unanswered(f"Whether the effect is on the final answer is {too_few} whose answer can be corrupted.")
        return _unanswered(f"{too_few[:1].upper()}{too_few[1:]}.")
    # Question 4 compares dictionaries: of the tested one, too, the list to the dose, by the same function.
    tested_P = measured.drops(measured.edits("trained"))[0] if group == "untrained" else measured.drop_P
    control_N = measured.drops(controls).mean(axis=1)
    effect, _ = measured.interval(tested_P - measured.drops(controls).mean(axis=0))
    p_value = rank_p(float(tested_P.mean()), control_N)
    median, high = np.quantile(control_N, [0.5, 0.95])
    numbers = dict(sets=len(controls), mean=control_N.mean(), median=median, high=high)
    numbers |= dict(max=control_N.max(), top=tested_P.mean())
    numbers |= dict(features=np.median([len(control.features) for control in controls]), p_controls=p_value)
    pool = measured.edits("pool")
    if group == "random" and pool:
        numbers["pool"] = len(pool[0].features)
    if group == "untrained" and (uncentred := measured.reaching(measured.edits("uncentred"))):
        numbers["uncentred"] = np.median(measured.drops(uncentred).mean(axis=1))
    parts: dict[str, Interval] = {}
    shares = _compare_shares(measured) if group == "placebo" else None
    # Of benchmarks the other side is not asked.
    lacks_side = group == "placebo" and shares is None and measured.objective == "logit_diff"
    if shares:
        numbers |= shares.numbers
        parts = dict(share=shares.share)
        # A yes needs both sides, so the larger p-value is the whole question's (Berger, 1982).
        p_value = max(p_value, shares.p_value)
    is_testable = not lacks_side and (group != "random" or _lists_differ(measured, config))

    def conclude(p_holm: float | None) -> CausalAnswer:
        behaviours = max(tested(), 1)
        needed = min_controls(behaviours, config.level)
        figures = {name: float(value) for name, value in numbers.items()} | dict(needed=float(needed))
        if lacks_side:
            return CausalAnswer("not testable", wording.NO_SHARES, effect, p_value, p_holm, figures)
        # What raises the readout costs nothing, though its controls may raise it by more.
        answer = "yes" if p_holm is not None and p_holm <= config.level and tested_P.mean() > 0 else "no"
        # With so few controls even the first rank of all is not significant after correction: "no" would say too much.
        if not is_testable or len(controls) < needed:
            answer = "not testable"
        answered = CausalAnswer(answer, "", effect, p_value, p_holm, figures, parts or None)
        # The same holds of resamples, of which the smallest share is one among all.
        if shares and answer == "no" and p_value <= config.level and config.resamples < needed:
            return dataclasses.replace(
                answered, answer="not testable", sentence=wording.too_few_resamples(config.resamples, needed)
            )
        k = len(measured.edits("trained")[0].features) if group == "untrained" else measured.k
        sentence = wording.among_sentence(answered, group, k, behaviours, measured.objective, controls[0].site)
        return dataclasses.replace(answered, sentence=sentence)

    return _Test(p_value if is_testable else None, conclude)


def _without_controls(measured: MeasuredBehaviour, group: str) -> _Test:
    """Return the answer where there are no controls of a group."""
    pool = measured.edits("pool")
    if group == "untrained" and measured.edits(group) and measured.edits("trained"):
        return _unanswered(wording.NO_DOSE)
    if group == "placebo" and measured.objective == "readout":
        return _unanswered(wording.NO_PLACEBO_READOUTS, "not tested")
    if group == "placebo" and measured.objective == "answer_margin":
        return _unanswered(wording.NO_PLACEBO_ANSWERS, "not tested")
    if group != "random" or not pool:
        return _not_tested(f"no {wording.CONTROLS[group]} were measured")
    return _unanswered(
        f"Not testable: all {len(pool[0].features):,} other features that fire change the site less than the "
        f"{counted(measured.k, 'top feature')}; use a smaller k or a wider dictionary."
    )


class _Shares(NamedTuple):
    """The shares that T takes from the logit differences of its own answer and of other answers."""

    share: Interval
    p_value: float
    numbers: dict[str, float]


def _compare_shares(measured: MeasuredBehaviour) -> _Shares | None:
    """Compare the share of the logit difference that T takes with the shares of pairs of other likely tokens.

    Shares and not logits, because a general loss of confidence takes most from the most confident. Pairs share tokens,
    so this is no rank test: the real share must exceed the 95th percentile of pairs in resamples over prompts, in which
    pairs and the real one are resampled together.

    Returns:
      None where ranks were not measured, or the clean logit difference is not above zero.
    """
    table, prompts = measured.table, measured.prompts
    values = [(table.clean_values(prompts, name), table.values([measured.top], prompts, name)[0]) for name in RANKS]
    ranked = [pair for pair in values if np.isfinite(pair).all()]
    clean_P = table.clean_values(prompts, "logit_diff")
    if measured.objective != "logit_diff" or len(ranked) < 3 or clean_P.mean() <= 0:
        return None
    logit_SxP, edited_SxP = (np.stack(some) for some in zip(*ranked, strict=True))
    first_C, second_C = np.triu_indices(len(ranked), 1)
    clean_CxP = logit_SxP[first_C] - logit_SxP[second_C]
    lost_CxP = clean_CxP - (edited_SxP[first_C] - edited_SxP[second_C])
    # Pairs whose clean difference is small have shares of any size.
    mean_C = clean_CxP.mean(axis=1)
    kept_C = mean_C >= 0.5 * min(float(clean_P.mean()), float(np.quantile(mean_C, 0.9)))
    clean_NxP, lost_NxP = clean_CxP[kept_C], lost_CxP[kept_C]
    weight_RxP = measured.weight_RxP
    real_R = (weight_RxP @ measured.drop_P) / (weight_RxP @ clean_P)
    pairs_RxN = (weight_RxP @ lost_NxP.T) / np.maximum(weight_RxP @ clean_NxP.T, 1e-12)
    high_R = np.quantile(pairs_RxN, 0.95, axis=1)
    share_N = lost_NxP.mean(axis=1) / clean_NxP.mean(axis=1)
    # Where a resample's logit difference is not above zero, its share says nothing for T.
    fails_R = (real_R <= high_R) | (weight_RxP @ clean_P <= 0)
    share = Interval(float(measured.drop_P.mean() / clean_P.mean()), *bootstrap.percentile_interval(real_R))
    share_high, lost_high = (float(np.quantile(some_N, 0.95)) for some_N in (share_N, lost_NxP.mean(axis=1)))
    p_value = float((1 + fails_R.sum()) / (1 + len(real_R)))
    numbers = dict(pairs=float(len(share_N)), share_median=float(np.median(share_N)), share_high=share_high)
    return _Shares(share, p_value, numbers | dict(lost_high=lost_high, p_shares=p_value))


def _lists_differ(measured: MeasuredBehaviour, config: VerdictConfig) -> bool:
    """Return whether the pool of the random lists, if it is known, holds enough of them."""
    pool, sizes = measured.edits("pool"), [len(edit.features) for edit in measured.edits("random")]
    return not pool or lists_differ(len(pool[0].features), sizes, config.least_lists)


def _count_fooled(measured: MeasuredBehaviour, config: VerdictConfig) -> int | None:
    """Count the placebo sets that pass question 2, uncorrected: how often "more than random" is fooled."""
    placebo, random = measured.edits("placebo"), measured.edits("random")
    if not placebo or len(random) < min_controls(1, config.level) or not _lists_differ(measured, config):
        return None
    random_N = measured.drops(random).mean(axis=1)
    return sum(rank_p(float(drop), random_N) <= config.level for drop in measured.drops(placebo).mean(axis=1))


def _judge_bases(
    table: EffectsTable, measured: Mapping[str, MeasuredBehaviour], config: VerdictConfig
) -> dict[str, dict[str, CausalAnswer]]:
    """Test whether T has a larger effect than the directions of a simpler basis at the same dose."""
    groups = sorted({edit.group for edit in table.edits if edit.group.startswith(BASIS)})
    tests: dict[tuple[str, str], _Test] = {}
    for name, behaviour in measured.items():
        for group in groups if behaviour.dictionary == TESTED else ():
            if edits := table.select_edits(name, group):
                tests[name, group.removeprefix(BASIS)] = _test_basis(behaviour, edits[-1], config)
    answers = _correct(tests, config)  # over all bases, too
    return {name: {basis: answer for (owner, basis), answer in answers.items() if owner == name} for name in measured}


def _test_basis(measured: MeasuredBehaviour, edit: EditDefinition, config: VerdictConfig) -> _Test:
    """Compare T with the directions of one basis."""
    basis_P = measured.drops([edit])[0]
    (dose,) = measured.table.doses([edit], measured.prompts)
    difference, sample_R = measured.interval(measured.drop_P - basis_P)
    p_value = bootstrap.two_sided_p(sample_R)
    # Relative to the effect: what is negligible depends on how large it is.
    margin = config.equivalence_margin * abs(float(measured.drop_P.mean()))
    numbers = dict(top=float(measured.drop_P.mean()), basis=float(basis_P.mean()), dose=float(dose / measured.dose))
    reason = wording.too_few_prompts(len(basis_P), config.least_prompts)
    # All directions together may change the site less than the features do: then there is nothing to compare.
    if not reason and numbers["dose"] < 0.99:
        share = f"{100 * numbers['dose']:.0f} %"
        count = len(edit.features)
        some = f"{counted(count, 'direction')} change{'s' * (count == 1)}"
        reason = f"not testable, because its {some} the site by {share} of the dose"

    def conclude(p_holm: float | None) -> CausalAnswer:
        is_significant = p_holm is not None and p_holm <= config.level
        if reason:
            answer = "not testable"
        elif is_significant and difference.low > 0:
            answer = "more"
        elif is_significant and difference.high < 0:
            answer = "less"
        elif bootstrap.is_equivalent((difference.low, difference.high), margin):
            answer = "equivalent"
        else:
            answer = "no significant difference"
        answered = CausalAnswer(answer, "", difference, p_value, p_holm, numbers)
        sentence = wording.basis_sentence(answered, edit.group.removeprefix(BASIS), measured.objective, reason)
        return dataclasses.replace(answered, sentence=sentence)

    return _Test(None if reason else p_value, conclude)


def _test_selective(table: EffectsTable, measured: MeasuredBehaviour, config: VerdictConfig) -> _Test:
    """Test question 5: do other behaviours and held-out text stay as they are, in either direction?"""
    top = [measured.top]
    changes: dict[str, tuple[np.ndarray, list[str], float]] = {}
    at_chance = []
    for behaviour in (name for name in (*table.behaviours, *table.untested) if name != measured.behaviour):
        prompts = table.select_prompts(behaviour)
        clean_P = table.clean_values(prompts, measured.objective)
        # What the model does not do cannot be spared: its logit differences are noise.
        if (
            measured.objective == "logit_diff"
            and len(prompts) >= config.least_prompts
            and wilson(clean_P > 0).low <= 0.5
        ):
            at_chance.append(behaviour)
            continue
        # Of each prompt by itself: changes of different signs would cancel in the mean.
        change_P = np.abs(table.drops(top, prompts, measured.objective)[0])
        margin = config.max_other_change * float(np.abs(clean_P).mean())
        changes[behaviour] = (change_P, [prompt.template for prompt in prompts], margin)
    documents = table.select_prompts(TEXT)
    if documents:
        change_P = np.abs(table.values(top, documents, "ce")[0] - table.clean_values(documents, "ce"))
        changes[TEXT] = (change_P, [""] * len(documents), config.max_ce_change)
    left_out = ", ".join(name.replace("_", " ") for name in at_chance)
    left_out = f"left out, not shown to be above chance: {left_out}" if at_chance else ""
    if not changes.keys() - {TEXT}:
        return _not_tested(f"the run has no other behaviour{left_out and f' above chance ({left_out})'}")
    if TEXT not in changes:
        return _not_tested("the run has no held-out text")
    # What was not measured may have changed: the others do not speak for it.
    for name in (name for name, (value_P, _, _) in changes.items() if not np.isfinite(value_P).all()):
        return _not_tested(f"the top features were not ablated on all of {name.replace('_', ' ')}")
    parts, p_values = {}, {}
    for name, (value_P, strata, margin) in changes.items():
        sample_R = bootstrap.resampling_weights(strata, config.resamples, config.seed) @ value_P
        parts[name] = Interval(float(value_P.mean()), *bootstrap.percentile_interval(sample_R))
        p_values[name] = bootstrap.non_inferiority_p(sample_R, margin)
    # All parts must pass, so the largest p-value is the whole question's (Berger, 1982).
    p_value, margins = max(p_values.values()), {name: margin for name, (_, _, margin) in changes.items()}
    numbers = margins | _sparing_of_controls(measured, changes)
    fewest, count = min(((name, len(arrays[0])) for name, arrays in changes.items()), key=lambda item: item[1])
    too_few = wording.too_few_prompts(count, config.least_prompts)

    def conclude(p_holm: float | None) -> CausalAnswer:
        if p_holm is None:
            sentence = f"{fewest.replace('_', ' ').capitalize()}: {too_few}."
            return CausalAnswer("not testable", sentence, None, p_value, None, numbers, parts)
        failing = [name for name, interval in parts.items() if interval.high >= margins[name]]
        answer = "yes" if p_holm <= config.level and not failing else "no"
        answered = CausalAnswer(answer, "", None, p_value, p_holm, numbers, parts)
        return dataclasses.replace(
            answered, sentence=wording.selective_sentence(answered, failing, left_out, measured.objective)
        )

    return _Test(None if too_few else p_value, conclude)


def _sparing_of_controls(measured: MeasuredBehaviour, names: Iterable[str]) -> dict[str, float]:
    """Return what controls of T's dose change in other behaviours and text: of each group the median mean |change|.

    It stands beside question 5, and decides nothing. Keys are a behaviour or ``TEXT``, a colon and the group.
    """
    table, numbers = measured.table, dict[str, float]()
    for name in names:
        prompts, readout = table.select_prompts(name), "ce" if name == TEXT else measured.objective
        for group in SPARING:
            change_ExP = np.abs(table.drops(measured.edits(group), prompts, readout))
            # Few of the sets were run here, on some of the documents.
            means = [float(np.nanmean(change_P)) for change_P in change_ExP if not np.isnan(change_P).all()]
            if means:
                numbers[f"{name}:{group}"] = float(np.median(means))
    return numbers


def _measure_enough(measured: MeasuredBehaviour) -> tuple[Kept, ...]:
    """Return question 6: what is left of the logit difference where so many features alone are kept."""
    table, prompts = measured.table, measured.prompts
    clean_P = table.clean_values(prompts, measured.objective)
    clean_R = measured.weight_RxP @ clean_P
    is_above_R = clean_R > 0
    # A difference that may be zero has no share.
    if not clean_P.mean() > 0 or is_above_R.mean() < 0.975:
        return ()

    def values(group: str) -> dict[int, list[np.ndarray]]:
        """Return the logit differences of each prompt by the number of kept features."""
        by_size: dict[int, list[np.ndarray]] = {}
        edits = measured.edits(KEPT + group)
        for edit, value_P in zip(edits, table.values(edits, prompts, measured.objective), strict=True):
            by_size.setdefault(len(edit.features), []).append(value_P)
        return by_size

    def share(value_P: np.ndarray) -> Interval:
        sample_R = (measured.weight_RxP @ value_P)[is_above_R] / clean_R[is_above_R]
        return Interval(float(value_P.mean() / clean_P.mean()), *bootstrap.percentile_interval(sample_R))

    groups = {name + ending: values(name + ending) for name in ("top", *KEPT_CONTROLS) for ending in ("", NO_ERROR)}

    def median(group: str, size: int) -> float | None:
        controls = groups[group].get(size)
        return float(np.median([value_P.mean() for value_P in controls]) / clean_P.mean()) if controls else None

    def shares(name: str, size: int) -> tuple[float, float | None] | None:
        kept = median(name, size)
        return None if kept is None else (kept, median(name + NO_ERROR, size))

    return tuple(
        Kept(
            features=size,
            left=share(value_P),
            left_without_error=share(without[0]) if (without := groups["top" + NO_ERROR].get(size)) else None,
            controls={name: pair for name in KEPT_CONTROLS if (pair := shares(name, size))},
        )
        for size, (value_P, *_) in sorted(groups["top"].items())
    )


def summarise(answers: CausalVerdict, behaviour: str, dictionary: str = TESTED) -> str:
    """Return the answers on a behaviour, or why it has none, in one line.

    Args:
      answers: the verdict on the run.
      behaviour: name of the behaviour.
      dictionary: name of the dictionary, ``TESTED`` or another seed's.
    """
    if reason := (answers.untested or {}).get(behaviour):
        return f"not testable: {reason}"
    result = answers.dictionaries[dictionary][behaviour]
    answer_of = {question: answer.answer for question, answer in wording.answers_by_question(result).items()}
    answer_of |= {f"more than {name}": answer.answer for name, answer in result.bases.items()}
    line = "; ".join(f"{question.replace('_', ' ')}: {answer}" for question, answer in answer_of.items())
    if result.enough:
        first = result.enough[0]
        line += f"; left with {first.features} alone: {100 * first.left.mean:z.0f} %"
    return line
