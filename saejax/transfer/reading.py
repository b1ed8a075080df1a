"""The text that models read together, and what the dictionaries' features do on it.

The texts are held-out documents of the run's corpus. Those of even numbers choose pairs of features and fit maps; the
others judge them.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from saejax.errors import UserError
from saejax.evaluation.loss_recovered import recovered, stand_in_losses
from saejax.models.language_model import LanguageModel
from saejax.models.loading import load_configured_model
from saejax.models.source import resolve
from saejax.runner.workspace import Run
from saejax.settings import CorpusConfig, ModelConfig, TaskConfig
from saejax.stages.transfer import TransferConfig
from saejax.tasks import corpora
from saejax.transfer.activity import Activity, activations, encode
from saejax.transfer.compared import Compared
from saejax.transfer.reconstruction import DictionaryOnText, Losses, at_home, onto
from saejax.transfer.results import Rebuilt, ReconstructionTransfer
from saejax.transfer.text import ReadText, aligned, first_texts, read_text
from saejax.transfer.tuning import can_be_tuned, fine_tuned

_LEAST = 64  # tokens that two models must share


class Reading:
    """What models and dictionaries make of shared text.

    Args:
      lms: the models by their fingerprints.
      reads: how each reads the texts.
      values: activations [N, D] by model and site.
    """

    def __init__(
        self,
        run: Run,
        compared: Sequence[Compared],
        mesh: Mesh,
        lms: Mapping[str, LanguageModel],
        reads: Mapping[str, ReadText],
        values: Mapping[tuple[str, str], np.ndarray],
    ):
        self._compared = [one.with_sink_norms(lms[one.fingerprint].sink_norm) for one in compared]
        self._mesh, self._config = mesh, run.configs[TransferConfig]
        self._lms, self._reads, self._values = lms, reads, values
        self.activity = functools.cache(self._activity)
        self._tokens = functools.cache(self._shared)
        self._home = functools.cache(self._at_home)

    @classmethod
    def of(cls, run: Run, compared: Sequence[Compared], mesh: Mesh) -> "Reading":
        """Runs every model on the text; see ``read_sites``."""
        config = run.configs[TransferConfig]
        return cls(
            run, compared, mesh, *read_sites(run, compared, mesh, config.tokens, config.batch_tokens, config.seed)
        )

    def tokens(self, first: int, second: int) -> int:
        """How many tokens two dictionaries, by their places ``first`` and ``second``, are compared on."""
        return len(self._tokens(first, second)[0])

    def rows(self, first: int, second: int, null: bool, judge: bool) -> tuple[np.ndarray, np.ndarray]:
        """The activity of two dictionaries' features on the tokens that both models share.

        Args:
          first, second: places of the dictionaries.
          null: whether the second one's text is shifted by half, so that nothing is shared.
          judge: whether it is the half that judges, not the one that chooses.
        """
        own_N, other_N = self._half(first, second, judge)
        other_N = np.roll(other_N, len(other_N) // 2) if null else other_N
        return self.activity(first).rows(own_N), self.activity(second).rows(other_N)

    def alike(self, first: int, second: int, partner_F: np.ndarray) -> float | None:
        """Mean correlation of features with what fires most nearly as often as their partners; None: they have none.

        Args:
          first, second: places of the dictionaries.
          partner_F: the second one's feature that each of the first has; -1: none.
        """
        has = np.flatnonzero(partner_F >= 0)
        if not len(has):
            return None
        own_FxN, other_GxN = self.rows(first, second, null=False, judge=True)
        alike_M = self.activity(second).alike(partner_F[has])
        return float(np.einsum("mn,mn->m", own_FxN[has], other_GxN[alike_M]).mean(dtype=np.float64))

    def transfers(self, first: int, second: int) -> dict[str, ReconstructionTransfer]:
        """Each of two SAEs (by their places ``first`` and ``second``) in the other's stead; nothing of transcoders."""
        if any(self._compared[place].dictionary.config.target for place in (first, second)):
            return {}
        fits, judges = (self._half(first, second, judge) for judge in (False, True))
        places = {
            place: DictionaryOnText(
                self._compared[place].dictionary, *(self._value(place)[half[at]] for half in (fits, judges))
            )
            for at, place in enumerate((first, second))
        }
        found = {}
        for name, moved, place in (("onto_second", first, second), ("onto_first", second, first)):
            seed = [self._config.seed, moved]
            about = (self._home(place), self._mesh, self._config.batch_tokens, seed, self._losses(place))
            found[name] = onto(places[moved], places[place], *about)
            own, there = places[moved].dictionary, places[place].dictionary
            if self._config.tune_tokens and can_be_tuned(own, there):
                trained = fine_tuned(
                    own, places[place], self._config.tune_tokens, self._mesh, self._config.batch_tokens, [*seed, place]
                )
                found[name] = dataclasses.replace(found[name], fine_tuning=trained)
        return found

    def _value(self, place: int) -> np.ndarray:
        one = self._compared[place]
        return self._values[one.fingerprint, one.dictionary.site]

    def _activity(self, place: int) -> Activity:
        return encode(self._compared[place].dictionary, self._value(place), self._config.batch_tokens)

    def _at_home(self, place: int) -> Rebuilt:
        read, real_N = self._reads[self._compared[place].fingerprint], self.activity(place).real_N
        judge, fit = (np.flatnonzero(real_N & (read.text_N % 2 == odd)) for odd in (1, 0))
        own = DictionaryOnText(self._compared[place].dictionary, self._value(place)[fit], self._value(place)[judge])
        return at_home(own, self._mesh, self._config.batch_tokens, self._losses(place))

    def _shared(self, first: int, second: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens at which both dictionaries' features count, among the tokens of each model."""
        one, two = self._compared[first], self._compared[second]
        own_N, other_N = aligned(self._reads[one.fingerprint], self._reads[two.fingerprint])
        real = self.activity(first).real_N[own_N] & self.activity(second).real_N[other_N]
        odd = self._reads[one.fingerprint].text_N[own_N[real]] % 2
        if min((odd == 0).sum(), (odd == 1).sum()) < _LEAST:
            raise UserError(
                f"{one.name} and {two.name} share {real.sum()} tokens of {self._config.tokens} asked for, in halves of "
                f"whole texts: expected {_LEAST} in each; raise --transfer.tokens, or name another --corpus.path"
            )
        return own_N[real], other_N[real]

    def _half(self, first: int, second: int, judge: bool) -> tuple[np.ndarray, np.ndarray]:
        own_N, other_N = self._tokens(first, second)
        half = self._reads[self._compared[first].fingerprint].text_N[own_N] % 2 == judge
        return own_N[half], other_N[half]

    def _losses(self, place: int) -> Losses | None:
        """What measures cross-entropy recovered at a dictionary's site, on texts that judge."""
        one, read = self._compared[place], self._reads[self._compared[place].fingerprint]
        starts = np.cumsum([0, *(len(piece) - read.front for piece in read.pieces)])[:-1]
        odd = [piece for piece, start in zip(read.pieces, starts, strict=True) if read.text_N[start] % 2]
        documents = odd[: self._config.ce_documents]
        if not documents:
            return None
        # Without attention sinks, which are left alone where the mean stands in, as ``evaluate`` does.
        mean_D = self._value(place)[self.activity(place).real_N].mean(0, dtype=np.float64)

        def measure(dictionaries):
            lm = self._lms[one.fingerprint]
            found = stand_in_losses(lm, dictionaries, documents, mean_D, self._config.batch_tokens)
            return [recovered(losses.ce, "mean_ablated") for losses in found]

        return measure


class SitesOnText(NamedTuple):
    """Models and what they make of the same texts.

    Attributes:
      lms: the models by their fingerprints.
      reads: how each reads the texts.
      values: activations [N, D] by model and site.
    """

    lms: dict[str, LanguageModel]
    reads: dict[str, ReadText]
    values: dict[tuple[str, str], np.ndarray]


def read_sites(
    run: Run, compared: Sequence[Compared], mesh: Mesh, tokens: int, batch_tokens: int, seed: int
) -> SitesOnText:
    """Runs every model that dictionaries belong to on held-out text of the run's corpus.

    Args:
      compared: the dictionaries; the sites that they read are captured.
      tokens: about so many.
      batch_tokens: that run at a time.
      seed: of the documents' order.

    Raises:
      UserError: there is no text, a model is not found, or it is not the one that a dictionary belongs to.
    """
    corpus = run.configs[CorpusConfig]
    held_out = corpora.held_out_documents(corpus, run.configs[TaskConfig])
    order = np.random.default_rng(seed).permutation(len(held_out))
    texts = first_texts([held_out[i].text for i in order], tokens)
    own = resolve(run.configs[ModelConfig], decoder=True).fingerprint
    found = SitesOnText({}, {}, {})
    for model in dict.fromkeys(one.fingerprint for one in compared):
        members = [one for one in compared if one.fingerprint == model]
        lm = found.lms[model] = _load(run, own, members[0], mesh)
        read = found.reads[model] = read_text(lm.tokenizer, texts, min(corpus.context, lm.config.context))
        sites = list(dict.fromkeys(one.dictionary.site for one in members))
        at_sites = activations(lm, read, sites, batch_tokens)
        found.values.update({(model, site): value_NxD for site, value_NxD in at_sites.items()})
        run.say(f"{lm.source.name}: {len(read.text_N):,} tokens of {len(texts)} texts, {len(sites)} sites")
    return found


def _load(run: Run, own: str, one: Compared, mesh: Mesh) -> LanguageModel:
    """The model that a dictionary belongs to: the run's, if it is that one or the dictionary's files do not say."""
    config, model = run.configs[ModelConfig], one.dictionary.config
    if one.fingerprint not in ("", own):
        if not model.model:
            raise UserError(
                f"{one.name} belongs to another model than --model.path={config.path}, and does not say which"
            )
        config = ModelConfig(path=model.model, revision=model.revision or "main", dtype=config.dtype)
    lm = load_configured_model(config, mesh)
    if one.fingerprint not in ("", lm.source.fingerprint):
        raise UserError(
            f"{one.name} belongs to the model {model.model} of another state ({model.fingerprint}; it is now "
            f"{lm.source.fingerprint}): train it again, or bring that model back"
        )
    return lm
