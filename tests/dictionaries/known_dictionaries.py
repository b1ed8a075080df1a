"""Random dictionaries of every kind and form, and what files of other tools compute, by formula in float64."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import yaml
from safetensors.numpy import load_file, save_file

from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.dictionaries.modules import parameter_table

KINDS = ("standard", "linear", "gated", "jumprelu", "topk", "batchtopk", "matryoshka")
FORMS = ("sae", "transcoder", "skip_transcoder")
D, F = 12, 40
EVERY = [(kind, form) for kind in KINDS for form in FORMS]
NOT_IN_SAELENS = [("linear", form) for form in FORMS] + [("topk", "transcoder"), ("topk", "skip_transcoder")]
IN_SAELENS = [pair for pair in EVERY if pair not in NOT_IN_SAELENS]


def make(
    kind: str = "standard", form: str = "sae", layer: int = 3, seed: int = 0, d_out: int = D, **changes
) -> Dictionary:
    """A random dictionary with decoder rows of length 1."""
    of_k = kind in ("topk", "batchtopk", "matryoshka", "matching_pursuit")
    centred, skip = form == "sae", form == "skip_transcoder"
    site, target = (f"resid_post.{layer}", "") if centred else (f"mlp_in.{layer}", f"mlp_out.{layer}")
    k, groups = 4 if of_k else 0, (10, 20, F) if kind == "matryoshka" else ()
    facts = dict(max_norm=123.5, model="some/model", revision="abc", fingerprint="0123")
    config = DictionaryConfig(kind, site, target, D, F, d_out, k=k, groups=groups, skip=skip, centred=centred, **facts)
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(size=shape) for name, (shape, _) in parameter_table(config).items()}
    arrays["W_dec_FxD"] /= np.linalg.norm(arrays["W_dec_FxD"], axis=1, keepdims=True)
    for name in ("threshold_F", "r_mag_F"):
        if name in arrays:
            arrays[name] = np.abs(arrays[name]) * 0.3
    if kind == "matching_pursuit":  # which has no encoder
        arrays |= dict(W_enc_DxF=arrays["W_dec_FxD"].T, b_enc_F=np.zeros(F))
    config = dataclasses.replace(config, **changes)
    return Dictionary(config, **{name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()})


def activations(rows: int = 50, seed: int = 9) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, D)) * 2).astype(np.float32)


def relative(a, b) -> float:
    """max |a - b| / max |b|."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


def assert_computes(dictionary: Dictionary, x, expected, within: float = 1e-5) -> None:
    """That a dictionary's activations and output of x are the expected ones, relative to their largest."""
    for found, wanted in zip((dictionary.encode(x), dictionary(x)), expected, strict=True):
        assert relative(found, wanted) < within


def largest(pre: np.ndarray, k: int) -> np.ndarray:
    """max(pre, 0) of the k largest of each row, else 0."""
    kept = pre >= np.sort(pre, axis=1)[:, [-k]]
    return np.where(kept, np.maximum(pre, 0), 0)


def tensors_of(file: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(array, np.float64) for name, array in load_file(file).items()}


