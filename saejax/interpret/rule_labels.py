"""The labels of all features of a dictionary by the rules of ``detectors``, beside the labels of its two controls.

1. The firings of the dictionary and of a frozen-random one on the search text (the store's train split) are written to
   a folder, then the firings of random directions that fire as often.
2. The best detector of every feature is searched there.
3. Detectors are scored on held-out text, and detectors that pass become labels.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from saejax.activations.store import Store
from saejax.dictionaries import Dictionary
from saejax.dictionaries.labels import Label
from saejax.interpret import neighbours
from saejax.interpret.control import frozen_random, random_directions
from saejax.interpret.detectors import Detector, Scored, best_detectors
from saejax.interpret.firings import blocks, record, used_rows
from saejax.interpret.results import LabelCounts
from saejax.interpret.text import FAMILIES, CodeCounts, CodedText
from saejax.models.language_model import LanguageModel
from saejax.models.sites import IN_STREAM, Site
from saejax.short_reprs import has_short_repr

_OUTPUT = 10  # output tokens at either end
#: For every feature its detector; with its firing rate on the search text.
Searched = tuple[list[Detector | None], np.ndarray]
#: Called with what is done, how many there are of it, and of what; returns what is called with the number done since.
BeginProgress = Callable[[str, int, str], Callable[[int], None]]


@has_short_repr
@dataclasses.dataclass(frozen=True)
class RuleLabels:
    """The labels of a dictionary's features, and how many there are beside its controls."""

    labels: Mapping[int, Label]  #: by feature; of features whose detector passes
    counts: LabelCounts  #: of the dictionary
    frozen: LabelCounts  #: of a frozen-random dictionary as large and as sparse
    random: LabelCounts  #: of random directions that fire as often


@dataclasses.dataclass(frozen=True)
class LabelSearch:
    """The labels of a dictionary's features, with the detectors, firings and control of the search."""

    labels: RuleLabels  #: the labels, with their counts
    detectors: Scored  #: of all features, with their scores
    firings: Path  #: folder of the firings on the search text
    control: Dictionary  #: the frozen-random dictionary
    output: neighbours.OutputTokens | None  #: tokens that features promote and suppress; None: unknown
    #: place_N and held_out_place_M: encoded places of the search text and of the held-out text.
    place_N: np.ndarray
    held_out_place_M: np.ndarray


def search_labels(
    lm: LanguageModel,
    store: Store,
    text: CodedText,
    dictionary: Dictionary,
    folder: Path,
    *,
    batch_tokens: int = 2048,
    seed: int = 789,
    begin_progress: BeginProgress = lambda doing, total, unit: lambda done: None,
) -> LabelSearch:
    """Search and score the labels of a dictionary's features.

    Args:
      lm: the model, on whose devices activations are encoded.
      store: activations of the dictionary's sites, with held-out text.
      text: its text.
      dictionary: the dictionary.
      folder: where firings are written; they stay.
      batch_tokens: tokens in a batch.
      seed: of the controls.
      begin_progress: see ``BeginProgress``; what it returns may raise to stop.

    Raises:
      UserError: a split has no activations of the dictionary's site.
    """
    in_stream = Site.parse(dictionary.config.target or dictionary.site).kind in IN_STREAM

    def record_firings(split: str, dictionaries: Mapping[Path, Dictionary]) -> np.ndarray:
        names = ", ".join(path.name for path in dictionaries)
        total = len(used_rows(store, split, dictionary.site, dictionary.config.target))
        on_tokens = begin_progress(f"firings are recorded ({names})", total, "tokens")
        return record(store, split, dictionaries, lm.mesh, batch_tokens, on_tokens=on_tokens)

    def promoted(some: Dictionary) -> neighbours.OutputTokens | None:
        """Return the tokens that features promote and suppress; None if they do not write to the residual stream."""
        return neighbours.output_tokens(lm, some.W_dec_FxD[...], _OUTPUT) if in_stream else None

    def search(path: Path, features: int, output: neighbours.OutputTokens | None) -> Searched:
        detectors: list[Detector | None] = []
        fires_F = np.zeros(features)
        on_features = begin_progress(f"labels are searched ({path.name})", features, "features")
        for block in blocks(path, features):
            of_block = slice(block.first, block.first + block.size)
            detectors += best_detectors(block, text, bases, output.raised(of_block) if output else ())
            fires_F[of_block] = block.counts
            on_features(block.size)
        return detectors, fires_F / bases["position"].places

    # Both dictionaries are encoded in one pass over the store; random directions fire as often as the first.
    frozen = frozen_random(store, dictionary, seed)
    trained_path, frozen_path, random_path = (folder / name for name in ("dictionary", "frozen", "random"))
    place_N = record_firings("train", {trained_path: dictionary, frozen_path: frozen})
    bases, output = count_codes(text, place_N), promoted(dictionary)
    searched = [search(trained_path, dictionary.config.n_features, output)]
    random = random_directions(store, dictionary, searched[0][1], seed)
    record_firings("train", {random_path: random})
    searched.append(search(frozen_path, dictionary.config.n_features, promoted(frozen)))
    searched.append(search(random_path, random.config.n_features, promoted(random)))
    firings = {folder / f"held_out_{number}": some for number, some in enumerate((dictionary, frozen, random))}
    held_out_place_M = record_firings("held_out", firings)
    held_out_bases = count_codes(text, held_out_place_M)
    scored = [
        Scored.of(path, detectors, text, held_out_bases, rates)
        for path, (detectors, rates) in zip(firings, searched, strict=True)
    ]
    labels = [detectors.labels(random=scored[-1]) for detectors in scored]
    counts, frozen_counts, random_counts = (
        detectors.counts(rates > 0, of) for detectors, (_, rates), of in zip(scored, searched, labels, strict=True)
    )
    return LabelSearch(
        labels=RuleLabels(labels[0], counts, frozen_counts, random_counts),
        detectors=scored[0],
        firings=trained_path,
        control=frozen,
        output=output,
        place_N=place_N,
        held_out_place_M=held_out_place_M,
    )


def count_codes(text: CodedText, place_N: np.ndarray) -> dict[str, CodeCounts]:
    """Return the frequency of each code of each family at some places."""
    return {family: CodeCounts(text.code(family, place_N)) for family in FAMILIES}
