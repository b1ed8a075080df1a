"""Random graphs, tiny models and transcoders for them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from tiny_models import save_tiny, save_tiny_tokenizer

from saejax import load_model
from saejax.attribution.graph import Graph
from saejax.attribution.graph.data import BIAS, ERROR, FEATURE, LOGIT, TOKEN, Nodes
from saejax.attribution.local.dictionaries import LayerTranscoders
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.dictionaries.modules import parameter_table

FEATURES = 48
IDS = [0, 17, 230, 5, 42, 99, 7]  # a prompt


def make_graph(features=7, layers=2, positions=3, logits=2, seed=0) -> Graph:
    """A random graph; its edges do not follow the order of layers."""
    rng = np.random.default_rng(seed)
    layer_E, position_E = np.divmod(np.arange(layers * positions), positions)
    nodes = Nodes.joined(
        Nodes.of(FEATURE, np.sort(rng.integers(0, layers, features)), 1, np.arange(features), rng.random(features)),
        Nodes.of(ERROR, layer_E, position_E),
        Nodes.of(TOKEN, -1, np.arange(positions), [5, 6, 7]),
        Nodes.of(BIAS, np.arange(layers), 0),
        Nodes.of(LOGIT, layers, positions - 1, [11, 12], [0.6, 0.3]),
    )
    targets = features + logits
    adjacency_RxS = rng.normal(size=(targets, len(nodes) - logits)).astype(np.float32)
    rest = {name: rng.normal(size=targets).astype(np.float32) for name in ("value_R", "constant_R", "untraced_R")}
    return Graph(
        adjacency_RxS=adjacency_RxS,
        nodes=nodes,
        **rest,
        ids_P=np.array([5, 6, 7], np.int32),
        tokens=("a", " b", "ü"),
        logit_K=np.array([3, 1], np.float32),
        labels=(" c", "d"),
        prompt="a b c",
        n_layers=layers,
        model=dict(name="m"),
        transcoders=dict(name="t", n_features=9),
        settings=dict(max_features=None),
    )


def make_transcoders(config, kind="standard", skip=False, seed=0) -> list[Dictionary]:
    """Random transcoders in which a fifth of the features or so is active."""
    rng, made = np.random.default_rng(seed), []
    for layer in range(config.n_layers):
        of = DictionaryConfig(
            kind=kind, site=f"mlp_in.{layer}", target=f"mlp_out.{layer}", d_in=config.d_model, n_features=FEATURES,
            k=6 if kind == "topk" else 0, skip=skip, centred=False,
        )  # fmt: skip
        arrays = {name: 0.2 * rng.normal(size=shape) for name, (shape, _) in parameter_table(of).items()}
        arrays["b_enc_F"] -= 0.8
        if kind == "jumprelu":
            arrays["threshold_F"] = np.abs(arrays["threshold_F"])
        made.append(Dictionary(of, **{name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}))
    return made


def altered(dictionary, **changes) -> Dictionary:
    """The same arrays under another description."""
    return Dictionary(dataclasses.replace(dictionary.config, **changes), **dictionary.arrays)


def make_cross_layer(config, kind="standard", skip=False, reads="mlp_in") -> tuple[LayerTranscoders, list, list]:
    """A random cross-layer transcoder: the set, its dictionaries, and what the features of each write [F, L - l, D]."""
    made, rng = make_transcoders(config, kind, skip), np.random.default_rng(9)
    if reads == "resid_mid":
        made = [altered(one, site=f"resid_mid.{layer}") for layer, one in enumerate(made)]
    layers = config.n_layers
    writes = [0.1 * rng.normal(size=(FEATURES, layers - layer, config.d_model)) for layer in range(layers)]
    writes = [write.astype(np.float32) for write in writes]
    for write, one in zip(writes, made, strict=True):
        write[:, 0] = one.W_dec_FxD[...]
    configs, read = [one.config for one in made], lambda layer, features_U: writes[layer][features_U]
    return LayerTranscoders("made", configs, made.__getitem__, reads=reads, writes=read), made, writes


def load_tiny(folder, family, mesh, **changes):
    save_tiny(folder, family, vocab_size=384, **changes)
    save_tiny_tokenizer(folder, 384)
    return load_model(str(folder), mesh=mesh)
