"""The stage ``interpret``: records and labels of all features of the members of a train unit.

Records and the search for labels use training text; held-out text only scores labels. Firings are written to the
unit's folder while a member is interpreted, and deleted afterwards.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.activations.progress import TextProgress
from saejax.activations.store import Store
from saejax.dictionaries import Dictionary, load_dictionary
from saejax.dictionaries.bos import follow_bos
from saejax.dictionaries.labels import LABELS
from saejax.dictionaries.results import TrainedMember
from saejax.errors import Interrupted
from saejax.evaluation.reconstruction import reconstruct
from saejax.files import read_json, write_json, write_text
from saejax.interpret import neighbours
from saejax.interpret.attended import HeadShares
from saejax.interpret.categories import categorise, read_prompts
from saejax.interpret.control import spread
from saejax.interpret.feature_record import FEATURES, FeatureCategory
from saejax.interpret.firings import blocks
from saejax.interpret.heatmaps import MAPS, TokenMaps
from saejax.interpret.records import Describer
from saejax.interpret.results import InterpretedDictionary, InterpretResults
from saejax.interpret.rule_labels import search_labels
from saejax.interpret.text import CodeCounts, CodedText
from saejax.links import member_folder
from saejax.models.config import TorchConfig
from saejax.models.language_model import LanguageModel
from saejax.models.loading import load_configured_model
from saejax.models.settings import ModelConfig
from saejax.models.sites import Site
from saejax.models.tokens import token_piece
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.results import from_json, to_json
from saejax.runner import stacks
from saejax.runner.workspace import Run
from saejax.stages.interpret.settings import InterpretConfig

DONE = "interpreted.json"
_REBUILT = 4096  # largest number of held-out tokens on which the control's fit is compared
_EXAMPLES = 8  # strongest contexts kept of each feature
_DRAWS = 2  # contexts from each tenth of a feature's firings: weak ones show what the strongest hide
_HEATMAPS = 4  # documents of the search text that are shown, features by tokens
_NEAREST = 6  # nearest decoder rows
_STOPPED = "stopped; finished dictionaries are kept: run the same command again to continue"


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
        for site in {self.dictionary.site, self.dictionary.config.target or self.dictionary.site}:
            Site.parse(site)  # of others nothing can be said, which is to be known before the text is encoded
        folder, config = self.run.member_folder(self.name), self.run.configs[InterpretConfig]
        scratch, features = folder / "firings", self.dictionary.config.n_features
        for old in (scratch, folder / FEATURES):
            shutil.rmtree(old, ignore_errors=True)
        (folder / FEATURES).mkdir(parents=True)
        # 1. Labels by rules, and the labels of both controls.
        search = search_labels(
            self.lm,
            self.store,
            self.text,
            self.dictionary,
            scratch,
            batch_tokens=config.batch_tokens,
            seed=config.seed,
            begin_progress=self._begin_progress,
        )
        labels = search.labels.labels
        write_json(folder / LABELS, {str(i): to_json(label) for i, label in labels.items()})
        # 2. Prompt categories.
        categories: dict[int, list[FeatureCategory]] = {}
        category_counts, prompts = None, read_prompts(self.run.inputs)
        if prompts:  # these units are read with --interpret.categories alone
            lm = follow_bos(self.lm, [self.dictionary.config], self.run.say)
            categories, category_counts = categorise(lm, self.dictionary, prompts, config.seed)
        # 3. Records of all features.
        nearest = neighbours.nearest_rows(self.dictionary.W_dec_FxD[...], _NEAREST)
        place_N, token_counts = search.place_N, CodeCounts(self.text.code("token", search.place_N))
        describer = Describer(
            self.text, place_N, token_counts, _EXAMPLES, _DRAWS, search.output, nearest, self._heads()
        )
        maps = TokenMaps(self.text, place_N, _HEATMAPS)
        on_features = self._begin_progress("records are written", features, "features")
        for number, block in enumerate(blocks(search.firings, features)):
            records = describer.records(block)
            for feature_record in records:
                feature = feature_record["feature"]
                search.detectors.describe(feature_record)
                if feature in labels:
                    feature_record["label"] = labels[feature].label
                if feature in categories:
                    feature_record["categories"] = categories[feature]
            _write_compact(folder / FEATURES / f"{number:05d}.json", records)
            maps.add(block)
            on_features(block.size)
        length_F = np.asarray(jnp.linalg.norm(self.dictionary.W_dec_FxD[...], axis=1))
        _write_compact(folder / MAPS, maps.maps(length_F))
        shutil.rmtree(scratch)
        return InterpretedDictionary(
            name=self.name,
            site=self.dictionary.site,
            target=self.dictionary.config.target or self.dictionary.site,
            features=features,
            search_tokens=len(search.place_N),
            held_out_tokens=len(search.held_out_place_M),
            labels=search.labels.counts,
            frozen=search.labels.frozen,
            random=search.labels.random,
            explained_variance=self._explained_variance(self.dictionary),
            frozen_explained_variance=self._explained_variance(search.control),
            categories=category_counts,
        )

    def _explained_variance(self, dictionary: Dictionary) -> float:
        """Return the share of the variance of held-out tokens that a dictionary rebuilds."""
        config = dictionary.config
        sites = (config.site, config.target) if config.target else (config.site,)
        rows = spread(self.store.rows("held_out", *{*sites}), _REBUILT)
        values = [[self.store.read(site, rows).astype(np.float32) for site in sites]]
        return reconstruct([dictionary], values, self.mesh)[0].explained_variance

    def _begin_progress(self, doing: str, total: int, unit: str) -> Callable[[int], None]:
        progress = TextProgress(lambda line: self.run.say(f"{doing}: {line}"), total, unit)

        def on_done(count: int) -> None:
            if self.run.stopping():
                raise Interrupted(_STOPPED)
            progress.add(count)

        return on_done

    def _heads(self) -> HeadShares | None:
        """Return the attention shares of the heads before the site; None if not asked for, or without heads."""
        site, tokens = Site.parse(self.dictionary.site), self.run.configs[InterpretConfig].attention_tokens
        layers = site.layer + (site.kind != "resid_pre")
        # A TorchModel has no attention patterns.
        if not tokens or not layers or isinstance(self.lm.config, TorchConfig):
            return None
        return HeadShares(self.lm, self.text, layers, tokens)


def _write_compact(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False))


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
        return lm, mesh, CodedText(store.documents, list(map(token_piece(lm.tokenizer), range(lm.config.vocab))))

    def interpret(member: TrainedMember) -> None:
        if run.stopping():
            raise Interrupted(_STOPPED)
        lm, mesh, text = read()
        dictionary = load_dictionary(member_folder(trained, member.name), mesh=mesh)
        if conflict := dictionary.config.bos_conflict(store.manifest.bos):
            run.say(f"{member.name or run.name}: {conflict}")
        results = Interpreter(run, store, text, lm, mesh, member.name, dictionary).interpret()
        write_json(path[member.name], to_json(dataclasses.replace(results, name="")))  # as of a run of it alone
        run.say(_line(results))

    run.make_each(stack, lambda member: path[member.name], interpret)
    interpreted = {name: from_json(InterpretedDictionary, read_json(done), done) for name, done in path.items()}
    if run.stack:
        for name in run.stack.missing:
            run.stack.finish(name, InterpretResults(run.name, (interpreted[name],)))
    named = tuple(dataclasses.replace(dictionary, name=name) for name, dictionary in interpreted.items())
    return InterpretResults(run.name, named)


def _line(interpreted: InterpretedDictionary) -> str:
    """Return the figures of a dictionary as a log line."""
    labels, frozen, random = interpreted.labels, interpreted.frozen, interpreted.random
    return (
        f"{interpreted.name}{': ' if interpreted.name else ''}{labels.labelled:,} of {labels.features:,} features that "
        f"fire have a label; of a frozen-random dictionary {frozen.labelled:,} of {frozen.features:,}, of random "
        f"directions {random.labelled:,} of {random.features:,}"
    )
