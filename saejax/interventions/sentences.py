"""The sentences of a verdict."""

from collections.abc import Mapping, Sequence

from saejax.results import Interval

#: The readouts of question 1: their names, and the factor and unit in which they are printed. The last two are those
#: of benchmarks.
ABLATION_READOUTS = dict(
    logit_diff=("the logit difference", 1, "logits"),
    log_prob=("the log-probability of the correct answer", 1, "nats"),
    two_way=("two-way accuracy", 100, "points"),
    top1=("top-1 accuracy", 100, "points"),
    answer_log_prob=("the log-likelihood of the reference answer", 1, "nats"),
    accuracy=("accuracy", 100, "points"),
)
#: What follows the name of a readout in which T was not set to zero.
RESAMPLED = "_resampled"
#: Bases in words; a dictionary's folder stands for itself.
BASES = dict(
    neurons="MLP neurons",
    pca="principal components",
    diff_means="the difference of means",
    untrained="an untrained dictionary",
)


def ablation(
    k: int,
    readout: str,
    effect: Interval,
    clean: float,
    is_sure: bool,
    is_large: bool,
    disagreeing: Mapping[str, float],
) -> str:
    """Return the sentence of question 1.

    Args:
      k: number of ablated features.
      readout: one of ``ABLATION_READOUTS``, perhaps with ``RESAMPLED``.
      effect: drop of the readout.
      clean: the readout of the unedited model.
      is_sure: whether the drop is significant.
      is_large: whether it exceeds the criterion.
      disagreeing: drop by template, if the templates disagree.
    """
    name, factor, unit = ABLATION_READOUTS[readout.removesuffix(RESAMPLED)]
    verb = "Resampling" if readout.endswith(RESAMPLED) else "Ablating"
    digits = 2 if factor == 1 else 1
    rises = effect.mean < 0
    shown = effect * (-factor if rises else factor)
    low, high = sorted((shown.low, shown.high))
    text = f"{verb} the {features(k)} {'raises' if rises else 'lowers'} {name} by {shown.mean:.{digits}f} {unit} "
    text += f"[{low:.{digits}f}, {high:.{digits}f}] from {factor * clean:.{digits}f}"
    if rises and effect.high < 0:
        return f"{text}: the opposite of what was asked."
    if not is_sure:
        return f"{text}: not significant."
    if not is_large:
        return f"{text}: too little to count."
    if disagreeing:
        listed = ", ".join(f"{template!r} {factor * drop:.{digits}f}" for template, drop in disagreeing.items())
        return f"{text}, but the templates disagree: {listed}."
    return f"{text}, in every template."


def sets(
    answer: str,
    group: str,
    k: int,
    numbers: Mapping[str, float],
    p_value: float,
    p_holm: float,
    behaviours: int,
    objective: str = "logit_diff",
) -> str:
    """Return the sentence of questions 2 (``group`` random) and 3 (placebo).

    Args:
      answer: yes, no or not testable.
      group: group of the control sets.
      k: number of features of each set.
      numbers: sets, needed, mean (effect of the controls), top (mean effect of the features). Each pair is compared at
        the smaller of its two doses, so the effect of the features differs between pairs.
      p_value: before correction.
      p_holm: after correction.
      behaviours: number of behaviours that the correction is over.
      objective: the readout whose drop is the effect.
    """
    count, needed = int(numbers["sets"]), int(numbers["needed"])
    if answer == "not testable" and group == "random":
        return (
            f"Not testable with k = {k}: {count} independent sets of {needed} needed; use a smaller k or a wider "
            "dictionary."
        )
    if answer == "not testable":
        return f"Not testable: {count} placebo targets of {needed} needed; raise their number."
    lowers = numbers["top"] >= 0
    verb, sign = ("lower", 1) if lowers else ("raise", -1)
    # p = (1 + sets that lower the objective at least as much) / (1 + sets); see ``ranks.rank_p``.
    reaching = round(p_value * (count + 1)) - 1
    reach = f"{_conjugate(verb, reaching)} it {'at least as much' if lowers else 'no more'}"
    corrected = f", {p_holm:.2g} after correction for {behaviours} behaviours" if behaviours > 1 else ""
    if group == "placebo":
        conclusion = "specific to this answer" if answer == "yes" else "not shown to be specific to this answer"
    else:
        conclusion = f"{'more' if answer == 'yes' else 'not significantly more'} than {group} sets"
    return (
        f"Compared with each of {count} {group} sets at the smaller of the two doses, the {features(k)} "
        f"{_conjugate(verb, k)} {ABLATION_READOUTS[objective][0]} by {sign * numbers['top']:z.2f} on average and the "
        f"sets by {sign * numbers['mean']:z.2f}; {reaching} of the {count} sets {reach} "
        f"(p = {p_value:.2g}{corrected}): {conclusion}."
    )


