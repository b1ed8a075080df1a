"""Transcoders of a transformer set by hand: exact ones, and others for comparison.

exact       the neurons themselves, in random order
wrong       the same encoders, each with the decoder of another neuron
random      random directions, as many active as neurons fire
trained     trained by the code that trains on any model's activations
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from saejax.dictionaries import Dictionary, DictionaryConfig, load_dictionary, save_dictionary
from saejax.dictionaries.formats.own import DESCRIPTION
from saejax.ground_truth.circuits.cases import Case
from saejax.ground_truth.circuits.handset import frame, neuron_arrays
from saejax.ground_truth.circuits.handset import run as run_known
from saejax.library.activations import Activations, capture
from saejax.models.language_model import LanguageModel
from saejax.models.sinks import NO_SINKS
from saejax.runner.workspace import Run
from saejax.settings import TrainConfig
from saejax.training.members import make_members
from saejax.training.train import run_train

EXACT, WRONG, RANDOM, TRAINED = "exact", "wrong", "random", "trained"
_LEARNING_RATE = 3e-3
_KIND, _BATCH, _TEXTS, _TOKENS = "topk", 256, 4000, 600_000


def write_sets(run: Run, case: Case, model: LanguageModel, seed: int) -> dict[str, Path]:
    """Write a folder for each set, with a folder for each layer's transcoder; existing ones are kept. Return them."""
    folders = {name: run.folder / "transcoders" / name for name in (EXACT, WRONG, RANDOM, TRAINED)}
    for layer in range(len(case.model.layers)):
        for name, dictionary in untrained_sets(case, model, layer, seed).items():
            _save(folders[name] / f"layer{layer}", dictionary)
    if not all((folders[TRAINED] / f"layer{layer}" / DESCRIPTION).exists() for layer in range(len(case.model.layers))):
        _train(run, case, model, seed, folders[TRAINED])
    return folders


def order(case: Case, layer: int, seed: int) -> np.ndarray:
    """Return the neuron of each feature of a layer's exact transcoder, [F], shuffled with ``seed``."""
    return np.random.default_rng([seed, layer]).permutation(case.model.width)


def untrained_sets(case: Case, model: LanguageModel, layer: int, seed: int) -> dict[str, Dictionary]:
    """Return the transcoders of a ``layer`` of the sets that need no training; ``seed`` draws order and directions."""
    neuron_F = order(case, layer, seed)
    arrays = neuron_arrays(case.model, layer, frame(case.model, seed))
    columns = dict(arrays, W_enc_DxF=arrays["W_enc_DxF"][:, neuron_F])
    exact = columns | {name: arrays[name][neuron_F] for name in ("b_enc_F", "W_dec_FxD")}
    count = len(case.model.layers[layer].neurons)
    # A ring of all neurons: no neuron keeps its decoder, which a random permutation would allow.
    ring_N = np.random.default_rng([seed, layer, 1]).permutation(count)
    donor_F = np.arange(case.model.width)
    donor_F[ring_N] = np.roll(ring_N, 1)  # the neuron whose decoder each neuron gets
    wrong = exact | dict(W_dec_FxD=arrays["W_dec_FxD"][donor_F[neuron_F]])
    config = DictionaryConfig(
        kind="standard",
        site=f"mlp_in.{layer}",
        target=f"mlp_out.{layer}",
        d_in=model.config.d_model,
        n_features=case.model.width,
        centred=False,
        # No position of these models has an extreme norm, so that none has to be left out.
        max_norm=NO_SINKS,
        target_max_norm=NO_SINKS,
        model=model.source.name,
        fingerprint=model.source.fingerprint,
    )
    width = config.d_in * _expansion(case, model)
    # As many active features as neurons fire: more would give the control an advantage.
    drawn = dataclasses.replace(config, kind=_KIND, k=_firing(case, layer), n_features=width, centred=True)
    return {
        EXACT: Dictionary(config, **{name: jnp.asarray(array, jnp.float32) for name, array in exact.items()}),
        WRONG: Dictionary(config, **{name: jnp.asarray(array, jnp.float32) for name, array in wrong.items()}),
        RANDOM: Dictionary.initial(drawn, jax.random.fold_in(jax.random.key(seed), layer)),
    }


def _expansion(case: Case, model: LanguageModel) -> int:
    """Return the expansion of a trained dictionary: at least as many features as a layer has neurons."""
    return math.ceil(case.model.width / model.config.d_model)


def _firing(case: Case, layer: int) -> int:
    """Return the number of neurons of a layer that fire at the last position of a text, at least 1."""
    act_TxF = run_known(case.model, case.prompts[0].text).acts[layer]
    return max(int((act_TxF[-1] > 0).sum()), 1)


def _train(run: Run, case: Case, model: LanguageModel, seed: int, into: Path) -> None:
    """Train a set on random texts, with as many active features as neurons fire."""
    layers = range(len(case.model.layers))
    texts = list(dict.fromkeys(case.texts(_TEXTS, seed)))
    acts = capture(model, texts, [f"mlp_{part}.{layer}" for layer in layers for part in ("in", "out")])
    acts = without_silent_tokens(acts, [f"mlp_out.{layer}" for layer in layers])
    store = acts.save(run.folder / "capture")
    for layer in layers:
        config = TrainConfig(
            kinds=(_KIND,),
            form="transcoder",
            sites=(f"mlp_in.{layer}",),
            expansion=_expansion(case, model),
            k=(_firing(case, layer),),
            learning_rate=(_LEARNING_RATE,),
            batch=_BATCH,
            # As many tokens for every case, however many texts it has.
            epochs=max(_TOKENS // len(acts.index_Nx3), 1),
            auxk=0.03,
            seed=(seed,),
            log_every=1000,
        )
        folder = run.folder / "train" / f"layer{layer}"
        folder.mkdir(parents=True, exist_ok=True)
        inputs = dict(capture=store.folder)
        run_train(dataclasses.replace(run, name=_KIND, folder=folder, configs=run.configs | config, inputs=inputs))
        (member,) = make_members(config, _KIND, config.sites)
        _save(into / f"layer{layer}", load_dictionary(folder / member.name / "dictionary"))


def without_silent_tokens(acts: Activations, sites: Sequence[str]) -> Activations:
    """Return activations without the tokens at which all of some sites are 0.

    They have nothing to learn from, and may be the majority. A store has all tokens of its texts, so that each token
    that is kept becomes a text of its own.
    """
    some_N = np.any([np.abs(acts.values[site]).max(axis=1) > 0 for site in sites], axis=0)
    if some_N.all():
        return acts
    values, kept_Rx3 = {site: value_NxD[some_N] for site, value_NxD in acts.values.items()}, acts.index_Nx3[some_N]
    return dataclasses.replace(acts, values=values, index_Nx3=kept_Rx3, texts=list(kept_Rx3[:, 2:]))


def _save(folder: Path, dictionary: Dictionary) -> None:
    if not (folder / DESCRIPTION).exists():
        save_dictionary(folder, dictionary)
