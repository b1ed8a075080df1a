"""A followed text as lines for a terminal: for each layer the strongest features where the answer is the next token."""

from saejax.matching.track.page import ShownText
from saejax.matching.track.results import TrackedText
from saejax.page.tables import number, visible

_TOP = 4  # features of a layer


def summary(text: TrackedText) -> str:
    """Return the figures of a text as one line."""
    tests = [test for step in text.steps for test in step.tests.values()]
    harmed, answer = sum(test.hurt == "yes" for test in tests), text.lenses["logit"].answer[-1]
    return (
        f"{text.tokens} tokens, {len(text.sites)} layers, {text.links:,} links by {text.link_kind}; probability of "
        f"{visible(text.answer)!r} {answer:.2f}; ablating its features lowers the log-likelihood of {harmed} of "
        f"{len(tests)} tested steps more than random sets; {text.seconds:.0f} s"
    )


def text_lines(slug: str, text: TrackedText, shown: ShownText) -> str:
    """Return the lines of a text: layers from the prompt to the answer, each with its strongest features.

    A feature is named by its label, or else by its top tokens on this text; its activation is relative to its maximum
    on this text.
    """
    lines = [f"{slug}: {summary(text)}"]
    for layer, row in zip(shown.layers, shown.cells, strict=True):
        cell = row[text.position]
        features = [
            f"{number(value / layer.peaks[str(feature)])} {feature} {visible(layer.labels[str(feature)])}"
            for feature, value in zip(cell[::2][:_TOP], cell[1::2][:_TOP], strict=True)
        ]
        lines.append(f"  {layer.site:<16} {'; '.join(features) or 'no feature fires'}")
    output = [f"  output           {visible(text.output)}"] if text.output else []
    return "\n".join([*lines, f"  answer           {visible(text.answer)}", *output])
