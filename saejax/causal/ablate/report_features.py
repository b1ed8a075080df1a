"""The report on the features one by one: what each costs, beside its contexts."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from saejax.causal.ablate import report_figures
from saejax.causal.ablate.importance import DISCOVERY, Importance
from saejax.causal.ablate.importance_results import ImportanceSummary
from saejax.causal.ablate.results import AblateResults, BehaviourAblation, TopFeature
from saejax.dictionaries import stacks
from saejax.dictionaries.labels import Label, labels_in
from saejax.errors import UserError
from saejax.page.blocks import Block, Picture, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.strips import Strips
from saejax.page.tables import MISSING, Table, interval, number, percent, significant
from saejax.page.words import behaviour, detail_title

SLOPES = dict(gradient="the gradient", integrated="the integrated gradient", relp="the slope (relevance patching)")


TABLE_ROWS, FIGURE_ROWS = 50, 30  # longest list of features in a table and in a figure


def features(found: Findings, draw: Draw, shown: int) -> list[Section]:
    """The top features of each behaviour, one by one, with the contexts of the first ``shown``."""
    ablate, estimate = found.one(AblateResults), found.settings()["ablate"]["estimate"]
    intro = (
        f"Features were ranked by attribution: the activation times {SLOPES[estimate]} of the logit difference, "
        "summed over a prompt and averaged over the train prompts, an estimate of the effect. The drop is measured: "
        "what is lost on the test prompts when this feature alone is removed. Features have numbers, and names only "
        "where they were interpreted. "
        "Below are the contexts of the captured text in which they fire most strongly; colour shows how strongly a "
        "feature fires on a token, and the maximum is bold and underlined. ↵ is a line break, ␣ a space, � a piece of "
        "a character."
    )
    sections = [Section("The features", (Text(intro),))]
    known = labels_in(found.folders, found.one(AblateResults).dictionary)
    contexts = _Contexts(found, known) if shown and found.examples else None
    for name, result in ablate.behaviours.items():
        every = [_every(found, name, result, result.importance, draw)] if result.importance else []
        if result.top:
            strips = [contexts.strips(name, item) for item in result.top[:shown]] if contexts else []
            table = _feature_table(result, known)
            blocks: tuple[Block, ...] = (_singles(name, result, draw), *every, table, *strips)
            sections.append(Section(detail_title(name), blocks, level=3))
        else:
            nothing = Text(
                "No feature was tested: none has an attribution above zero on the train prompts.", strong=True
            )
            sections.append(Section(detail_title(name), (nothing, *every), level=3))
    return sections


def _singles(name: str, result: BehaviourAblation, draw: Draw) -> Picture:
    top = result.top[:FIGURE_ROWS]
    drops = [item.logit_diff_drop for item in top]
    numbers = [item.feature for item in top]
    figure = report_figures.single_features(numbers, drops, [item.control_drop for item in top])
    above = sum(item.logit_diff_drop.low > 0 for item in result.top)
    rest = f" The figure shows the first {len(top)}." if len(top) < len(result.top) else ""
    caption = (
        f"In order of attribution. Removed alone, {above} of {len(result.top)} features cost logit difference with "
        f"an interval above zero; of features without effect about one in forty would.{rest}"
    )
    first = "; ".join(f"feature {item.feature} {interval(item.logit_diff_drop)}" for item in top[:5])
    alt = f"{behaviour(name)}: drop of the logit difference when single features are removed. {first}."
    return draw(f"features_{name}", figure, caption, alt)


def _every(found: Findings, name: str, result: BehaviourAblation, summary: ImportanceSummary, draw: Draw) -> Picture:
    """All features that fire, where each was removed by itself."""
    unit = next(unit for unit, one in found.summaries.items() if one.stage == "ablate")
    measured = Importance.load(Importance.file(found.folders[unit], name))
    top = [item.feature for item in result.top]
    strongest = set(measured.feature[np.argsort(-measured.drop, kind="stable")[: len(top)]].tolist())
    used = found.settings()["ablate"]["estimate"]
    fits = [
        f"{name} {fit.pearson:.2f} (of ranks {fit.spearman:.2f})"
        for name, fit in summary.estimates.items()
        if fit.pearson is not None
    ]
    figure = report_figures.estimates(getattr(measured, used), measured.drop, measured.q_value <= DISCOVERY, used)
    caption = (
        f"Each of the {summary.features:,} features that fire on the test prompts was removed by itself. "
        f"{summary.discoveries:,} effects are discoveries (sign-flip permutations, q at most {DISCOVERY:g} after "
        "Benjamini and Hochberg, which holds if the tests are independent or positively dependent; "
        f"{summary.sure:,} by maxT, which holds however they depend; so few prompts allow no p-value below "
        f"{summary.least_p:.2g}). Correlation of "
        f"estimates with the effect: {'; '.join(fits) or 'not defined'}. {_agreement(summary)}"
        f"Of the {len(top)} features chosen on the train prompts, {len(strongest & set(top))} are among the {len(top)} "
        "with the largest measured effects. Both axes are linear around zero and logarithmic beyond."
    )
    return draw(f"every_feature_{name}", figure, caption, f"{behaviour(name)}: estimate against effect. {caption}")


def _agreement(summary: ImportanceSummary) -> str:
    """How far importance by correlation, and another half of the prompts, rank the features as their effects do."""
    correlated, stable = summary.correlations["pearson"], summary.stability.rank_correlation
    return (
        "Correlation of a feature's largest activation with the logit difference, which needs no intervention, ranks "
        f"the features otherwise: its size has a rank correlation of {number(correlated)} with the effect. Effects on "
        f"two halves of the prompts have one of {number(stable)}. "
    )


def _feature_table(result: BehaviourAblation, known: Mapping[int, Label]) -> Table:
    top = result.top
    columns = {
        "Feature": lambda item: f"{item.feature} {known[item.feature].label if item.feature in known else ''}".strip(),
        "Logit difference lost": lambda item: interval(item.logit_diff_drop),
        "Random": lambda item: number(item.control_drop),
        "Accuracy lost, points": lambda item: interval(item.accuracy_drop, 0, 100),
        "Attribution": lambda item: significant(item.attribution),
        "Fires on": lambda item: percent(item.firing_rate, 1),
        "Mean activation": lambda item: significant(item.mean_activation),
    }
    rest = f" The first {TABLE_ROWS} of {len(top)} features." if len(top) > TABLE_ROWS else ""
    note = (
        "Random: mean loss of logit difference for the random features matched to this one "
        f"({MISSING}: it never fires, so there are none). Fires on: share of the tokens of the test prompts, and of "
        f"those that lend replacements. Square brackets: 95 % bootstrap intervals over prompts.{rest}"
    )
    return Table.of(
        "Features removed one by one", [(item,) for item in top[:TABLE_ROWS]], columns, stack=False, note=note
    )


def held_out(found: Findings, name: str) -> np.ndarray:
    """Of the tested dictionary on held-out text, [F]: "firing_rate", or "mean_activation" over tokens where it fires.

    Raises:
      UserError: the file is missing or damaged.
    """
    kind, member = stacks.kind_and_member(found.one(AblateResults).dictionary)
    path: Path = found.folders[f"evaluate/{kind}"] / member / f"{name}.npy"
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise UserError(
            f"{path} is missing or damaged: delete {path.parent} and run the evaluate stage again"
        ) from None


class _Contexts:
    """The contexts of features, and what held-out text says of them: its files are read once."""

    def __init__(self, found: Findings, known: Mapping[int, Label]):
        self._examples, self._known = found.examples, known
        self._rate_F, self._mean_F = (held_out(found, name) for name in ("firing_rate", "mean_activation"))
        behaviours = found.one(AblateResults).behaviours
        self._tops = {name: {entry.feature for entry in result.top} for name, result in behaviours.items()}

    def strips(self, name: str, item: TopFeature) -> Strips:
        """Of a top feature of a behaviour."""
        feature = item.feature
        shared = [behaviour(other) for other, top in self._tops.items() if other != name and feature in top]
        rate, mean = float(self._rate_F[feature]), float(self._mean_F[feature])
        called = self._known.get(feature)
        note = f"Called {called.label} by {called.by}. " if called else ""
        note += f"Removing it alone costs {interval(item.logit_diff_drop)} logits. "
        note += (
            f"It fires on {significant(100 * rate)} % of held-out tokens, at {significant(mean)} on average."
            if rate > 0
            else "It fires on no held-out token."
        )
        if shared:
            note += f" It is also among the top features of: {', '.join(shared)}."
        examples = tuple(self._examples.get(feature, ()))
        if not examples:
            note += " It fires nowhere in the captured text, so there is no context to show."
        return Strips(f"Feature {feature}", note, examples)
