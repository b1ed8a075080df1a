"""The tables of what a study's rows found: effects, agreement, and what follows from them."""

from saejax.page.tables import MISSING, answer, interval, number, percent
from saejax.studies.sheet import Sheet, points

_AFTER_NOTE = (
    "Top features set to zero, or each replaced, where it fires, by an activation that it has elsewhere. Drops of "
    "accuracy are in percentage points, those of the reference's log-likelihood in nats per token; square brackets: "
    "95 % intervals over items. Random: mean drop without matched random features. p: share of these draws and the top "
    "features that cost at least as much log-likelihood. Verdict: of the rule on accuracy, with p after Holm's "
    "correction over the row's benchmarks; a dash where the model is at chance before any edit, or gives no answers. "
    "Placebo: share of the draws to which the rule says yes."
)
FOUND = (
    Sheet(
        "effects",
        "Benchmarks without top features",
        {
            "Row": lambda one: one.row,
            "Benchmark": lambda one: one.benchmark,
            "Replaced": lambda one: one.replacement,
            "Accuracy before, %": lambda one: points(one.accuracy_before) + (" (at chance)" if one.at_chance else ""),
            "Accuracy drop": lambda one: points(one.accuracy_drop),
            "Random": lambda one: number(one.accuracy_control_drop, 1, 100),
            "Verdict": lambda one: (
                MISSING if one.verdict is None else f"{answer(one.verdict)} (p = {number(one.verdict_p, 3)})"
            ),
            "Placebo": lambda one: percent(one.placebo_rate, 1),
            "Log-likelihood drop": lambda one: interval(one.nats_drop, 3),
            "Random, nats": lambda one: number(one.nats_control_drop, 3),
            "p": lambda one: number(one.nats_p, 3),
            "Features": lambda one: f"{one.top} of {one.dictionary}",
            "Draws": lambda one: str(one.draws),
            "Items": lambda one: str(one.items),
        },
        frozenset({"Benchmark", "Replaced", "Verdict", "Features"}),
        _AFTER_NOTE,
    ),
    Sheet(
        "single",
        "Benchmarks without single features",
        {
            "Row": lambda one: one.row,
            "Benchmark": lambda one: one.benchmark,
            "Features": lambda one: str(one.features),
            "Change it": lambda one: str(one.discoveries),
            "Of a draw": lambda one: number(one.control_discoveries, 1),
            "p": lambda one: number(one.p_value, 3),
            "Strongest": lambda one: f"{one.dictionary}/{one.strongest}",
            "Drop, nats": lambda one: interval(one.drop, 3),
            "q": lambda one: number(one.q_value, 3),
            "Above random": lambda one: percent(one.control_percentile),
        },
        frozenset({"Benchmark", "Strongest"}),
        "Top features that fire on the items, each set to zero by itself. Change it: their drops of log-likelihood "
        "have q at most 0.05, by sign flips over items; of a draw: how many of the matched random features do, on "
        "average; p: share of the draws and the top features of which as many do. Above random: share of the "
        "features that draws put in the strongest one's place that cost less.",
    ),
    Sheet(
        "behaviours",
        "Behaviours without top features",
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
            "Partners that fire alike": lambda one: f"up to {number(one.control)}" if one.control else MISSING,
            "Aligned": lambda one: answer(one.aligned),
        },
        frozenset({"Benchmark", "Ranked", "Aligned"}),
        "A dash: fewer than three items or matched features, or no two of a different rank.",
    ),
    Sheet(
        "gates",
        "Interpretable, unstable, or no signal",
        {
            "Row": lambda one: one.row,
            "Benchmark": lambda one: one.benchmark,
            "Gate": lambda one: one.gate,
            "Why": lambda one: one.reason,
            "Random sets called interpretable": lambda one: percent(one.placebo_rate, 1),
        },
        frozenset({"Benchmark", "Gate", "Why"}),
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
            "Matched sets that pass": lambda one: percent(one.placebo_rate, 1),
        },
        frozenset({"Text"}),
    ),
    Sheet(
        "criteria",
        "Criteria of success",
        {
            "Criterion": lambda one: one.criterion,
            "Met": lambda one: answer(one.met, "not asked"),
            "Evidence": lambda one: one.evidence,
            "The reasoning study reports": lambda one: one.published or MISSING,
        },
        frozenset({"Met", "Evidence", "The reasoning study reports"}),
        cards=True,
    ),
)
