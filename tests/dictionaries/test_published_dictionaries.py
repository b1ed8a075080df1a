"""Published layouts of dictionaries, as data: each is built with random arrays and compared with its formula.

A layout is a function of a folder and arrays that writes the files, and returns what ``load_dictionary`` is given, the
function that its publisher's code computes, in float64 from the arrays as the files hold them, and what is described.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub.utils import filter_repo_objects
from known_dictionaries import assert_computes, relative
from safetensors.numpy import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import saejax
from saejax.dictionaries import Dictionary, joined, load_dictionary, load_transcoders, save_dictionary
from saejax.dictionaries.formats import circuit_tracer, load_all, place, read_config
from saejax.dictionaries.hashes import hash_dictionaries
from saejax.dictionaries.input_norm import normalise
from saejax.errors import UserError

D, F, K = 12, 40, 5
NAME = "Llama-3.1-8B-Instruct-SAE-l19"  # of a file of Goodfire
X = (np.random.default_rng(7).standard_normal((40, D)) * 2 + 0.5).astype(np.float32)
LAYOUTS: dict[str, Callable] = {}


def layout(**drawn):
    """Names a layout, whose function is given a folder and the arrays ``arrays(**drawn)``."""

    def add(function):
        LAYOUTS[function.__name__] = lambda folder: function(folder, arrays(**drawn))
        return function

    return add


def arrays(seed=0, unit=False, **vectors) -> dict[str, np.ndarray]:
    """Random W_enc [D, F], W_dec [F, D], biases, and further vectors [F], given the range they are drawn from."""
    rng = np.random.default_rng(seed)
    drawn = dict(W_enc=(D, F), W_dec=(F, D), b_enc=(F,), b_dec=(D,))
    made = {name: rng.standard_normal(shape) for name, shape in drawn.items()}
    if unit:
        made["W_dec"] /= np.linalg.norm(made["W_dec"], axis=1, keepdims=True)
    made |= {name: rng.uniform(*limits, F) for name, limits in vectors.items()}
    return {name: array.astype(np.float32) for name, array in made.items()}


def relu(pre):
    return np.maximum(pre, 0)


def topk(pre, k=K):
    """The k largest, whatever their sign."""
    return np.where(pre >= np.sort(pre, axis=-1)[:, [-k]], pre, 0)


def jump(threshold):
    return lambda pre: np.where(pre > threshold, relu(pre), 0)


def function(w, act=relu, centred=True, inputs=1.0, outputs=1.0):
    """f = act(s_in x W_enc + b_enc), y = (f W_dec + b_dec) / s_out, with x less b_dec where it is centred."""

    def compute(x):
        w64 = {name: array.astype(np.float64) for name, array in w.items()}
        x = inputs * x.astype(np.float64)
        f = act((x - w64["b_dec"] if centred else x) @ w64["W_enc"] + w64["b_enc"])
        y = (f @ w64["W_dec"] + w64["b_dec"]) / outputs
        return f, y + x @ w64["W_skip"] if "W_skip" in w64 else y

    return compute


def normalised(compute, norm):
    """A function of normalised tokens, with its output mapped back."""

    def normed(x):
        x = x.astype(np.float64)
        mean = x.mean(-1, keepdims=True) if norm != "token_norm" else 0
        std = (x - mean).std(-1, keepdims=True, ddof=1)
        if norm == "token_norm":
            std = np.linalg.norm(x, axis=-1, keepdims=True) / np.sqrt(D)
        scale = dict(layer_norm=std, token_norm=std, center=np.ones_like(std))[norm]
        f, y = compute((x - mean) / (scale + (1e-5 if norm == "layer_norm" else 0)))
        return f, y * scale + mean

    return normed


def write_json(file: Path, value) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def write_tensors(file: Path, dtype=np.float32, **tensors) -> dict[str, np.ndarray]:
    file.parent.mkdir(parents=True, exist_ok=True)
    stored = {name.replace("__", "."): np.ascontiguousarray(array).astype(dtype) for name, array in tensors.items()}
    save_file(stored, file)
    return stored


def write_pickled(file: Path, **tensors) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name.replace("__", "."): torch.tensor(np.array(value)) for name, value in tensors.items()}, file)


def linears(w, **names) -> dict[str, np.ndarray]:
    """The state of two torch ``Linear`` modules, with the decoder's bias under another name."""
    state = dict(encoder__weight=w["W_enc"].T, encoder__bias=w["b_enc"], decoder__weight=w["W_dec"].T)
    return state | {names.get("bias", "decoder__bias"): w["b_dec"]}


# --- SAELens

SAELENS = dict(dtype="torch.float32", device="mps", apply_b_dec_to_input=True, d_in=D, d_sae=F, prepend_bos=True)
OLD = SAELENS | dict(hook_point="blocks.8.hook_resid_pre", hook_point_layer=8, model_name="gpt2-small")
OLD |= dict(context_size=128)
NEW = dict(SAELENS, architecture="standard", lora_rank=3)
META = dict(hook_name="blocks.8.hook_resid_post", model_name="gpt2", prepend_bos=False, sae_lens_version="6.5.0")


def saelens(folder, w, **cfg):
    write_json(folder / "cfg.json", cfg)
    write_tensors(folder / "sae_weights.safetensors", **w)
    return folder


@layout()
def saelens_before_version_3(folder, w):
    write_tensors(folder / "sparsity.safetensors", sparsity=np.zeros(F))
    path = saelens(folder, w | dict(scaling_factor=np.ones(F, np.float32)), **OLD)
    return path, function(w), dict(site="resid_pre.8", bos="always")


@layout()
def saelens_4_with_k_among_the_activations_arguments(folder, w):
    cfg = OLD | dict(architecture="standard", activation_fn_str="topk", activation_fn_kwargs=dict(k=K))
    path = saelens(folder, w, **cfg | dict(prepend_bos=False))
    return path, function(w, lambda pre: relu(topk(pre))), dict(kind="topk", k=K, bos="never")


@layout(threshold=(-1, 1), scaling_factor=(0.5, 2))
def saelens_4_jumprelu_with_a_scaling_factor(folder, w):
    path = saelens(folder, w, **OLD | dict(architecture="jumprelu", finetuning_scaling_factor=True))
    scaled = w | dict(W_dec=w["W_dec"] * w["scaling_factor"][:, None])
    return path, function(scaled, jump(w["threshold"])), dict(kind="jumprelu")


@layout()
def saelens_3_with_an_open_layer_and_k_as_a_float(folder, w):
    cfg = SAELENS | dict(hook_point="blocks.{layer}.hook_mlp_out", hook_point_layer=4, activation_fn_str="topk")
    path = saelens(folder, w, **cfg, model_name="gpt2-small", activation_fn_kwargs=dict(k=float(K)))
    return path, function(w, lambda pre: relu(topk(pre))), dict(site="mlp_out.4", kind="topk", k=K)


@layout()
def saelens_5_of_a_module_without_centring(folder, w):
    cfg = SAELENS | dict(hook_name="gpt_neox.layers.6.mlp", model_name="pythia-70m", apply_b_dec_to_input=False)
    return saelens(folder, w, **cfg), function(w, centred=False), dict(site="mlp_out.6", centred=False)


@layout()
def saelens_6_with_unknown_settings(folder, w):
    return saelens(folder, w, **NEW, metadata=META), function(w), dict(site="resid_post.8", bos="always")


