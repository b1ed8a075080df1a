"""Interpretation of one dictionary: a record and a label for every feature, with controls of the labels."""

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
from saejax.interpret.categories import categorise, read_prompts
from saejax.interpret.control import frozen_random, random_directions, spread
from saejax.interpret.detectors import Detector, PairCounts, best_detectors
from saejax.interpret.feature_record import FEATURES, FeatureCategory, FeatureMaps, FeatureRecord
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

_REBUILT = 4096  # largest number of held-out tokens on which the control's fit is compared
_EXAMPLES = 8  # strongest contexts kept of each feature
_DRAWS = 2  # contexts from each tenth of a feature's firings: weak ones show what the strongest hide
_HEATMAPS = 4  # documents of the search text that are shown, features by tokens
OUTPUT, NEAREST = 10, 6  # output tokens at either end, nearest decoder rows
IN_STREAM = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
)  # added to the residual stream, or the stream itself
#: For every feature: family -> detector and its F1 on the search text.
Detectors = list[dict[str, tuple[Detector, float]]]
Searched = tuple[Detectors, np.ndarray]  # with the firing rate of each feature on the search text


def heads_before(site: str) -> int:
    """Return the number of layers whose attention heads come before a site."""
    parsed = Site.parse(site)
    return parsed.layer + (parsed.kind != "resid_pre")


