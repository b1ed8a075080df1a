"""The evaluate stage: held-out scores of one dictionary."""

from collections.abc import Iterator

import numpy as np

from saejax.activations.store import Store
from saejax.dictionaries import load_dictionary
from saejax.evaluation.loss_recovered import cross_entropies, recovered
from saejax.evaluation.reconstruction import reconstruct
from saejax.models.language_model import load_model
from saejax.models.sites import Site
from saejax.parallel import make_mesh
from saejax.settings import EvaluateConfig
from saejax.workspace import Run, write_array


def run_evaluate(run: Run) -> dict:
    """Scores the dictionary ``run.name`` on the store's held-out split.

    Writes ``firing_rate.npy`` and ``mean_activation.npy`` [F], fp32.
    """
    config: EvaluateConfig = run.configs["evaluate"]
    store = Store.open(run.inputs["capture"])
    dictionary = load_dictionary(run.inputs[f"train/{run.name}"])
    site = str(Site.parse(dictionary.site))  # cross-entropy is measured in the decoder
    mesh = make_mesh(run.configs["mesh"])
    scores = reconstruct(dictionary, _blocks(store, "held_out", site, config.batch_tokens), mesh, config.batch_tokens)
    run.say(
        f"explained variance {scores.explained_variance:.3f}, L0 {scores.l0:.1f}, dead {scores.dead_fraction:.1%} "
        f"on {scores.tokens:,} held-out tokens"
    )
    for name, values in (("firing_rate", scores.firing_rate_F), ("mean_activation", scores.mean_activation_F)):
        write_array(run.folder / f"{name}.npy", values.astype(np.float32))

    model = run.configs["model"]
    lm = load_model(model.path, model.revision, model.dtype, mesh)
    store.check_model(lm.source)
    documents = store.documents.of("held_out")
    if config.ce_documents:
        documents = documents[: config.ce_documents]
    ce = cross_entropies(lm, dictionary, documents, _mean(store, site, config.batch_tokens), config.batch_tokens)
    results = dict(
        dictionary=run.name,
        kind=dictionary.config.kind,
        site=site,
        tokens=scores.tokens,
        explained_variance=scores.explained_variance,
        l0=scores.l0,
        dead_fraction=scores.dead_fraction,
        dense_fraction=scores.dense_fraction(config.dense_above),
        ce=ce,
        ce_recovered_mean=recovered(ce, "mean_ablated"),
        ce_recovered_zero=recovered(ce, "zero_ablated"),
        density_histogram=scores.density_histogram(),
        sinks=store.sinks(site),
    )
    run.say(f"cross-entropy recovered {results['ce_recovered_mean']} against the mean, on {ce['tokens']:,} tokens")
    return results


def _blocks(store: Store, split: str, site: str, size: int) -> Iterator[np.ndarray]:
    rows = store.rows(split, site)
    for start in range(0, len(rows), size):
        yield store.read(site, rows[start : start + size])


def _mean(store: Store, site: str, size: int) -> np.ndarray:
    total_D, count = np.zeros(store.d(site)), 0
    for block in _blocks(store, "train", site, size):
        total_D += block.astype(np.float64).sum(0)
        count += len(block)
    return total_D / max(count, 1)
