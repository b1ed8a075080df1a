"""Measurements of the stage ``study`` before answers are scored: top features, their effects, and what drives them."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from scipy import sparse

from saejax.dictionaries import Dictionary
from saejax.dictionaries.input_norm import normalise
from saejax.errors import UserError
from saejax.evaluation.reconstruction import reconstruct
from saejax.files import write_json
from saejax.interventions import bases
from saejax.interventions.ablation import BehaviourAblation, describe_top
from saejax.interventions.answers import FeatureEffect
from saejax.interventions.benchmark import POOL, BenchmarkItems, MeasuredBenchmark, measure_benchmark
from saejax.interventions.falsify import Falsification, falsify
from saejax.interventions.references import References
from saejax.interventions.settings import StudyConfig
from saejax.interventions.table import merge_tables, save_effects
from saejax.matching.importance import read_features
from saejax.matching.rows import rotate
from saejax.models.language_model import LanguageModel
from saejax.results import to_json
from saejax.runner.parts import Progress
from saejax.runner.workspace import Run
from saejax.stages.study.results import BenchmarkActivations, BenchmarkFeature, ChosenFeatures
from saejax.studies.primitives import (
    CHOSEN_ON,
    GROUP,
    MOST,
    BenchmarkPrimitives,
    count_testable,
    find_primitives,
    recurrence_p,
    recurring,
)
from saejax.tasks import corpora
from saejax.tasks.benchmark_definitions import Item
from saejax.tasks.benchmarks import read_items
from saejax.tasks.settings import CorpusConfig, TaskConfig

RANKING = "feature_importance_ranking.json"
FEATURES = "features.json"
FEATURES_ON_ITEMS, ROTATED_ON_ITEMS = "features_on_items.npz", "rotated_on_items.npz"
ITEM_ATTRIBUTION = "item_attribution.npz"  # [items, features], train items first
MEASURED = "log-likelihoods"  # folder of what is measured before answers are scored
_ORDINARY = 1024  # documents of --study.falsify_text, from which --study.falsify are taken at equal distances


def read_benchmark(name: str, lm: LanguageModel, task: TaskConfig, config: StudyConfig) -> BenchmarkItems:
    """Return the items of a benchmark that choose features and the items that judge them; see ``split_items``."""
    return BenchmarkItems(lm, name, task, *split_items(read_items(name, task), config, name))


def split_items(items: Sequence[Item], config: StudyConfig, name: str) -> tuple[list[Item], list[Item]]:
    """Return the items that choose features and the items that judge them, by seed; the second half is not smaller.

    The split is drawn among all items given; ``--study.items`` is the number of items that are read. Items of held-out
    templates choose nothing, nor does an item whose question is among the judging ones, too.

    Args:
      items: items of the benchmark.
      config: settings of the study.
      name: the benchmark.

    Raises:
      UserError: there are fewer than 4, or all ask the same.
    """
    items = items[: config.items]
    if len(items) < 4:
        raise UserError(f"{name} has {len(items)} items for --study: expected at least 4; raise --task.examples")
    order = np.random.default_rng([config.seed, *name.encode()]).permutation(len(items))
    half = len(items) // 2
    train = [i for i in order if not items[i].held_out][:half]
    judging = {items[i].question for i in order if i not in train}
    train = [i for i in train if items[i].question not in judging]
    if not train:
        raise UserError(f"no item of {name} can choose features for --study: the others ask the same questions")
    return [items[i] for i in train], [items[i] for i in order if i not in train]


def _item_texts(items: Sequence[Item]) -> dict[str, str]:
    """Return each item's question with its solution, by its id."""
    return {item.id: f"{item.question}\n{item.solution}" for item in items}


def measure_items(run: Run, items: BenchmarkItems, dictionary: Dictionary, repeats: Mapping[str, Dictionary]) -> None:
    """Choose the top features and ablate them, their controls and groups; write what was chosen and measured."""
    config = run.configs[StudyConfig]
    on_progress = Progress(run, "rows").of_part("effects", 0)
    measured = measure_benchmark(items, dictionary, config, repeats, on_progress)
    table, ablation = measured.table, measured.tested
    attribution_PxF, *of_repeats = measured.item_attributions()
    of_seeds = dict(zip(repeats, of_repeats, strict=True))
    pools = ablation.train.pools(ablation.top(), POOL, config.seed)
    chosen = ChosenFeatures(
        top=describe_top(table, ablation),
        pools={feature: tuple(pool) for feature, pool in pools.items()},
        activations=_measure_activations(ablation),
        primitives=_find_primitives(items.train, attribution_PxF, of_seeds, config.seed),
    )
    write_json(run.folder / RANKING, to_json(_ranking(ablation, chosen.top)))
    tables, testable = [table], count_testable(config.random_sets, config.placebo_targets)
    for number, primitive in enumerate(chosen.primitives.primitives[:MOST]):
        inside = [not primitive.name or primitive.name in item.categories for item in items.test]
        places = np.flatnonzero(inside).tolist()
        is_testable = testable > 0 and len(places) > 1
        testable -= is_testable
        controls = ("random", "placebo") if is_testable else ()
        tables.append(measured.measure_group(f"{GROUP}{number}", primitive.features, places, controls))
    for name in config.benchmarks:
        if name != run.name:
            features = measured.choose_features(read_benchmark(name, items.lm, items.task, config))
            tables.append(measured.measure_group(CHOSEN_ON + name, features, range(len(items.test)), ("random",)))
    table = merge_tables(tables)
    _save_activity(run.folder, measured, config.seed)
    sparse.save_npz(run.folder / ITEM_ATTRIBUTION, sparse.csr_array(attribution_PxF))
    save_effects(run.folder / MEASURED, table)
    write_json(run.folder / FEATURES, to_json(chosen))  # last: it says that all of it is there


