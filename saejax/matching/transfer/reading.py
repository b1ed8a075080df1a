"""The text that models read together, and the activations of the dictionaries' features on it.

One model at a time is loaded, reads the text, and is dropped again; activities, and the values of sites where they are
needed, go to files. So memory does not grow with the number of models or dictionaries.

Texts of even number choose pairs of features and fit maps; texts of odd number measure.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from saejax.activations.checksums import npy_header
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.dictionaries.bos import follow_bos
from saejax.dictionaries.formats import hooks
from saejax.dictionaries.kinds import by_name
from saejax.errors import UserError
from saejax.matching.rows import CentredRows
from saejax.matching.transfer.activity import MIN_FIRINGS, Activity, ReadText, aligned, encode, read_text, site_values
from saejax.matching.transfer.compared import Compared
from saejax.matching.transfer.reconstruction import DictionaryOnText, evaluate_at_other_site
from saejax.matching.transfer.results import ReconstructionTransfer
from saejax.matching.transfer.settings import TransferConfig
from saejax.models.language_model import LanguageModel
from saejax.models.loading import load_configured_model
from saejax.models.settings import ModelConfig
from saejax.models.source import resolve
from saejax.wording import counted

SCORES, NULL, CEILING = "scores", "null", "ceiling"  # rows of two dictionaries, of chance, of one with itself
_MIN_SHARED = 64  # tokens that two models must share in each half
_VALUE_BYTES = 1 << 30  # values of sites that are in memory at once


class SharedText(NamedTuple):
    """Models and dictionaries on the same texts."""

    folder: Path  #: folder with the files of activities and values
    reads: dict[str, ReadText]  #: how each model reads the texts, by ``Compared.model_key``
    sink_norms: dict[tuple[str, str], float]  #: sink rule of each model (its key) and site

    def activity(self, index: int) -> Activity:
        """Return the activity of the dictionary number ``index``."""
        return Activity.load(self.folder / f"activity-{index:04d}.npz")

    def values(self, entry: Compared) -> np.ndarray:
        """Return the values at a dictionary's site, fp32 [N, D], mapped from their file."""
        return np.load(self.folder / _value_file(entry), mmap_mode="r")


def _value_file(entry: Compared) -> str:
    return f"values-{entry.model_key or 'model'}-{entry.config.site.replace('/', '_')}.npy"


class TextsToRead(NamedTuple):
    """Texts, and how models read them."""

    texts: Sequence[str]
    context: int  #: tokens of a piece of a text at most
    batch_tokens: int  #: tokens in a batch


