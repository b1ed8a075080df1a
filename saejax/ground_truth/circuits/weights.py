"""The weights of a transformer set by hand: GPT-2's architecture with ReLU, and layer norms without effect.

Named directions become random orthonormal vectors whose entries sum to 0, so that no single dimension of the stream has
a meaning, and subtracting the mean, as a layer norm does, has no effect. Dividing by the standard deviation is undone:
with an epsilon of 2^32 and a gain of 2^16 the factor is 1 to the last bit of fp32.
"""

import math
from typing import Any

import numpy as np

from saejax.ground_truth.circuits.handset import HandSet, Head

_EPSILON, _GAIN = 2.0**32, 2.0**16
SILENT = -1.0  # bias of neurons that pad a layer


def frame(model: HandSet, seed: int) -> np.ndarray:
    """Return the vector of each named direction, float64 [J, D]."""
    width = _shape(model)[2]
    rng = np.random.default_rng(seed)
    # The constant vector comes first: all others are orthogonal to it, so that their entries sum to 0.
    drawn_DxD = np.concatenate([np.ones((width, 1)), rng.normal(size=(width, width - 1))], axis=1)
    return np.linalg.qr(drawn_DxD)[0].T[1 : 1 + len(model.directions)]


def _shape(model: HandSet) -> tuple[int, int, int]:
    """Return the number of heads of a layer, the width of each, and the width of the stream."""
    heads = [head for layer in model.layers for head in layer.heads]
    count = max(max(len(layer.heads) for layer in model.layers), 1)
    least = max((max(len(head.scores), len(head.moves)) for head in heads), default=1)
    # One dimension more than directions, for the constant vector, which none of them is.
    d_head = max(least, math.ceil((len(model.directions) + 1) / count))
    return count, d_head, count * d_head


def neuron_arrays(model: HandSet, layer: int, frame_JxD: np.ndarray) -> dict[str, np.ndarray]:
    """Return a layer's neurons in a frame, under the names of a dictionary's arrays; F is ``model.width``."""
    neurons = model.layers[layer].neurons
    silent = model.width - len(neurons)
    reads_FxJ = model.vectors([*(neuron.reads for neuron in neurons), *[{}] * silent])
    writes_FxJ = model.vectors([*(neuron.writes for neuron in neurons), *[{}] * silent])
    return dict(
        W_enc_DxF=(reads_FxJ @ frame_JxD).T,
        b_enc_F=np.array([*(neuron.bias for neuron in neurons), *[SILENT] * silent]),
        W_dec_FxD=writes_FxJ @ frame_JxD,
        b_dec_D=np.zeros(frame_JxD.shape[1]),
    )


def checkpoint(model: HandSet, seed: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the fields of ``config.json`` and the tensors of GPT-2's checkpoint, float64."""
    frame_JxD = frame(model, seed)
    count, _, width = _shape(model)
    norm = dict(weight=np.full(width, _GAIN), bias=np.zeros(width))
    tensors = {f"transformer.ln_f.{name}": value for name, value in norm.items()}
    tensors["transformer.wte.weight"] = model.vectors(list(model.words.values())) @ frame_JxD
    tensors["transformer.wpe.weight"] = model.vectors(model.positions) @ frame_JxD
    tensors["lm_head.weight"] = model.vectors([model.logits.get(word, {}) for word in model.words]) @ frame_JxD
    for layer in range(len(model.layers)):
        arrays = neuron_arrays(model, layer, frame_JxD)
        parts = {f"{name}.{part}": value for name in ("ln_1", "ln_2") for part, value in norm.items()}
        parts |= _attention(model, layer, frame_JxD)
        parts |= {"mlp.c_fc.weight": arrays["W_enc_DxF"], "mlp.c_fc.bias": arrays["b_enc_F"]}
        parts |= {"mlp.c_proj.weight": arrays["W_dec_FxD"], "mlp.c_proj.bias": arrays["b_dec_D"]}
        tensors |= {f"transformer.h.{layer}.{name}": value for name, value in parts.items()}
    fields = dict(
        model_type="gpt2",
        architectures=["GPT2LMHeadModel"],
        n_layer=len(model.layers),
        n_head=count,
        n_embd=width,
        n_inner=model.width,
        n_positions=len(model.positions),
        activation_function="relu",
        layer_norm_epsilon=_EPSILON,
        tie_word_embeddings=False,
    )
    return fields, tensors


def _attention(model: HandSet, layer: int, frame_JxD: np.ndarray) -> dict[str, np.ndarray]:
    """Return GPT-2's tensors of a layer's attention; unused heads move nothing."""
    count, d_head, width = _shape(model)
    weight_DxSxHxK, bias_SxHxK = np.zeros((width, 3, count, d_head)), np.zeros((3, count, d_head))
    out_HxKxD = np.zeros((count, d_head, width))

    def vector(name: str) -> np.ndarray:
        return frame_JxD[model.directions.index(name)]

    def set_head(number: int, head: Head) -> None:
        for place, (query, key, score) in enumerate(head.scores):
            if query:
                weight_DxSxHxK[:, 0, number, place] = vector(query)
            else:
                bias_SxHxK[0, number, place] = 1.0
            # Times the root that the model divides scores by.
            weight_DxSxHxK[:, 1, number, place] = score * d_head**0.5 * vector(key)
        for place, (source, target) in enumerate(head.moves):
            weight_DxSxHxK[:, 2, number, place] = vector(source)
            out_HxKxD[number, place] = vector(target)

    for number, head in enumerate(model.layers[layer].heads):
        set_head(number, head)
    return {
        "attn.c_attn.weight": weight_DxSxHxK.reshape(width, -1),
        "attn.c_attn.bias": bias_SxHxK.reshape(-1),
        "attn.c_proj.weight": out_HxKxD.reshape(-1, width),
        "attn.c_proj.bias": np.zeros(width),
    }