@layout()
def saelens_6_topk_with_layer_norm(folder, w):
    cfg = NEW | dict(architecture="topk", k=K, normalize_activations="layer_norm", rescale_acts_by_decoder_norm=False)
    compute = normalised(function(w, lambda pre: relu(topk(pre))), "layer_norm")
    return saelens(folder, w, **cfg, metadata=META), compute, dict(input_norm="layer_norm")


@layout()
def saelens_6_with_constant_norm(folder, w):
    path = saelens(folder, w, **NEW | dict(normalize_activations="constant_norm_rescale"), metadata=META)
    return path, normalised(function(w), "token_norm"), dict(input_norm="token_norm")


@layout()
def saelens_6_with_a_constant_factor(folder, w):
    cfg = NEW | dict(normalize_activations="constant_scalar_rescale", activation_normalization_factor=0.25)
    return saelens(folder, w, **cfg, metadata=META), function(w, inputs=0.25, outputs=0.25), {}


@layout()
def saelens_6_of_centred_weights(folder, w):
    kwargs = dict(model_from_pretrained_kwargs=dict(center_writing_weights=True, fold_ln=True))
    path = saelens(folder, w, **NEW, metadata=META | kwargs)
    return path, normalised(function(w), "center"), dict(input_norm="center")


@layout()
def saelens_6_of_centred_weights_of_a_model_without_layer_norms(folder, w):
    kwargs = dict(model_from_pretrained_kwargs=dict(center_writing_weights=True), model_name="google/gemma-2-2b")
    return saelens(folder, w, **NEW, metadata=META | kwargs), function(w), dict(input_norm="")


@layout()
def saelens_6_of_heads_side_by_side(folder, w):
    meta = META | dict(hook_name="blocks.8.attn.hook_z", model_from_pretrained_kwargs=dict(center_writing_weights=True))
    path = saelens(folder, w, **NEW | dict(reshape_activations="hook_z"), metadata=meta)
    return path, function(w), dict(site="attn_z.8", input_norm="")


@layout()
def saelens_6_of_a_hook_that_its_module_tells(folder, w):
    """As SAELens describes Gemma Scope 2: the older hook's name means another place."""
    hooks = dict(hook_name="blocks.8.hook_mlp_in", hf_hook_name="model.layers.8.pre_feedforward_layernorm.output")
    return saelens(folder, w, **NEW, metadata=META | hooks), function(w), dict(site="mlp_in.8")


@layout()
def saelens_named_by_its_file(folder, w):
    return saelens(folder, w, **OLD) / "sae_weights.safetensors", function(w), dict(site="resid_pre.8")


# --- dictionary_learning


def learned(folder, name, state, **trainer):
    write_pickled(folder / "ae.pt", **state)
    trainer = dict(dict_class=name, activation_dim=D, dict_size=F, submodule_name="resid_post_layer_12") | trainer
    write_json(folder / "config.json", dict(trainer=trainer | dict(lm_name="google/gemma-2-2b"), buffer=dict(io="out")))
    return folder


@layout()
def dictionary_learning_standard(folder, w):
    return learned(folder, "AutoEncoder", linears(w, bias="bias")), function(w), dict(site="resid_post.12")


@layout()
def dictionary_learning_standard_of_april(folder, w):
    return learned(folder, "AutoEncoderNew", linears(w)), function(w, centred=False), dict(model="google/gemma-2-2b")


@layout()
def dictionary_learning_topk(folder, w):
    path = learned(folder, "AutoEncoderTopK", linears(w, bias="b_dec") | dict(k=K, threshold=0.4))
    return path, function(w, lambda pre: topk(relu(pre))), dict(kind="topk", k=K)


@layout()
def dictionary_learning_of_a_compiled_model_on_several_devices(folder, w):
    state = linears(w, bias="b_dec") | dict(k=[K])
    path = learned(folder, "AutoEncoderTopK", {f"module._orig_mod.{name}": value for name, value in state.items()})
    return path, function(w, lambda pre: topk(relu(pre))), dict(kind="topk", k=K)


@layout()
def dictionary_learning_state_inside_a_training_checkpoint(folder, w):
    path = learned(folder, "AutoEncoder", {})
    state = {name.replace("__", "."): torch.tensor(array) for name, array in linears(w, bias="bias").items()}
    torch.save(dict(state_dict=state, epoch=3), path / "ae.pt")
    return path, function(w), dict(kind="standard")


@layout()
def dictionary_learning_of_what_a_module_reads(folder, w):
    path = learned(folder, "AutoEncoder", linears(w, bias="bias"), submodule_name="mlp_layer_3")
    write_json(path / "config.json", json.loads((path / "config.json").read_text()) | dict(buffer=dict(io="in")))
    return path, function(w), dict(site="mlp_in.3", target="")


@layout()
def dictionary_learning_checkpoint(folder, w):
    path = learned(folder, "AutoEncoderTopK", linears(w, bias="b_dec"), k=K)
    (path / "checkpoints").mkdir()
    file = path / "checkpoints" / "ae_100.pt"
    return (path / "ae.pt").rename(file), function(w, lambda pre: topk(relu(pre))), dict(site="resid_post.12", k=K)


@layout()
def dictionary_learning_batch_topk(folder, w):
    path = learned(folder, "BatchTopKSAE", linears(w, bias="b_dec") | dict(k=K, threshold=1.25))
    return path, function(w, jump(1.25)), dict(kind="batchtopk", k=K)


@layout()
def dictionary_learning_of_normalised_inputs(folder, w):
    """As science-of-finetuning's version trains: inputs less a mean, times a factor, and outputs back."""
    mean = np.linspace(-1, 1, D).astype(np.float32)
    kept = dict(activation_mean=mean, activation_std=np.ones(D), activation_global_scale=0.25, target_rms=1.0)
    path = learned(folder, "BatchTopKSAE", linears(w, bias="b_dec") | dict(k=K, threshold=0.75) | kept, k=K + 2)
    compute = function(w, jump(0.75), inputs=0.25, outputs=0.25)

    def shifted(x):
        f, y = compute(x.astype(np.float64) - mean)
        return f, y + mean

    return path, shifted, dict(kind="batchtopk", k=K)


@layout()
def dictionary_learning_matryoshka(folder, w):
    path = learned(folder, "MatryoshkaBatchTopKSAE", w | dict(k=K, threshold=1.25, group_sizes=[10, 30]))
    return path, function(w, jump(1.25)), dict(kind="matryoshka", groups=(10, F))


@layout(unit=True, threshold=(0, 1))
def dictionary_learning_jumprelu(folder, w):
    """Some versions multiply activations by the lengths of decoder rows, which are 1 in what they train."""
    return (
        learned(folder, "JumpReluAutoEncoder", w),
        function(w, jump(w["threshold"]), False),
        dict(kind="jumprelu"),
    )


def gated_state(w):
    state = linears(w, bias="decoder_bias") | dict(gate_bias=w["b_enc"], r_mag=w["r_mag"], mag_bias=w["mag_bias"])
    del state["encoder__bias"]
    return state


@layout(unit=True, r_mag=(-0.5, 0.5), mag_bias=(-0.5, 0.5))
def dictionary_learning_gated(folder, w):
    def act(gate):
        magnitude = (gate - w["b_enc"]) * np.exp(w["r_mag"].astype(np.float64)) + w["mag_bias"]
        return (gate > 0) * relu(magnitude)

    return learned(folder, "GatedAutoEncoder", gated_state(w)), function(w, act), {}


