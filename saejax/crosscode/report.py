"""The report on crosscoders: what their parts share, beside what the rule makes of shared features."""

from matplotlib.figure import Figure

from saejax.crosscode.results import CrosscodedDictionary, CrosscodeResults, PartFeatures
from saejax.page import style
from saejax.page.blocks import Block, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import Table, answer, interval, number, percent, significant

_FEATURES = 10  # that are shown of a crosscoder


def sections(found: Findings, draw: Draw) -> list[Section]:
    """Crosscoders; no section if none were asked for."""
    return [_section(results, draw) for results in found.each(CrosscodeResults).values()]


def _section(results: CrosscodeResults, draw: Draw) -> Section:
    intro = (
        "A crosscoder has one dictionary for several layers, or for two models that read the same tokens. A feature "
        "whose decoder row is long in one part alone seems to be that part's own. A penalty on activations makes such "
        "features of shared ones, so latent scaling asks how much of each the other part's error and reconstruction "
        f"hold. {results.rule}."
    )
    blocks: list[Block] = [Text(intro), _picture(results, draw), _table(results)]
    for one in results.dictionaries:
        if one.listed:
            blocks.append(_listed(one))
        if one.behaviours:
            blocks.append(_behaviours(one))
        if one.left_out:
            blocks.append(Text(f"Not tested of {one.name}: {'; '.join(f'{k}: {v}' for k, v in one.left_out.items())}."))
    return Section("What layers or models share", tuple(blocks))


def _picture(results: CrosscodeResults, draw: Draw) -> Block:
    caption = (
        "Living features by the relative norm of their rows in the first part: 1 in this alone, 0 in others alone, 0.5 "
        "as long in the other."
    )
    told = "; ".join(f"{one.name}: {one.shared} of {one.alive} from 0.4 to 0.6" for one in results.dictionaries)
    return draw("crosscoders", norms(results), caption, f"{caption} {told}.")


@style.styled
def norms(results: CrosscodeResults) -> Figure:
    """A histogram for each crosscoder."""
    titles = [f"{one.name}, {one.parts[0]}" for one in results.dictionaries]
    figure, below = style.panels([1.6] * len(titles), titles)
    for axes, one in zip(below, results.dictionaries, strict=True):
        width = 1 / len(one.histogram)
        axes.bar([(i + 0.5) * width for i in range(len(one.histogram))], one.histogram, 0.9 * width, color=style.BLUE)
        axes.set_xlim(0, 1)
        axes.set_ylabel("features")
    below[-1].set_xlabel("relative norm in the first part")
    return figure


def _table(results: CrosscodeResults) -> Table:
    columns = ("Crosscoder", "Part", "By norms", "Looked at", "Private", "In errors", "Chance", "In reconstructions")
    rows = [
        (one.name, part, *_cells(own))
        for one in results.dictionaries
        for part, own in [*one.own.items(), ("shared, as a control", one.control)]
    ]
    note = (
        "In errors, in reconstructions: the median share that the other part's hold; chance: the 95th percentile with "
        "activations moved along the text. Shared features fire as often and go through the same rule, which should "
        "pass none; by norms, of them: how many there are."
    )
    return Table("What is one part's own", columns, tuple(rows), frozenset({1}), stack=False, note=note)


def _cells(own: PartFeatures) -> tuple[str, ...]:
    counts = tuple(number(count, 0) for count in (own.by_norms, own.measured, own.private))
    return *counts, number(own.nu_error), number(own.nu_null), number(own.nu_reconstruction)


def _listed(one: CrosscodedDictionary) -> Table:
    columns = {
        "Feature": lambda own: str(own.feature),
        "Part": lambda own: own.part,
        "Relative norm": lambda own: number(own.relative_norm, 3),
        "Fires on": lambda own: percent(own.firing_rate, 2),
        "In errors": lambda own: interval(own.nu_error),
        "In reconstructions": lambda own: interval(own.nu_reconstruction),
        "Private": lambda own: answer(own.private),
    }
    rows = [(own,) for own in one.listed[:_FEATURES]]
    return Table.of(f"Features of {one.name} that seem to be one part's own", rows, columns, {"Part", "Private"})


def _behaviours(one: CrosscodedDictionary) -> Table:
    columns = {
        "Removed from": lambda name, found: name,
        "Features": lambda name, found: str(len(found.features)),
        "Drop": lambda name, found: interval(found.drop),
        "Matched shared": lambda name, found: number(found.matched_drop),
        "In the other model": lambda name, found: number(found.other_drop),
        "p": lambda name, found: significant(found.claim.p_holm, 2),
        "Placebo rate": lambda name, found: percent(found.claim.placebo_rate),
        "Costs": lambda name, found: answer(found.claim.yes),
    }
    note = (
        "Drop: of the logit difference. p: after Holm's correction. Placebo rate: how often drawn sets pass the rule."
    )
    caption = f"Removing private features of {one.name} together"
    return Table.of(caption, one.behaviours.items(), columns, {"Costs"}, note=note)
