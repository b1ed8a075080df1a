"""The report on labels by a language model: how many are kept, and how well they are told from others."""

from saejax.dictionaries import stacks
from saejax.explain.contexts import FEWEST
from saejax.explain.results import ExplainedDictionary, ExplainResults, LabelScores
from saejax.page.blocks import Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import Table, number, percent


def sections(found: Findings, draw: Draw) -> list[Section]:
    """A table of the dictionaries whose labels were judged; no section if there are none."""
    every = list(found.each(ExplainResults).values())
    if not every:
        return []
    rows = [row for results in every for member in results.members for row in _rows(results, member)]
    wrote = "wrote labels from contexts in training text and judged them" if every[0].written else "judged given labels"
    intro = (
        f"A language model ({every[0].model}) {wrote} on contexts in held-out text, from every tenth of a feature's "
        "firings and as many without it. Detection: in which contexts is the feature of this label active? Fuzzing: in "
        "which are the right tokens marked? Intruder: which context does not belong to the others, without a label? "
        "Embedding: how well does the cosine of its embedding with that of a label tell a context with the feature? A "
        "label is kept if the lower end of the 95 % interval of its balanced accuracy in detection lies above that of "
        f"another feature's label, and above one half. Features with fewer than {FEWEST} held-out firings are not "
        "asked about."
    )
    columns = ("Dictionary", "Labels kept", "Score", "Mean", "95 %", "Control", "Features", "Unread")
    note = (
        "Mean: of balanced accuracy, of intruders the share found, of embeddings the area under the ROC curve; "
        "intervals by bootstrap over features. Control: with the label of another feature that fires about as often; "
        "of intruders, by guessing. Unread: answers not as "
        "asked for, which count nowhere else."
    )
    return [
        Section("Labels by a language model", (Text(intro), Table("Labels judged", columns, tuple(rows), note=note)))
    ]


def _rows(results: ExplainResults, member: ExplainedDictionary) -> list[tuple[str, ...]]:
    name = stacks.full_name(results.kind, member.name)
    kept = f"{member.kept} of {member.judged}"
    return [(name, kept, score, *_cells(one)) for score, one in member.scores.items()]


def _cells(one: LabelScores) -> tuple[str, ...]:
    mean = (number(one.mean.mean), f"{number(one.mean.low)} to {number(one.mean.high)}") if one.mean else ("–", "–")
    control = "–" if one.control is None else number(one.control)
    return (*mean, control, str(one.features), percent(one.unread))