def test_classes_of_dictionary_learning_whose_version_would_matter_are_refused(tmp_path):
    learned(tmp_path / "JumpReluAutoEncoder", "JumpReluAutoEncoder", arrays(threshold=(0, 1)))
    state = gated_state(arrays(r_mag=(-0.5, 0.5), mag_bias=(-0.5, 0.5)))
    learned(tmp_path / "GatedAutoEncoder", "GatedAutoEncoder", state)
    for folder in tmp_path.iterdir():
        with pytest.raises(UserError, match=f"by which only some versions of {folder.name} multiply"):
            load_dictionary(folder)
    # Rows of length 1 have other lengths where each of their numbers was rounded.
    rounded = {name: array.astype(ml_dtypes.bfloat16).astype(np.float32) for name, array in arrays(unit=True).items()}
    assert np.abs(np.linalg.norm(rounded["W_dec"], axis=1) - 1).max() > 1e-3
    learned(tmp_path / "rounded", "JumpReluAutoEncoder", rounded | dict(threshold=np.ones(F, np.float32)))
    assert load_dictionary(tmp_path / "rounded").config.kind == "jumprelu"


# --- Gemma Scope


def gemma_scope(folder, w):
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **w)
    return folder, function(w, jump(w["threshold"]), False)


@layout(threshold=(0, 2))
def gemma_scope_1(folder, w):
    path = folder / "gemma-scope-2b-pt-res" / "layer_12" / "width_16k" / "average_l0_82"
    return *gemma_scope(path, w), dict(site="resid_post.12", model="google/gemma-2-2b", bos="always")


@layout(threshold=(0, 2))
def gemma_scope_1_attention(folder, w):
    path = folder / "gemma-scope-2b-pt-att" / "layer_3" / "width_16k" / "average_l0_9"
    return *gemma_scope(path, w), dict(site="attn_z.3")


@layout(threshold=(0, 2))
def gemma_scope_1_transcoder(folder, w):
    """It reads the norm before the MLP before its gain, which graphs can."""
    path = folder / "gemma-scope-2b-pt-transcoders" / "layer_3" / "width_16k"
    return *gemma_scope(path, w), dict(site="mlp_normed.3", target="mlp_out.3")


