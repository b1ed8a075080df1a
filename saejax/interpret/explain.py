"""The stage ``explain``: a language model writes labels of features and judges them.

Labels are written from what ``interpret`` keeps, which is training text; held-out text only judges them. Each label is
judged beside that of another feature that fires about as often, on the same contexts.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from saejax.activations.store import Store
from saejax.dictionaries import load_dictionary, stacks
from saejax.dictionaries.labels import EXPLAINED, LABELS, Label, load_labels
from saejax.dictionaries.results import TrainedMember
from saejax.errors import Interrupted, UserError
from saejax.files import read_json, write_json
from saejax.interpret import questions
from saejax.interpret.feature_record import FeatureRecord, read_records
from saejax.interpret.firings import blocks, record
from saejax.interpret.held_out import MIN_FIRINGS, HeldOut, detection, detection_score, held_out, is_kept
from saejax.interpret.judges import Answers, Endpoint, Judge, LocalJudge
from saejax.interpret.labels import partners, read_labels
from saejax.interpret.results import (
    ExplainedDictionary,
    ExplainedFeature,
    ExplainResults,
    FeatureScore,
    LabelScores,
)
from saejax.interpret.text import CodedText
from saejax.models.source import load_tokenizer, resolve
from saejax.models.tokens import token_text
from saejax.parallel.mesh import make_mesh
from saejax.results import from_json, to_json
from saejax.runner.workspace import Run, member_folder
from saejax.settings import MeshConfig, ModelConfig
from saejax.stages.explain import INTERPRETED, ExplainConfig, check
from saejax.tasks.scoring import bootstrap_mean

DONE = "done.json"
_BATCH, _RESAMPLES = 4096, 2000
_PROMOTED = 10  # tokens made more likely that a question for a label lists


def run_explain(run: Run) -> ExplainResults:
    """Label features of the dictionaries of the train unit ``run.name``.

    This writes for each member, in a folder of its name if there are several: ``explained.json`` with every judged
    feature, ``labels.json`` with the labels that are kept, and ``answers.jsonl`` with all questions and answers.

    Raises:
      UserError: a feature does not exist, the given labels cannot be read, the model does not answer, or the limit of
        tokens is reached.
      Interrupted: asked to stop.
    """
    check(run.configs)
    config = run.configs[ExplainConfig]
    stack = stacks.members(run.inputs[f"train/{run.name}"])
    # All files are read first: a bad one is refused before any question costs money or time.
    labels_to_judge = [_read_labels_to_judge(run, member, len(stack) > 1) for member in stack]
    results, text, judge = [], None, None
    for member, labels in zip(stack, labels_to_judge, strict=True):
        path = run.folder / member.name / DONE
        if not path.exists():
            if run.stopping():
                raise Interrupted("stopped; answers so far are kept: run the same command again to continue")
            text, judge = text or read_text(run), judge or _make_judge(config, run)
            write_json(path, to_json(_explain(run, member, *text, judge, labels)))
        results.append(from_json(ExplainedDictionary, read_json(path), path))
        run.say(_line(results[-1]))
    return ExplainResults(run.name, config.model, not config.labels, tuple(results))


def _line(results: ExplainedDictionary) -> str:
    """Return a dictionary's figures as a log line."""
    scores, detection = results.detection, "detection unparsed"
    if scores.mean:
        control = "none" if scores.control is None else f"{scores.control:.2f}"
        detection = f"detection {scores.mean.mean:.2f} (control {control})"
    name = f"{results.name}: " if results.name else ""
    kept = f"{name}{results.kept} of {results.judged} features keep a label"
    tokens = f"{results.questions:,} answers, {results.prompt_tokens + results.answer_tokens:,} tokens"
    return ", ".join([kept, detection, tokens])


def _make_judge(config: ExplainConfig, run: Run) -> Judge:
    if config.url:
        return Endpoint(config.url, config.model)
    return LocalJudge(config.model, make_mesh(run.configs[MeshConfig]))


def read_text(run: Run) -> tuple[Store, CodedText]:
    """Return the store and its text, which all members share."""
    store, source = Store.open(run.inputs["capture"]), resolve(run.configs[ModelConfig])
    store.check_model(source)
    as_text, documents = token_text(load_tokenizer(source)), store.documents
    return store, CodedText(documents, [as_text(token) for token in range(int(documents.ids_T.max()) + 1)])


def _read_labels_to_judge(run: Run, member: TrainedMember, several: bool) -> dict[int, Label] | None:
    """Return the labels of a member that are to be judged; None: they are to be written."""
    config = run.configs[ExplainConfig]
    if not config.labels:
        return None
    if config.labels == INTERPRETED:
        return load_labels(member_folder(run.inputs[f"interpret/{run.name}"], member.name) / LABELS)
    several = several or len(config.dictionaries) > 1
    features = load_dictionary(member_folder(run.inputs[f"train/{run.name}"], member.name)).config.n_features
    name = stacks.full_name(run.name, member.name)
    return read_labels(Path(config.labels), name, features, several, "--explain.labels")


