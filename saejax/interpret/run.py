"""The stage ``interpret``: records and labels of all features of the members of a train unit.

Records and the search for labels use training text; held-out text only scores labels. Firings are written to the
unit's folder while a member is interpreted, and deleted afterwards.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from saejax.activations.progress import TextProgress
from saejax.activations.store import Store
from saejax.dictionaries import Dictionary, load_dictionary, stacks
from saejax.dictionaries.labels import LABELS, Label
from saejax.dictionaries.results import TrainedMember
from saejax.errors import Interrupted
from saejax.evaluation.reconstruction import reconstruct
from saejax.files import read_json, write_json, write_text
from saejax.interpret import neighbours
from saejax.interpret.attended import HeadShares
from saejax.interpret.categories import categorise, read_prompts
from saejax.interpret.control import frozen_random, random_directions, spread
from saejax.interpret.detectors import Detector, PairCounts, Scored, best_detectors
from saejax.interpret.feature_record import FEATURES, FeatureCategory, FeatureRecord
from saejax.interpret.firings import Block, blocks, record
from saejax.interpret.heatmaps import MAPS, TokenMaps
from saejax.interpret.records import Describer
from saejax.interpret.results import FrozenControl, InterpretedDictionary, InterpretResults
from saejax.interpret.text import FAMILIES, CodeCounts, CodedText
from saejax.models.config import TorchConfig
from saejax.models.language_model import LanguageModel
from saejax.models.loading import load_configured_model
from saejax.models.sites import Site
from saejax.models.tokens import token_text
from saejax.parallel.mesh import make_mesh
from saejax.results import from_json, to_json
from saejax.runner.workspace import Run, member_folder
from saejax.settings import MeshConfig, ModelConfig
from saejax.stages.interpret import InterpretConfig

DONE = "interpreted.json"
_REBUILT = 4096  # largest number of held-out tokens on which the control's fit is compared
_EXAMPLES = 8  # strongest contexts kept of each feature
_DRAWS = 2  # contexts from each tenth of a feature's firings: weak ones show what the strongest hide
_HEATMAPS = 4  # documents of the search text that are shown, features by tokens
OUTPUT, NEAREST = 10, 6  # output tokens at either end, nearest decoder rows
# Added to the residual stream, or the stream itself.
IN_STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
#: For every feature: family -> detector and its F1 on the search text.
Detectors = list[dict[str, tuple[Detector, float]]]
Searched = tuple[Detectors, np.ndarray]  # with the firing rate of each feature on the search text


def heads_before(site: str) -> int:
    """Return the number of layers whose attention heads come before a site."""
    parsed = Site.parse(site)
    return parsed.layer + (parsed.kind != "resid_pre")


@dataclasses.dataclass
class Interpreter:
    """Interprets one dictionary."""

    run: Run  #: the run of the stage
    store: Store  #: the store
    text: CodedText  #: its text
    lm: LanguageModel  #: the model
    mesh: Mesh  #: the devices
    name: str  #: name of the member; "" for a single dictionary
    dictionary: Dictionary  #: the dictionary

    def interpret(self) -> InterpretedDictionary:
        """Interpret the dictionary and write the records of its features."""
        folder, config = self.run.member_folder(self.name), self.run.configs[InterpretConfig]
        scratch, features = folder / "firings", self.dictionary.config.n_features
        for old in (scratch, folder / FEATURES):
            shutil.rmtree(old, ignore_errors=True)
        (folder / FEATURES).mkdir(parents=True)
        # 1. Both dictionaries are encoded in one pass over the store.
        frozen = frozen_random(self.store, self.dictionary, config.seed)
        together = neighbours.Together(features, max(len(self.store.rows("train", self.dictionary.site)), 1))
        place = self._record("train", {scratch / "own": self.dictionary, scratch / "frozen": frozen}, together.add)
        bases = self._bases(place)
        # 2. Records, and detectors that are searched on the same text.
        output = self._output(self.dictionary)
        nearest = neighbours.nearest_rows(self.dictionary.W_dec_FxD[...], NEAREST)
        kept = (_EXAMPLES, _DRAWS, output, nearest, together, self._heads())
        describer = Describer(self.store, self.text, place, bases, *kept)
        maps = TokenMaps(self.text, place, _HEATMAPS)

        def write(number: int, block: Block, tokens: PairCounts) -> None:
            write_json(folder / FEATURES / f"{number:05d}.json", describer.records(block, tokens))
            maps.add(block)

        searched = [
            self._search(scratch / "own", features, bases, output, write),
            self._search(scratch / "frozen", features, bases, self._output(frozen)),
        ]
        token_maps = maps.maps(np.linalg.norm(np.asarray(self.dictionary.W_dec_FxD[...]), axis=1))
        write_text(folder / MAPS, json.dumps(token_maps, ensure_ascii=False))
        live = searched[0][1] > 0
        random = random_directions(self.store, self.dictionary, searched[0][1], config.seed)
        self._record("train", {scratch / "random": random})
        searched.append(self._search(scratch / "random", random.config.n_features, bases, None))
        # 3. Scores of all detectors on held-out text, and the labels that pass.
        firings = {scratch / f"held_out_{i}": each for i, each in enumerate((self.dictionary, frozen, random))}
        held_out_place = self._record("held_out", firings)
        held_out_bases = self._bases(held_out_place)
        scored, frozen_scores, random_scores = (
            Scored.of(path, detectors, self.text, held_out_bases, rates)
            for path, (detectors, rates) in zip(firings, searched, strict=True)
        )
        shutil.rmtree(scratch)
        labels = scored.labels(random_scores)
        write_json(folder / LABELS, {str(i): to_json(label) for i, label in labels.items()})
        # 4. Prompt categories.
        categories: dict[int, list[FeatureCategory]] = {}
        counts, prompts = None, read_prompts(self.run.inputs)
        if prompts:  # these units are read with --interpret.categories alone
            categories, counts = categorise(self.lm, self.dictionary, prompts, config.seed)
        self._finish(folder, scored, labels, categories)
        return InterpretedDictionary(
            name=self.name,
            site=self.dictionary.site,
            target=self.dictionary.config.target or self.dictionary.site,
            features=features,
            search_tokens=len(place),
            held_out_tokens=len(held_out_place),
            labels=scored.counts(live, labels),
            random=random_scores.counts(np.ones(random.config.n_features, bool), random_scores.labels(random_scores)),
            shuffled_f1=scored.mean_shuffled(live),
            families=scored.families(labels),
            frozen=self._frozen(frozen, frozen_scores, searched[1][1] > 0, frozen_scores.labels(random_scores)),
            categories=counts,
        )

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

    def _heads(self) -> HeadShares | None:
        """Return the attention shares of the heads before the site; None if not asked for, or without heads."""
        layers, tokens = heads_before(self.dictionary.site), self.run.configs[InterpretConfig].attention_tokens
        # A TorchModel has no attention patterns.
        if not tokens or not layers or isinstance(self.lm.config, TorchConfig):
            return None
        return HeadShares(self.lm, self.store.documents, self.text, layers, tokens)

    def _finish(
        self,
        folder: Path,
        scored: Scored,
        labels: dict[int, Label],
        categories: Mapping[int, list[FeatureCategory]],
    ) -> None:
        """Add labels, their scores and prompt categories to the records."""
        for path in sorted((folder / FEATURES).glob("*.json")):
            records: list[FeatureRecord] = read_json(path)
            for feature_record in records:
                scored.describe(feature_record)
                if feature_record["feature"] in labels:
                    feature_record["label"] = labels[feature_record["feature"]].label
                if feature_record["feature"] in categories:
                    feature_record["categories"] = categories[feature_record["feature"]]
            write_text(path, json.dumps(records, separators=(",", ":"), ensure_ascii=False, allow_nan=False))


def run_interpret(run: Run) -> InterpretResults:
    """Interpret the dictionaries of the train unit ``run.name``; those finished in an earlier run are kept.

    This writes for each member, in a folder of its name if there are several: ``features/00000.json`` and so on, up
    to 512 features each, ``labels.json`` with the labels, and ``heatmaps.json``.

    Raises:
      UserError: the store belongs to another model, or a split has no text.
      Interrupted: asked to stop.
    """
    trained = run.inputs[f"train/{run.name}"]
    stack, store = stacks.members(trained), Store.open(run.inputs["capture"])
    path = {member.name: run.member_folder(member.name) / DONE for member in stack}

    # Read only if a dictionary is left to do: a finished unit needs no model.
    @functools.cache
    def read() -> tuple[LanguageModel, Mesh, CodedText]:
        model, mesh = run.configs[ModelConfig], make_mesh(run.configs[MeshConfig])
        lm = load_configured_model(model, mesh)
        store.check_model(lm.source)
        as_text = token_text(lm.tokenizer)
        return lm, mesh, CodedText(store.documents, [as_text(token) for token in range(lm.config.vocab)])

    def interpret(member: TrainedMember) -> None:
        if run.stopping():
            raise Interrupted("stopped; finished dictionaries are kept: run the same command again to continue")
        lm, mesh, text = read()
        dictionary = load_dictionary(member_folder(trained, member.name))
        results = Interpreter(run, store, text, lm, mesh, member.name, dictionary).interpret()
        write_json(path[member.name], to_json(dataclasses.replace(results, name="")))  # as of a run of it alone
        run.say(line(results))

    run.each(stack, lambda member: path[member.name], interpret)
    interpreted = {name: from_json(InterpretedDictionary, read_json(done), done) for name, done in path.items()}
    for name in run.stack.missing if run.stack else ():
        run.finish_member(name, InterpretResults(run.name, (interpreted[name],)))
    named = tuple(dataclasses.replace(dictionary, name=name) for name, dictionary in interpreted.items())
    return InterpretResults(run.name, named)


def line(interpreted: InterpretedDictionary) -> str:
    """Return the figures of a dictionary as a log line."""
    name = f"{interpreted.name}: " if interpreted.name else ""
    labels = interpreted.labels
    controls = [("random directions", interpreted.random), ("a frozen-random dictionary", interpreted.frozen.labels)]
    return (
        f"{name}{labels.labelled:,} of {labels.features:,} features that fire have a label "
        f"({labels.share:.1%}; {', '.join(f'{counts.share:.1%} of {of}' for of, counts in controls)}); mean F1 "
        f"{labels.mean_f1:.3f}, {', '.join(f'of {of} {counts.mean_f1:.3f}' for of, counts in controls)}, "
        f"of another feature's label {interpreted.shuffled_f1:.3f}"
    )
