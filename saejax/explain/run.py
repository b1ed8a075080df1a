"""The stage ``explain``: a language model writes labels of features and judges them.

Labels are written from what ``interpret`` keeps, which is training text; held-out text judges them and does nothing
else. Each label is judged beside that of another feature that fires about as often, on the same contexts.
"""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from saejax.activations.store import Store
from saejax.dictionaries import load_dictionary, stacks
from saejax.dictionaries.labels import EXPLAINED, LABELS, Label, load_labels
from saejax.dictionaries.results import TrainedMember
from saejax.errors import Interrupted, UserError
from saejax.explain import questions, scores
from saejax.explain.answers import Answers
from saejax.explain.contexts import FEWEST, HeldOut, held_out
from saejax.explain.endpoint import Endpoint
from saejax.explain.judged import judged
from saejax.explain.local import LocalJudge
from saejax.explain.results import ExplainedDictionary, ExplainedFeature, ExplainResults
from saejax.files import read_json, write_json
from saejax.interpret.feature_record import FeatureRecord
from saejax.interpret.firings import blocks, record
from saejax.interpret.interpreter import FEATURES
from saejax.interpret.labels import partners, read_labels
from saejax.interpret.text import CodedText
from saejax.models.source import load_tokenizer, resolve
from saejax.models.tokens import token_text
from saejax.parallel.mesh import make_mesh
from saejax.results import from_json, to_json
from saejax.runner.workspace import Run
from saejax.settings import MeshConfig, ModelConfig
from saejax.stages.explain import FOUND, ExplainConfig, check

DONE = "done.json"
_BATCH = 4096
_RAISED = 10  # tokens that a feature raises, which its question names


def run_explain(run: Run) -> ExplainResults:
    """Labels features of the dictionaries of the train unit ``run.name``.

    Writes for each member, in a folder of its name if there are several: ``explained.json``, every feature that was
    asked about, ``labels.json``, the labels that are kept, and ``answers.jsonl``, all that was asked and answered.

    Raises:
      UserError: a feature does not exist, the labels given cannot be read, the model does not answer, or the limit of
        tokens is reached.
      Interrupted: asked to stop.
    """
    check(run.configs)
    config = run.configs[ExplainConfig]
    unit = run.inputs[f"train/{run.name}"]
    made = []
    stack = stacks.members(unit)
    given = [_given(run, member, len(stack) > 1) for member in stack]  # before anything is asked
    text = judge = None
    for member, labels in zip(stack, given, strict=True):
        path = run.folder / member.name / DONE
        if not path.exists():
            if run.stopping():
                raise Interrupted("stopped; what was answered is kept: run the same command to go on")
            text, judge = text or _Text.of(run), judge or _judge(config, run)
            write_json(path, to_json(_Explainer(run, member, text, judge, labels).explain()))
        made.append(from_json(ExplainedDictionary, read_json(path), path))
        run.say(line(made[-1]))
    return ExplainResults(run.name, config.model, not config.given, tuple(made))


def line(found: ExplainedDictionary) -> str:
    """The figures of a dictionary in a line."""
    told = [
        f"{name} {one.mean.mean:.2f} (control {'none' if one.control is None else f'{one.control:.2f}'})"
        if one.mean
        else f"{name} unread"
        for name, one in found.scores.items()
    ]
    return ", ".join(
        [
            f"{found.name + ': ' if found.name else ''}{found.kept} of {found.judged} features keep a label",
            *told,
            f"{found.questions:,} answers, {found.prompt_tokens + found.answer_tokens:,} tokens",
        ]
    )


def _judge(config: ExplainConfig, run: Run) -> Endpoint | LocalJudge:
    if config.url:
        return Endpoint(config.url, config.model, config.concurrent, config.timeout)
    return LocalJudge(config.model, make_mesh(run.configs[MeshConfig]), config.concurrent)


def _given(run: Run, member: TrainedMember, several: bool) -> dict[int, Label] | None:
    """The labels of a member that are judged; None: they are written."""
    config = run.configs[ExplainConfig]
    if not config.given:
        return None
    found = run.inputs[f"interpret/{run.name}"] / member.name
    if config.given == FOUND:
        return load_labels(found / LABELS)
    several = several or len(config.dictionaries) > 1
    features = load_dictionary(run.inputs[f"train/{run.name}"] / member.name).config.n_features
    return read_labels(
        Path(config.given), stacks.full_name(run.name, member.name), features, several, "--explain.given"
    )


@dataclasses.dataclass(frozen=True)
class _Text:
    """The store and its text, which all members share."""

    store: Store
    coded: CodedText

    @classmethod
    def of(cls, run: Run) -> "_Text":
        store, model = Store.open(run.inputs["capture"]), run.configs[ModelConfig]
        source = resolve(model)
        store.check_model(source)
        as_text, documents = token_text(load_tokenizer(source)), store.documents
        return cls(store, CodedText(documents, [as_text(token) for token in range(int(documents.ids_T.max()) + 1)]))