@dataclasses.dataclass
class Interpreter:
    """Interprets one dictionary.

    Attributes:
      run: the run of the stage.
      store: the store.
      text: its text.
      lm: the model.
      mesh: the devices.
      name: name of the member; "" for a single dictionary.
      dictionary: the dictionary.
      layers: folders of the dictionaries of other layers to compare it with, by the site they read.
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
        """Interpret the dictionary and write the records of its features."""
        folder, seed = self.run.member_folder(self.name), self.run.configs[InterpretConfig].seed
        scratch = folder / "firings"
        shutil.rmtree(scratch, ignore_errors=True)
        # The frozen-random dictionary goes first, since both dictionaries are encoded in one pass over the store.
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
        categories: dict[int, list[FeatureCategory]] = {}
        counts, prompts = None, read_prompts(self.run.inputs)
        if prompts:  # these units are read with --interpret.categories alone
            categories, counts = categorise(self.lm, self.dictionary, prompts, seed)
        self._finish(folder, scored, labels, describer, categories)
        live = rate > 0
        return InterpretedDictionary(
            name=self.name,
            site=self.dictionary.site,
            target=self.dictionary.config.target or self.dictionary.site,
            features=self.dictionary.config.n_features,
            search_tokens=len(describer.place),
            held_out_tokens=held_out_tokens,
            labels=scored.counts(live, labels),
            random=random_scores.counts(np.ones(random.config.n_features, bool), random_scores.labels(random_scores)),
            shuffled_f1=scored.mean_shuffled(live),
            families=scored.families(labels),
            frozen=self._frozen(frozen, frozen_scores, searched[1][1] > 0, frozen_scores.labels(random_scores)),
            categories=counts,
        )

    def _describe(self, folder: Path, scratch: Path, frozen: Dictionary) -> tuple[Describer, list[Searched]]:
        """Write the records of all features without labels; return the detectors of both dictionaries.

        Args:
          folder: folder of the dictionary.
          scratch: folder for firings.
          frozen: the frozen-random dictionary.
        """
        features = self.dictionary.config.n_features
        together = neighbours.Together(features, max(len(self.store.rows("train", self.dictionary.site)), 1))
        place = self._record("train", {scratch / "own": self.dictionary, scratch / "frozen": frozen}, together.add)
        bases = self._bases(place)
        output = self._output(self.dictionary)
        W_dec_FxD = np.asarray(self.dictionary.W_dec_FxD[...])
        nearest = neighbours.nearest_rows(self.dictionary.W_dec_FxD[...], NEAREST)
        kept = (_EXAMPLES, _DRAWS, output, nearest, together, self._heads())
        describer = Describer(self.store, self.text, place, bases, *kept, self._layers())
        maps = TokenMaps(self.text, place, _HEATMAPS)
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
        token_maps = maps.maps(np.linalg.norm(W_dec_FxD, axis=1))
        write_text(folder / MAPS, json.dumps(FeatureMaps(texts=token_maps, layers_bar=bar), ensure_ascii=False))
        return describer, searched

    def _score(
        self, scratch: Path, dictionaries: Sequence[Dictionary], searched: Sequence[Searched]
    ) -> tuple[int, list[Scored]]:
        """Return the number of held-out tokens, and the scores of each dictionary's detectors on them."""
        firings = {scratch / f"held_out_{i}": dictionary for i, dictionary in enumerate(dictionaries)}
        place = self._record("held_out", firings)
        bases = self._bases(place)
        scores = [
            Scored.of(path, detectors, self.text, bases, rates)
            for path, (detectors, rates) in zip(firings, searched, strict=True)
        ]
        return len(place), scores

    def _bases(self, place: np.ndarray) -> dict[str, CodeCounts]:
        """Return the frequency of each code of each family at these places."""
        return {family: CodeCounts(self.text.code(family, place)) for family in FAMILIES}

    def _search(
        self,
        firings: Path,
        features: int,
        bases: Mapping[str, CodeCounts],
        output: neighbours.OutputTokens | None,
        on_block: Callable[[int, Block, PairCounts], None] | None = None,
    ) -> Searched:
        """Return the detectors of all features of a dictionary on the search text, and the firing rates there.

        Args:
          firings: folder of the firings.
          features: number of features.
          bases: frequency of each code in the search text.
          output: tokens that features promote; None: unknown.
          on_block: called with the number of each block of firings, the block, and its counts of tokens.
        """
        all_detectors: Detectors = []
        fires_F = np.zeros(features)
        what = dict(own="of the dictionary", frozen="of the frozen-random one", random="of random directions")[
            firings.name
        ]
        progress = TextProgress(lambda line: self.run.say(f"labels {what} are searched: {line}"), features, "features")
        for number, block in enumerate(blocks(firings, features)):
            of_block = slice(block.first, block.first + block.size)
            codes = output.raised(of_block) if output else ()
            detectors, tokens = best_detectors(block, self.text, bases, codes)
            all_detectors, fires_F[of_block] = all_detectors + detectors, block.counts
            if on_block:
                on_block(number, block, tokens)
            progress.add(block.size)
        return all_detectors, fires_F / bases["position"].places

    def _frozen(
        self, frozen: Dictionary, scored: Scored, live: np.ndarray, labels: Mapping[int, Label]
    ) -> FrozenControl:
        """Return the results of the frozen-random control, with its fit and the dictionary's."""
        config = self.dictionary.config
        rows = spread(self.store.rows("held_out", *{config.site, config.target or config.site}), _REBUILT)
        sites = (config.site, config.target) if config.target else (config.site,)
        values = [[self.store.read(site, rows).astype(np.float32) for site in sites]]
        trained, control = (reconstruct([dictionary], values, self.mesh)[0] for dictionary in (self.dictionary, frozen))
        variance = (control.explained_variance, trained.explained_variance)
        return FrozenControl(scored.counts(live, labels), scored.mean_shuffled(live), control.l0, trained.l0, *variance)

    def _record(self, split: str, dictionaries: dict[Path, Dictionary], on_batch: Any = None) -> np.ndarray:
        config = self.run.configs[InterpretConfig]
        options = dict(stopping=self.run.stopping, on_batch=on_batch)
        return record(self.store, split, dictionaries, self.mesh, config.batch_tokens, **options)

    def _output(self, dictionary: Dictionary) -> neighbours.OutputTokens | None:
        """Return the tokens that features promote and suppress; None if they do not write to the residual stream."""
        target = self.dictionary.config.target or self.dictionary.site
        if Site.parse(target).kind not in IN_STREAM:
            return None
        return neighbours.output_tokens(self.lm, dictionary.W_dec_FxD[...], OUTPUT)

    def _layers(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return for each other layer's dictionary the features with the nearest decoder rows, and the cosines."""
        W_dec_FxD = self.dictionary.W_dec_FxD[...]
        return {
            site: across_layers(W_dec_FxD, load_dictionary(path).W_dec_FxD[...]) for site, path in self.layers.items()
        }

    def _heads(self) -> HeadShares | None:
        """Return the attention shares of the heads before the site; None if not asked for, or without heads."""
        layers, tokens = heads_before(self.dictionary.site), self.run.configs[InterpretConfig].attention_tokens
        if (
            not tokens or not layers or isinstance(self.lm.config, TorchConfig)
        ):  # a TorchModel has no attention patterns
            return None
        return HeadShares(self.lm, self.store.documents, self.text, layers, tokens)

    def _finish(
        self,
        folder: Path,
        scored: "Scored",
        labels: dict[int, Label],
        describer: Describer,
        categories: Mapping[int, list[FeatureCategory]],
    ) -> None:
        """Add labels, their scores, q-values and prompt categories to the records."""
        for path in sorted((folder / FEATURES).glob("*.json")):
            records: list[FeatureRecord] = read_json(path)
            for feature_record in records:
                describer.adjust(feature_record)
                scored.describe(feature_record)
                if feature_record["feature"] in labels:
                    feature_record["label"] = labels[feature_record["feature"]].label
                if feature_record["feature"] in categories:
                    feature_record["categories"] = categories[feature_record["feature"]]
            write_text(path, json.dumps(records, separators=(",", ":"), ensure_ascii=False, allow_nan=False))
