"""The stage ``interpret``: what every feature of the members of a train unit means.

All that describes a feature, the search of labels included, is made of training text; held-out text scores labels and
does nothing else. The firings are written to the unit's folder while a member is worked on, and deleted afterwards.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from saejax.activations.store import Store
from saejax.dictionaries import Dictionary, load_dictionary, stacks
from saejax.dictionaries.labels import LABELS, Label
from saejax.errors import Interrupted
from saejax.interpret import neighbours
from saejax.interpret.attended import HeadShares
from saejax.interpret.control import random_directions
from saejax.interpret.detectors import Detector, best_detectors
from saejax.interpret.firings import blocks, record
from saejax.interpret.records import Describer
from saejax.interpret.results import InterpretedDictionary, InterpretResults
from saejax.interpret.scored import Scored
from saejax.interpret.text import FAMILIES, CodeCounts, CodedText
from saejax.models.language_model import LanguageModel, load_model
from saejax.models.sites import Site
from saejax.models.tokens import token_text
from saejax.parallel import make_mesh
from saejax.results import from_json, to_json
from saejax.workspace import Run, read_json, write_json, write_text

DONE, FEATURES = "interpreted.json", "features"
_OUTPUT, _NEAREST = 10, 6  # output tokens at either end, nearest decoder rows
_IN_STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")  # what is added to, or is, the stream
Found = list[dict[str, tuple[Detector, float]]]  # of every feature: family -> detector and its F1 on the search text


def run_interpret(run: Run) -> InterpretResults:
    """Interprets the dictionaries of the train unit ``run.name``, those left from an earlier run excepted.

    Writes for each member, in a folder of its name if there are several: ``features/00000.json`` and so on, up
    to 512 features each, and ``labels.json``, the labels that were found.

    Raises:
      UserError: the store belongs to another model, or a split has no text.
      Interrupted: asked to stop.
    """
    trained = run.inputs[f"train/{run.name}"]
    stack, store = stacks.members(trained), Store.open(run.inputs["capture"])
    paths = [run.folder / member.name / DONE for member in stack]
    if not all(path.exists() for path in paths):
        model, mesh = run.configs["model"], make_mesh(run.configs["mesh"])
        lm = load_model(model.path, model.revision, model.dtype, mesh)
        store.check_model(lm.source)
        as_text = token_text(lm.tokenizer)
        text = CodedText(store.documents, [as_text(token) for token in range(lm.config.vocab)])
        for member, path in zip(stack, paths, strict=True):
            if run.stopping():
                raise Interrupted(
                    "stopped; the dictionaries that were finished are kept: run the same command to go on"
                )
            if not path.exists():
                dictionary = load_dictionary(trained / member.name)
                found = Interpreter(run, store, text, lm, mesh, member.name, dictionary).interpret()
                write_json(path, to_json(found))
                run.say(line(found))
    members = tuple(from_json(InterpretedDictionary, read_json(path), path) for path in paths)
    return InterpretResults(run.name, members)


def line(found: InterpretedDictionary) -> str:
    """The figures of a dictionary in a line."""
    name = f"{found.name}: " if found.name else ""
    return (
        f"{name}{found.found.labelled:,} of {found.found.features:,} features that fire have a label "
        f"({found.found.share:.1%}; {found.random.share:.1%} of random directions); mean F1 {found.found.mean_f1:.3f}, "
        f"of random directions {found.random.mean_f1:.3f}, of another feature's label {found.shuffled_f1:.3f}"
    )


@dataclasses.dataclass
class Interpreter:
    """Interprets one dictionary.

    Attributes:
      run: of the stage; ``name``: of the member, "" for one alone.
      store, text: what is read; ``lm``: the model; ``mesh``: the devices; ``dictionary``: what is interpreted.
    """

    run: Run
    store: Store
    text: CodedText
    lm: LanguageModel
    mesh: Mesh
    name: str
    dictionary: Dictionary

    def interpret(self) -> InterpretedDictionary:
        """Interprets the dictionary, and writes what there is to say of each feature."""
        folder, config = self.run.folder / self.name, self.run.configs["interpret"]
        scratch, features = folder / "firings", self.dictionary.config.n_features
        shutil.rmtree(scratch, ignore_errors=True)
        own, control = scratch / "train" / "own", scratch / "train" / "control"
        rows = self.store.rows("train", self.dictionary.site)
        together = neighbours.Together(features, max(len(rows), 1))
        place = self._record("train", {own: self.dictionary}, together.add)
        bases = {family: CodeCounts(self.text.code(family, place)) for family in FAMILIES}
        output = self._output()
        nearest = neighbours.nearest_rows(self.dictionary.W_dec_FxD[...], _NEAREST)
        kept = (config.examples, config.draws, output, nearest, together, self._heads())
        describer = Describer(self.store, self.text, place, bases, *kept)
        found: Found = []
        shutil.rmtree(folder / FEATURES, ignore_errors=True)
        (folder / FEATURES).mkdir(parents=True)
        for number, block in enumerate(blocks(own, features)):
            raised = output.ids[block.first : block.first + block.size, :_OUTPUT] if output else ()
            codes = [tuple(ids.tolist()) for ids in raised]
            detectors, tokens = best_detectors(block, self.text, bases, codes)
            found += detectors
            write_json(folder / FEATURES / f"{number:05d}.json", describer.records(block, tokens))
        rate = describer.fires / len(place)
        random = random_directions(self.store, self.dictionary, rate, config.seed)
        self._record("train", {control: random})
        random_found: Found = []
        random_rate = np.zeros(random.config.n_features)
        for block in blocks(control, random.config.n_features):
            random_rate[block.first : block.first + block.size] = block.counts / len(place)
            random_found += best_detectors(block, self.text, bases, ())[0]
        held_out = {scratch / "held_out" / "own": self.dictionary, scratch / "held_out" / "control": random}
        held_place = self._record("held_out", held_out)
        held_bases = {family: CodeCounts(self.text.code(family, held_place)) for family in FAMILIES}
        own_scores, control_scores = (
            Scored.of(path, known, self.text, held_bases, rates)
            for path, known, rates in zip(held_out, (found, random_found), (rate, random_rate), strict=True)
        )
        shutil.rmtree(scratch)
        labels = own_scores.labels(control_scores)
        random_labels = control_scores.labels(control_scores)
        write_json(folder / LABELS, {str(i): to_json(label) for i, label in labels.items()})
        self._finish(folder, own_scores, labels, describer)
        live = rate > 0
        return InterpretedDictionary(
            name=self.name,
            site=self.dictionary.site,
            target=self.dictionary.config.target or self.dictionary.site,
            features=features,
            search_tokens=len(place),
            held_out_tokens=len(held_place),
            found=own_scores.counts(live, labels),
            random=control_scores.counts(np.ones(len(random_found), bool), random_labels),
            shuffled_f1=float(own_scores.shuffled[live].mean()) if live.any() else 0.0,
            families=own_scores.families(labels),
        )

    def _record(self, split: str, dictionaries: dict[Path, Dictionary], on_batch: Any = None) -> np.ndarray:
        config = self.run.configs["interpret"]
        options = dict(stopping=self.run.stopping, on_batch=on_batch)
        return record(self.store, split, dictionaries, self.mesh, config.batch_tokens, **options)

    def _output(self) -> neighbours.OutputTokens | None:
        """The tokens that features raise and lower; None where the dictionary does not write into the stream."""
        target = self.dictionary.config.target or self.dictionary.site
        if Site.parse(target).kind not in _IN_STREAM:
            return None
        return neighbours.output_tokens(self.lm, self.dictionary.W_dec_FxD[...], _OUTPUT)

    def _heads(self) -> HeadShares | None:
        """What the heads before the dictionary's site look at; None if that is not asked for, or there are none."""
        site, tokens = Site.parse(self.dictionary.site), self.run.configs["interpret"].attention_tokens
        layers = site.layer + (site.kind != "resid_pre")
        return HeadShares(self.lm, self.store.documents, self.text, layers, tokens) if tokens and layers else None

    def _finish(self, folder: Path, scored: "Scored", labels: dict[int, Label], describer: Describer) -> None:
        """Adds to the records what is known at the end: labels and their scores, and adjusted p-values."""
        for path in sorted((folder / FEATURES).glob("*.json")):
            records = read_json(path)
            for one in records:
                describer.adjust(one)
                one |= scored.record(one["feature"])
                if one["feature"] in labels:
                    one["label"] = labels[one["feature"]].label
            write_text(path, json.dumps(records, separators=(",", ":"), ensure_ascii=False, allow_nan=False))
