"""The stage ``explain``: a language model writes labels of features and judges them.

Labels are written from what ``interpret`` keeps, which is training text; held-out text only judges them. Each label is
judged beside the label of another feature that fires about as often, on the same contexts.
"""

import shutil
from collections.abc import Mapping, Sequence

import numpy as np

from saejax.activations.store import Store
from saejax.dictionaries import load_dictionary
from saejax.dictionaries.labels import EXPLAINED, LABELS, Label
from saejax.errors import Interrupted, UserError
from saejax.files import write_json
from saejax.interpret import questions
from saejax.interpret.feature_record import FeatureRecord, iterate_records, read_records
from saejax.interpret.firings import blocks, record
from saejax.interpret.held_out import MIN_FIRINGS, HeldOut, held_out
from saejax.interpret.judges import Answers, Endpoint
from saejax.interpret.label_scores import EXAMS, is_kept
from saejax.interpret.labels import partners
from saejax.interpret.questions import GROUP
from saejax.interpret.results import (
    ExplainedDictionary,
    ExplainedFeature,
    ExplainResults,
    LabelScore,
    MeanLabelScore,
)
from saejax.interpret.settings import ExplainConfig
from saejax.interpret.text import CodedText
from saejax.links import member_folder
from saejax.models.settings import ModelConfig
from saejax.models.source import load_tokenizer, resolve
from saejax.models.tokens import token_piece
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.results import Interval, to_json
from saejax.runner import stacks
from saejax.runner.parts import Progress
from saejax.runner.workspace import Run
from saejax.statistics.intervals import bootstrap_mean

_BATCH, _RESAMPLES = 4096, 2000
_PROMOTED = 10  # tokens made more likely that a question for a label lists


def run_explain(run: Run) -> ExplainResults:
    """Label features of the dictionaries of the train unit ``run.name``.

    This writes for each member, in a folder of its name if there are several: ``explained.json`` with every judged
    feature, ``labels.json`` with the labels that are kept, and ``answers.jsonl`` with all questions and answers.

    Raises:
      UserError: a feature does not exist, the model does not answer, or the limit of tokens is reached.
      Interrupted: asked to stop.
    """
    config, (store, text) = run.configs[ExplainConfig], read_text(run)
    endpoint, results = Endpoint(config.url, config.model), list[ExplainedDictionary]()
    for member in stacks.members(run.inputs[f"train/{run.name}"]):
        if run.stopping():
            raise Interrupted("stopped; answers so far are kept: run the same command again to continue")
        results.append(_explain(run, member.name, store, text, endpoint))
        run.say(_line(results[-1]))
    return ExplainResults(run.name, config.model, tuple(results))


def _line(results: ExplainedDictionary) -> str:
    """Return a dictionary's figures as a log line."""
    name = f"{results.name}: " if results.name else ""
    scores = [
        f"{score} {mean.value.mean:.2f}" + (f" (control {mean.control:.2f})" if mean.control is not None else "")
        for score, mean in results.scores.items()
    ]
    if not results.judged:
        return f"{name}no feature fires often enough to be judged"
    scored = ", ".join(scores or ["no reply could be parsed"])
    kept = f"{results.kept} of {results.judged} features keep a label"
    kept += f" ({results.untold} not testable)" if results.untold else ""
    return f"{name}{kept}, {scored}, {results.tokens:,} tokens"


def read_text(run: Run) -> tuple[Store, CodedText]:
    """Return the store and its text, which all members share."""
    store, source = Store.open(run.inputs["capture"]), resolve(run.configs[ModelConfig])
    store.check_model(source)
    as_piece, documents = token_piece(load_tokenizer(source)), store.documents
    return store, CodedText(documents, list(map(as_piece, range(int(documents.ids_T.max()) + 1))))


def _explain(run: Run, member: str, store: Store, text: CodedText, endpoint: Endpoint) -> ExplainedDictionary:
    """Write and judge the labels of one dictionary, and write the files of ``run_explain``."""
    config, folder = run.configs[ExplainConfig], run.folder / member
    folder.mkdir(parents=True, exist_ok=True)
    chosen, records, skipped = _choose_features(run, member, store, text)
    answers = Answers(folder, endpoint, config, lambda label: Progress(run, "answers").of_part(label, 0))
    labels = _write_labels(answers, chosen, records)
    rates = np.array([records[held.feature]["rate"] for held in chosen])
    partner_N = partners(rates, [label is not None for label in labels])
    borrowed = [labels[i] if i >= 0 else None for i in partner_N]
    scores: list[dict[str, LabelScore]] = [{} for _ in chosen]
    unparsed = count = 0
    for name in config.scores:
        # The control label meets the same contexts, so that both face equally hard ones.
        values, *counts = _score(answers, name, chosen, labels, config.seed)
        controls = [{name: 1 / GROUP}] * len(chosen)
        if name != "intruder":
            borrowed_scores, *_ = _score(answers, name, chosen, borrowed, config.seed)
            controls = [{key: score.mean for key, score in scored.items()} for scored in borrowed_scores]
        for scored, value, control in zip(scores, values, controls, strict=True):
            scored |= {key: LabelScore(score, control.get(key)) for key, score in value.items()}
        unparsed, count = unparsed + counts[0], count + counts[1]
    explained = {
        held.feature: ExplainedFeature(label or "", is_kept(scored), scored)
        for held, label, scored in zip(chosen, labels, scores, strict=True)
    }
    kept = {
        feature: Label(feature_label.label, config.model)
        for feature, feature_label in explained.items()
        if feature_label.kept
    }
    write_json(
        folder / EXPLAINED, {str(feature): to_json(feature_label) for feature, feature_label in explained.items()}
    )
    write_json(folder / LABELS, {str(feature): to_json(label) for feature, label in kept.items()})
    return ExplainedDictionary(
        name=member,
        judged=len(chosen),
        skipped=skipped,
        kept=len(kept),
        scores=_mean_scores(scores, config.seed),
        unparsed=unparsed / max(count, 1),
        tokens=answers.tokens,
        untold=sum("detection" not in scored or scored["detection"].control is None for scored in scores) or None,
    )