def _find_primitives(
    train: Sequence[Item], attribution_PxF: np.ndarray, of_seeds: Mapping[str, np.ndarray], seed: int
) -> BenchmarkPrimitives:
    """Return the primitives of the tested dictionary, and which of them dictionaries of other seeds have.

    Args:
      train: items that choose.
      attribution_PxF: attribution of the tested dictionary's features, for the train items first.
      of_seeds: the same of the other dictionaries, by name.
      seed: seed of permutations and resampling.
    """
    ids, categories = [item.id for item in train], [item.categories for item in train]

    def find(attribution_PxF: np.ndarray) -> BenchmarkPrimitives:
        return find_primitives(attribution_PxF[: len(train)], ids, categories, seed)

    tested = find(attribution_PxF)
    elsewhere = {name: find(seed_PxF).primitives for name, seed_PxF in of_seeds.items()}
    seeds = {name: recurring(tested.primitives, some) for name, some in elsewhere.items()}
    p_recurs = recurrence_p(
        tested.primitives, [*elsewhere.values()], sorted({name for some in categories for name in some}), seed
    )
    return dataclasses.replace(tested, seeds=seeds, p_recurs=p_recurs)


def _ranking(ablation: BehaviourAblation[References], top: Sequence[FeatureEffect]) -> tuple[BenchmarkFeature, ...]:
    """Return all features that fire on the test items, the largest attribution first."""
    statistics, drops = ablation.statistics, {effect.feature: effect.drop for effect in top}
    order_F = np.argsort(-ablation.attribution_F, kind="stable")
    return tuple(
        BenchmarkFeature(
            feature=feature,
            attribution=float(ablation.attribution_F[feature]),
            drop=drops.get(feature),
            **statistics.of(feature),
        )
        for feature in order_F.tolist()
        if statistics.fires_F[feature]
    )


def _measure_activations(ablation: BehaviourAblation[References]) -> BenchmarkActivations:
    """Return statistics of the site on the test items, and how well the dictionary reconstructs it."""
    norms: list[np.ndarray] = []
    references = ablation.test

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for read_NxD, value_NxD in references.values():
            norms.append(np.linalg.norm(value_NxD.astype(np.float64), axis=1))
            yield read_NxD, value_NxD

    (scores,) = reconstruct([ablation.split.dictionary], blocks(), ablation.split.point.mesh)
    norm_N = np.concatenate(norms)
    return BenchmarkActivations(
        tokens=scores.tokens,
        median_norm=float(np.median(norm_N)),
        largest_norm=float(norm_N.max()),
        l0=scores.l0,
        firing=1 - scores.dead_fraction,
        explained_variance=scores.explained_variance,
    )


def _save_activity(folder: Path, measured: MeasuredBenchmark, seed: int) -> None:
    """Write what ``saejax.matching.importance`` compares: features on all items, and those of a rotated dictionary."""
    items, ablation = measured.items, measured.tested
    is_fast = getattr(items.lm.tokenizer, "is_fast", False)
    if not is_fast or {ablation.basis.config.d_in, ablation.basis.config.d_out} != {items.lm.config.d_model}:
        return  # no character offsets, or a site that is none of the stream: not compared with features of other models
    texts, none_0xF = _item_texts([*items.train, *items.test]), np.zeros((0, ablation.basis.config.n_features))
    # An SAE's centre is its decoder's bias; a transcoder's is of its target.
    centre_D = _mean_read(ablation) if ablation.basis.config.target else None
    rotated, placebo_RxF = ablation.with_basis(rotate(ablation.basis, [seed], centre_D)), measured.placebo_RxF
    for name, some, targets_RxF in ((FEATURES_ON_ITEMS, ablation, placebo_RxF), (ROTATED_ON_ITEMS, rotated, none_0xF)):
        read_features(items.lm, some.basis, texts, some.attribution_F, targets_RxF).save(folder / name)


def _mean_read(ablation: BehaviourAblation[References]) -> np.ndarray:
    """Return the mean of what the encoder reads on the train items, normalised as the dictionary does, [D]."""
    norm, total_D, count = ablation.basis.config.input_norm, np.zeros(ablation.basis.config.d_in), 0
    for read_NxD, _ in ablation.train.values():
        read_NxD = np.asarray(normalise(jnp.asarray(read_NxD), norm).x_xD) if norm else read_NxD
        total_D, count = total_D + read_NxD.sum(axis=0, dtype=np.float64), count + len(read_NxD)
    return total_D / max(count, 1)


def falsify_top(
    run: Run, items: BenchmarkItems, dictionary: Dictionary, chosen: ChosenFeatures, config: StudyConfig
) -> Falsification:
    """Return what drives the top features: tokens from train items, the level on test items, both with solutions."""
    train, test = (list(_item_texts(half).values()) for half in (items.train, items.test))
    documents = _ordinary_documents(config.falsify_text)
    places = np.unique(np.arange(config.falsify) * len(documents) // config.falsify)
    return falsify(
        items.lm,
        dictionary,
        [effect.feature for effect in chosen.top],
        train,
        [documents[place].text for place in places],
        test_texts=test,
        random_dictionary=bases.untrained(dictionary, round(chosen.activations.l0), config.seed),
        seed=config.seed,
        on_progress=Progress(run, "injections").of_part("falsify", 0),
    )


def _ordinary_documents(path: str) -> list[corpora.Document]:
    """Return ordinary text: the first documents of a path, or held-out ones of the embedded corpus."""
    if path:
        return list(itertools.islice(corpora.documents(CorpusConfig(path=path)), _ORDINARY))
    # Whatever the dictionary was trained on: a benchmark is no ordinary text.
    return corpora.held_out_documents(CorpusConfig())
