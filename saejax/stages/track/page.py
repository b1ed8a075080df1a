"""An interactive page of texts that were followed: one HTML file, complete in itself, that loads nothing.

Layers by positions; a cell's features can be followed up and down, and every step has its features and their test.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from saejax.dictionaries.labels import Label
from saejax.files import write_text
from saejax.interpret.feature_record import feature_words, quote_words
from saejax.matching.track.firings import LayerFirings, StepFeature
from saejax.matching.track.links import Link
from saejax.matching.track.results import TrackedText, TrackResults
from saejax.matching.track.stack import Stack
from saejax.matching.track.texts import EncodedText
from saejax.models.lens import LensOutput
from saejax.page.scripts import elements_script, interactive
from saejax.page.tables import number
from saejax.results import to_json
from saejax.unicode import visible
from saejax.wording import counted

_VIEWER = Path(__file__).parent / "viewer"
_SCRIPTS = ("grid", "panel", "main")
_TOP = 4  # features of a layer

ShownText = dict[str, Any]  # as JSON; docs/artifacts.md explains it


def shown_text(
    stack: Stack,
    text: EncodedText,
    shown: Sequence[LayerFirings],
    links: Sequence[Link],
    chosen: Sequence[Sequence[Sequence[StepFeature]]],
    reading: LensOutput,
    as_text: Callable[[int], str],
    firings: Sequence[LayerFirings],
    lens: str,
) -> ShownText:
    """Return the data that the page shows of a text, besides its results.

    Args:
      stack: the dictionaries.
      text: the tokens and steps.
      shown: of each dictionary the features of each position.
      links: between the features.
      chosen: of each dictionary the features that belong to each segment.
      reading: of the lens.
      as_text: gives a token's text.
      firings: of each dictionary all features that fire.
      lens: its name.
    """
    words: dict[int, int] = {}
    features = [[feature.feature for part in parts for feature in part] for parts in chosen]
    layers = [
        dict(
            name=layer.name,
            site=layer.config.site,
            # The address of a feature's page, but for its number.
            atlas=layer.atlas.resolve().as_uri() + f"#{layer.name}/" if layer.atlas else "",
            **_names(layer.labels, every, {*cells.feature_A.tolist(), *belonging}, text.tokens),
        )
        for layer, every, cells, belonging in zip(stack, firings, shown, features, strict=True)
    ]
    return dict(
        tokens=text.tokens,
        layers=layers,
        cells=[[_cell(layer_firings, position) for position in range(len(text.tokens))] for layer_firings in shown],
        links=[(*source, *target, float(f"{weight:.4g}")) for source, target, weight in links],
        belongs=to_json(chosen),
        reading=_reading(stack, reading, words) | dict(lens=lens),
        # After the reading, which names its tokens by their place here.
        texts=[as_text(token) for token in words],
    )


def _names(
    labels: Mapping[int, Label], firings: LayerFirings, features: Set[int], tokens: Sequence[str]
) -> dict[str, Any]:
    """Return the fields ``labels`` and ``peaks`` of a layer: by feature its name, and its largest activation here."""
    names: dict[str, str] = {}
    peaks: dict[str, float] = {}
    for feature in sorted(features):
        feature_firings = firings[np.flatnonzero(firings.feature_A == feature)]
        words = feature_words([tokens[t] for t in feature_firings.position_A], feature_firings.value_A.tolist())
        names[str(feature)] = labels[feature].label if feature in labels else quote_words(words)
        peaks[str(feature)] = float(f"{np.abs(feature_firings.value_A).max():.4g}")
    return dict(labels=names, peaks=peaks)


def _reading(stack: Stack, reading: LensOutput, words: dict[int, int]) -> dict[str, Any]:
    """Return the lens's readouts at the layers with a dictionary.

    Tokens are named by ``words`` (token id -> index of its text); missing ones are added to it.
    """

    def top_tokens(layer: int) -> list[list[int | float]]:
        """Return of each position the likeliest tokens and their probabilities, in turn."""
        ids_TxC, p_TxC = reading.ids_LxBxTxC[layer, 0], np.exp(reading.logp_LxBxTxC[layer, 0])
        return [
            [
                value
                for token, p in zip(ids, ps, strict=True)
                for value in (words.setdefault(token, len(words)), round(p, 4))
            ]
            for ids, ps in zip(ids_TxC.tolist(), p_TxC.tolist(), strict=True)
        ]

    layers = [layer.reads.layer for layer in stack]
    return dict(
        top_tokens=[top_tokens(layer) for layer in layers],
        kl=[_rounded(reading.kl_LxBxT[layer, 0]) for layer in layers],
        control_kl=[_rounded(reading.control.kl_LxBxT[layer, 0]) for layer in layers],
        answer=[_rounded(np.exp(reading.answer_logp_LxBxTxN[layer, 0, :, 0])) for layer in layers],
    )


def write_page(path: Path, results: TrackResults, cells: Mapping[str, ShownText], model: str) -> None:
    """Write the page."""
    texts = [dict(slug=slug) | to_json(results.texts[slug]) | shown for slug, shown in cells.items()]
    data = dict(model=model, texts=texts)  # in place of how many tokens and links there are, all of them
    scripts = [elements_script(), *((_VIEWER / f"{name}.js").read_text("utf-8") for name in _SCRIPTS)]
    write_text(path, interactive(_VIEWER, "track", scripts, data, title=f"Through the layers: {', '.join(cells)}"))


def _cell(firings: LayerFirings, position: int) -> list[int | float]:
    """Return the features of a cell and their activations, in turn, the strongest first."""
    cell = firings.at(position)
    pairs = zip(cell.feature_A.tolist(), cell.value_A.tolist(), strict=True)
    return [number for feature, value in pairs for number in (feature, float(f"{value:.4g}"))]


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.3g}") for value in np.nan_to_num(values, posinf=1e9).tolist()]


def summary(text: TrackedText) -> str:
    """Return the figures of a text as one line."""
    tests = [step.test for step in text.steps if step.test and step.test.hurt != "not testable"]
    harmed, answer = sum(test.hurt == "yes" for test in tests), text.lens.answer[-1]
    tested = f"{harmed} of {len(tests)} tested steps more than random sets"
    return (
        f"{counted(text.tokens, 'token')}, {counted(len(text.sites), 'layer')}, {counted(text.links, 'link')}; "
        f"probability of {visible(text.answer)!r} {answer:.2f}; "
        + (f"ablating its features lowers the log-likelihood of {tested}" if tests else "no step could be tested")
    )


def text_lines(slug: str, text: TrackedText, shown: ShownText) -> str:
    """Return the lines of a text: layers from the prompt to the answer, each with its strongest features.

    A feature is named by its label, or else by its top tokens on this text; its activation is relative to its maximum
    on this text.
    """
    lines = [f"{slug}: {summary(text)}"]
    for layer, row in zip(shown["layers"], shown["cells"], strict=True):
        cell = row[text.position]
        features = [
            f"{number(value / layer['peaks'][str(feature)])} {feature} {visible(layer['labels'][str(feature)])}"
            for feature, value in zip(cell[::2][:_TOP], cell[1::2][:_TOP], strict=True)
        ]
        lines.append(f"  {layer['site']:<16} {'; '.join(features) or 'no feature fires'}")
    output = [f"  output           {visible(text.output)}"] if text.output else []
    return "\n".join([*lines, f"  answer           {visible(text.answer)}", *output])