def _explain(
    run: Run,
    member: TrainedMember,
    store: Store,
    text: CodedText,
    judge: Judge,
    labels_to_judge: Mapping[int, Label] | None,
) -> ExplainedDictionary:
    """Write and judge the labels of one dictionary, and write the files of ``run_explain``."""
    config, folder = run.configs[ExplainConfig], run.folder / member.name
    folder.mkdir(parents=True, exist_ok=True)
    chosen, skipped, features = _choose_features(run, member, store, text, labels_to_judge)
    answers = Answers(run, folder, judge)
    interpreted = member_folder(run.inputs[f"interpret/{run.name}"], member.name)
    records = read_records(interpreted, {held.feature for held in chosen})
    labels = _write_labels(answers, chosen, records, config.model) if labels_to_judge is None else labels_to_judge
    texts = [labels[held.feature].label if held.feature in labels else None for held in chosen]
    rates = np.array([records[held.feature]["rate"] for held in chosen])
    partner_N = partners(rates, [text is not None for text in texts])
    # The control label meets the same contexts, so that both face equally hard ones.
    scores, unparsed = _detect(answers, chosen, texts, config.seed)
    control_texts = [texts[i] if i >= 0 else None for i in partner_N]
    control_scores, _ = _detect(answers, chosen, control_texts, config.seed)
    explained = {
        held.feature: ExplainedFeature(label or "", is_kept(score, control), score, control)
        for held, label, score, control in zip(chosen, texts, scores, control_scores, strict=True)
    }
    kept = {feature: labels[feature] for feature, each in explained.items() if each.kept}
    write_json(folder / EXPLAINED, {str(feature): to_json(each) for feature, each in explained.items()})
    write_json(folder / LABELS, {str(feature): to_json(label) for feature, label in kept.items()})
    accuracies = [score.accuracy for score in scores if score]
    controls = [score.accuracy for score in control_scores if score]
    prompt_tokens, answer_tokens = answers.spent
    return ExplainedDictionary(
        name=member.name,
        features=features,
        judged=len(chosen),
        skipped=skipped,
        labelled=sum(map(bool, texts)),
        kept=len(kept),
        detection=LabelScores(
            mean=bootstrap_mean(np.array(accuracies), config.seed, _RESAMPLES) if accuracies else None,
            control=float(np.mean(controls)) if controls else None,
            features=len(accuracies),
            unparsed=unparsed,
        ),
        questions=len(answers),
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
    )


def _choose_features(
    run: Run, member: TrainedMember, store: Store, text: CodedText, labels_to_judge: Mapping[int, Label] | None
) -> tuple[list[HeldOut], int, int]:
    """Return the held-out contexts of the features to judge, the number skipped, and of the dictionary."""
    config, scratch = run.configs[ExplainConfig], run.folder / member.name / "firings"
    dictionary = load_dictionary(member_folder(run.inputs[f"train/{run.name}"], member.name))
    features, mesh = dictionary.config.n_features, make_mesh(run.configs[MeshConfig])
    if unknown := [feature for feature in config.features if feature >= features]:
        raise UserError(f"--explain.features names {unknown[0]}: expected numbers from 0 to {features - 1}")
    shutil.rmtree(scratch, ignore_errors=True)
    # A label is written from training text, where it would describe its own examples best.
    place = record(store, "held_out", {scratch: dictionary}, mesh, _BATCH, stopping=run.stopping)
    fires_F = np.concatenate([block.counts for block in blocks(scratch, features)])
    able = np.flatnonzero(fires_F >= MIN_FIRINGS)
    if labels_to_judge is not None:
        able = np.intersect1d(able, list(labels_to_judge))
    wanted = np.intersect1d(able, config.features or able)
    if not config.features and len(wanted) > config.sample:
        wanted = np.sort(np.random.default_rng(config.seed).choice(wanted, config.sample, replace=False))
    chosen = list(held_out(scratch, features, set(wanted.tolist()), place, text, config.seed))
    shutil.rmtree(scratch)
    return chosen, len(set(config.features)) - len(wanted) if config.features else 0, features


def _write_labels(
    answers: Answers, chosen: Sequence[HeldOut], records: Mapping[int, FeatureRecord], model: str
) -> dict[int, Label]:
    """Return the labels that the model writes from training text."""
    requests = []
    for held in chosen:
        record = records[held.feature]
        contexts = record["examples"] + record["groups"]
        # A strongest firing can also be in a group's sample, and a context shown twice would count twice.
        distinct = {(context["document"], context["position"]): context for context in contexts}
        promoted = [text for text, _ in record.get("up", ())][:_PROMOTED]
        requests.append(questions.explain(list(distinct.values()), promoted))
    labels = map(questions.read_label, answers.all(requests, "labels"))
    return {held.feature: Label(label, model) for held, label in zip(chosen, labels, strict=True) if label}


def _detect(
    answers: Answers, chosen: Sequence[HeldOut], labels: Sequence[str | None], seed: int
) -> tuple[list[FeatureScore | None], float]:
    """Return each label's score, None where there is none, and the share of replies that could not be parsed."""
    exams = [detection(held, label, seed) if label else [] for held, label in zip(chosen, labels, strict=True)]
    replies = iter(answers.all([question for exam in exams for question, _ in exam], "detection"))
    parsed = [[questions.read_judgements(next(replies), len(truth)) for _, truth in exam] for exam in exams]
    scores = [detection_score([truth for _, truth in exam], read) for exam, read in zip(exams, parsed, strict=True)]
    every = [reply for read in parsed for reply in read]
    return scores, every.count(None) / max(len(every), 1)