@dataclasses.dataclass
class _Explainer:
    """Labels the features of one dictionary.

    Attributes:
      run: of the stage; ``member``: the dictionary; ``text``: what it is judged on.
      judge: the model that is asked; ``given``: the labels that are judged; None: they are written.
    """

    run: Run
    member: TrainedMember
    text: _Text
    judge: Endpoint | LocalJudge
    given: Mapping[int, Label] | None

    def explain(self) -> ExplainedDictionary:
        """Labels the features, and writes what came of it."""
        folder, config = self.run.folder / self.member.name, self.run.configs[ExplainConfig]
        folder.mkdir(parents=True, exist_ok=True)
        chosen, skipped, features = self._chosen(folder / "firings")
        answers = Answers(self.run, folder, self.judge)
        records = self._records({held.feature for held in chosen})
        labels = self._written(answers, chosen, records) if self.given is None else self.given
        rates = np.array([records[held.feature]["rate"] for held in chosen])
        other = partners(rates, [held.feature in labels for held in chosen])
        own = [labels[held.feature].label if held.feature in labels else None for held in chosen]
        control = [own[i] if i >= 0 else None for i in other]
        columns, summaries = judged(answers, config, chosen, own, control)
        made = [
            ExplainedFeature(
                label=label or "",
                kept=scores.is_kept(columns["detection"][i], columns["detection_control"][i]),
                **{name: column[i] for name, column in columns.items()},
            )
            for i, label in enumerate(own)
        ]
        found = {held.feature: one for held, one in zip(chosen, made, strict=True)}
        kept = {feature: labels[feature] for feature, one in found.items() if one.kept}
        write_json(folder / EXPLAINED, {str(feature): to_json(one) for feature, one in found.items()})
        write_json(folder / LABELS, {str(feature): to_json(label) for feature, label in kept.items()})
        counts = dict(judged=len(chosen), skipped=skipped, labelled=sum(map(bool, own)), kept=len(kept))
        asked, told = answers.spent
        return ExplainedDictionary(
            self.member.name, features, **counts, scores=summaries, questions=len(answers), prompt_tokens=asked,
            answer_tokens=told,
        )  # fmt: skip

    def _chosen(self, scratch: Path) -> tuple[list[HeldOut], int, int]:
        """The held-out contexts of the features to be judged, how many were left out, and how many there are."""
        config, store = self.run.configs[ExplainConfig], self.text.store
        dictionary = load_dictionary(self.run.inputs[f"train/{self.run.name}"] / self.member.name)
        features, mesh = dictionary.config.n_features, make_mesh(self.run.configs[MeshConfig])
        if unknown := [feature for feature in config.features if feature >= features]:
            raise UserError(f"--explain.features names {unknown[0]}: expected numbers from 0 to {features - 1}")
        shutil.rmtree(scratch, ignore_errors=True)
        place = record(store, "held_out", {scratch: dictionary}, mesh, _BATCH, stopping=self.run.stopping)
        fires = np.concatenate([block.counts for block in blocks(scratch, features)])
        able = np.flatnonzero(fires >= FEWEST)
        if self.given is not None:
            able = np.intersect1d(able, list(self.given))
        wanted = np.intersect1d(able, config.features or able)
        if not config.features and len(wanted) > config.sample:
            wanted = np.sort(np.random.default_rng(config.seed).choice(wanted, config.sample, replace=False))
        drawn = (config.draws, config.seed)
        chosen = list(held_out(scratch, features, set(wanted.tolist()), place, self.text.coded, *drawn))
        shutil.rmtree(scratch)
        return chosen, len(set(config.features)) - len(wanted) if config.features else 0, features

    def _records(self, wanted: set[int]) -> dict[int, FeatureRecord]:
        """What ``interpret`` found of some features."""
        folder = self.run.inputs[f"interpret/{self.run.name}"] / self.member.name / FEATURES
        every = (one for path in sorted(folder.glob("*.json")) for one in read_json(path))
        return {one["feature"]: one for one in every if one["feature"] in wanted}

    def _written(
        self, answers: Answers, chosen: Sequence[HeldOut], records: Mapping[int, FeatureRecord]
    ) -> dict[int, Label]:
        """The labels that the model writes, from training text."""
        asked = []
        for held in chosen:
            one = records[held.feature]
            shown = {(context["document"], context["position"]): context for context in one["examples"] + one["groups"]}
            asked.append(questions.explain(list(shown.values()), [text for text, _ in one.get("up", ())][:_RAISED]))
        read = map(questions.read_label, answers.all(asked, "labels"))
        by = self.run.configs[ExplainConfig].model
        return {held.feature: Label(label, by) for held, label in zip(chosen, read, strict=True) if label}
