"""The stage ``explain``: a language model writes labels of features and judges them.

Labels are written from what ``interpret`` keeps, which is training text; held-out text only judges them. Each label is
judged beside that of another feature that fires about as often, on the same contexts.
"""

import shutil
from collections.abc import Mapping, Sequence

import numpy as np

from saejax.activations.store import Store
from saejax.config import Configs
from saejax.dictionaries import load_dictionary
from saejax.dictionaries.labels import EXPLAINED, LABELS, Label
from saejax.errors import Interrupted, UserError
from saejax.files import write_json
from saejax.interpret import questions
from saejax.interpret.feature_record import FeatureRecord, iterate_records, read_records
from saejax.interpret.firings import blocks, record
from saejax.interpret.held_out import MIN_FIRINGS, HeldOut, detection, detection_score, held_out, is_kept
from saejax.interpret.judges import Answers, Endpoint
from saejax.interpret.labels import partners
from saejax.interpret.results import ExplainedDictionary, ExplainedFeature, ExplainResults
from saejax.interpret.settings import ExplainConfig
from saejax.interpret.text import CodedText
from saejax.links import member_folder
from saejax.models.settings import ModelConfig
from saejax.models.source import load_tokenizer, resolve
from saejax.models.tokens import token_text
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.results import Interval, to_json
from saejax.runner import stacks
from saejax.runner.parts import Progress
from saejax.runner.workspace import Run
from saejax.tasks.scoring import bootstrap_mean

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
    check(run.configs)
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
    name, detection = f"{results.name}: " if results.name else "", "detection unparsed"
    if results.accuracy:
        control = "none; a label is kept only beside another one"
        if results.control_accuracy is not None:
            control = f"{results.control_accuracy:.2f}"
        detection = f"detection {results.accuracy.mean:.2f} (control {control})"
    return f"{name}{results.kept} of {results.judged} features keep a label, {detection}, {results.tokens:,} tokens"


def read_text(run: Run) -> tuple[Store, CodedText]:
    """Return the store and its text, which all members share."""
    store, source = Store.open(run.inputs["capture"]), resolve(run.configs[ModelConfig])
    store.check_model(source)
    as_text, documents = token_text(load_tokenizer(source)), store.documents
    return store, CodedText(documents, [as_text(token) for token in range(int(documents.ids_T.max()) + 1)])


def _explain(run: Run, member: str, store: Store, text: CodedText, endpoint: Endpoint) -> ExplainedDictionary:
    """Write and judge the labels of one dictionary, and write the files of ``run_explain``."""
    config, folder = run.configs[ExplainConfig], run.folder / member
    folder.mkdir(parents=True, exist_ok=True)
    chosen, skipped = _choose_features(run, member, store, text)
    answers = Answers(folder, endpoint, config, lambda label: Progress(run, "answers").of_part(label, 0))
    interpreted = member_folder(run.inputs[f"interpret/{run.name}"], member)
    records = read_records(interpreted, {held.feature for held in chosen})
    labels = _write_labels(answers, chosen, records)
    rates = np.array([records[held.feature]["rate"] for held in chosen])
    partner_N = partners(rates, [label is not None for label in labels])
    # The control label meets the same contexts, so that both face equally hard ones.
    scores, unparsed = _detect(answers, chosen, labels, config.seed)
    borrowed = [labels[i] if i >= 0 else None for i in partner_N]
    control_scores, _ = _detect(answers, chosen, borrowed, config.seed)
    controls = [score.mean if score else None for score in control_scores]
    explained = {
        held.feature: ExplainedFeature(label or "", is_kept(score, control), score, control)
        for held, label, score, control in zip(chosen, labels, scores, controls, strict=True)
    }
    kept = {feature: Label(each.label, config.model) for feature, each in explained.items() if each.kept}
    write_json(folder / EXPLAINED, {str(feature): to_json(each) for feature, each in explained.items()})
    write_json(folder / LABELS, {str(feature): to_json(label) for feature, label in kept.items()})
    accuracies = np.array([score.mean for score in scores if score])
    control_accuracies = [control for control in controls if control is not None]
    return ExplainedDictionary(
        name=member,
        judged=len(chosen),
        skipped=skipped,
        kept=len(kept),
        accuracy=bootstrap_mean(accuracies, config.seed, _RESAMPLES) if len(accuracies) else None,
        control_accuracy=float(np.mean(control_accuracies)) if control_accuracies else None,
        unparsed=unparsed,
        tokens=answers.tokens,
    )


def _choose_features(run: Run, member: str, store: Store, text: CodedText) -> tuple[list[HeldOut], int]:
    """Return the held-out contexts of the features to judge, and the number of features skipped."""
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
    able = np.intersect1d(able, [each["feature"] for each in iterate_records(interpreted) if each["fires"]])
    wanted = np.intersect1d(able, config.features or able)
    if not config.features and len(wanted) > config.sample:
        wanted = np.sort(np.random.default_rng(config.seed).choice(wanted, config.sample, replace=False))
    chosen = list(held_out(scratch, features, set(wanted.tolist()), place, text, config.seed))
    shutil.rmtree(scratch)
    return chosen, len(set(config.features)) - len(wanted) if config.features else 0


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


def _detect(
    answers: Answers, chosen: Sequence[HeldOut], labels: Sequence[str | None], seed: int
) -> tuple[list[Interval | None], float]:
    """Return each label's accuracy, None where there is none, and the share of replies that could not be parsed."""
    exams = [detection(held, label, seed) if label else [] for held, label in zip(chosen, labels, strict=True)]
    replies = iter(answers.all([question for exam in exams for question, _ in exam], "detection"))
    parsed = [[questions.read_judgements(next(replies), len(truth)) for _, truth in exam] for exam in exams]
    scores = [detection_score([truth for _, truth in exam], read) for exam, read in zip(exams, parsed, strict=True)]
    every = [reply for read in parsed for reply in read]
    return scores, every.count(None) / max(len(every), 1)


def check(configs: Configs) -> None:
    """Raise a ``UserError`` unless an endpoint and its model are named."""
    config = configs[ExplainConfig]
    if not config.model:
        raise UserError("--explain.model is missing: name a model of the endpoint")
    if not config.url:
        raise UserError("--explain.url is missing: name an endpoint, such as http://localhost:8000/v1")
