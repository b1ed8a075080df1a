"""The report on other bases: whether the dictionary's features do more than neurons, components, random directions."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from saejax.reporting import style
from saejax.reporting.document import Picture, Section, Text
from saejax.reporting.findings import Findings
from saejax.reporting.sections import Draw, behaviour
from saejax.reporting.tables import interval

_WORDS = dict(neurons="MLP neurons", components="principal components", random="untrained dictionary")


def sections(found: Findings, draw: Draw) -> list[Section]:
    """A figure of all behaviours; no section if nothing was compared."""
    results = found.ablate["behaviours"]
    compared = {behaviour(name): rows_of(result) for name, result in results.items() if result.get("baselines")}
    if not compared:
        return []
    caption = (
        f"The logit difference that is lost without the top {found.ablate['top']} directions of each basis, chosen on "
        "train prompts, on the test prompts; and without as many random ones of the same basis, matched in firing "
        "rate, size and length (grey crosses: mean over draws). 95 % bootstrap intervals over prompts."
    )
    alt = "Logit difference lost. " + " ".join(
        f"{name}: " + ", ".join(f"{basis} {interval(row['drop'])}" for basis, row in rows.items()) + "."
        for name, rows in compared.items()
    )
    picture: Picture = draw("bases", figure(compared), caption, alt)
    missing = sorted(
        {
            f"{_WORDS.get(name, name)}, {behaviour(of)}: {entry['reason']}"
            for of, result in results.items()
            for name, entry in result.get("baselines", {}).items()
            if "reason" in entry
        }
    )
    said = [Text(f"Not compared: {'; '.join(missing)}.")] if missing else []
    return [Section("Beside other bases", (picture, *said))]


def rows_of(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Of one behaviour, basis -> what its top directions cost ("drop") and what random ones do ("control")."""
    drops = result["controls"]["logit_diff_drop"]
    rows: dict[str, Mapping[str, Any]] = {
        "features": dict(drop=result["joint"]["logit_diff_drop"], control=sum(drops) / len(drops))
    }
    for name, entry in result["baselines"].items():
        if "reason" not in entry:
            rows[_WORDS.get(name, name.rstrip("/").rpartition("/")[2])] = dict(
                drop=entry["joint"]["logit_diff_drop"], control=entry["control_drop"]
            )
    return rows


@style.styled
def figure(compared: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Figure:
    """What the top directions of each basis cost, a panel for each behaviour."""
    heights = [0.55 + style.height_of(rows, 0.3) for rows in compared.values()]
    heights[-1] += 0.6  # the legend takes it
    drawn, below = style.panels(heights, [f"{name}: logit difference lost" for name in compared])
    for axes, rows in zip(below, compared.values(), strict=True):
        style.name_rows(axes, list(rows))
        for place, (name, row) in enumerate(rows.items()):
            color = style.BLUE if name == "features" else style.ORANGE
            axes.plot([row["control"]], [place], "x", color=style.GREY, label="matched random directions", zorder=2)
            label = "top features" if name == "features" else "top directions of another basis"
            style.point(axes, row["drop"], place, color, "o" if name == "features" else "s", label)
        axes.axvline(0, color=style.INK, linewidth=0.8, alpha=0.5)
    style.legend(below[-1], 1)
    return drawn
