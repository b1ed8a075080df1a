"""The report's section on labels by a language model."""

from saejax.dictionaries import stacks
from saejax.interpret.explain_results import ExplainedDictionary, ExplainResults, LabelScores
from saejax.interpret.held_out import MIN_FIRINGS
from saejax.page.blocks import Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import MISSING, Table, number, percent


def sections(findings: Findings, draw: Draw) -> list[Section]:
    """Return a section with a table of the judged dictionaries; none if there are none."""
    units = list(findings.each(ExplainResults).values())
    if not units:
        return []
    rows = [_row(results, member) for results in units for member in results.members]
    wrote = "wrote labels from contexts in training text and judged them" if units[0].written else "judged given labels"
    intro = (
        f"A language model ({units[0].model}) {wrote} on contexts in held-out text: some from every tenth of a "
        "feature's firings and as many in which it does not fire. Detection: in which contexts does the feature with "
        "this label fire? A label is "
        "kept if the lower end of the 95 % interval of its balanced accuracy in detection is above that of another "
        f"feature's label and above one half. Features with fewer than {MIN_FIRINGS} held-out firings are skipped."
    )
    columns = ("Dictionary", "Labels kept", "Detection", "95 %", "Control", "Features", "Unparsed")
    note = (
        "Detection: mean balanced accuracy; intervals by bootstrap over features. Control: with the label of another "
        "feature that fires about as often. Unparsed replies are excluded."
    )
    table = Table("Scores of the labels", columns, tuple(rows), note=note)
    return [Section("Labels by a language model", (Text(intro), table))]


def _row(results: ExplainResults, member: ExplainedDictionary) -> tuple[str, ...]:
    name = stacks.full_name(results.kind, member.name)
    return (name, f"{member.kept} of {member.judged}", *_cells(member.detection))


def _cells(scores: LabelScores) -> tuple[str, ...]:
    mean = (MISSING, MISSING)
    if scores.mean:
        mean = number(scores.mean.mean), f"{number(scores.mean.low)} to {number(scores.mean.high)}"
    control = MISSING if scores.control is None else number(scores.control)
    return (*mean, control, str(scores.features), percent(scores.unparsed))
