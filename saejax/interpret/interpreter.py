"""One dictionary interpreted: every feature described and labelled, beside the controls of labels."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from saejax.activations.progress import TextProgress
from saejax.activations.store import Store
from saejax.dictionaries import Dictionary, load_dictionary
from saejax.dictionaries.labels import LABELS, Label
from saejax.evaluation.reconstruction import reconstruct
from saejax.files import read_json, write_json, write_text
from saejax.interpret import neighbours
from saejax.interpret.attended import HeadShares
from saejax.interpret.control import frozen_random, random_directions, spread
from saejax.interpret.detectors import Detector, PairCounts, best_detectors
from saejax.interpret.feature_record import FEATURES, FeatureMaps, FeatureRecord
from saejax.interpret.firings import Block, blocks, record
from saejax.interpret.heatmaps import MAPS, TokenMaps, across_layers, layers_bar
from saejax.interpret.records import Describer
from saejax.interpret.results import FrozenControl, InterpretedDictionary
from saejax.interpret.scored import Scored
from saejax.interpret.text import FAMILIES, CodeCounts, CodedText
from saejax.models.config import TorchConfig
from saejax.models.language_model import LanguageModel
from saejax.models.sites import Site
from saejax.results import to_json
from saejax.runner.workspace import Run
from saejax.stages.interpret import InterpretConfig

_REBUILT = 4096  # tokens of held-out text at most, on which the control's fit is compared
OUTPUT, NEAREST = 10, 6  # output tokens at either end, nearest decoder rows
IN_STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")  # what is added to, or is, the stream
Found = list[dict[str, tuple[Detector, float]]]  # of every feature: family -> detector and its F1 on the search text
Searched = tuple[Found, np.ndarray]  # and how often each feature fires there, a share


def heads_before(site: str) -> int:
    """How many layers, from the first, have heads before a site."""
    parsed = Site.parse(site)
    return parsed.layer + (parsed.kind != "resid_pre")


@dataclasses.dataclass
class Interpreter:
    """Interprets one dictionary.

    Attributes:
      run: of the stage; ``name``: of the member, "" for one alone.
      store, text: what is read; ``lm``: the model; ``mesh``: the devices; ``dictionary``: what is interpreted.
      layers: folders of the dictionaries of other layers that it is compared with, by their members' names.
    """

    run: Run
    store: Store
    text: CodedText
    lm: LanguageModel
    mesh: Mesh
    name: str
    dictionary: Dictionary
    layers: Mapping[str, Path] = dataclasses.field(default_factory=dict)

    def interpret(self) -> InterpretedDictionary:
        """Interprets the dictionary, and writes what there is to say of each feature."""
        folder, seed = self.run.folder / self.name, self.run.configs[InterpretConfig].seed
        scratch = folder / "firings"
        shutil.rmtree(scratch, ignore_errors=True)
        frozen = frozen_random(self.store, self.dictionary, seed)
        describer, searched = self._describe(folder, scratch, frozen)
        rate = searched[0][1]
        random = random_directions(self.store, self.dictionary, rate, seed)
        self._record("train", {scratch / "random": random})
        searched.append(self._search(scratch / "random", random.config.n_features, describer.bases, None))
        held_out_tokens, (scored, frozen_scores, random_scores) = self._score(
            scratch, (self.dictionary, frozen, random), searched
        )
        shutil.rmtree(scratch)
        labels = scored.labels(random_scores)
        write_json(folder / LABELS, {str(i): to_json(label) for i, label in labels.items()})
        self._finish(folder, scored, labels, describer)
        live = rate > 0
        return InterpretedDictionary(
            name=self.name,
            site=self.dictionary.site,
            target=self.dictionary.config.target or self.dictionary.site,
            features=self.dictionary.config.n_features,
            search_tokens=len(describer.place),
            held_out_tokens=held_out_tokens,
            found=scored.counts(live, labels),
            random=random_scores.counts(np.ones(random.config.n_features, bool), random_scores.labels(random_scores)),
            shuffled_f1=scored.mean_shuffled(live),
            families=scored.families(labels),
            frozen=self._frozen(frozen, frozen_scores, searched[1][1] > 0, frozen_scores.labels(random_scores)),
        )

    def _describe(self, folder: Path, scratch: Path, frozen: Dictionary) -> tuple[Describer, list[Searched]]:
        """Writes the record of each feature, but for labels; what was found for them and for the frozen-random ones.

        Args:
          folder: of the dictionary.
          scratch: where firings are kept meanwhile.
          frozen: the frozen-random dictionary.
        """
        config, features = self.run.configs[InterpretConfig], self.dictionary.config.n_features
        together = neighbours.Together(features, max(len(self.store.rows("train", self.dictionary.site)), 1))
        place = self._record("train", {scratch / "own": self.dictionary, scratch / "frozen": frozen}, together.add)
        bases = self._bases(place)
        output = self._output(self.dictionary)
        W_dec_FxD = np.asarray(self.dictionary.W_dec_FxD[...])
        nearest = neighbours.nearest_rows(self.dictionary.W_dec_FxD[...], NEAREST)
        kept = (config.examples, config.draws, output, nearest, together, self._heads())
        describer = Describer(self.store, self.text, place, bases, *kept, self._layers())
        maps = TokenMaps(self.text, place, config.heatmaps)
        shutil.rmtree(folder / FEATURES, ignore_errors=True)
        (folder / FEATURES).mkdir(parents=True)

        def write(number: int, block: Block, tokens: PairCounts) -> None:
            write_json(folder / FEATURES / f"{number:05d}.json", describer.records(block, tokens))
            maps.add(block)

        searched = [
            self._search(scratch / "own", features, bases, output, write),
            self._search(scratch / "frozen", features, bases, self._output(frozen)),
        ]
        bar = round(layers_bar(*W_dec_FxD.shape), 3) if self.layers else None
        told = maps.made(np.linalg.norm(W_dec_FxD, axis=1))
        write_text(folder / MAPS, json.dumps(FeatureMaps(texts=told, layers_bar=bar), ensure_ascii=False))
        return describer, searched

    def _score(
        self, scratch: Path, dictionaries: Sequence[Dictionary], searched: Sequence[Searched]
    ) -> tuple[int, list[Scored]]:
        """How many tokens of held-out text were read, and what the detectors of each dictionary are worth there."""
        firings = {scratch / f"held_out_{i}": dictionary for i, dictionary in enumerate(dictionaries)}
        place = self._record("held_out", firings)
        bases = self._bases(place)
        scores = [
            Scored.of(path, found, self.text, bases, rates)
            for path, (found, rates) in zip(firings, searched, strict=True)
        ]
        return len(place), scores

    def _bases(self, place: np.ndarray) -> dict[str, CodeCounts]:
        """How often each code of each family stands at these places."""
        return {family: CodeCounts(self.text.code(family, place)) for family in FAMILIES}

    def _search(
        self,
        firings: Path,
        features: int,
        bases: Mapping[str, CodeCounts],
        output: neighbours.OutputTokens | None,
        on_block: Callable[[int, Block, PairCounts], None] | None = None,
    ) -> Searched:
        """The detectors of all features of a dictionary on the search text, and how often each fires there.

        Args:
          firings: the folder with them; ``features``: how many there are.
          bases: how often each code stands in the search text.
          output: the tokens that features raise, if they are known.
          on_block: called with each block of firings, its number, and its counts of tokens.
        """
        found: Found = []
        fires_F = np.zeros(features)
        what = dict(own="of the dictionary", frozen="of the frozen-random one", random="of random directions")[
            firings.name
        ]
        progress = TextProgress(lambda line: self.run.say(f"labels {what} are searched: {line}"), features, "features")
        for number, block in enumerate(blocks(firings, features)):
            own = slice(block.first, block.first + block.size)
            codes = output.raised(own) if output else ()
            detectors, tokens = best_detectors(block, self.text, bases, codes)
            found, fires_F[own] = found + detectors, block.counts
            if on_block:
                on_block(number, block, tokens)
            progress.add(block.size)
        return found, fires_F / bases["position"].places

    def _frozen(
        self, frozen: Dictionary, scored: Scored, live: np.ndarray, labels: Mapping[int, Label]
    ) -> FrozenControl:
        """What the control says, with its fit beside the dictionary's."""
        config = self.dictionary.config
        rows = spread(self.store.rows("held_out", *{config.site, config.target or config.site}), _REBUILT)
        sites = (config.site, config.target) if config.target else (config.site,)
        values = [[self.store.read(site, rows).astype(np.float32) for site in sites]]
        own, control = (reconstruct([one], values, self.mesh)[0] for one in (self.dictionary, frozen))
        variance = (control.explained_variance, own.explained_variance)
        return FrozenControl(scored.counts(live, labels), scored.mean_shuffled(live), control.l0, own.l0, *variance)

    def _record(self, split: str, dictionaries: dict[Path, Dictionary], on_batch: Any = None) -> np.ndarray:
        config = self.run.configs[InterpretConfig]
        options = dict(stopping=self.run.stopping, on_batch=on_batch)
        return record(self.store, split, dictionaries, self.mesh, config.batch_tokens, **options)

    def _output(self, dictionary: Dictionary) -> neighbours.OutputTokens | None:
        """The tokens that features raise and lower; None where the dictionary does not write into the stream."""
        target = self.dictionary.config.target or self.dictionary.site
        if Site.parse(target).kind not in IN_STREAM:
            return None
        return neighbours.output_tokens(self.lm, dictionary.W_dec_FxD[...], OUTPUT)

    def _layers(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The feature of each other layer's dictionary with the nearest decoder row, and the cosine, of each own."""
        own = self.dictionary.W_dec_FxD[...]
        return {name: across_layers(own, load_dictionary(path).W_dec_FxD[...]) for name, path in self.layers.items()}

    def _heads(self) -> HeadShares | None:
        """What the heads before the dictionary's site look at; None if that is not asked for, or there are none."""
        layers, tokens = heads_before(self.dictionary.site), self.run.configs[InterpretConfig].attention_tokens
        if not tokens or not layers or isinstance(self.lm.config, TorchConfig):  # which shows no attention patterns
            return None
        return HeadShares(self.lm, self.store.documents, self.text, layers, tokens)

    def _finish(self, folder: Path, scored: "Scored", labels: dict[int, Label], describer: Describer) -> None:
        """Adds to the records what is known at the end: labels and their scores, and adjusted p-values."""
        for path in sorted((folder / FEATURES).glob("*.json")):
            records: list[FeatureRecord] = read_json(path)
            for one in records:
                describer.adjust(one)
                scored.describe(one)
                if one["feature"] in labels:
                    one["label"] = labels[one["feature"]].label
            write_text(path, json.dumps(records, separators=(",", ":"), ensure_ascii=False, allow_nan=False))
