"""Dictionaries of a tiny model: random directions, biases that let about a tenth of the features be active."""

import numpy as np

from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.models.tokens import Tokens

IDS = [5, 17, 33, 8, 41, 100]  # a prompt


def made_sae(lm, site, ids, kind="topk", seed=0, features=32, **changes) -> Dictionary:
    """A random SAE in which a fifth of the features or so is active; the largest token at its site is a sink."""
    rng, width = np.random.default_rng(seed), lm.config.d_model
    tokens = Tokens(np.array([ids], np.int32), np.array([len(ids)], np.int32))
    norms = np.sort(np.linalg.norm(np.asarray(lm(tokens, capture=[site]).sites[site])[0], axis=1))
    fields = dict(kind=kind, site=site, d_in=width, n_features=features, k=6 if kind == "topk" else 0)
    fields |= dict(max_norm=float(norms[-2:].mean()), fingerprint=lm.source.fingerprint, model="tiny")
    arrays = dict(
        W_enc_DxF=rng.normal(size=(width, features)) / np.sqrt(width),
        b_enc_F=0.3 * rng.normal(size=features),
        W_dec_FxD=rng.normal(size=(features, width)) / np.sqrt(width),
        b_dec_D=0.1 * rng.normal(size=width),
    )
    if kind == "jumprelu":
        arrays["threshold_F"] = rng.uniform(0.3, 0.6, features)
    made = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    return Dictionary(DictionaryConfig(**fields | changes), **made)


def made_set(lm, features: int = 48, kind: str = "standard", skip: bool = False, seed: int = 0) -> list[Dictionary]:
    """A transcoder for each layer of a model."""
    rng = np.random.default_rng(seed)
    width, transcoders = lm.config.d_model, []
    ids_BxT = rng.integers(0, lm.config.vocab, (4, 8)).astype(np.int32)
    sites = [f"mlp_in.{layer}" for layer in range(lm.config.n_layers)]
    seen = lm(Tokens(ids_BxT, np.full(4, 8, np.int32)), capture=sites).sites
    for layer, site in enumerate(sites):
        config = DictionaryConfig(
            kind=kind, site=site, target=f"mlp_out.{layer}", d_in=width, n_features=features, centred=False,
            k=6 if kind == "topk" else 0, skip=skip, fingerprint=lm.source.fingerprint, model=lm.source.name,
        )  # fmt: skip
        read_NxD = np.asarray(seen[site]).reshape(-1, width)
        W_enc_DxF = rng.normal(size=(width, features)) / np.sqrt(width)
        pre_NxF = read_NxD @ W_enc_DxF
        arrays = dict(
            W_enc_DxF=W_enc_DxF,
            b_enc_F=-np.quantile(pre_NxF, 0.85, axis=0),
            W_dec_FxD=rng.normal(size=(features, width)) / np.sqrt(width),
            b_dec_D=0.1 * rng.normal(size=width),
        )
        if kind == "jumprelu":
            arrays["threshold_F"] = rng.uniform(0.0, 0.3, features)
        if skip:
            arrays["W_skip_DxD"] = 0.1 * rng.normal(size=(width, width)) / np.sqrt(width)
        transcoders.append(Dictionary(config, **{name: np.asarray(a, np.float32) for name, a in arrays.items()}))
    return transcoders
