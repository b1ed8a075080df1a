"""What was followed, as text for a terminal: the answer forming, and the steps with their features and tests."""

import os
from collections.abc import Mapping, Sequence
from typing import TextIO

from saejax.page.tables import number, significant, visible
from saejax.track.links import GEOMETRY
from saejax.track.page import ShownLayer, ShownText
from saejax.track.results import StepTest, TrackedText, TrackResults
from saejax.track.steps import StepFeature

_BOLD, _DIM, _GREEN, _END = "\033[1m", "\033[2m", "\033[32m", "\033[0m"
_SHOWN = 4  # features of a step
_WIDE = 76  # characters of a step's text


def wants_colour(stream: TextIO) -> bool:
    """Whether a stream is a terminal that shows colours."""
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")


def line(found: TrackedText) -> str:
    """The figures of a text in a line."""
    tests = [test for step in found.steps for test in step.tests.values()]
    hurt = f"{sum(test.hurt == 'yes' for test in tests)} of {len(tests)}"
    random = "" if found.random_links is None else f" (of random directions {found.random_links:,})"
    answer = found.lenses["logit"].answer[-1]
    start = ", most of features of one number: the dictionaries had one start, these links mean nothing"
    start = start if found.link_kind == GEOMETRY and found.same_number > found.links / 2 else ""
    return (
        f"{found.tokens} tokens, {len(found.sites)} layers, {found.links:,} links by {found.link_kind}{random}{start}; "
        f"probability of {visible(found.answer)!r} {answer:.2f}; {hurt} tested steps are hurt more by their features "
        f"than by random sets; {found.seconds:.0f} s"
    )


def written(results: TrackResults, cells: Mapping[str, ShownText], colour: bool) -> str:
    """All texts.

    Args:
      cells: slug -> what the page shows.
      colour: with escape codes for a terminal.
    """

    def in_style(style: str, text: str) -> str:
        return f"{style}{text}{_END}" if colour else text

    lines: list[str] = []
    for slug, found in results.texts.items():
        lines += ["", in_style(_BOLD, f"{slug}: {line(found)}"), ""]
        lines += [in_style(_DIM, row) if odd % 2 else row for odd, row in enumerate(_layers(found, cells[slug]))]
        lines.append("")
        for place, step in enumerate(found.steps):
            text = visible(step.text)
            cut = text if len(text) <= _WIDE else f"{text[: _WIDE - 1]}…"
            lines.append(f"{in_style(_BOLD, step.name)} [{step.start}, {step.stop}) {cut}")
            for site in step.only_here:
                features, said = _step(found, cells[slug], place, site)
                passed = site in step.tests and step.tests[site].hurt == "yes"
                lines += [f"  {site}: {features}", f"  {in_style(_GREEN if passed else _DIM, said)}"]
    return "\n".join(lines)


def _layers(found: TrackedText, cells: ShownText) -> list[str]:
    """A row for each layer with a dictionary: what the logit lens says where the answer is next."""
    reading, lens = cells.readings["logit"], found.lenses["logit"]
    rows = [f"{'read at':<16}{'logit lens says':<22}{'P(answer)':>10}{'rank':>8}{'control P':>11}"]
    for place, layer in enumerate(cells.layers):
        said = visible(cells.texts[int(reading.said[place][found.position][0])])[:20]
        number_of = layer.layer
        figures = f"{lens.answer[number_of]:>10.4f}{lens.rank[number_of]:>8,}{lens.control[number_of]:>11.4f}"
        rows.append(f"{layer.site:<16}{said!r:<22}{figures}")
    return rows


def _step(found: TrackedText, cells: ShownText, place: int, site: str) -> tuple[str, str]:
    """A step's features at a site, and what was found of them."""
    step, layer = found.steps[place], found.sites.index(site)
    features = [_feature(one, cells.layers[layer], found) for one in cells.belongs[layer][place][:_SHOWN]]
    own, shifted = step.only_here[site]
    test = step.tests.get(site)
    said = _test(test) if test else f"not tested: {step.untested.get(site, 'part of the prompt')}"
    alone = f"{own:.0f} fire here only, {shifted:.1f} with shifted boundaries"
    return ", ".join(features) or "no feature belongs to it", f"{alone}; {said}"


def _feature(one: StepFeature, layer: ShownLayer, found: TrackedText) -> str:
    label = layer.labels.get(str(one.feature), "")
    later = [f"carries over to {_names(one.carries, found)}"] if one.carries else []
    later += [f"returns in {_names(one.returns, found)}"] if one.returns else []
    told = f" ({'; '.join(later)})" if later else ""
    return f"{one.feature}{' ' + visible(label) if label else ''} {significant(one.mean)}{told}"


def _names(segments: Sequence[int], found: TrackedText) -> str:
    """Names of steps, those in a row by the first and the last: "3-10, 12"."""
    runs: list[list[int]] = []
    for segment in segments:
        if runs and runs[-1][-1] == segment - 1:
            runs[-1].append(segment)
        else:
            runs.append([segment])
    short = [found.steps[run[0]].name.removeprefix("step ") for run in runs]
    ends = [found.steps[run[-1]].name.removeprefix("step ") for run in runs]
    return ", ".join(first if first == last else f"{first}-{last}" for first, last in zip(short, ends, strict=True))


def _test(test: StepTest) -> str:
    if test.hurt == "not testable":
        sets = f"{test.sets} independent random sets of {test.needed} needed"
        return f"not testable: {sets}; {number(test.drop)} nats a token"
    verdict = "hurts more than random sets" if test.hurt == "yes" else "not significantly more than random sets"
    return (
        f"{verdict}: {number(test.drop)} nats a token; at equal dose {number(test.equal_drop)}, "
        f"{test.sets} random sets {number(test.random_drop)}, p {significant(test.p_holm, 2)}"
    )