@layout(threshold=(0, 2))
def gemma_scope_1_embedding(folder, w):
    """Trained on rows of the table, which the stream has times the root of the width."""
    path, compute = gemma_scope(folder / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6", w)

    def scaled(x):
        f, y = compute(x / np.sqrt(D))
        return f, y * np.sqrt(D)

    return path, scaled, dict(site="resid_pre.0", bos="always", model="google/gemma-2-2b")


@layout(threshold=(0, 2))
def gemma_scope_2_affine_transcoder(folder, w):
    w["W_skip"] = arrays(1)["W_enc"][:, :D]
    path = folder / "gemma-scope-2-1b-it" / "transcoder_all" / "layer_5_width_16k_l0_small_affine"
    names = dict(W_enc="w_enc", W_dec="w_dec", W_skip="affine_skip_connection")
    write_tensors(path / "params.safetensors", **{names.get(name, name): array for name, array in w.items()})
    expected = dict(site="mlp_in.5", target="mlp_out.5", skip=True, model="google/gemma-3-1b-it")
    return path, function(w, jump(w["threshold"]), False), expected


# --- OpenMOSS

NORMS = {"in": 6.3125, "out": 3.390625}
S_IN, S_OUT = (np.sqrt(D) / NORMS[side] for side in ("in", "out"))


@layout()
def llama_scope_1(folder, w):
    stored = write_tensors(folder / "checkpoints" / "final.safetensors", ml_dtypes.bfloat16, **linears(w))
    settings = dict(d_model=D, d_sae=F, act_fn="jumprelu", jump_relu_threshold=0.25, norm_activation="dataset-wise")
    settings |= dict(hook_point_in="blocks.8.hook_resid_post", hook_point_out="blocks.8.hook_mlp_out")
    write_json(folder / "hyperparams.json", settings | dict(dataset_average_activation_norm=NORMS))
    w = dict(W_enc=stored["encoder.weight"].T, W_dec=stored["decoder.weight"].T)
    w |= dict(b_enc=stored["encoder.bias"], b_dec=stored["decoder.bias"])
    length = np.linalg.norm(w["W_dec"].astype(np.float64), axis=1)

    def compute(x):
        """Activations times the lengths of decoder rows, in units of the output; the threshold is of these."""
        act = jump(0.25 * S_OUT / length)
        f, y = function(w, act, False, inputs=S_IN, outputs=S_OUT)(x)
        return f * length / S_OUT, y

    return folder, compute, dict(site="resid_post.8", target="mlp_out.8")


@layout(unit=True, threshold=(0.5, 2))
def llama_scope_r1(folder, w):
    state = linears(w) | dict(log_jumprelu_threshold=np.log(w["threshold"]))
    hook = "blocks.15.hook_resid_post"
    state[f"dataset_average_activation_norm.{hook}"] = np.float32(9.5)
    write_tensors(folder / "sae_weights.safetensors", **state)
    settings = dict(sae_type="sae", d_model=D, act_fn="jumprelu", top_k=50, hook_point_in=hook, hook_point_out=hook)
    write_json(folder / "config.json", settings | dict(norm_activation="dataset-wise"))
    s = np.sqrt(D) / 9.5

    def compute(x):
        f, y = function(w, jump(w["threshold"]), False, inputs=s, outputs=s)(x)
        return f / s, y

    return folder, compute, dict(site="resid_post.15")


@layout()
def llama_scope_2(folder, w):
    into, out = "blocks.12.mlp.hook_in", "blocks.12.hook_mlp_out"
    state = dict(W_E=w["W_enc"], b_E=w["b_enc"], W_D=w["W_dec"], b_D=w["b_dec"])
    for side, hook in (("in", into), ("out", out)):
        state[f"dataset_average_activation_norm.{hook}"] = np.float32(NORMS[side])
    write_tensors(folder / "sae_weights.safetensors", **state)
    settings = dict(sae_type="sae", d_model=D, act_fn="topk", top_k=K, hook_point_in=into, hook_point_out=out)
    write_json(folder / "config.json", settings | dict(norm_activation="dataset-wise"))
    length = np.linalg.norm(w["W_dec"].astype(np.float64), axis=1)

    def compute(x):
        act = lambda pre: relu(topk(pre * length)) / length  # noqa: E731
        f, y = function(w, act, False, inputs=S_IN, outputs=S_OUT)(x)
        return f * length / S_OUT, y

    return folder, compute, dict(site="mlp_in.12", target="mlp_out.12", k=K)


# --- others


def write_sparsify(folder, w, **more):
    state = dict(encoder__weight=w["W_enc"].T, encoder__bias=w["b_enc"], W_dec=w["W_dec"], b_dec=w["b_dec"])
    write_tensors(folder / "sae.safetensors", **state, **more)


@layout()
def sparsify_sae(folder, w):
    write_sparsify(folder / "layers.10", w)
    write_json(folder / "layers.10" / "cfg.json", dict(num_latents=F, k=K, signed=False, d_in=D))
    write_json(folder / "config.json", dict(model="EleutherAI/pythia-70m"))
    expected = dict(site="resid_post.10", signed=False, model="EleutherAI/pythia-70m")
    return folder / "layers.10", function(w, lambda pre: topk(relu(pre))), expected


@layout()
def sparsify_transcoder_of_the_first_version(folder, w):
    """That it is one is said of its run alone, and so the decoder's bias is subtracted."""
    write_sparsify(folder / "h.3.mlp", w)
    write_json(folder / "h.3.mlp" / "cfg.json", dict(num_latents=F, k=K, d_in=D))
    write_json(folder / "config.json", dict(model="gpt2", transcode=True))
    expected = dict(site="mlp_in.3", target="mlp_out.3", centred=True)
    return folder / "h.3.mlp", function(w, lambda pre: topk(relu(pre))), expected


@layout()
def sparsify_skip_transcoder(folder, w):
    w["W_skip"] = arrays(1)["W_enc"][:, :D]
    write_sparsify(folder / "layers.3.mlp", w, W_skip=w["W_skip"].T)
    cfg = dict(activation="topk", num_latents=F, k=K, d_in=D, transcode=True, skip_connection=True)
    write_json(folder / "layers.3.mlp" / "cfg.json", cfg)
    compute = function(w, lambda pre: topk(relu(pre)), False)
    return folder / "layers.3.mlp", compute, dict(site="mlp_in.3", target="mlp_out.3")


@layout()
def sparsify_of_one_of_several_seeds(folder, w):
    path, compute, expected = LAYOUTS["sparsify_skip_transcoder"](folder / "made")
    (folder / "layers.3.mlp").mkdir()
    write_json(folder / "config.json", dict(model="EleutherAI/pythia-70m"))
    seed = path.rename(folder / "layers.3.mlp" / "seed1")
    return seed, compute, expected | dict(model="EleutherAI/pythia-70m")


@layout()
def openai_topk(folder, w):
    file = folder / "resid_post_mlp_v5_32k" / "autoencoders" / "6.pt"
    state = {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T, "pre_bias": w["b_dec"]}
    state = {name: torch.tensor(array) for name, array in (state | dict(latent_bias=w["b_enc"])).items()}
    file.parent.mkdir(parents=True)
    torch.save(state | dict(activation="TopK", activation_state_dict=dict(k=K, postact_fn="ReLU")), file)
    expected = dict(site="resid_post.6", kind="topk", k=K, input_norm="layer_norm", model="gpt2")
    return file, normalised(function(w, lambda pre: relu(topk(pre))), "layer_norm"), expected


@layout()
def openai_relu(folder, w):
    file = folder / "resid_delta_mlp" / "autoencoders" / "11.pt"
    write_pickled(file, **linears(w, bias="pre_bias") | dict(encoder__bias=0.0, latent_bias=w["b_enc"]))
    return file, function(w), dict(site="mlp_out.11", kind="standard", input_norm="")


@layout()
def openai_neurons(folder, w):
    file = folder / "mlp_post_act" / "autoencoders" / "3.pt"
    write_pickled(file, **linears(w, bias="pre_bias") | dict(encoder__bias=0.0, latent_bias=w["b_enc"]))
    return file, function(w), dict(site="mlp_act.3", kind="standard", input_norm="", model="gpt2")


@layout()
def qwen_scope(folder, w):
    file = folder / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_30" / "layer4.sae.pt"
    write_pickled(file, **{name: array.T for name, array in w.items()})
    return file, function(w, lambda pre: topk(pre, 30), False), dict(site="resid_post.4", k=30, signed=True)


@layout()
def goodfire(folder, w):
    state = {name.replace("coder__", "coder_linear__"): array for name, array in linears(w).items()}
    write_pickled(folder / f"{NAME}.pth", **state)
    return folder, function(w, centred=False), dict(site="resid_post.19")


@layout()
def qresearch(folder, w):
    write_pickled(folder / "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", **linears(w))
    return folder, function(w, centred=False), dict(site="resid_post.19")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_published_layout_computes_what_its_publisher_says(name, tmp_path):
    path, compute, expected = LAYOUTS[name](tmp_path)
    dictionary = load_dictionary(path)
    f, y = compute(X)
    assert_computes(dictionary, X, (f, y))
    assert ((dictionary.encode(jnp.asarray(X)) != 0) == (f != 0)).mean() > 0.999 and 0 < (f != 0).mean() < 1
    assert {key: getattr(dictionary.config, key) for key in expected} == expected
    assert read_config(path) == dictionary.config


@pytest.mark.parametrize("kind", ["standard", "matryoshka", "jumprelu"])
def test_a_folder_without_a_description_is_known_by_its_tensors(kind, tmp_path):
    path, compute, _ = LAYOUTS[f"dictionary_learning_{kind}"](tmp_path)
    (path / "config.json").unlink()
    dictionary = load_dictionary(path)
    assert dictionary.config.kind == kind
    assert_computes(dictionary, X, compute(X))
    write_pickled(path / "ae.pt", odd=1.0)
    with pytest.raises(UserError, match="names no dict_class, and its tensors are those of no class"):
        load_dictionary(path)


def test_a_crosscoder_of_gemma_scope_2_has_features_that_read_one_layer_and_write_to_all(tmp_path):
    folder, layers = tmp_path / "crosscoder" / "layer_7_13_17_width_65k_l0_medium", (7, 13, 17)
    rng, made = np.random.default_rng(0), []
    for index in range(3):
        w = arrays(index, threshold=(0, 2)) | dict(W_dec=rng.standard_normal((F, 3, D)).astype(np.float32))
        names = dict(W_enc="w_enc", W_dec="w_dec")
        write_tensors(folder / f"params_layer_{index}.safetensors", **{names.get(n, n): a for n, a in w.items()})
        made.append({name: array.astype(np.float64) for name, array in w.items()})
    dictionary = load_dictionary(folder)
    assert dictionary.config.site == "+".join(f"resid_post.{layer}" for layer in layers)
    x = np.random.default_rng(1).standard_normal((20, 3, D)).astype(np.float32)
    f = [jump(w["threshold"])(x[:, index] @ w["W_enc"] + w["b_enc"]) for index, w in enumerate(made)]
    y = sum(np.einsum("bf,fpd->bpd", f[index], w["W_dec"]) for index, w in enumerate(made))
    y = (y + np.stack([w["b_dec"] for w in made])).reshape(20, -1)
    assert_computes(dictionary, x.reshape(20, -1), (np.concatenate(f, 1), y))
    (folder / "params_layer_1.safetensors").unlink()
    with pytest.raises(UserError, match="params_layer_1.safetensors is missing"):
        load_dictionary(folder)


@pytest.mark.parametrize("batch_topk", [False, True])
def test_a_crosscoder_of_two_models(batch_topk, tmp_path):
    name = "gemma-2-2b-L13-k100-lr1e-04" if batch_topk else "gemma-2-2b-crosscoder-l13-mu4.1e-02-lr1e-04"
    folder, rng = tmp_path / name, np.random.default_rng(0)
    w = dict(encoder__weight=rng.standard_normal((2, D, F)), decoder__weight=rng.standard_normal((2, F, D)))
    w |= dict(encoder__bias=rng.standard_normal(F), decoder__bias=rng.standard_normal((2, D)))
    more = dict(threshold=np.asarray(3.0), k=np.asarray(7.0)) if batch_topk else {}
    stored = write_tensors(folder / "model.safetensors", **w, **more)
    settings = dict(activation_dim=D, dict_size=F, num_layers=2)
    write_json(folder / "config.json", settings | (dict(k=7) if batch_topk else {}))
    dictionary, x = load_dictionary(folder), rng.standard_normal((20, 2, D)).astype(np.float32)
    assert dictionary.config.site == "resid_post.13+other:resid_post.13" and dictionary.config.widths == (D, D)
    pre = relu(np.einsum("bpd,pdf->bf", x.astype(np.float64), stored["encoder.weight"]) + stored["encoder.bias"])
    weight = np.linalg.norm(stored["decoder.weight"].astype(np.float64), axis=2).sum(0)
    f = pre * (pre * weight > 3.0) if batch_topk else pre
    y = np.einsum("bf,pfd->bpd", f, stored["decoder.weight"]) + stored["decoder.bias"]
    assert_computes(dictionary, x.reshape(20, -1), (f, y.reshape(20, -1)))


def test_a_crosscoder_of_normalised_inputs(tmp_path):
    """Whose tensors say what newer versions do: inputs less a mean and scaled, and by what activations are compared."""
    folder, rng, scale_P = tmp_path / "gemma-2-2b-L13-k100-lr1e-04", np.random.default_rng(0), np.array([0.5, 0.25])
    w = dict(encoder__weight=rng.standard_normal((2, D, F)), decoder__weight=rng.standard_normal((2, F, D)))
    w |= dict(encoder__bias=rng.standard_normal(F), decoder__bias=rng.standard_normal((2, D)))
    w |= dict(threshold=np.asarray(1.5), k=np.asarray(7.0), code_normalization_id=np.asarray(4))
    kept = dict(activation_mean=rng.standard_normal((2, D)), activation_std=np.ones((2, D)), target_rms=np.asarray(1.0))
    stored = write_tensors(folder / "model.safetensors", **w, **kept, activation_global_scale=scale_P)
    write_json(folder / "config.json", dict(activation_dim=D, dict_size=F, num_layers=2, k=9))
    dictionary, x_PxBxD = load_dictionary(folder), rng.standard_normal((2, 20, D)).astype(np.float32)
    assert (dictionary.config.scales, dictionary.config.k) == ((0.5, 0.25), 7)
    inputs = joined.join(dictionary.config, dict(zip(dictionary.site.split("+"), x_PxBxD, strict=True)))
    mean_PxD = stored["activation_mean"].astype(np.float64)
    scaled_PxBxD = (x_PxBxD - mean_PxD[:, None]) * scale_P[:, None, None]
    pre = relu(np.einsum("pbd,pdf->bf", scaled_PxBxD, stored["encoder.weight"]) + stored["encoder.bias"])
    f = pre * (pre > 1.5)
    y_BxPxD = np.einsum("bf,pfd->bpd", f, stored["decoder.weight"]) + stored["decoder.bias"]
    y_BxPxD = y_BxPxD / scale_P[:, None] + mean_PxD
    assert_computes(dictionary, inputs, (f, (y_BxPxD * scale_P[:, None]).reshape(20, -1)))
    for changes, message in (
        (dict(code_normalization_id=np.asarray(2)), "code_normalization is SAE, which cannot be followed"),
        (dict(activation_global_scale=np.zeros(2)), "the mean and scale of its inputs are not finite, or 0"),
        (dict(activation_mean=np.where(np.eye(2, D), np.nan, 1.0)), "the mean and scale of its inputs are not finite"),
    ):
        changed = w | kept | dict(activation_global_scale=scale_P) | changes
        write_tensors(folder / "model.safetensors", **changed)
        with pytest.raises(UserError, match=message):
            load_dictionary(folder)
    write_tensors(folder / "model.safetensors", **w, **kept)
    with pytest.raises(UserError, match="lacks activation_global_scale of the normalisation of its inputs"):
        load_dictionary(folder)
    kept |= dict(activation_mean=np.full((2, D), np.nan), activation_global_scale=np.ones(2))  # there is none
    write_tensors(folder / "model.safetensors", **w, **kept)
    assert load_dictionary(folder).config.scales == (1.0, 1.0)


def test_a_crosscoder_of_two_models_whose_scales_no_file_states(tmp_path, caplog):
    scales, rng = (0.2758961493232058, 0.24422852496546169), np.random.default_rng(0)
    w = dict(W_enc=(2, D, F), W_dec=(F, 2, D), b_enc=(F,), b_dec=(2, D))
    w = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in w.items()}
    for name in ("crosscoder-gemma-2-2b-model-diff", "another"):
        write_pickled(tmp_path / name / "cc_weights.pt", **w)
        write_json(tmp_path / name / "cfg.json", dict(hook_point="blocks.14.hook_resid_pre", model_name="gemma-2-2b"))
    with caplog.at_level("WARNING", "absl"):
        dictionary = load_dictionary(tmp_path / "crosscoder-gemma-2-2b-model-diff")
        assert not caplog.records
        load_dictionary(tmp_path / "another")
        assert "are in no file and are taken as 1" in caplog.text
    assert (dictionary.site, dictionary.config.scales) == ("resid_pre.14+other:resid_pre.14", scales)
    x_PxBxD = rng.standard_normal((2, 20, D)).astype(np.float32)
    inputs = joined.join(dictionary.config, dict(zip(dictionary.site.split("+"), x_PxBxD, strict=True)))
    scaled = x_PxBxD * np.reshape(scales, (2, 1, 1)).astype(np.float64)
    f = relu(np.einsum("pbd,pdf->bf", scaled, w["W_enc"]) + w["b_enc"])
    y = np.einsum("bf,fpd->bpd", f, w["W_dec"]) + w["b_dec"]
    assert_computes(dictionary, inputs, (f, y.reshape(20, -1)))


