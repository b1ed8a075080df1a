"""The text that models read together, and the activations of the dictionaries' features on it.

One model at a time is loaded, reads the text, and is dropped again; activities, and the values of sites where they are
needed, go to files. So memory does not grow with the number of models or dictionaries.

The texts are held-out documents of the run's corpus. Those of even number choose pairs of features and fit maps; those
of odd number measure.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from saejax.errors import UserError
from saejax.matching.transfer.activity import MIN_FIRINGS, Activity, encode, site_values
from saejax.matching.transfer.compared import Compared
from saejax.matching.transfer.reconstruction import DictionaryOnText, evaluate_at_home, evaluate_at_other_site
from saejax.matching.transfer.results import Rebuilt, ReconstructionTransfer
from saejax.matching.transfer.text import ReadText, aligned, first_texts, read_text
from saejax.models.language_model import LanguageModel
from saejax.models.loading import load_configured_model
from saejax.models.source import resolve
from saejax.runner.workspace import Run
from saejax.settings import CorpusConfig, ModelConfig, TaskConfig
from saejax.stages.transfer import TransferConfig
from saejax.tasks import corpora

_MIN_SHARED = 64  # tokens that two models must share in each half
_VALUE_BYTES = 1 << 30  # values of sites that are in memory at once


class SharedText(NamedTuple):
    """Models and dictionaries on the same texts.

    Attributes:
      folder: folder with the files of activities and values.
      reads: how each model reads the texts, by its fingerprint.
      sink_norms: sink rule of each model (fingerprint) and site.
    """

    folder: Path
    reads: dict[str, ReadText]
    sink_norms: dict[tuple[str, str], float]

    def activity(self, index: int) -> Activity:
        """Return the activity of the dictionary number ``index``."""
        return Activity.load(self.folder / f"activity-{index:04d}.npz")

    def values(self, each: Compared) -> np.ndarray:
        """Return the values at a dictionary's site, fp32 [N, D], mapped from their file."""
        return np.load(self.folder / _value_file(each), mmap_mode="r")


def _value_file(each: Compared) -> str:
    return f"values-{each.fingerprint or 'model'}-{each.config.site.replace('/', '_')}.npy"


