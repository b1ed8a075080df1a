"""Transcoders of a transformer set by hand: exact ones, and others for comparison.

exact       the neurons themselves, in random order
wrong       the same encoders, each with the decoder of another neuron
random      random directions, as many active as neurons fire
trained     trained by the code that trains on any model's activations
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.activations.in_memory import Activations, capture
from saejax.dictionaries import Dictionary, DictionaryConfig, save_dictionary
from saejax.dictionaries.formats.own import DESCRIPTION
from saejax.ground_truth.circuits.cases import Case
from saejax.ground_truth.circuits.handset import frame, neuron_arrays
from saejax.ground_truth.circuits.handset import run as run_known
from saejax.models.language_model import LanguageModel
from saejax.models.sinks import NO_SINKS
from saejax.training.in_memory import train

EXACT, WRONG, RANDOM, TRAINED = "exact", "wrong", "random", "trained"
_BATCH, _TEXTS, _TOKENS = 256, 4000, 150_000


def write_sets(
    folder: Path,
    case: Case,
    model: LanguageModel,
    seed: int,
    mesh: Mesh | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Path]:
    """Write a folder for each set, with a folder for each layer's transcoder; existing ones are kept. Return them.

    Args:
      folder: where to; what is trained is in it, too.
      case: the case.
      model: its transformer.
      seed: draws texts, the order of features, directions, and initial values.
      mesh: devices that train; None: all share the tokens.
      say: logs lines of progress of training.
    """
    folders = {name: folder / "transcoders" / name for name in (EXACT, WRONG, RANDOM, TRAINED)}
    layers = range(len(case.model.layers))
    texts = list(dict.fromkeys(case.texts(_TEXTS, seed)))
    acts = capture(model, texts, [f"mlp_{part}.{layer}" for layer in layers for part in ("in", "out")])
    acts = without_silent_tokens(acts, [f"mlp_out.{layer}" for layer in layers])
    store = acts.save(folder / "capture")
    for layer in layers:
        sets = untrained_sets(case, model, layer, seed)
        config = sets[RANDOM].config
        trained = train(
            store,
            config.site,
            config.kind,
            folder=folder / "train" / f"layer{layer}",
            mesh=mesh,
            on_progress=say,
            form="transcoder",
            expansion=config.n_features // config.d_in,
            k=config.k,
            learning_rate=3e-3,
            batch=_BATCH,
            # As many tokens for every case, however many texts it has.
            epochs=max(_TOKENS // len(acts.index_Nx3), 1),
            auxk=0.03,
            dead_tokens=100_000,
            warmup=28,
            seed=seed,
            log_every=1000,
        )
        # In the control's configuration, so that both run in the same programs.
        sets[TRAINED] = trained.with_config(config)
        for name, dictionary in sets.items():
            if not (folders[name] / f"layer{layer}" / DESCRIPTION).exists():
                save_dictionary(folders[name] / f"layer{layer}", dictionary)
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
    # At least as many features as a layer has neurons, and as many active as neurons fire at the last position of a
    # text: more would give the control an advantage.
    width = config.d_in * math.ceil(case.model.width / config.d_in)
    firing = int((run_known(case.model, case.prompts[0].text).acts[layer][-1] > 0).sum())
    drawn = dataclasses.replace(config, kind="topk", k=max(firing, 1), n_features=width)
    return {
        EXACT: Dictionary(config, **{name: jnp.asarray(array, jnp.float32) for name, array in exact.items()}),
        WRONG: Dictionary(config, **{name: jnp.asarray(array, jnp.float32) for name, array in wrong.items()}),
        RANDOM: Dictionary.initial(drawn, jax.random.fold_in(jax.random.key(seed), layer)),
    }


def without_silent_tokens(acts: Activations, sites: Sequence[str]) -> Activations:
    """Return activations without the tokens at which all of some sites are 0.

    They have nothing to learn from, and may be the majority. A store has all tokens of its texts, so that each token
    that is kept becomes a text of its own.
    """
    some_N = np.any([np.abs(acts.values[site]).max(axis=1) > 0 for site in sites], axis=0)
    if some_N.all():
        return acts
    values, kept_Rx3 = {site: value_NxD[some_N] for site, value_NxD in acts.values.items()}, acts.index_Nx3[some_N]
    return dataclasses.replace(acts, values=values, index_Nx3=kept_Rx3, texts=list(kept_Rx3[:, 2:]), sources=None)