@torch.no_grad()
def test_the_stream_of_a_model_with_centred_writing_weights_is_the_published_one_less_its_mean():
    """As TransformerLens centres them: everything that is added to the stream loses its mean over the width."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_size=50)).eval()
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3 + 0.1)  # a mean that is not 0, and gains that are not 1
    ids = torch.arange(20)[None]
    published = model(ids, output_hidden_states=True).hidden_states
    written = [model.transformer.wte.weight, model.transformer.wpe.weight]
    for block in model.transformer.h:
        written += [block.attn.c_proj.weight, block.attn.c_proj.bias, block.mlp.c_proj.weight, block.mlp.c_proj.bias]
    for parameter in written:
        parameter -= parameter.mean(-1, keepdim=True)
    centred = model(ids, output_hidden_states=True).hidden_states
    for before, after in zip(published[:-1], centred[:-1], strict=True):  # the last ones are after the final norm
        assert before.mean(-1).abs().min() > 1e-3
        normed = normalise(jnp.asarray(before.numpy()), "center").x_xD
        np.testing.assert_allclose(normed, after.numpy(), atol=1e-4 * float(after.abs().max()))


# --- sets


@pytest.mark.parametrize("described", [True, False])
def test_a_set_may_lack_its_description_and_k_of_one_set_is_known(described, tmp_path):
    folder, made = tmp_path / "crv-8b-instruct-transcoders", [arrays(layer) for layer in range(2)]
    for layer, w in enumerate(made):
        write_tensors(folder / f"layer_{layer}.safetensors", **w | dict(W_enc=w["W_enc"].T))
    settings = dict(model_kind="transcoder_set", model_name="m", activation="topk")
    settings |= dict(feature_input_hook="mlp.hook_in", feature_output_hook="mlp.hook_out")
    if described:
        for k, message in (({}, "k is 128: expected a whole number from 1 to the 40"), (dict(k=0), "number above 0")):
            (folder / "config.yaml").write_text(yaml.safe_dump(settings | k))
            with pytest.raises(UserError, match=message):
                load_transcoders(folder)
        (folder / "config.yaml").write_text(yaml.safe_dump(settings | dict(k=F)))
        assert load_transcoders(folder)[0].config.k == F  # all of them
        (folder / "config.yaml").write_text(yaml.safe_dump(settings | dict(k=30)))
    for layer, (transcoder, w) in enumerate(zip(load_transcoders(folder), made, strict=True)):
        compute = function(w, (lambda pre: topk(pre, 30)) if described else relu, centred=False)
        assert_computes(transcoder, X, compute(X))
        assert (transcoder.config.site, transcoder.config.target) == (f"mlp_in.{layer}", f"mlp_out.{layer}")


def test_k_of_a_set_without_a_description_is_in_its_files(tmp_path):
    w = arrays()
    write_tensors(tmp_path / "layer_0.safetensors", **w | dict(W_enc=w["W_enc"].T, k=np.asarray(30.0)))
    (transcoder,) = load_transcoders(tmp_path)
    assert_computes(transcoder, X, function(w, lambda pre: topk(pre, 30), centred=False)(X))


def test_a_set_lists_files_on_the_hub_of_a_revision(tmp_path, monkeypatch):
    made, asked = [arrays(layer, threshold=(0, 2)) for layer in range(2)], []
    for layer, w in enumerate(made):
        np.savez(tmp_path / f"{layer}.npz", **w)

    def download(repository, file, revision):
        asked.append((repository, file, revision))
        return tmp_path / Path(file).name

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    settings = dict(model_kind="transcoder_set", model_name="google/gemma-2-2b")
    settings |= dict(feature_input_hook="ln2.hook_normalized", feature_output_hook="hook_mlp_out")
    settings |= dict(transcoders=["hf://org/s/a/0.npz@v2", "hf://org/s/a/1.npz"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    loaded = load_transcoders(tmp_path)
    assert asked == [("org/s", "a/0.npz", "v2"), ("org/s", "a/1.npz", "main")]
    assert [each.config.site for each in loaded] == ["mlp_normed.0", "mlp_normed.1"]
    assert_computes(loaded[1], X, function(made[1], jump(made[1]["threshold"]), False)(X))
    opened = circuit_tracer.open_set(tmp_path)
    np.testing.assert_array_equal(opened.rows(1, "W_enc", np.array([3, 0])), made[1]["W_enc"][:, [3, 0]].T)


# --- addresses


@pytest.fixture
def nothing_fetched():
    """Repositories on the hub are fetched once in a process."""
    place._fetch.cache_clear()
    yield
    place._fetch.cache_clear()


@pytest.fixture
def registry(tmp_path, monkeypatch, nothing_fetched):
    """SAELens' registry as its package has it, and its repository on the hub."""
    package = tmp_path / "site" / "sae_lens"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('it must not be imported')")
    release = dict(repo_id="jbloom/GPT2", model="gpt2-small", saes=[dict(id="blocks.8.hook_resid_pre", path="a/b")])
    overrides = dict(model_from_pretrained_kwargs=dict(center_writing_weights=True))
    centred = json.loads(json.dumps(release)) | dict(config_overrides=overrides)
    releases = {"gpt2-small-res-jb": centred, "plain": release}
    layers = dict(conversion_func="mntss_clt_layer_transcoder", saes=[dict(id="layer_1", path=1)])
    releases |= {"layers": release | layers, "heads": release | dict(conversion_func="connor_rob_hook_z")}
    releases = json.loads(json.dumps(releases))  # or YAML would share what is equal
    (package / "pretrained_saes.yaml").write_text(yaml.safe_dump(releases))
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **wanted: str(tmp_path / name))
    return saelens(tmp_path / "jbloom" / "GPT2" / "a" / "b", arrays(), **OLD)