def read_shared_text(
    run: Run,
    compared: Sequence[Compared],
    mesh: Mesh,
    tokens: int,
    batch_tokens: int,
    seed: int,
    keep_values: bool = False,
) -> SharedText:
    """Run every model that dictionaries belong to, one after the other, on held-out text of the run's corpus.

    Args:
      run: the run; files go to a folder "text" in its folder.
      compared: the dictionaries.
      mesh: devices of models and dictionaries.
      tokens: approximate number of tokens.
      batch_tokens: tokens in a batch.
      seed: seed of the order of documents.
      keep_values: whether values of sites are written, too.

    Raises:
      UserError: there is no text, a model does not exist, or it is not the one that a dictionary belongs to.
    """
    corpus = run.configs[CorpusConfig]
    held_out = corpora.held_out_documents(corpus, run.configs[TaskConfig])
    order = np.random.default_rng(seed).permutation(len(held_out))
    # Held-out text, because dictionaries fit the text that they were trained on.
    texts = first_texts([held_out[i].text for i in order], tokens)
    shared = SharedText(run.folder / "text", {}, {})
    shared.folder.mkdir(parents=True, exist_ok=True)
    for model in dict.fromkeys(each.fingerprint for each in compared):
        members = [(index, each) for index, each in enumerate(compared) if each.fingerprint == model]
        lm = load_model_of(run, members[0][1], mesh)
        read = shared.reads[model] = read_text(lm.tokenizer, texts, min(corpus.context, lm.config.context))
        sites = list(dict.fromkeys(each.config.site for _, each in members))
        # All sites of a model in as few passes as memory allows.
        at_once = max(1, _VALUE_BYTES // max(4 * len(read.text_N) * lm.config.d_model, 1))
        for start in range(0, len(sites), at_once):
            values = site_values(lm, read, sites[start : start + at_once], batch_tokens)
            for index, each in members:
                if each.config.site not in values:
                    continue
                dictionary = each.dictionary.with_sink_norms(lm.sink_norm)
                value_NxD = values[each.config.site]
                encode(dictionary, value_NxD, batch_tokens).save(shared.folder / f"activity-{index:04d}.npz")
                if keep_values:
                    np.save(shared.folder / _value_file(each), value_NxD)
        for _, each in members:
            for site in {each.config.site, each.target}:
                shared.sink_norms[model, site] = float(lm.sink_norm(site))
        run.say(f"{lm.source.name}: {len(read.text_N):,} tokens of {len(texts)} texts, {len(sites)} sites")
        del lm  # before the next model is loaded
    return shared


def load_model_of(run: Run, each: Compared, mesh: Mesh) -> LanguageModel:
    """Return the model that a dictionary belongs to: the run's, if it is that one or its files do not state one.

    Raises:
      UserError: the model cannot be loaded, or has changed.
    """
    config, stated = run.configs[ModelConfig], each.config
    if each.fingerprint not in ("", resolve(config, decoder=True).fingerprint):
        if not stated.model:
            raise UserError(
                f"{each.name} belongs to another model than --model.path={config.path}, and does not state which"
            )
        config = ModelConfig(path=stated.model, revision=stated.revision or "main", dtype=config.dtype)
    lm = load_configured_model(config, mesh)
    if each.fingerprint not in ("", lm.source.fingerprint):
        raise UserError(
            f"{each.name} belongs to another state of the model {stated.model} ({stated.fingerprint}; now "
            f"{lm.source.fingerprint}): train it again, or restore that model"
        )
    return lm


class Reading:
    """Dictionaries on shared text: activities on the tokens that two models share, and maps between sites.

    Args:
      run: the run of the stage ``transfer``.
      compared: the dictionaries.
      mesh: the devices.
      shared: the text.
    """

    def __init__(self, run: Run, compared: Sequence[Compared], mesh: Mesh, shared: SharedText):
        self._run, self._compared, self._mesh, self._shared = run, compared, mesh, shared
        self._config = run.configs[TransferConfig]
        self._activity = functools.lru_cache(maxsize=3)(shared.activity)
        self._tokens = functools.lru_cache(maxsize=8)(self._shared_tokens)
        self._home = functools.cache(self._evaluate_at_home)  # a few numbers for each dictionary
        self._model = functools.lru_cache(maxsize=1)(lambda index: load_model_of(run, compared[index], mesh))

    def tokens(self, first: int, second: int) -> int:
        """Return the number of tokens on which two dictionaries are compared.

        Args:
          first: number of a dictionary.
          second: number of another.
        """
        return len(self._tokens(first, second)[0])

    def compared_features(self, first: int, second: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the features of two dictionaries that fire often enough on both halves of the text, bool [F], [G].

        Args:
          first: number of a dictionary.
          second: number of another.
        """
        halves = [self._half(first, second, measures) for measures in (False, True)]
        first_F, second_G = (
            np.all([self._activity(index).firings(half[side]) >= MIN_FIRINGS for half in halves], axis=0)
            for side, index in enumerate((first, second))
        )
        return first_F, second_G

    def rows(self, first: int, second: int, null: bool, measures: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return the activity rows of two dictionaries on the tokens that both models share; see ``Activity.rows``.

        Args:
          first: number of a dictionary.
          second: number of another, or of the same for the ceiling of a comparison.
          null: shift the second's text by half, so that nothing is shared.
          measures: use the half of the text that measures, not the one that chooses pairs.
        """
        first_N, second_N = self._half(first, second, measures)
        # Shifted by half, every feature keeps its runs of firings, and no token meets itself.
        second_N = np.roll(second_N, len(second_N) // 2) if null else second_N
        first_F, second_G = self.compared_features(first, second)
        return self._activity(first).rows(first_N, first_F), self._activity(second).rows(second_N, second_G)

    def ceiling_rows(self, first: int, second: int, measures: bool) -> np.ndarray:
        """Return the first dictionary's rows alone, for matching it with itself on the same tokens and features.

        Args:
          first: number of a dictionary.
          second: number of the dictionary that it is compared with.
          measures: use the half of the text that measures, not the one that chooses pairs.
        """
        first_N, _ = self._half(first, second, measures)
        return self._activity(first).rows(first_N, self.compared_features(first, second)[0])

    def rate_matched(self, first: int, second: int, partner_F: np.ndarray) -> float | None:
        """Return the mean correlation of features with others of their partners' firing rate; None without pairs.

        Args:
          first: number of a dictionary.
          second: number of another.
          partner_F: feature of the second paired with each feature of the first; -1: none.
        """
        paired = np.flatnonzero(partner_F >= 0)
        if not len(paired):
            return None
        first_N, second_N = self._half(first, second, True)
        other_M = self._activity(second).rate_matched(partner_F[paired])
        # All features: those of a similar rate need not fire often enough to be compared themselves.
        everything = [np.ones(self._activity(index).f_NxF.shape[1], bool) for index in (first, second)]
        first_FxN = self._activity(first).rows(first_N, everything[0])
        second_GxN = self._activity(second).rows(second_N, everything[1])
        return float(np.einsum("mn,mn->m", first_FxN[paired], second_GxN[other_M]).mean(dtype=np.float64))

    def transfers(self, first: int, second: int) -> dict[str, ReconstructionTransfer]:
        """Return each of two SAEs evaluated at the other's site; nothing for transcoders.

        Args:
          first: number of a dictionary.
          second: number of another.
        """
        pair = (first, second)
        if any(self._compared[index].config.target for index in pair):
            return {}
        fits, measures = (self._half(first, second, half) for half in (False, True))
        on_text = {
            index: DictionaryOnText(
                self._load(index),
                np.asarray(self._shared.values(self._compared[index])[fits[side]]),
                np.asarray(self._shared.values(self._compared[index])[measures[side]]),
            )
            for side, index in enumerate(pair)
        }
        transfers = {}
        for name, moved, native in (("onto_second", first, second), ("onto_first", second, first)):
            transfers[name] = evaluate_at_other_site(
                on_text[moved],
                on_text[native],
                self._home(native),
                self._mesh,
                self._config.batch_tokens,
                [self._config.seed, moved],
            )
        return transfers

    def _load(self, index: int):
        each = self._compared[index]
        return each.dictionary.with_sink_norms(lambda site: self._shared.sink_norms[each.fingerprint, site])

    def _evaluate_at_home(self, index: int) -> Rebuilt:
        each, real_N = self._compared[index], self._activity(index).real_N
        odd_N = self._shared.reads[each.fingerprint].text_N % 2 == 1
        fit, measure = (np.flatnonzero(real_N & (odd_N == odd)) for odd in (False, True))
        values_NxD = self._shared.values(each)
        at_home = DictionaryOnText(self._load(index), np.asarray(values_NxD[fit]), np.asarray(values_NxD[measure]))
        return evaluate_at_home(at_home, self._mesh, self._config.batch_tokens)

    def _shared_tokens(self, first: int, second: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens at which both dictionaries apply, among the tokens of each model."""
        left, right = self._compared[first], self._compared[second]
        first_N, second_N = aligned(self._shared.reads[left.fingerprint], self._shared.reads[right.fingerprint])
        # Neither dictionary reads its model's attention sinks, which may be at other tokens in the other model.
        real = self._activity(first).real_N[first_N] & self._activity(second).real_N[second_N]
        # Halves of whole texts: tokens of a text resemble each other, so halves of its tokens would not be independent.
        odd = self._shared.reads[left.fingerprint].text_N[first_N[real]] % 2
        if min((odd == 0).sum(), (odd == 1).sum()) < _MIN_SHARED:
            raise UserError(
                f"{left.name} and {right.name} share {real.sum()} tokens of {self._config.tokens} asked for, in halves "
                f"of whole texts: expected {_MIN_SHARED} in each; raise --transfer.tokens, or name another "
                "--corpus.path"
            )
        return first_N[real], second_N[real]

    def _half(self, first: int, second: int, measures: bool) -> tuple[np.ndarray, np.ndarray]:
        first_N, second_N = self._tokens(first, second)
        half = self._shared.reads[self._compared[first].fingerprint].text_N[first_N] % 2 == measures
        return first_N[half], second_N[half]
