"""The tables of what a study's rows found: effects, agreement, and what follows from them."""

from saejax.page.tables import MISSING, answer, count, interval, number, percent
from saejax.studies.learned import QUESTIONS
from saejax.studies.sheet import Sheet, points, quoted

_EFFECTS_NOTE = (
    "Top features ablated, or each resampled: where it fires, its activation is drawn from those elsewhere. Drop: of "
    "accuracy, in percentage points, also under random and placebo sets; nats: drop of the reference's log-likelihood; "
    "square brackets: 95 % intervals over items. Falls: whether accuracy falls by more than the criterion, set to zero "
    "and resampled. Placebo sets too: the share of sets chosen for other items' answers that also do more than random "
    "sets."
)
FOUND = (
    Sheet(
        "effects",
        "Benchmarks under ablation",
        {
            "Row": lambda one: one.row,
            "Benchmark": lambda one: f"{one.benchmark}, {one.items} items; {one.top} features of {one.dictionary}",
            "Accuracy before, %": lambda one: percent(one.accuracy, 1) + (" (at chance)" if one.at_chance else ""),
            "Drop; resampled": lambda one: f"{points(one.accuracy_drop)}; {points(one.accuracy_drop_resampled)}",
            "Random; placebo sets": lambda one: "; ".join(
                number(drop, 1, 100) for drop in (one.random_accuracy_drop, one.placebo_accuracy_drop)
            ),
            "Falls": lambda one: f"{one.effect}, {one.effect_resampled}",
            "Nats; resampled": lambda one: f"{interval(one.nats_drop)}; {interval(one.nats_drop_resampled)}",
            "More than random": lambda one: one.random,
            "Placebo sets too": lambda one: percent(one.fooled),
            "Specific": lambda one: one.placebo,
        },
        frozenset({"Benchmark", "Falls", "More than random", "Specific", "Drop; resampled", "Nats; resampled"}),
        _EFFECTS_NOTE,
    ),
    Sheet(
        "behaviours",
        "Behaviours under ablation",
        {
            "Row": lambda one: one.row,
            "Behaviour": lambda one: one.behaviour,
            "Dictionary": lambda one: one.dictionary,
            "Logit difference lost": lambda one: interval(one.drop),
            "Top-1 accuracy lost": lambda one: points(one.top1_drop),
            "More than random": lambda one: one.random,
            "Placebo sets too": lambda one: percent(one.fooled),
            "Specific": lambda one: one.placebo,
            "Selective": lambda one: one.selective,
        },
        frozenset({"Behaviour", "Dictionary", "More than random", "Specific", "Selective"}),
        "Ablation of each behaviour's top features. Placebo sets too: the share of sets chosen for unrelated tokens "
        "that also do more than random sets.",
    ),
    Sheet(
        "alignment",
        "Do rows agree on what matters?",
        {
            "Rows": lambda one: f"{one.first}, {one.second}",
            "Benchmark": lambda one: one.benchmark,
            "Ranked": lambda one: one.by,
            "Number": lambda one: str(one.n),
            "Rank correlation": lambda one: number(one.rank_correlation),
            "p (Holm)": lambda one: number(one.p_holm, 4),
            "Placebo": lambda one: MISSING if one.control is None else f"up to {number(one.control)}",
            "Shared; by chance": lambda one: f"{percent(one.shared)}; {percent(one.shared_null)}",
            "Aligned": lambda one: answer(one.aligned),
        },
        frozenset({"Benchmark", "Ranked", "Aligned"}),
        "Items: without what random sets explain. Features: matched by their activity on the items. Placebo: of items, "
        "a random set in the place of one row's top features; of features, a rotated dictionary, and the importance "
        "for other answers. Shared: of the first row's features that fire. A dash: too few items or features.",
    ),
    Sheet(
        "gates",
        "Interpretable, unstable, no signal, or cannot tell",
        {
            "Row": lambda one: one.row,
            "Benchmark": lambda one: one.benchmark,
            "Gate": lambda one: one.gate,
            "Why": lambda one: one.reason,
            "Seeds that agree": lambda one: f"{one.agreeing} of {one.seeds}",
            "Items needed": lambda one: count(one.items_needed),
            "Placebo sets beyond random": lambda one: percent(one.fooled, 1),
        },
        frozenset({"Benchmark", "Gate", "Why"}),
        cards=True,
    ),
    Sheet(
        "domains",
        "Transfer to unseen domains",
        {
            "Row": lambda one: one.row,
            "Chosen on": lambda one: one.chosen_on,
            "Ablated on": lambda one: one.benchmark,
            "Effect, nats": lambda one: interval(one.effect),
            "Features chosen there": lambda one: interval(one.own),
            "In common": lambda one: str(one.common),
            "Random sets": lambda one: f"{number(one.random)} ({one.random_sets})",
            "p (Holm)": lambda one: number(one.p_holm, 3),
        },
        frozenset({"Chosen on", "Ablated on"}),
        "Features chosen on the train items of one benchmark, ablated on the test items of another, beside those "
        "chosen there. Random sets: mean effect at equal dose, of those that hold none of the features, and their "
        "number.",
    ),
    Sheet(
        "drivers",
        "Words or context?",
        {
            "Row": lambda one: one.row,
            "Benchmark": lambda one: one.benchmark,
            "Features": lambda one: f"{one.features}, {one.group}",
            "Driven by tokens, %": lambda one: interval(one.tokens, 0, 100),
            "By context, %": lambda one: interval(one.context, 0, 100),
            "Undecided, %": lambda one: interval(one.undecided, 0, 100),
        },
        frozenset({"Benchmark", "Features"}),
        "The tokens that excite a feature most are injected into ordinary text. A feature is driven by tokens if that "
        "brings it more than half of the way to its activation on the benchmark. Square brackets: 95 % intervals over "
        "features.",
    ),
    Sheet(
        "primitives",
        "Groups of features that matter for the same items",
        {
            "Row": lambda one: one.row,
            "Group": lambda one: one.name or "no category stands out",
            "Features": lambda one: f"{len(one.features)}: {quoted(one.words)}",
            "Stable": lambda one: f"{number(one.overlap)}; {one.recurs} of {one.seeds} seeds",
            "Nats lost there; elsewhere": lambda one: f"{interval(one.effect)}; {interval(one.elsewhere)}",
            "Random; placebo sets": lambda one: f"{number(one.random)}; {number(one.placebo)}",
            "More than both": lambda one: (
                one.more
                if one.more != "not testable" or one.sets is None
                else f"{one.more}: {one.sets} sets of {one.needed}"
            ),
            "Also named in": lambda one: ", ".join(one.rows) or MISSING,
            "Features with a partner": lambda one: "; ".join(one.partners) or MISSING,
        },
        frozenset({"Group", "Features", "Stable", "More than both", "Also named in", "Features with a partner"}),
        "Important features are grouped by the items whose answers they matter for, and a group is named after the "
        "category for which it matters most, if that is more than by chance. In quotation marks: the tokens on which "
        "its features are most active. Stable: overlap with the groups of resampled items (1: always the same), and "
        "dictionaries of other seeds with a group of that name. Nats lost: when the whole group is ablated, on test "
        "items of its category and on others, beside control sets at equal dose. A dash: not ablated. "
        "As many groups are compared with control sets as their number allows: 19 of each kind for one group, 20 more "
        "for each further one.",
        cards=True,
    ),
    Sheet(
        "labels",
        "How many features go with a label",
        {
            "Row": lambda one: one.row,
            "Benchmark": lambda one: one.benchmark,
            "Label": lambda one: one.label,
            "Items": lambda one: str(one.items),
            "Features that go with it": lambda one: f"{one.associated} of {one.features}",
            "With labels permuted": lambda one: number(one.shuffled),
        },
        frozenset({"Benchmark", "Label"}),
        "A feature goes with a label if its activation on test items is correlated with it, after correction for all "
        "features and labels. Labels: categories, and whether the model answers rightly.",
    ),
    Sheet(
        "associations",
        "Three answers for each top feature",
        {
            "Row": lambda one: one.row,
            "Feature": lambda one: f"{one.feature}, {one.label}",
            "Correlation": lambda one: interval(one.correlation),
            "p": lambda one: number(one.p_value, 3),
            "Goes with the label": lambda one: one.associated,
            "Probe's AUC": lambda one: number(one.auc),
            "Probe finds it": lambda one: one.probe,
            "Nats more than elsewhere": lambda one: interval(one.causal_drop),
            "Its p": lambda one: number(one.p_causal, 3),
            "Causes it": lambda one: one.causal,
            "Agree": lambda one: answer(one.agree),
        },
        frozenset({"Feature", "Goes with the label", "Probe finds it", "Causes it", "Agree"}),
        "Each top feature with the category that it goes with most on train items, judged on test items. The "
        "correlation is corrected for all features and labels, the probe (of this feature alone) and the drop for all "
        "rows of a benchmark. Causes it: ablating the feature alone costs items with the label more than others.",
    ),
    Sheet(
        "problems",
        "The same problems in every row",
        {
            "Problem": lambda one: f"{one.question} ({one.answer})",
            "Row": lambda one: one.row,
            "Right": lambda one: answer(one.right),
            "Nats": lambda one: number(one.log_likelihood),
            "In every row": lambda one: "; ".join(one.universal) or MISSING,
            "In some": lambda one: "; ".join(one.shared) or MISSING,
            "In this row alone": lambda one: "; ".join(one.specific) or MISSING,
        },
        frozenset({"Problem", "Right", "In every row", "In some", "In this row alone"}),
        "The features with the largest attribution for the right answer: number, tokens on which each is most active, "
        "attribution in nats. In every row: a feature with a partner, by its activity on the items, in each other row; "
        "dashes alone: a row with other items, which cannot be compared. Nats: log-likelihood of the right answer.",
        cards=True,
    ),
    Sheet(
        "phases",
        "All phases",
        {
            "Phase": lambda one: one.phase,
            "Test": lambda one: one.test,
            "Row": lambda one: one.row,
            "Result": lambda one: one.result,
            "Control": lambda one: one.control,
            "Beyond the control": lambda one: one.answer,
        },
        frozenset({"Phase", "Test", "Row", "Result", "Control", "Beyond the control"}),
        cards=True,
    ),
    Sheet(
        "learned",
        "All answers",
        {
            "Row": lambda one: one.row,
            "Benchmark": lambda one: one.benchmark,
            "Question": lambda one: QUESTIONS[one.question].heading,
            "Answer": lambda one: one.answer,
            "Known": lambda one: one.known or MISSING,
            "Evidence": lambda one: one.evidence,
        },
        frozenset({"Benchmark", "Question", "Answer", "Known", "Evidence"}),
        cards=True,
    ),
    Sheet(
        "transfer",
        "What dictionaries share",
        {
            "Row": lambda one: one.row,
            "Dictionaries": lambda one: f"{one.first}, {one.second}",
            "By": lambda one: one.measure,
            "Pairs": lambda one: interval(one.matched, 2),
            "By chance": lambda one: number(one.matched_null.mean, 2),
            "Shared": lambda one: f"{points(one.shared)} %",
            "Shared by chance": lambda one: percent(one.shared_null.mean, 1),
        },
        frozenset({"Dictionaries", "By"}),
        "Pairs: mean cosine or correlation of the one-to-one pairs of features with the largest sum. Square "
        "brackets: 95 % intervals over features.",
    ),
    Sheet(
        "tracking",
        "Texts followed through the layers",
        {
            "Row": lambda one: one.row,
            "Text": lambda one: one.text,
            "Tokens": lambda one: str(one.tokens),
            "Layers": lambda one: str(one.sites),
            "Links": lambda one: f"{one.links:,}",
            "Measured; hold": lambda one: f"{one.measured}; {one.holding}",
            "Steps tested": lambda one: str(one.tests),
            "Hurt": lambda one: str(one.hurt),
        },
        frozenset({"Text"}),
        "Of the strongest links between features of two layers some are measured: one holds if setting the lower "
        "feature to zero takes more from the upper one than each of five random active features does, at equal "
        "dose. A step is hurt if ablating its features lowers its log-likelihood more than random sets.",
    ),
    Sheet(
        "criteria",
        "Criteria of success",
        {
            "Criterion": lambda one: one.criterion,
            "Met": lambda one: answer(one.met, "not tested"),
            "Evidence": lambda one: one.evidence,
            "The reasoning study reports": lambda one: one.published or MISSING,
        },
        frozenset({"Met", "Evidence", "The reasoning study reports"}),
        cards=True,
    ),
)