def fooled(count: int | None, placebo_sets: int) -> str:
    """Return how many placebo sets pass question 2, in words.

    Args:
      count: number of placebo sets that pass; None: not testable.
      placebo_sets: number of placebo sets.
    """
    if count is None or not placebo_sets:
        return "Whether placebo sets also do more than random sets was not tested."
    return (
        f"{count} of {placebo_sets} placebo sets, chosen for unrelated answers, also do more than random sets "
        f"({100 * count / placebo_sets:.0f} %)."
    )


def basis(
    answer: str,
    name: str,
    numbers: Mapping[str, float],
    differences: Mapping[str, Interval],
    objective: str = "logit_diff",
) -> str:
    """Return the sentence of question 4.

    Args:
      answer: more, less, equivalent, no significant difference or contradictory.
      name: name of the basis.
      numbers: top, basis and dose at which they were compared.
      differences: features' effect minus the basis's, by kind of dose.
      objective: the readout whose drop is the effect.
    """
    endings = {
        "more": "the features have the larger effect",
        "less": "the features have the smaller effect",
        "equivalent": "equivalent",
        "no significant difference": "no significant difference, which is not equality",
        "contradictory": "contradictory, the two doses disagree significantly",
    }
    kinds = dict(norm="norm", kl="KL on text")
    listed = ", ".join(
        f"{at.mean:+.2f} [{at.low:.2f}, {at.high:.2f}] by {kinds[kind]}" for kind, at in differences.items()
    )
    return (
        f"Against {BASES.get(name, name)} at equal dose: {numbers['top']:.2f} {ABLATION_READOUTS[objective][2]} lost "
        f"to {numbers['basis']:.2f}; "
        f"difference {listed}: {endings[answer]}."
    )


def selective(answer: str, parts: Mapping[str, Interval], margins: Mapping[str, float], failing: Sequence[str]) -> str:
    """Return the sentence of question 5.

    Args:
      answer: yes or no.
      parts: loss on held-out text (nats) and on other behaviours (logits).
      margins: margin of each.
      failing: parts whose interval reaches the margin.
    """
    names = failing or list(parts)
    # "z": a rounded -0.001 is written 0.00, so runs that differ by rounding errors get the same sentence.
    listed = "; ".join(
        f"{name.replace('_', ' ')} {parts[name].mean:z.2f} [{parts[name].low:z.2f}, {parts[name].high:z.2f}], margin "
        f"{margins[name]:z.2f}"
        for name in names
    )
    if answer == "yes":
        return f"Held-out text and all other behaviours are spared ({listed})."
    if not failing:
        return f"Not shown to spare held-out text and the other behaviours after correction ({listed})."
    return f"Not shown to spare: {listed}."


def replication(counts: Mapping[str, int], dictionaries: int) -> str:
    """Return how many dictionaries of other seeds give the same answers.

    Args:
      counts: dictionaries that answer yes, by question (ablation, random, placebo).
      dictionaries: dictionaries of other seeds.
    """
    return (
        f"Of {dictionaries} dictionaries of other seeds, {counts['ablation']} have top features with an effect, "
        f"{counts['random']} with more than random sets, {counts['placebo']} with one specific to the answer."
    )


def features(k: int) -> str:
    """Return "10 top features" with the right number."""
    return f"{k} top feature{'' if k == 1 else 's'}"


def _conjugate(verb: str, count: int) -> str:
    """Return a verb that agrees with a count."""
    return f"{verb}s" if count == 1 else verb