def saelens_by_formula(folder: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Activations and output of a SAELens folder, as its documentation defines them."""
    cfg, w = json.loads((folder / "cfg.json").read_text()), tensors_of(folder / "sae_weights.safetensors")
    x = x.astype(np.float64)
    name, centred = cfg["architecture"], x - w["b_dec"] if cfg["apply_b_dec_to_input"] else x
    if name == "matching_pursuit":
        assert cfg["residual_threshold"] == 0 and not cfg["stop_on_duplicate_support"]
        f, tokens = np.zeros((len(x), F)), np.arange(len(x))
        for _ in range(cfg["max_iterations"]):
            chosen = (centred @ w["W_dec"].T).argmax(axis=1)
            value = np.maximum((centred * w["W_dec"][chosen]).sum(axis=1), 0)
            f[tokens, chosen] += value
            centred = centred - value[:, None] * w["W_dec"][chosen]
        return f, f @ w["W_dec"] + (w["b_dec"] if cfg["apply_b_dec_to_input"] else 0)
    projected = centred @ w["W_enc"]
    lengths = np.linalg.norm(w["W_dec"], axis=1) if cfg.get("rescale_acts_by_decoder_norm") else 1.0
    if name == "gated":
        f = np.maximum(projected * np.exp(w["r_mag"]) + w["b_mag"], 0) * (projected + w["b_gate"] > 0)
    elif name == "topk":
        f = largest((projected + w["b_enc"]) * lengths, cfg["k"])
    elif name.startswith("jumprelu"):
        f = np.maximum(projected + w["b_enc"], 0) * (projected + w["b_enc"] > w["threshold"])
    else:
        f = np.maximum(projected + w["b_enc"], 0)
    y = (f / lengths) @ w["W_dec"] + w["b_dec"]
    return f, y + x @ w["W_skip"].T if "W_skip" in w else y


def circuit_tracer_by_formula(folder: Path, layer: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Activations and output of a layer of a circuit-tracer set."""
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    w = tensors_of(folder / f"layer_{layer}.safetensors")
    x = x.astype(np.float64)
    pre = x @ w["W_enc"].T + w["b_enc"]
    if settings.get("activation") == "topk":
        f = largest(pre, settings["k"])
    elif "activation_function.threshold" in w:
        f = np.where(pre > w["activation_function.threshold"], pre, 0)
    else:
        f = np.maximum(pre, 0)
    y = f @ w["W_dec"] + w["b_dec"]
    return f, y + x @ w["W_skip"].T if "W_skip" in w else y


def write_saelens(folder: Path, architecture: str, /, seed: int = 1, dtype=np.float32, **changes) -> Path:
    """A folder as SAELens writes it: decoder rows of any length, facts in ``metadata`` that nobody here knows.

    Changes of a key with the value ... remove it.
    """
    rng = np.random.default_rng(seed)
    transcoder = architecture.endswith("transcoder")
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,)}
    shapes |= {name: (F,) for name in (("b_gate", "b_mag", "r_mag") if architecture == "gated" else ("b_enc",))}
    shapes |= {"threshold": (F,)} if architecture.startswith("jumprelu") else {}
    shapes |= {"W_skip": (D, D)} if "skip" in architecture else {}
    arrays = {name: (rng.normal(size=shape) * 0.7).astype(dtype) for name, shape in shapes.items()}
    if "threshold" in arrays:
        arrays["threshold"] = np.abs(arrays["threshold"])
    hook = "blocks.2.mlp.hook_in" if transcoder else "blocks.2.hook_resid_pre"
    metadata = dict(sae_lens_version="6.54.12", model_name="gpt2", hook_name=hook, context_size=128, prepend_bos=True)
    cfg = dict(
        d_in=D, d_sae=F, dtype=np.dtype(dtype).name, device="cuda", apply_b_dec_to_input=not transcoder,
        normalize_activations="none", reshape_activations="none", metadata=metadata,
    )  # fmt: skip
    if architecture == "topk":
        cfg |= dict(k=5, rescale_acts_by_decoder_norm=False)
    if transcoder:
        cfg |= dict(d_out=D)
        metadata |= dict(hook_name_out="blocks.2.hook_mlp_out")
    cfg |= dict(architecture=architecture)
    for key, value in changes.items():
        place, key = (metadata, key.removeprefix("metadata__")) if key.startswith("metadata__") else (cfg, key)
        place.pop(key, None) if value is ... else place.update({key: value})
    folder.mkdir(parents=True, exist_ok=True)
    save_file(arrays, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return folder


def change_tensors(file: Path, **changes) -> None:
    """Rewrites a safetensors file with arrays replaced or added; the value ... removes one."""
    arrays = load_file(file)
    for name, array in changes.items():
        arrays.pop(name, None) if array is ... else arrays.update({name: np.ascontiguousarray(array)})
    save_file(arrays, file)