def test_a_release_of_saelens_registry_brings_the_settings_that_its_folder_lacks(registry, monkeypatch):
    """The weights of this release's model were centred, which the folder itself does not say."""
    names = [f"saelens:{release}/blocks.8.hook_resid_pre" for release in ("gpt2-small-res-jb", "plain")]
    centred, plain = map(load_dictionary, names)
    assert (centred.config.input_norm, plain.config.input_norm) == ("center", "")
    assert saejax.SAE.from_pretrained("plain", "blocks.8.hook_resid_pre").config == plain.config
    assert_computes(centred, X, normalised(function(arrays()), "center")(X))
    assert hash_dictionaries(names[1]) == hash_dictionaries(str(registry)) != hash_dictionaries(names[0])
    with pytest.raises(UserError, match="no dictionary 'x': expected one such as blocks.8.hook_resid_pre"):
        load_dictionary("saelens:plain/x")
    with pytest.raises(UserError, match="no release 'gpt2-medium': expected one such as gpt2-small-res-jb"):
        load_dictionary("saelens:gpt2-medium/x")
    with pytest.raises(UserError, match="layers/layer_1 is a layer of a cross-layer transcoder"):
        load_dictionary("saelens:layers/layer_1")
    with pytest.raises(UserError, match="value biases TransformerLens folded away"):
        load_dictionary("saelens:heads/blocks.8.hook_resid_pre")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="SAELens is not installed: install it .*, or give the address on the hub"):
        load_dictionary("saelens:gpt2-small-res-jb/blocks.8.hook_resid_pre")