def read_shared_text(
    text: TextsToRead,
    compared: Sequence[Compared],
    config: ModelConfig,
    mesh: Mesh,
    *,
    folder: Path,
    keep_values: bool,
    say: Callable[[str], None],
    check_stop: Callable[[], None] = lambda: None,
) -> SharedText:
    """Run every model that dictionaries belong to, one after the other, on the same texts.

    Args:
      text: what is read.
      compared: the dictionaries.
      config: of the model that dictionaries belong to which state none.
      mesh: devices of models and dictionaries.
      folder: of the files, made here.
      keep_values: whether values of sites are written, too.
      say: takes a line for each model.
      check_stop: called before each batch; may raise to stop.

    Raises:
      UserError: a model does not exist, or it is not the one that a dictionary belongs to.
    """
    (texts, context, batch_tokens), shared = text, SharedText(folder, {}, {})
    shared.folder.mkdir(parents=True, exist_ok=True)
    # Files of other tools have names of models alone: where all have one, it is the run's, however that is called.
    by_name = len({entry.model_name for entry in compared} - {""}) > 1
    for model in dict.fromkeys(entry.model_key for entry in compared):
        members = [(index, entry) for index, entry in enumerate(compared) if entry.model_key == model]
        lm = load_model_of(config, members[0][1], mesh, by_name)
        lm = follow_bos(lm, [entry.config for _, entry in members], say)
        read = shared.reads[model] = read_text(lm.tokenizer, texts, min(context, lm.config.context), lm.bos)
        # What a transcoder reads together with its target, whose attention sinks are left out, too.
        pairs = list(dict.fromkeys((entry.config.site, entry.target) for _, entry in members))
        # All sites of a model in as few passes as memory allows.
        at_once = max(1, _VALUE_BYTES // max(4 * len(read.text_N) * lm.config.d_model, 1))
        for these in _split_pairs(pairs, at_once):
            values = site_values(lm, read, [*dict.fromkeys(itertools.chain(*these))], batch_tokens, check_stop)
            for index, entry in members:
                if (entry.config.site, entry.target) not in these:
                    continue
                dictionary = entry.load(mesh).with_sink_norms(lm.sink_norm)
                value_NxD, target_NxO = values[entry.config.site], values[entry.target]
                activity = encode(dictionary, value_NxD, batch_tokens, target_NxO)
                activity.save(shared.folder / f"activity-{index:04d}.npz")
                if keep_values:
                    with open(shared.folder / _value_file(entry), "wb") as file:  # np.save loses a full disk's error
                        file.write(npy_header(value_NxD.shape, value_NxD.dtype))
                        file.write(np.ascontiguousarray(value_NxD).data)
        for _, entry in members:
            for site in {entry.config.site, entry.target}:
                shared.sink_norms[model, site] = float(lm.sink_norm(site))
        sites = {*itertools.chain(*pairs)}
        of = f"{counted(len(texts), 'text')}, {counted(len(sites), 'site')}"
        say(f"{lm.source.name}: {len(read.text_N):,} tokens of {of}")
        del lm  # before the next model is loaded
    return shared


def _split_pairs(pairs: Sequence[tuple[str, str]], most: int) -> Iterator[list[tuple[str, str]]]:
    """Yield the pairs of sites in groups with at most ``most`` distinct sites each, but at least one pair."""
    group: list[tuple[str, str]] = []
    for pair in pairs:
        if group and len({*itertools.chain(*group, pair)}) > most:
            yield group
            group = []
        group.append(pair)
    yield group


def load_model_of(config: ModelConfig, entry: Compared, mesh: Mesh, by_name: bool = False) -> LanguageModel:
    """Return the model that a dictionary belongs to: a given one, if it is that one or its files do not state one.

    Args:
      config: of the given model.
      entry: the dictionary.
      mesh: devices of the model.
      by_name: whether a name alone states a model.

    Raises:
      UserError: the model cannot be loaded, or has changed.
    """
    stated, source = entry.config, resolve(config, decoder=True)
    names = ("", hooks.short_model_name(config.path), hooks.short_model_name(source.name))
    other_name = by_name and not entry.fingerprint and entry.model_name not in names
    if other_name or entry.fingerprint not in ("", source.fingerprint):
        if not stated.model:
            raise UserError(
                f"{entry.name} belongs to another model than --model.path={config.path}, and does not state which"
            )
        config = ModelConfig(path=hooks.hub_name(stated.model), revision=stated.revision or "main", dtype=config.dtype)
    lm = load_configured_model(config, mesh)
    if entry.fingerprint not in ("", lm.source.fingerprint):
        raise UserError(
            f"{entry.name} belongs to another state of the model {stated.model} ({stated.fingerprint}; now "
            f"{lm.source.fingerprint}): train it again, or restore that model"
        )
    return lm


def is_movable(config: DictionaryConfig) -> bool:
    """Return whether affine maps can be multiplied into a dictionary: an SAE with an encoder, without normalisation."""
    return not (config.target or config.input_norm or by_name(config.kind).rebuilds_input)


class Reading:
    """Dictionaries on shared text: activities on the tokens that two models share, and maps between sites.

    In its methods ``first`` and ``second`` are numbers of dictionaries, and ``measures`` asks for the half of the text
    that measures, not the one that chooses pairs and fits maps.
    """

    def __init__(self, config: TransferConfig, compared: Sequence[Compared], mesh: Mesh, shared: SharedText):
        self._config, self._compared, self._mesh, self._shared = config, compared, mesh, shared
        self._activity = functools.lru_cache(maxsize=3)(shared.activity)
        self._halves = functools.lru_cache(maxsize=8)(self._shared_tokens)

    def tokens(self, first: int, second: int) -> int:
        """Return the number of tokens on which two dictionaries are compared."""
        return sum(len(first_N) for first_N, _ in self._halves(first, second))

    def compared_features(self, first: int, second: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the features of two dictionaries that fire often enough on both halves of the text, bool [F], [G]."""
        halves = self._halves(first, second)
        first_F, second_G = (
            np.all([self._activity(index).firings(half[side]) >= MIN_FIRINGS for half in halves], axis=0)
            for side, index in enumerate((first, second))
        )
        return first_F, second_G

    def rows(self, first: int, second: int, side: str, measures: bool) -> tuple[CentredRows, CentredRows]:
        """Return the activity rows of two dictionaries on the tokens that both models share; see ``Activity.rows``.

        Of the side ``NULL`` the second's text is shifted by half, so that nothing is shared; of ``CEILING`` both are
        the first's, on the same tokens and features.
        """
        first_N, second_N = self._halves(first, second)[measures]
        first_F, second_G = self.compared_features(first, second)
        first_rows = self._activity(first).rows(first_N, first_F)
        if side == CEILING:
            return first_rows, first_rows
        # Shifted by half, every feature keeps its runs of firings, and no token meets itself.
        second_N = np.roll(second_N, len(second_N) // 2) if side == NULL else second_N
        return first_rows, self._activity(second).rows(second_N, second_G)

    def transfers(self, first: int, second: int) -> dict[str, ReconstructionTransfer]:
        """Return each of two SAEs evaluated at the other's site; nothing if one of them cannot be moved."""
        pair = (first, second)
        if not all(is_movable(self._compared[index].config) for index in pair):
            return {}
        halves = self._halves(first, second)
        on_text = {}
        for side, index in enumerate(pair):
            values_NxD = self._shared.values(self._compared[index])
            parts = (np.asarray(values_NxD[half[side]]) for half in halves)
            on_text[index] = DictionaryOnText(self._load(index), *parts)
        return {
            name: evaluate_at_other_site(
                on_text[moved], on_text[native], self._mesh, self._config.batch_tokens, [self._config.seed, moved]
            )
            for name, moved, native in (("onto_second", first, second), ("onto_first", second, first))
        }

    def _load(self, index: int) -> Dictionary:
        entry = self._compared[index]
        dictionary = entry.load(self._mesh)
        return dictionary.with_sink_norms(lambda site: self._shared.sink_norms[entry.model_key, site])

    def _shared_tokens(self, first: int, second: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the tokens at which both dictionaries apply, among each model's: a pair for each half."""
        left, right = self._compared[first], self._compared[second]
        first_N, second_N = aligned(self._shared.reads[left.model_key], self._shared.reads[right.model_key])
        # Neither dictionary reads its model's attention sinks, which may be at other tokens in the other model.
        real = self._activity(first).real_N[first_N] & self._activity(second).real_N[second_N]
        first_N, second_N = first_N[real], second_N[real]
        # Halves of whole texts: tokens of a text resemble each other, so halves of its tokens would not be independent.
        odd_N = self._shared.reads[left.model_key].text_N[first_N] % 2 == 1
        if min(odd_N.sum(), (~odd_N).sum()) < _MIN_SHARED:
            raise UserError(
                f"{left.name} and {right.name} share {real.sum()} tokens of {self._config.tokens} asked for, in halves "
                f"of whole texts: expected {_MIN_SHARED} in each; raise --transfer.tokens, or name another "
                "--corpus.path"
            )
        return [(first_N[half], second_N[half]) for half in (~odd_N, odd_N)]
