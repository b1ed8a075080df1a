"""The tables of a study's results: effects, agreement between rows, and the answers that follow."""

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
RESULT_SHEETS = (
    Sheet(
        "effects",
        "Benchmarks under ablation",
        {
            "Row": lambda effect: effect.row,
            "Benchmark": lambda effect: (
                f"{effect.benchmark}, {effect.items} items; {effect.top} features of {effect.dictionary}"
            ),
            "Accuracy before, %": lambda effect: (
                percent(effect.accuracy, 1) + (" (at chance)" if effect.at_chance else "")
            ),
            "Drop; resampled": lambda effect: (
                f"{points(effect.accuracy_drop)}; {points(effect.accuracy_drop_resampled)}"
            ),
            "Random; placebo sets": lambda effect: "; ".join(
                number(drop, 1, 100) for drop in (effect.random_accuracy_drop, effect.placebo_accuracy_drop)
            ),
            "Falls": lambda effect: f"{effect.effect}, {effect.effect_resampled}",
            "Nats; resampled": lambda effect: f"{interval(effect.nats_drop)}; {interval(effect.nats_drop_resampled)}",
            "More than random": lambda effect: effect.random,
            "Placebo sets too": lambda effect: percent(effect.fooled),
            "Specific": lambda effect: effect.placebo,
        },
        frozenset({"Benchmark", "Falls", "More than random", "Specific", "Drop; resampled", "Nats; resampled"}),
        _EFFECTS_NOTE,
    ),
    Sheet(
        "behaviours",
        "Behaviours under ablation",
        {
            "Row": lambda result: result.row,
            "Behaviour": lambda result: result.behaviour,
            "Dictionary": lambda result: result.dictionary,
            "Logit difference lost": lambda result: interval(result.drop),
            "Top-1 accuracy lost": lambda result: points(result.top1_drop),
            "More than random": lambda result: result.random,
            "Placebo sets too": lambda result: percent(result.fooled),
            "Specific": lambda result: result.placebo,
            "Selective": lambda result: result.selective,
        },
        frozenset({"Behaviour", "Dictionary", "More than random", "Specific", "Selective"}),
        "Ablation of each behaviour's top features. Placebo sets too: the share of sets chosen for unrelated tokens "
        "that also do more than random sets.",
    ),
    Sheet(
        "alignment",
        "Do rows agree on what matters?",
        {
            "Rows": lambda comparison: f"{comparison.first}, {comparison.second}",
            "Benchmark": lambda comparison: comparison.benchmark,
            "Ranked": lambda comparison: comparison.by,
            "Number": lambda comparison: str(comparison.n),
            "Rank correlation": lambda comparison: number(comparison.rank_correlation),
            "p (Holm)": lambda comparison: number(comparison.p_holm, 4),
            "Placebo": lambda comparison: (
                MISSING if comparison.control is None else f"up to {number(comparison.control)}"
            ),
            "Shared; by chance": lambda comparison: f"{percent(comparison.shared)}; {percent(comparison.shared_null)}",
            "Aligned": lambda comparison: answer(comparison.aligned),
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
            "Row": lambda gate: gate.row,
            "Benchmark": lambda gate: gate.benchmark,
            "Gate": lambda gate: gate.gate,
            "Why": lambda gate: gate.reason,
            "Seeds that agree": lambda gate: f"{gate.agreeing} of {gate.seeds}",
            "Items needed": lambda gate: count(gate.items_needed),
            "Placebo sets beyond random": lambda gate: percent(gate.fooled, 1),
        },
        frozenset({"Benchmark", "Gate", "Why"}),
        cards=True,
    ),
    Sheet(
        "domains",
        "Transfer to unseen domains",
        {
            "Row": lambda transfer: transfer.row,
            "Chosen on": lambda transfer: transfer.chosen_on,
            "Ablated on": lambda transfer: transfer.benchmark,
            "Effect, nats": lambda transfer: interval(transfer.effect),
            "Features chosen there": lambda transfer: interval(transfer.chosen_here),
            "In common": lambda transfer: str(transfer.common),
            "Random sets": lambda transfer: f"{number(transfer.random)} ({transfer.random_sets})",
            "p (Holm)": lambda transfer: number(transfer.p_holm, 3),
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
            "Row": lambda drivers: drivers.row,
            "Benchmark": lambda drivers: drivers.benchmark,
            "Features": lambda drivers: f"{drivers.features}, {drivers.group}",
            "Driven by tokens, %": lambda drivers: interval(drivers.tokens, 0, 100),
            "By context, %": lambda drivers: interval(drivers.context, 0, 100),
            "Undecided, %": lambda drivers: interval(drivers.undecided, 0, 100),
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
            "Row": lambda primitive: primitive.row,
            "Group": lambda primitive: primitive.name or "no category stands out",
            "Features": lambda primitive: f"{len(primitive.features)}: {quoted(primitive.words)}",
            "Stable": lambda primitive: f"{number(primitive.overlap)}; {primitive.recurs} of {primitive.seeds} seeds",
            "Nats lost there; elsewhere": lambda primitive: (
                f"{interval(primitive.effect)}; {interval(primitive.elsewhere)}"
            ),
            "Random; placebo sets": lambda primitive: f"{number(primitive.random)}; {number(primitive.placebo)}",
            "More than both": lambda primitive: (
                primitive.more
                if primitive.more != "not testable" or primitive.sets is None
                else f"{primitive.more}: {primitive.sets} sets of {primitive.needed}"
            ),
            "Also named in": lambda primitive: ", ".join(primitive.rows) or MISSING,
            "Features with a partner": lambda primitive: "; ".join(primitive.partners) or MISSING,
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
            "Row": lambda label: label.row,
            "Benchmark": lambda label: label.benchmark,
            "Label": lambda label: label.label,
            "Items": lambda label: str(label.items),
            "Features that go with it": lambda label: f"{label.associated} of {label.features}",
            "With labels permuted": lambda label: number(label.shuffled),
        },
        frozenset({"Benchmark", "Label"}),
        "A feature goes with a label if its activation on test items is correlated with it, after correction for all "
        "features and labels. Labels: categories, and whether the model answers rightly.",
    ),
    Sheet(
        "associations",
        "Three answers for each top feature",
        {
            "Row": lambda association: association.row,
            "Feature": lambda association: f"{association.feature}, {association.label}",
            "Correlation": lambda association: interval(association.correlation),
            "p": lambda association: number(association.p_value, 3),
            "Goes with the label": lambda association: association.associated,
            "Probe's AUC": lambda association: number(association.auc),
            "Probe finds it": lambda association: association.probe,
            "Nats more than elsewhere": lambda association: interval(association.causal_drop),
            "Its p": lambda association: number(association.p_causal, 3),
            "Causes it": lambda association: association.causal,
            "Agree": lambda association: answer(association.agree),
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
            "Problem": lambda problem: f"{problem.question} ({problem.answer})",
            "Row": lambda problem: problem.row,
            "Right": lambda problem: answer(problem.right),
            "Nats": lambda problem: number(problem.log_likelihood),
            "In every row": lambda problem: "; ".join(problem.universal) or MISSING,
            "In some": lambda problem: "; ".join(problem.shared) or MISSING,
            "In this row alone": lambda problem: "; ".join(problem.specific) or MISSING,
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
            "Phase": lambda test: test.phase,
            "Test": lambda test: test.test,
            "Row": lambda test: test.row,
            "Result": lambda test: test.result,
            "Control": lambda test: test.control,
            "Beyond the control": lambda test: test.answer,
        },
        frozenset({"Phase", "Test", "Row", "Result", "Control", "Beyond the control"}),
        cards=True,
    ),
    Sheet(
        "learned",
        "All answers",
        {
            "Row": lambda learned: learned.row,
            "Benchmark": lambda learned: learned.benchmark,
            "Question": lambda learned: QUESTIONS[learned.question].heading,
            "Answer": lambda learned: learned.answer,
            "Known": lambda learned: learned.known or MISSING,
            "Evidence": lambda learned: learned.evidence,
        },
        frozenset({"Benchmark", "Question", "Answer", "Known", "Evidence"}),
        cards=True,
    ),
    Sheet(
        "transfer",
        "What dictionaries share",
        {
            "Row": lambda pair: pair.row,
            "Dictionaries": lambda pair: f"{pair.first}, {pair.second}",
            "By": lambda pair: pair.measure,
            "Pairs": lambda pair: interval(pair.matched, 2),
            "By chance": lambda pair: number(pair.matched_null.mean, 2),
            "Shared": lambda pair: f"{points(pair.shared)} %",
            "Shared by chance": lambda pair: percent(pair.shared_null.mean, 1),
        },
        frozenset({"Dictionaries", "By"}),
        "Pairs: mean cosine or correlation of the one-to-one pairs of features with the largest sum. Square "
        "brackets: 95 % intervals over features.",
    ),
    Sheet(
        "tracking",
        "Texts followed through the layers",
        {
            "Row": lambda text: text.row,
            "Text": lambda text: text.text,
            "Tokens": lambda text: str(text.tokens),
            "Layers": lambda text: str(text.sites),
            "Links": lambda text: f"{text.links:,}",
            "Output": lambda text: f"\u201c{text.output}\u201d" if text.output else MISSING,
            "Chains; hold": lambda text: f"{text.measured}; {text.holding}",
            "Steps tested": lambda text: str(text.tests),
            "Hurt": lambda text: str(text.hurt),
        },
        frozenset({"Text", "Output"}),
        "Output: what the model writes after the prompt. The strongest chains of features, from layer to layer to the "
        "answer, are measured: one holds if setting each feature to zero takes more from the next one than each of "
        "five random active features does, at equal dose, and more from the answer. A step is hurt if ablating its "
        "features lowers its log-likelihood more than random sets.",
    ),
    Sheet(
        "criteria",
        "Criteria of success",
        {
            "Criterion": lambda criterion: criterion.criterion,
            "Met": lambda criterion: answer(criterion.met, "not tested"),
            "Evidence": lambda criterion: criterion.evidence,
            "The reasoning study reports": lambda criterion: criterion.published or MISSING,
        },
        frozenset({"Met", "Evidence", "The reasoning study reports"}),
        cards=True,
    ),
)
