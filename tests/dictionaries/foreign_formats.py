"""Dictionaries as other tools publish them: folders in their layouts, with random arrays."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

LLAMA_NORMS = {"in": 6.3125, "out": 3.390625}


def arrays(d: int, features: int, seed: int = 0) -> dict[str, np.ndarray]:
    """W_enc [d, F], W_dec [F, d] with rows of different lengths, biases."""
    rng = np.random.default_rng(seed)
    drawn = dict(W_enc=(d, features), W_dec=(features, d), b_enc=(features,), b_dec=(d,))
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in drawn.items()}


def gemma_scope(folder: Path, d: int, features: int, version: int = 1) -> Path:
    """Of version 1 (.npz) or 2 (.safetensors)."""
    made = arrays(d, features) | dict(threshold=np.random.default_rng(1).random(features).astype(np.float32))
    folder.mkdir(parents=True)
    if version == 1:
        np.savez(folder / "params.npz", **made)
    else:
        save_file({name.lower(): array for name, array in made.items()}, folder / "params.safetensors")
    return folder


def llama_scope(folder: Path, d: int, features: int, hook: str = "blocks.0.hook_resid_post", **changes) -> Path:
    """Arrays of training, hence for inputs of norm sqrt(d)."""
    made = arrays(d, features)
    settings = dict(d_model=d, d_sae=features, act_fn="jumprelu", jump_relu_threshold=0.25, top_k=50)
    settings |= dict(norm_activation="dataset-wise", dataset_average_activation_norm=LLAMA_NORMS)
    settings |= dict(hook_point_in=hook, hook_point_out=hook, use_decoder_bias=True, sparsity_include_decoder_norm=True)
    (folder / "checkpoints").mkdir(parents=True)
    tensors = {"encoder.weight": made["W_enc"].T, "encoder.bias": made["b_enc"]}
    tensors |= {"decoder.weight": made["W_dec"].T, "decoder.bias": made["b_dec"]}
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(contiguous, folder / "checkpoints" / "final.safetensors")
    settings = {key: value for key, value in (settings | changes).items() if value is not ...}
    (folder / "hyperparams.json").write_text(json.dumps(settings))
    return folder


def qwen_scope(file: Path, d: int, features: int, k: int | None = 4) -> Path:
    """A file of one layer; ``k`` in the description beside it, or in none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    made = {name: torch.tensor(array.T.copy()) for name, array in arrays(d, features).items()}
    torch.save(made, file)
    if k is not None:
        (file.parent / "config.json").write_text(json.dumps(dict(model_type="topk_sae", d_sae=features, k=k)))
    return file


def sparsify(folder: Path, d: int, features: int, k: int = 4) -> Path:
    """An SAE; the folder's name says where it reads."""
    made = arrays(d, features)
    tensors = {"encoder.weight": np.ascontiguousarray(made["W_enc"].T), "encoder.bias": made["b_enc"]}
    folder.mkdir(parents=True)
    save_file(tensors | dict(W_dec=made["W_dec"], b_dec=made["b_dec"]), folder / "sae.safetensors")
    cfg = dict(activation="topk", num_latents=features, k=k, d_in=d, skip_connection=False, transcode=False)
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return folder
