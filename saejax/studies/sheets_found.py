"""The tables of what a study's rows found: effects, agreement, and what follows from them."""

from saejax.page.tables import MISSING, answer, count, interval, number, percent
from saejax.studies.learned import QUESTIONS
from saejax.studies.sheet import Sheet, points

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
            "Steps tested": lambda one: str(one.tests),
            "Hurt": lambda one: str(one.hurt),
        },
        frozenset({"Text"}),
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