def _mean_scores(scores: Sequence[Mapping[str, LabelScore]], seed: int) -> dict[str, MeanLabelScore]:
    """Return each score's mean over the features that have it."""
    means = {}
    for name in dict.fromkeys(name for scored in scores for name in scored):
        of_name = [scored[name] for scored in scores if name in scored]
        controls = [score.control for score in of_name if score.control is not None]
        value = bootstrap_mean(np.array([score.value.mean for score in of_name]), seed, _RESAMPLES)
        means[name] = MeanLabelScore(len(of_name), value, float(np.mean(controls)) if controls else None)
    return means


def _choose_features(
    run: Run, member: str, store: Store, text: CodedText
) -> tuple[list[HeldOut], dict[int, FeatureRecord], int]:
    """Return the held-out contexts of the features to judge, their records, and the number of features skipped."""
    config, scratch = run.configs[ExplainConfig], run.folder / member / "firings"
    mesh = make_mesh(run.configs[MeshConfig])
    dictionary = load_dictionary(member_folder(run.inputs[f"train/{run.name}"], member), mesh=mesh)
    features = dictionary.config.n_features
    if unknown := [feature for feature in config.features if feature >= features]:
        raise UserError(f"--explain.features names {unknown[0]}: expected numbers from 0 to {features - 1}")
    shutil.rmtree(scratch, ignore_errors=True)
    # A label is written from training text, where it would describe its own examples best.
    place = record(store, "held_out", {scratch: dictionary}, mesh, _BATCH, stopping=run.stopping)
    able = np.flatnonzero(np.concatenate([block.counts for block in blocks(scratch, features)]) >= MIN_FIRINGS)
    # A feature that is silent in training text has no contexts to write a label from.
    interpreted = member_folder(run.inputs[f"interpret/{run.name}"], member)
    able = np.intersect1d(
        able, [feature_record["feature"] for feature_record in iterate_records(interpreted) if feature_record["fires"]]
    )
    wanted = np.intersect1d(able, config.features or able)
    if not config.features and len(wanted) > config.sample:
        wanted = np.sort(np.random.default_rng(config.seed).choice(wanted, config.sample, replace=False))
    records = read_records(interpreted, set(wanted.tolist()))
    similar = {
        feature: [other for other, _ in feature_record["nearest"]] for feature, feature_record in records.items()
    }
    chosen = list(held_out(scratch, features, similar, place, text, config.seed))
    shutil.rmtree(scratch)
    return chosen, records, len(set(config.features)) - len(wanted) if config.features else 0


def _write_labels(
    answers: Answers, chosen: Sequence[HeldOut], records: Mapping[int, FeatureRecord]
) -> list[str | None]:
    """Return the labels that the model writes from training text; None where a reply has none."""
    requests = []
    for held in chosen:
        record = records[held.feature]
        contexts = record["examples"] + record["groups"]
        # A strongest firing can also be in a group's sample, and a context shown twice would count twice.
        distinct = {(context["document"], context["position"]): context for context in contexts}
        promoted = [text for text, _ in record.get("up", ())][:_PROMOTED]
        requests.append(questions.explain(list(distinct.values()), promoted))
    return [questions.read_label(reply) for reply in answers.all(requests, "labels")]


def _score(
    answers: Answers, name: str, chosen: Sequence[HeldOut], labels: Sequence[str | None], seed: int
) -> tuple[list[dict[str, Interval]], int, int]:
    """Return the scores of each label by name, none without a label, the number of unparsed replies, and of all."""
    exams = [EXAMS[name](held, label, seed) if label else None for held, label in zip(chosen, labels, strict=True)]
    exam_questions = [question for exam in exams if exam for question in exam.questions]
    replies = iter(answers.all(exam_questions, name))
    read = [exam.read([next(replies) for _ in exam.questions]) if exam else ({}, 0) for exam in exams]
    return [scores for scores, _ in read], sum(unparsed for _, unparsed in read), len(exam_questions)
