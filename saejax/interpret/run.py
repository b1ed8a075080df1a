"""The stage ``interpret``: what every feature of the members of a train unit means.

All that describes a feature, the search of labels included, is made of training text; held-out text scores labels and
does nothing else. The firings are written to the unit's folder while a member is worked on, and deleted afterwards.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from saejax.activations.store import Store
from saejax.dictionaries import Dictionary, load_dictionary, stacks
from saejax.dictionaries.labels import LABELS, Label
from saejax.errors import Interrupted
from saejax.evaluation.reconstruction import reconstruct
from saejax.interpret import neighbours
from saejax.interpret.attended import HeadShares
from saejax.interpret.control import frozen_random, random_directions, spread
from saejax.interpret.detectors import Detector, PairCounts, best_detectors
from saejax.interpret.firings import Block, blocks, record
from saejax.interpret.records import Describer
from saejax.interpret.results import FrozenControl, InterpretedDictionary, InterpretResults
from saejax.interpret.scored import Scored
from saejax.interpret.text import FAMILIES, CodeCounts, CodedText
from saejax.models.language_model import LanguageModel, load_model
from saejax.models.sites import Site
from saejax.models.tokens import token_text
from saejax.parallel import make_mesh
from saejax.results import from_json, to_json
from saejax.workspace import Run, read_json, write_json, write_text

DONE, FEATURES = "interpreted.json", "features"
_REBUILT = 4096  # tokens of held-out text at most, on which the control's fit is compared
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
    controls = [("random directions", found.random)]
    if found.frozen:
        controls.append(("a frozen-random dictionary", found.frozen.labels))
    return (
        f"{name}{found.found.labelled:,} of {found.found.features:,} features that fire have a label "
        f"({found.found.share:.1%}; {', '.join(f'{one.share:.1%} of {of}' for of, one in controls)}); mean F1 "
        f"{found.found.mean_f1:.3f}, {', '.join(f'of {of} {one.mean_f1:.3f}' for of, one in controls)}, "
        f"of another feature's label {found.shuffled_f1:.3f}"
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
        frozen = frozen_random(self.store, self.dictionary, config.seed)
        together = neighbours.Together(features, max(len(self.store.rows("train", self.dictionary.site)), 1))
        read = {scratch / "own": self.dictionary, scratch / "frozen": frozen}
        place = self._record("train", read, together.add)
        bases = {family: CodeCounts(self.text.code(family, place)) for family in FAMILIES}
        output = self._output(self.dictionary)
        nearest = neighbours.nearest_rows(self.dictionary.W_dec_FxD[...], _NEAREST)
        kept = (config.examples, config.draws, output, nearest, together, self._heads())
        describer = Describer(self.store, self.text, place, bases, *kept)
        shutil.rmtree(folder / FEATURES, ignore_errors=True)
        (folder / FEATURES).mkdir(parents=True)

        def write(number: int, block: Block, tokens: PairCounts) -> None:
            write_json(folder / FEATURES / f"{number:05d}.json", describer.records(block, tokens))

        searched = [
            self._search(scratch / "own", features, bases, output, write),
            self._search(scratch / "frozen", features, bases, self._output(frozen)),
        ]
        rate = searched[0][1]
        random = random_directions(self.store, self.dictionary, rate, config.seed)
        self._record("train", {scratch / "random": random})
        searched.append(self._search(scratch / "random", random.config.n_features, bases, None))
        held_out = {
            scratch / f"held_out_{i}": dictionary for i, dictionary in enumerate((self.dictionary, frozen, random))
        }
        held_place = self._record("held_out", held_out)
        held_bases = {family: CodeCounts(self.text.code(family, held_place)) for family in FAMILIES}
        scored, frozen_scores, random_scores = (
            Scored.of(path, found, self.text, held_bases, rates)
            for path, (found, rates) in zip(held_out, searched, strict=True)
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
            features=features,
            search_tokens=len(place),
            held_out_tokens=len(held_place),
            found=scored.counts(live, labels),
            random=random_scores.counts(np.ones(random.config.n_features, bool), random_scores.labels(random_scores)),
            shuffled_f1=scored.mean_shuffled(live),
            families=scored.families(labels),
            frozen=self._frozen(frozen, frozen_scores, searched[1][1] > 0, frozen_scores.labels(random_scores)),
        )

    def _search(
        self,
        firings: Path,
        features: int,
        bases: Mapping[str, CodeCounts],
        output: neighbours.OutputTokens | None,
        on_block: Callable[[int, Block, PairCounts], None] | None = None,
    ) -> tuple[Found, np.ndarray]:
        """The detectors of all features of a dictionary on the search text, and how often each fires there.

        Args:
          firings: the folder with them; ``features``: how many there are.
          bases: how often each code stands in the search text.
          output: the tokens that features raise, if they are known.
          on_block: called with each block of firings, its number, and its counts of tokens.
        """
        found: Found = []
        fires_F = np.zeros(features)
        for number, block in enumerate(blocks(firings, features)):
            own = slice(block.first, block.first + block.size)
            codes = [tuple(ids.tolist()) for ids in output.ids[own, :_OUTPUT]] if output else ()
            detectors, tokens = best_detectors(block, self.text, bases, codes)
            found, fires_F[own] = found + detectors, block.counts
            if on_block:
                on_block(number, block, tokens)
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
        config = self.run.configs["interpret"]
        options = dict(stopping=self.run.stopping, on_batch=on_batch)
        return record(self.store, split, dictionaries, self.mesh, config.batch_tokens, **options)

    def _output(self, dictionary: Dictionary) -> neighbours.OutputTokens | None:
        """The tokens that features raise and lower; None where the dictionary does not write into the stream."""
        target = self.dictionary.config.target or self.dictionary.site
        if Site.parse(target).kind not in _IN_STREAM:
            return None
        return neighbours.output_tokens(self.lm, dictionary.W_dec_FxD[...], _OUTPUT)

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
