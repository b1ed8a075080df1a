"""The evaluate stage: held-out scores of the members of a train unit."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from saejax.activations.store import Store
from saejax.dictionaries import Dictionary, load_dictionary, stacks
from saejax.errors import Interrupted
from saejax.evaluation import neighbours
from saejax.evaluation.loss_recovered import Losses, recovered, stand_in_losses
from saejax.evaluation.reconstruction import Reconstruction, reconstruct
from saejax.evaluation.results import DictionaryScores, EvaluateResults, LeftOutSinks, StandInMeans
from saejax.models.language_model import LanguageModel, load_model
from saejax.models.sites import Site
from saejax.parallel import make_mesh
from saejax.results import from_json, to_json
from saejax.settings import EvaluateConfig
from saejax.workspace import Run, read_json, write_array, write_json

SCORES = "scores.json"


def run_evaluate(run: Run) -> EvaluateResults:
    """Scores the dictionaries of the train unit ``run.name`` on the store's held-out split.

    Writes for each member, in a folder of its name if there are several: ``firing_rate.npy`` and
    ``mean_activation.npy`` [F], fp32, and ``scores.json``, by which a run that was killed goes on with the others.
    """
    config: EvaluateConfig = run.configs["evaluate"]
    store = Store.open(run.inputs["capture"])
    trained = run.inputs[f"train/{run.name}"]
    stack = stacks.members(trained)
    waiting: dict[tuple[str, str], list[str]] = {}
    for member in stack:
        if not (run.folder / member.name / SCORES).exists():
            waiting.setdefault((member.site, member.target), []).append(member.name)
    for site in dict.fromkeys(member.site for member in stack):
        Site.parse(site)  # losses are measured in the decoder, which does not have a module of the PyTorch model
    if waiting:
        mesh, model = make_mesh(run.configs["mesh"]), run.configs["model"]
        lm = load_model(model.path, model.revision, model.dtype, mesh)
        store.check_model(lm.source)
        for sites, names in waiting.items():
            if run.stopping():
                raise Interrupted("stopped; the dictionaries that were scored are kept: run the same command to go on")
            _score_site(run, config, store, lm, mesh, sites, {name: trained / name for name in names})
    paths = [run.folder / member.name / SCORES for member in stack]
    return EvaluateResults(run.name, tuple(from_json(DictionaryScores, read_json(path), path) for path in paths))


def _score_site(
    run: Run,
    config: EvaluateConfig,
    store: Store,
    lm: LanguageModel,
    mesh: Mesh,
    sites: tuple[str, str],
    folders: dict[str, Path],
) -> None:
    """Scores the members that read one site and predict one target, and writes what there is to say of each."""
    site, target = sites
    dictionaries = [load_dictionary(folder) for folder in folders.values()]
    held_out = _blocks(store, "held_out", sites, config.batch_tokens)
    scores = reconstruct(dictionaries, held_out, mesh, config.batch_tokens)
    documents = store.documents.of("held_out")
    losses = stand_in_losses(
        lm,
        dictionaries,
        documents[: config.ce_documents] if config.ce_documents else documents,
        _target_mean(store, sites, config.batch_tokens),
        config.batch_tokens,
        store.max_norm(target),
    )
    sinks = _left_out(store, site)
    target_sinks = _left_out(store, target) if target != site else None
    for name, dictionary, score, loss in zip(folders, dictionaries, scores, losses, strict=True):
        folder = run.folder / name
        folder.mkdir(exist_ok=True)
        write_array(folder / "firing_rate.npy", score.firing_rate_F.astype(np.float32))
        write_array(folder / "mean_activation.npy", score.mean_activation_F.astype(np.float32))
        where = dict(name=name, site=site, target=target, sinks=sinks, target_sinks=target_sinks)
        described = _describe(config, dictionary, score, loss, **where)
        write_json(folder / SCORES, to_json(described))
        run.say(_line(described))


def _describe(
    config: EvaluateConfig, dictionary: Dictionary, score: Reconstruction, loss: Losses, **where: Any
) -> DictionaryScores:
    return DictionaryScores(
        tokens=score.tokens,
        explained_variance=score.explained_variance,
        fvu=score.fvu,
        cosine=score.cosine,
        l0=score.l0,
        dead_fraction=score.dead_fraction,
        dense_fraction=score.dense_fraction(config.dense_above),
        decoder_neighbours=neighbours.summary(neighbours.neighbour_cosines(dictionary.W_dec_FxD[...])),
        ce=_means(loss.ce, loss.tokens),
        kl=_means(loss.kl),
        ce_recovered_mean=recovered(loss.ce, "mean_ablated"),
        ce_recovered_zero=recovered(loss.ce, "zero_ablated"),
        kl_recovered_mean=recovered(loss.kl, "mean_ablated"),
        kl_recovered_zero=recovered(loss.kl, "zero_ablated"),
        density_histogram=score.density_histogram(),
        **where,
    )


def _left_out(store: Store, site: str) -> LeftOutSinks:
    return LeftOutSinks(**vars(store.sinks(site)), max_norm=store.max_norm(site))


def _means(values: dict[str, float], tokens: int | None = None) -> StandInMeans:
    return StandInMeans(**values, tokens=tokens)


def _line(scores: DictionaryScores) -> str:
    of_floor = [
        "nothing to recover" if value is None else f"{value:.3f}"
        for value in (scores.ce_recovered_mean, scores.kl_recovered_mean)
    ]
    name = f"{scores.name}: " if scores.name else ""
    return (
        f"{name}explained variance {scores.explained_variance:.3f}, L0 {scores.l0:.1f}, "
        f"dead {scores.dead_fraction:.1%} on {scores.tokens:,} held-out tokens; recovered against the mean: "
        f"cross-entropy {of_floor[0]}, KL {of_floor[1]}, on {scores.ce.tokens:,}"
    )


def _blocks(store: Store, split: str, sites: Sequence[str], size: int) -> Iterator[list[np.ndarray]]:
    """Activations of the sites, each named once, row by row the same tokens; those that are sinks at one left out."""
    sites = list(dict.fromkeys(sites))
    rows = store.rows(split, *sites)
    for start in range(0, len(rows), size):
        yield [store.read(site, rows[start : start + size]) for site in sites]


def _target_mean(store: Store, sites: Sequence[str], size: int) -> np.ndarray:
    """Mean of the target over training tokens, fp64 [d]."""
    total_D, count = np.zeros(store.d(sites[-1])), 0
    for *_, y_NxD in _blocks(store, "train", sites, size):
        total_D += y_NxD.astype(np.float64).sum(0)
        count += len(y_NxD)
    return total_D / max(count, 1)