def test_only_the_named_folder_of_a_repository_is_fetched(tmp_path, monkeypatch, nothing_fetched):
    asked = []

    def snapshot(name, revision, allow_patterns, ignore_patterns):
        asked.append((name, revision, allow_patterns, ignore_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    path, _, _ = LAYOUTS["gemma_scope_1"](tmp_path)
    below = path.relative_to(tmp_path).as_posix()
    assert load_dictionary(f"hf://google/scope/{below}@v1").site == "resid_post.12"
    ((name, revision, wanted, skipped),) = asked
    assert (name, revision, skipped) == ("google/scope", "v1", [f"{below}/*/*"]) and f"{below}/*.npz" in wanted
    file, _, _ = LAYOUTS["qwen_scope"](tmp_path)
    named = file.relative_to(tmp_path)
    assert load_dictionary(f"hf://Qwen/SAE/{named.as_posix()}").site == "resid_post.4"
    besides = [named.with_name(name).as_posix() for name in ("config.json", "cfg.json", "config.yaml")]
    assert asked[-1][2][:4] == [named.as_posix(), *besides]
    place._fetch.cache_clear()
    for revision in ("v1", "refs/pr/3"):  # the hub's own order
        assert load_dictionary(f"hf://google/scope@{revision}/{below}").site == "resid_post.12"
        assert asked[-1][:2] == ("google/scope", revision) and f"{below}/*.npz" in asked[-1][2]
    for address in ("hf://alone", "hf://", "hf://a/b@"):
        with pytest.raises(UserError, match="expected hf://ORG/NAME"):
            load_dictionary(address)


def test_a_folder_that_is_called_like_a_file_is_fetched(tmp_path, monkeypatch, nothing_fetched):
    """As "v5_32k_layer_0.pt" of jbloom/GPT2-Small-OAI-v5-32k-resid-post-SAEs."""
    remote = saelens(tmp_path / "remote" / "v5_32k_layer_0.pt", arrays(), **OLD).parent

    def snapshot(name, revision, allow_patterns, ignore_patterns):
        files = [file.relative_to(remote).as_posix() for file in remote.rglob("*.*") if file.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(remote / file, tmp_path / file)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    dictionary = load_dictionary("hf://jbloom/SAEs/v5_32k_layer_0.pt")
    assert_computes(dictionary, X, function(arrays())(X))


def test_files_of_one_layer_each_are_a_folders_dictionaries(tmp_path):
    file, _, _ = LAYOUTS["qwen_scope"](tmp_path)
    with pytest.raises(UserError, match="folders of such: name one, such as .*layer4.sae.pt"):
        load_dictionary(file.parent)  # others may not have been fetched
    assert [sae.site for sae in load_all(file.parent).values()] == ["resid_post.4"]
    for layer in (0, 10):
        write_pickled(file.with_name(f"layer{layer}.sae.pt"), **{name: array.T for name, array in arrays().items()})
    assert [sae.site for sae in load_all(file.parent).values()] == ["resid_post.0", "resid_post.4", "resid_post.10"]
    before = hash_dictionaries(str(file))
    write_json(file.with_name("config.json"), dict(k=3))
    assert hash_dictionaries(str(file)) != before and load_dictionary(file).config.k == 3


# --- what is refused, in one line


def settings(file, **changes):
    def change(path):
        values = json.loads((path / file).read_text())
        for key, value in changes.items():
            at = values.get("trainer", values)
            at.pop(key, None) if value is ... else at.update({key: value})
        write_json(path / file, values)

    return change


def cut(file):
    return lambda path: (path / file).write_bytes((path / file).read_bytes()[:200])


def without_skip_path(path):
    file = path / "params.safetensors"
    state = load_file(file)
    del state["affine_skip_connection"]
    write_tensors(file, **state)


def overwrite(file):
    """Write compressed arrays, and other bytes over the first of them."""
    np.savez_compressed(file, **arrays(threshold=(0, 2)))
    content = bytearray(file.read_bytes())
    content[200:1000] = b"\xff" * 800
    file.write_bytes(content)


TOPK = dict(dict_class="AutoEncoderTopK", k=K)
many = {f"w{number:02}": 1.0 for number in range(40)}
WITH_K = "saelens_4_with_k_among_the_activations_arguments"
JUMPS = "saelens_4_jumprelu_with_a_scaling_factor"
OLDEST, NEWEST, LEARNED = "saelens_before_version_3", "saelens_6_with_unknown_settings", "dictionary_learning_topk"


@pytest.mark.parametrize(
    "name,change,message",
    [
        (OLDEST, settings("cfg.json", d_sae=7), "d_sae is 7, but the arrays .* have 40"),
        (OLDEST, settings("cfg.json", activation_fn_str="tanh-relu"), "activation_fn is 'tanh"),
        (OLDEST, settings("cfg.json", hook_point_head_index=3), "hook_head_index is 3, expected null"),
        ("saelens_6_with_a_constant_factor", settings("cfg.json", activation_normalization_factor=...), "is missing"),
        ("saelens_6_with_a_constant_factor", settings("cfg.json", activation_normalization_factor=-1), "is -1: expect"),
        (NEWEST, lambda path: write_json(path / "cfg.json", {}), "is not the description of a dictionary"),
        (NEWEST, settings("cfg.json", architecture="odd"), "unknown architecture"),
        (NEWEST, settings("cfg.json", architecture="temporal"), "saejax.load_temporal reads it"),
        (NEWEST, settings("cfg.json", normalize_activations="odd"), "is 'odd': expected"),
        ("saelens_6_of_centred_weights", settings("cfg.json", model_name="odd"), "cannot undo for odd"),
        ("gemma_scope_1", cut("params.npz"), "params.npz is truncated or not a npz file"),
        ("gemma_scope_2_affine_transcoder", without_skip_path, "has no affine_skip_connection, and its folder's name"),
        ("goodfire", cut(f"{NAME}.pth"), "SAE-l19.pth is truncated"),
        ("goodfire", lambda path: write_pickled(path / f"{NAME}.pth", pre_bias=1.0), "holds pre_bias, which no dictio"),
        (
            "goodfire",
            lambda path: write_pickled(path / f"{NAME}.pth", **many),
            "w00, .*w11 and 28 more,",
        ),
        (LEARNED, settings("config.json", k=K + 1), f"ae.pt: k is {K}, and its description says {K + 1}"),
        (LEARNED, settings("config.json", dict_class="Odd"), "dict_class is 'Odd', which cannot"),
        (LEARNED, lambda path: write_pickled(path / "ae.pt", k=3), "lacks decoder.weight, encoder"),
        (LEARNED, settings("config.json", dict_class=...), "of AutoEncoderTopK and BatchTopKSAE: fetch"),
        ("llama_scope_1", settings("hyperparams.json", act_fn="relu"), "act_fn is 'relu', which no dictionary here"),
        ("llama_scope_1", settings("hyperparams.json", jump_relu_threshold=0), "jump_relu_threshold is 0"),
        ("llama_scope_1", settings("hyperparams.json", dataset_average_activation_norm=...), "expected norms above 0"),
        (
            "llama_scope_1",
            settings("hyperparams.json", dataset_average_activation_norm={"in": float("inf"), "out": 1.0}),
            "expected norms above 0",
        ),
        ("llama_scope_r1", settings("config.json", sae_type="lorsa"), "sae_type is 'lorsa'"),
        ("llama_scope_2", settings("config.json", top_k=F + 1), "k is 41: expected a whole number from 1 to the 40"),
        ("sparsify_skip_transcoder", settings("cfg.json", activation="groupmax"), "activation is 'groupmax'"),
        ("sparsify_skip_transcoder", settings("cfg.json", transcode="false"), "transcode is 'false': expected true or"),
        ("sparsify_sae", settings("cfg.json", signed=True), "signed is True, which no dictionary here has"),
        ("sparsify_sae", settings("cfg.json", normalize_io=True), "normalize_io is True, which no dictionary here has"),
        (
            "sparsify_sae",
            settings("cfg.json", skip_connection=True),
            "safetensors, which has no W_skip",
        ),
        ("sparsify_skip_transcoder", settings("cfg.json", skip_connection=False), "safetensors, which has a W_skip"),
        (JUMPS, settings("cfg.json", architecture=None), "has threshold, which belongs to another one"),
        (OLDEST, settings("cfg.json", hook_point=5), "has a setting of another type"),
        (WITH_K, settings("cfg.json", activation_fn_kwargs="k"), "a setting of another type"),
        (NEWEST, settings("cfg.json", prepend_bos=[]), "a setting of another type"),
        (NEWEST, settings("cfg.json", model_from_pretrained_kwargs="x"), "a setting of another type"),
        (NEWEST, settings("cfg.json", apply_b_dec_to_input="no"), "apply_b_dec_to_input is 'no': expected true or"),
        ("saelens_6_with_a_constant_factor", settings("cfg.json", activation_normalization_factor="x"), "is .x.: exp"),
        ("llama_scope_1", settings("hyperparams.json", hook_point_in=5), "a setting of another type"),
        ("llama_scope_1", settings("hyperparams.json", dataset_average_activation_norm={"in": "x"}), "another type"),
        (LEARNED, lambda path: write_json(path / "config.json", dict(trainer=TOPK, buffer="x")), "another type"),
        ("gemma_scope_1", lambda path: overwrite(path / "params.npz"), "params.npz is truncated or not a npz file"),
        ("sparsify_skip_transcoder", settings("cfg.json", k=F + 1), "k is 41: expected a whole number from 1 to the"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_followed_or_read_is_refused_in_one_line(name, change, message, tmp_path):
    path, _, _ = LAYOUTS[name](tmp_path)
    change(path)
    with pytest.raises(UserError, match=message) as error:
        load_dictionary(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype,stored", [("float32", "float32"), ("auto", "bfloat16"), ("bfloat16", "bfloat16")])
def test_bfloat16_matrices_stay_so_when_asked_and_compute_the_same(dtype, stored, tmp_path):
    w = arrays()
    write_json(tmp_path / "cfg.json", NEW | dict(metadata=META))
    write_tensors(tmp_path / "sae_weights.safetensors", ml_dtypes.bfloat16, **w)
    dictionary, wide = load_dictionary(tmp_path, dtype=dtype), load_dictionary(tmp_path)
    assert dictionary.W_enc_DxF.dtype == dictionary.W_dec_FxD.dtype == stored
    assert dictionary.b_enc_F.dtype == dictionary.b_dec_D.dtype == "float32"
    # Products of the stored and of the widened matrices are two programs: the same to rounding of fp32.
    assert relative(dictionary(jnp.asarray(X)), wide(jnp.asarray(X))) < 1e-5
    with pytest.raises(UserError, match="unknown dtype 'float8'"):
        load_dictionary(tmp_path, dtype="float8")


def test_a_release_whose_folders_lack_its_normalisation_is_told(tmp_path, caplog):
    folder = tmp_path / "models--jbloom--GPT2-Small-SAEs-Reformatted" / "blocks.8.hook_resid_pre"
    with caplog.at_level("WARNING", "absl"):
        load_dictionary(saelens(folder, arrays(), **OLD))
    assert "does not say that its release needs input_norm='center'" in caplog.text


def test_settings_of_saelens_that_are_not_known_are_told(tmp_path, caplog):
    known = dict(d_in=D, d_sae=F, architecture="standard", l1_coefficient=1.0, decoder_init_norm=0.1, metadata=META)
    with caplog.at_level("WARNING", "absl"):
        load_dictionary(saelens(tmp_path / "known", arrays(), **known))
        assert not caplog.text
        load_dictionary(saelens(tmp_path / "unknown", arrays(), **known, lora_rank=3))
    assert "cfg.json has lora_rank, which saejax does not know" in caplog.text


@pytest.mark.parametrize("value", ["expected_average_only_in", True])
def test_a_factor_of_the_inputs_that_is_missing_is_told(value, tmp_path, caplog):
    saelens(tmp_path, arrays(), **OLD | dict(normalize_activations=value))
    with caplog.at_level("WARNING", "absl"):
        load_dictionary(tmp_path)
    assert "the factor is not in the folder" in caplog.text


def test_a_layer_of_a_cross_layer_transcoder_is_refused_by_name(tmp_path):
    w = arrays(threshold=(0, 1)) | dict(W_dec=np.zeros((F, 1, D), np.float32))
    file = tmp_path / "params_layer_0.safetensors"
    write_tensors(file, **{name.lower(): array for name, array in w.items()})
    for path, what in ((tmp_path, "a cross-layer"), (file, "a layer of a cross-layer")):
        with pytest.raises(UserError, match=f"holds no dictionary but {what} transcoder: trace it"):
            load_dictionary(path)


def test_a_site_that_is_named_must_be_there_and_what_is_none_says_what_to_do(tmp_path):
    path, _, _ = LAYOUTS["goodfire"](tmp_path)
    assert read_config(path, site="blocks.3.hook_resid_mid").site == "resid_mid.3"
    for site, message in (
        ("resid_pots.3", "no site 'resid_pots.3'"),
        ("blocks.3.hook_k", "hook blocks.3.hook_k is none"),
    ):
        with pytest.raises(UserError, match=message):
            read_config(path, site=site)
    for site, message in (
        ("unknown", "give it as site= of saejax.load"),
        ("mlp_normed.3", "only attribution graphs read"),
    ):
        config = dataclasses.replace(read_config(path), site=site)
        with pytest.raises(UserError, match=message):
            load_dictionary(path).with_config(config).ablate([1])


def test_the_smallest_gemma_3_has_no_suffix(tmp_path):
    path, _, _ = LAYOUTS["gemma_scope_2_affine_transcoder"](tmp_path)
    path = (tmp_path / "gemma-scope-2-1b-it").rename(tmp_path / "gemma-scope-2-270m-pt") / path.parent.name / path.name
    assert read_config(path).model == "google/gemma-3-270m"


def test_a_damaged_description_of_ours_is_refused_in_one_line(tmp_path):
    path, _, _ = LAYOUTS[NEWEST](tmp_path / "published")
    save_dictionary(tmp_path / "ours", load_dictionary(path))
    file = tmp_path / "ours" / "dictionary.json"
    content = json.loads(file.read_text())
    damages = [dict(config=content["config"] | changed) for changed in (dict(d_in=5), dict(n_features=None))]
    for damage in (*damages, dict(config=5), dict(arrays={}), dict(arrays=[1])):
        write_json(file, content | damage)
        with pytest.raises(UserError):
            load_dictionary(tmp_path / "ours")
    write_json(file, content)
    for named, message in (dict(dtype="float16"), "unknown dtype"), (dict(matmul_dtype="float16"), "unknown matmul_dt"):
        with pytest.raises(UserError, match=message):
            load_dictionary(tmp_path / "ours", **named)


def test_arrays_that_are_not_finite_are_refused_by_name(tmp_path):
    """A threshold of infinity is a feature that never fires, as some publishers store dead ones."""
    w = arrays(threshold=(0, 1))
    w["threshold"][3] = np.inf
    cfg = NEW | dict(architecture="jumprelu")
    good, bad = (saelens(tmp_path / name, w, **cfg, metadata=META) for name in ("good", "bad"))
    dictionary = load_dictionary(good)
    assert not np.asarray(dictionary.encode(jnp.asarray(X)))[:, 3].any()
    w["W_enc"][2, 5], w["b_dec"][1], w["threshold"][4] = np.nan, np.inf, np.nan
    write_tensors(bad / "sae_weights.safetensors", **w)
    with pytest.raises(UserError, match="hold NaN or infinity in float32: W_enc, b_dec, threshold;"):
        load_dictionary(bad)
    ours = Dictionary(dictionary.config, **dictionary.arrays | dict(W_dec_FxD=jnp.full((F, D), jnp.nan)))
    save_dictionary(tmp_path / "ours", ours)
    with pytest.raises(UserError, match="hold NaN or infinity in float32: W_dec;"):
        load_dictionary(tmp_path / "ours")
