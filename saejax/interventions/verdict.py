"""Verdicts on whether features cause a behaviour: five questions, answered from the effects table alone.

T is the set of the k features with the largest attribution for the behaviour's answer on train prompts; E(S; d) is the
mean drop of the logit difference on test prompts when the set S is ablated so far that the dose is d, the root mean
square over prompts of the norm of the change at the site. Doses between measured ones are interpolated, none is
extrapolated. On a benchmark the log-likelihood of the reference answer takes the logit difference's place
(``EffectsTable.objective``). The questions are not nested and not combined:

1. Does ablation have an effect? On logit difference, log-probability, two-way and top-1 accuracy, each by itself; on
   a benchmark on log-likelihood and accuracy, with features set to zero and resampled.
2. More than random features at equal dose? Against disjoint sets S_j of features that fire and are not in T.
3. Specific to this answer? Against placebo sets T_r: the top features of the logit difference of two tokens that are
   likely in these contexts and no answers. They are compared on the real answer.
4. More than simpler bases at equal dose? By norm, and by KL on held-out text as a second view.
5. Selective? Other behaviours and held-out text change by less than a margin.

Intervals are bootstrap intervals over prompts within templates. p-values are corrected by Holm's method over the
behaviours of a run within each question. Beside question 2 stands how many placebo sets pass it: how often "more than
random features" says yes to features that were chosen for an unrelated answer.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from saejax.interventions import answers as wording
from saejax.interventions.answers import BehaviourVerdict, CausalAnswer, CausalVerdict, VerdictConfig
from saejax.interventions.curves import (
    EffectCurve,
    MeasuredBehaviour,
    ablation_readouts,
    compare_at_equal_dose,
    mean_drops_at_equal_dose,
    read_curves,
)
from saejax.interventions.table import BASIS, TESTED, TEXT, UNTRAINED, EffectsTable
from saejax.results import Interval
from saejax.statistics import bootstrap
from saejax.statistics.ranks import holm_by_key, min_controls, rank_p


def verdict(table: EffectsTable, config: VerdictConfig | None = None) -> CausalVerdict:
    """Answer the five questions for every dictionary and behaviour of a table.

    Args:
      table: effects table of a run; see ``saejax.load_effects``.
      config: the numbers of the rule.

    Returns:
      The verdict: a pure function of the table's rows, in whatever order they stand.

    Raises:
      UserError: a behaviour has fewer than 2 test prompts, an edit was not measured on some of them, or the control
        sets are none (``saejax.interventions.curves.check_controls``).
    """
    config = config or VerdictConfig()
    judged = {dictionary: _judge_dictionary(table, dictionary, config) for dictionary in table.dictionaries}
    seeds = [answers for name, answers in judged.items() if name not in (TESTED, UNTRAINED)]
    if seeds and TESTED in judged:
        judged[TESTED] = {
            behaviour: dataclasses.replace(result, replication=wording.replication(behaviour, seeds))
            for behaviour, result in judged[TESTED].items()
        }
    return CausalVerdict(config.rule, judged)


class _Test(NamedTuple):
    """A question about one behaviour before correction: its p-value, and the answer given the corrected one."""

    p_value: float | None  # None: not tested, and not counted by the correction
    conclude: Callable[[float | None], CausalAnswer]


def _judge_dictionary(table: EffectsTable, dictionary: str, config: VerdictConfig) -> dict[str, BehaviourVerdict]:
    names = [name for name in table.behaviours if table.select_edits(name, "top", dictionary)]
    measured = {name: MeasuredBehaviour.read(table, name, dictionary, config.resamples, config.seed) for name in names}
    sets = {
        group: {name: read_curves(table, name, group, dictionary, measured[name].prompts) for name in names}
        for group in ("random", "placebo")
    }
    fooled = {name: _count_fooled(sets["placebo"][name], sets["random"][name], config) for name in names}
    readouts_of = {name: ablation_readouts(table, measured[name]) for name in names}
    ablation: dict[str, dict[str, CausalAnswer]] = {}
    for readout in dict.fromkeys(readout for readouts in readouts_of.values() for readout in readouts):
        with_readout = [name for name in names if readout in readouts_of[name]]
        ablation[readout] = _correct(
            {name: _test_ablation(table, measured[name], readout, config) for name in with_readout}, config
        )
    random, placebo = (
        _correct({name: _test_sets(measured[name], group, curves, config) for name in names})
        for group, curves in sets.items()
    )
    bases = _judge_bases(table, measured, dictionary, config)
    selective = _correct({name: _test_selective(table, measured[name], config) for name in names}, config)
    return {
        name: BehaviourVerdict(
            features=measured[name].top.edits[-1].features,
            dose=float(measured[name].top.dose_A[-1]),
            ablation={readout: ablation[readout][name] for readout in readouts_of[name]},
            held_out=tuple(sorted({prompt.template for prompt in measured[name].prompts if prompt.held_out})),
            templates=bootstrap.stratum_means(measured[name].top.drop_AxP[-1], measured[name].templates),
            random=random[name],
            placebo=placebo[name],
            bases=bases[name],
            selective=selective[name],
            fooled=fooled[name],
            placebo_sets=len(sets["placebo"][name]),
        )
        for name in names
    }


def _correct(tests: Mapping[Any, _Test], config: VerdictConfig | None = None) -> dict[Any, CausalAnswer]:
    """Correct the p-values of one question over its tests, and conclude.

    Args:
      tests: of the question.
      config: numbers of the rule if the p-values are those of a bootstrap; None if they are ranks among sets.
    """
    p_values = {key: test.p_value for key, test in tests.items() if test.p_value is not None}
    # Within a question, as each question is answered by itself; a test that was not made is none of its hypotheses.
    adjusted = holm_by_key(p_values)
    answers = {key: test.conclude(adjusted.get(key)) for key, test in tests.items()}
    # The p-value of a bootstrap is at least 2 / (1 + resamples), which the correction multiplies by the tests.
    if config is None or config.resamples >= (needed := math.ceil(2 * len(p_values) / config.level) - 1):
        return answers
    sentence = f"Not testable with {config.resamples:,} bootstrap resamples, {needed:,} are needed."
    return {
        # What the correction alone denies.
        key: answer
        if tests[key].conclude(tests[key].p_value).answer == answer.answer
        else dataclasses.replace(answer, answer="not testable", sentence=sentence)
        for key, answer in answers.items()
    }


def _not_tested(reason: str) -> _Test:
    return _Test(None, lambda _: CausalAnswer("not tested", f"Not tested: {reason}."))


def _test_ablation(table: EffectsTable, measured: MeasuredBehaviour, readout: str, config: VerdictConfig) -> _Test:
    """Test question 1: does ablation have an effect on this readout?"""
    name, edits = readout.removesuffix(wording.RESAMPLED), measured.top.edits[-1:]
    if readout != name:
        edits = tuple(table.select_edits(measured.behaviour, "resample", edits[0].dictionary))
    clean_P, drop_P = table.clean_values(measured.prompts, name), table.drops(edits, measured.prompts, name)[0]
    if np.isnan(drop_P).any():
        return _not_tested(f"{name.replace('_', ' ')} was not measured")
    effect, sample_R = measured.interval(drop_P)
    p_value = bootstrap.two_sided_p(sample_R)
    means = bootstrap.stratum_means(drop_P, measured.templates)
    if name in ("two_way", "top1", "accuracy"):
        is_large = effect.mean > config.min_accuracy_drop
        # At 0 or 100 % the accuracy of a template may stay where it is: only a rise contradicts.
        templates_agree = min(means.values()) >= 0
    else:
        is_large, templates_agree = True, bootstrap.has_same_sign(list(means.values()))
    too_few = wording.too_few_prompts(len(drop_P), config.least_prompts)

    def conclude(p_holm: float | None) -> CausalAnswer:
        is_sure = p_holm is not None and p_holm <= config.level and effect.low > 0
        answer = "not testable" if too_few else "yes" if is_sure and is_large and templates_agree else "no"
        disagreeing = {} if templates_agree else means
        sentence = wording.ablation_sentence(
            measured.k, readout, effect, float(clean_P.mean()), is_sure, is_large, disagreeing, too_few
        )
        return CausalAnswer(answer, sentence, effect, p_value, p_holm)

    return _Test(p_value, conclude)


def _test_sets(
    measured: MeasuredBehaviour, group: str, sets: Mapping[str, Sequence[EffectCurve]], config: VerdictConfig
) -> _Test:
    """Test questions 2 and 3: more than random, and than placebo sets, each pair at the smaller of its two doses?"""
    # Behaviours without sets have no p-value, and are not corrected for.
    controls, behaviours = sets[measured.behaviour], sum(map(bool, sets.values()))
    if not controls:
        return _not_tested(f"no {group} sets were measured")
    top_NxP, control_NxP, _ = compare_at_equal_dose(measured.top, controls)
    effect, _ = measured.interval((top_NxP - control_NxP).mean(axis=0))
    top_N, control_N = top_NxP.mean(axis=1), control_NxP.mean(axis=1)
    p_value = rank_p(top_N, control_N)
    needed = min_controls(behaviours, config.level)
    numbers = dict(sets=len(controls), needed=needed, mean=control_N.mean(), max=control_N.max(), top=top_N.mean())
    numbers = {name: float(value) for name, value in numbers.items()}

    def conclude(p_holm: float | None) -> CausalAnswer:
        assert p_holm is not None
        answer = "yes" if p_holm <= config.level else "no"
        # With so few sets even the first rank of all is not significant after correction: "no" would say too much.
        if len(controls) < needed:
            answer = "not testable"
        answered = CausalAnswer(answer, "", effect, p_value, p_holm, numbers)
        sentence = wording.sets_sentence(answered, group, measured.k, behaviours, measured.objective)
        return dataclasses.replace(answered, sentence=sentence)

    return _Test(p_value, conclude)


def _count_fooled(placebo: Sequence[EffectCurve], random: Sequence[EffectCurve], config: VerdictConfig) -> int | None:
    """Count the placebo sets that pass question 2, uncorrected: how often "more than random" is fooled."""
    if not placebo or len(random) < min_controls(1, config.level):
        return None
    placebo_RxN, random_RxN = mean_drops_at_equal_dose(placebo, random)
    return sum(rank_p(*pair) <= config.level for pair in zip(placebo_RxN, random_RxN, strict=True))


def _judge_bases(
    table: EffectsTable, measured: Mapping[str, MeasuredBehaviour], dictionary: str, config: VerdictConfig
) -> dict[str, dict[str, CausalAnswer]]:
    """Test question 4: more than a simpler basis, at the largest dose that both reach, by norm and by KL on text?"""
    tests: dict[tuple[str, str, str], _Test] = {}
    for name, behaviour in measured.items():
        groups = dict.fromkeys(edit.group for edit in table.edits if edit.behaviour == name)
        for group in groups:
            if not group.startswith(BASIS) or group == f"{BASIS}{dictionary}":
                continue
            for dose in ("norm", "kl"):
                top = read_curves(table, name, "top", dictionary, behaviour.prompts, dose)
                basis = read_curves(table, name, group, TESTED, behaviour.prompts, dose)
                if top and basis:
                    tests[name, group.removeprefix(BASIS), dose] = _test_basis(behaviour, top[0], basis[0], config)
    answers = _correct(tests, config)  # over all bases and both doses, too
    judged: dict[str, dict[str, CausalAnswer]] = {name: {} for name in measured}
    for name, basis in dict.fromkeys(key[:2] for key in answers):
        views = {dose: answers[name, basis, dose] for dose in ("norm", "kl") if (name, basis, dose) in answers}
        judged[name][basis] = _combine_views(basis, views, measured[name].objective)
    return judged


def _test_basis(measured: MeasuredBehaviour, top: EffectCurve, basis: EffectCurve, config: VerdictConfig) -> _Test:
    """Test question 4 for one basis and one kind of dose."""
    dose = np.array([min(top.reach, basis.reach)])
    top_P, basis_P = top.drop_at(dose)[0], basis.drop_at(dose)[0]
    difference, sample_R = measured.interval(top_P - basis_P)
    p_value = bootstrap.two_sided_p(sample_R)
    # Relative to the effect: what is negligible depends on how large it is.
    margin = config.equivalence_margin * abs(float(top_P.mean()))
    numbers = dict(top=float(top_P.mean()), basis=float(basis_P.mean()), dose=float(dose[0]))

    def conclude(p_holm: float | None) -> CausalAnswer:
        is_significant = p_holm is not None and p_holm <= config.level
        if len(top_P) < config.least_prompts:
            answer = "not testable"
        elif is_significant and difference.low > 0:
            answer = "more"
        elif is_significant and difference.high < 0:
            answer = "less"
        elif bootstrap.is_equivalent((difference.low, difference.high), margin):
            answer = "equivalent"
        else:
            answer = "no significant difference"
        return CausalAnswer(answer, "", difference, p_value, p_holm, numbers)

    return _Test(p_value, conclude)


def _combine_views(basis: str, views: Mapping[str, CausalAnswer], objective: str) -> CausalAnswer:
    """Return the answer by norm, unless the one by KL contradicts it significantly."""
    main = views.get("norm") or views["kl"]
    answer = main.answer
    # Only a significant contradiction counts: one view may be too noisy to say anything.
    if {view.answer for view in views.values()} == {"more", "less"}:
        answer = "contradictory"
    parts = {dose: view.effect for dose, view in views.items() if view.effect}
    answered = dataclasses.replace(main, answer=answer, parts=parts)
    return dataclasses.replace(answered, sentence=wording.basis_sentence(answered, basis, objective))


def _test_selective(table: EffectsTable, measured: MeasuredBehaviour, config: VerdictConfig) -> _Test:
    """Test question 5: are other behaviours and held-out text spared?"""
    top = measured.top.edits[-1:]
    rises: dict[str, tuple[np.ndarray, list[str], float]] = {}
    for behaviour in (name for name in table.behaviours if name != measured.behaviour):
        prompts = table.select_prompts(behaviour)
        clean_P = table.clean_values(prompts, "logit_diff")
        # By size: the margin of a behaviour whose wrong answer the model prefers would be one that nothing keeps.
        margin = config.max_other_drop * abs(float(clean_P.mean()))
        drop_P = table.drops(top, prompts, "logit_diff")[0]
        rises[behaviour] = (drop_P, [prompt.template for prompt in prompts], margin)
    documents = table.select_prompts(TEXT)
    if documents:
        rise_P = table.values(top, documents, "ce")[0] - table.clean_values(documents, "ce")
        rises[TEXT] = (rise_P, [""] * len(documents), config.max_ce_rise)
    if not rises.keys() - {TEXT}:
        return _not_tested("the run has no other behaviour")
    if TEXT not in rises:
        return _not_tested("the run has no held-out text")
    # What was not measured may have changed: the others do not speak for it.
    for name in (name for name, (value_P, _, _) in rises.items() if not np.isfinite(value_P).all()):
        return _not_tested(f"the top features were not ablated on all of {name.replace('_', ' ')}")
    parts, p_values = {}, {}
    for name, (value_P, strata, margin) in rises.items():
        sample_R = bootstrap.resampling_weights(strata, config.resamples, config.seed) @ value_P
        parts[name] = Interval(float(value_P.mean()), *bootstrap.percentile_interval(sample_R))
        p_values[name] = bootstrap.non_inferiority_p(sample_R, margin)
    # All parts must pass, so the largest p-value is that of the whole (Berger, 1982).
    p_value, margins = max(p_values.values()), {name: margin for name, (_, _, margin) in rises.items()}

    def conclude(p_holm: float | None) -> CausalAnswer:
        assert p_holm is not None
        failing = [name for name, interval in parts.items() if interval.high >= margins[name]]
        answer = "yes" if p_holm <= config.level and not failing else "no"
        name, count = min(((name, len(value_P)) for name, (value_P, _, _) in rises.items()), key=lambda item: item[1])
        if too_few := wording.too_few_prompts(count, config.least_prompts):
            sentence = f"{name.replace('_', ' ').capitalize()}: {too_few}."
            return CausalAnswer("not testable", sentence, None, p_value, p_holm, margins, parts)
        answered = CausalAnswer(answer, "", None, p_value, p_holm, margins, parts)
        return dataclasses.replace(answered, sentence=wording.selective_sentence(answered, failing))

    return _Test(p_value, conclude)


def summarise(answers: CausalVerdict, behaviour: str) -> str:
    """Return the answers on a behaviour in one line."""
    result = answers.dictionaries[TESTED][behaviour]
    answer_of = dict(
        effect=result.ablation["logit_diff"].answer,
        more_than_random=result.random.answer,
        specific=result.placebo.answer,
        selective=result.selective.answer,
        **{f"more_than_{name}": answer.answer for name, answer in result.bases.items()},
    )
    return "; ".join(f"{question.replace('_', ' ')}: {answer}" for question, answer in answer_of.items())
