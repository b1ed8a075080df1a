"""Dictionaries of other publishers, one folder or file each; read only.

Each function describes the dictionary of one publisher's layout: its tensor names, the settings that change its
results, and what is folded into the arrays. ``formats`` has the table of all of them.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from saejax.dictionaries import rescale
from saejax.dictionaries.formats import hooks, tensors
from saejax.dictionaries.kinds import by_name
from saejax.dictionaries.kinds.base import Arrays
from saejax.dictionaries.modules import DictionaryConfig
from saejax.errors import UserError

_LINEAR = {"W_enc_DxF": "encoder.weight.T", "b_enc_F": "encoder.bias", "W_dec_FxD": "decoder.weight.T"}
_PLAIN = {"W_enc_DxF": "W_enc", "b_enc_F": "b_enc", "W_dec_FxD": "W_dec", "b_dec_D": "b_dec"}
_L0 = re.compile(r"-L0_(\d+)")
_QWEN = re.compile(r"layer(\d+)\.sae\.pt")
_LAYER_SUFFIX = re.compile(r"-l(\d+)\b", re.IGNORECASE)
_OPENAI_PATH = re.compile(r"/(resid_(?:delta|post)_(?:attn|mlp)|mlp_post_act)[^/]*/autoencoders/(\d+)\.pt$")
_OPENAI_SITES = dict(
    resid_delta_attn="attn_out",
    resid_post_attn="resid_mid",
    mlp_post_act="mlp_act",
    resid_delta_mlp="mlp_out",
    resid_post_mlp="resid_post",
)
# Factors of the inputs of a crosscoder's parts that its publisher's code states, by the name of its repository.
_KNOWN_SCALES = {"crosscoder-gemma-2-2b-model-diff": (0.2758961493232058, 0.24422852496546169)}


# --- sparsify (EleutherAI)

_SPARSIFY = {"W_enc_DxF": "encoder.weight.T", "b_enc_F": "encoder.bias", "W_dec_FxD": "W_dec", "b_dec_D": "b_dec"}
# Settings that change what is computed: signed ones keep the k largest by size, of any sign.
_SPARSIFY_UNREAD = (
    "signed",
    "normalize_io",
    "post_encoder_scale",
    "embed_skip",
    "gram_lookup",
    "n_targets",
    "n_sources",
)
_MODULE_INPUTS = dict(mlp_out="mlp_in", mlp_in="mlp_in", resid_post="resid_pre")  # what a module with this output reads


def _input_of(site: str) -> str:
    """Return the site that the module with this output reads."""
    kind, _, layer = site.partition(".")
    if site.startswith(hooks.NO_SITE):  # refused later, by name
        return site
    return f"{_MODULE_INPUTS[kind]}.{layer}" if kind in _MODULE_INPUTS else hooks.UNKNOWN


def parse_sparsify(folder: Path) -> tensors.Published:
    """Describe a folder with ``cfg.json`` and ``sae.safetensors``, named after the module that it reads.

    A transcoder predicts that module's output from its input. A run of several seeds has folders for each in it.
    """
    folder = folder.absolute()
    hookpoint = folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder
    file, weights = folder / "cfg.json", folder / "sae.safetensors"
    settings, state = tensors.read_settings(file), tensors.open_tensors(weights)
    if (activation := settings.get("activation", "topk")) != "topk":
        raise UserError(f"{file}: activation is {activation!r}, which no dictionary here has: expected 'topk'")
    if unread := [f"{key} is {settings[key]!r}" for key in _SPARSIFY_UNREAD if settings.get(key)]:
        raise UserError(f"{file}: {', '.join(unread)}, which no dictionary here has")
    has_skip = "W_skip" in state
    if has_skip != tensors.flag(file, settings, "skip_connection", has_skip):
        raise UserError(
            f"{file}: skip_connection does not fit {weights.name}, which has {'a' if has_skip else 'no'} W_skip"
        )
    layout = _SPARSIFY | ({"W_skip_DxD": "W_skip.T"} if has_skip else {})
    run = hookpoint.parent / "config.json"  # of the run that trained all folders beside this one
    run_settings = tensors.read_settings(run) if run.is_file() else {}
    model = str(run_settings.get("model") or "")
    # The first transcoders were trained by a class that did not know it and subtracted the bias as in an SAE.
    centred = not tensors.flag(file, settings, "transcode", False)
    transcoder = not centred or ("transcode" not in settings and tensors.flag(run, run_settings, "transcode", False))
    output = hooks.to_site(hookpoint.name, model)
    if output.startswith((hooks.MODULE, hooks.NO_SITE)) and "." not in hookpoint.name:  # a name that its user gave
        output = hooks.UNKNOWN
    parsed = tensors.describe(
        weights,
        state,
        layout,
        kind="topk",
        site=_input_of(output) if transcoder else output,
        target=output if transcoder else "",
        k=tensors.positive_int(file, "k", settings.get("k")),
        centred=centred,
        model=model,
    )
    for key, size in (("d_in", parsed.config.d_in), ("num_latents", parsed.config.n_features)):
        if settings.get(key) and settings[key] != size:
            raise UserError(f"{file}: {key} is {settings[key]!r}, but the arrays of {weights.name} have {size}")
    return parsed


# --- dictionary_learning (Marks, Karvonen, Mueller)

# dict_class: (kind, layout, whether the decoder's bias is subtracted from the input)
_CLASSES: dict[str, tuple[str, dict[str, str], bool]] = {
    "AutoEncoder": ("standard", _LINEAR | {"b_dec_D": "bias"}, True),
    "AutoEncoderNew": ("standard", _LINEAR | {"b_dec_D": "decoder.bias"}, False),
    "AutoEncoderTopK": ("topk", _LINEAR | {"b_dec_D": "b_dec"}, True),
    "BatchTopKSAE": ("batchtopk", _LINEAR | {"b_dec_D": "b_dec", "threshold_F": "threshold"}, True),
    "MatryoshkaBatchTopKSAE": ("matryoshka", _PLAIN | {"threshold_F": "threshold"}, True),
    "JumpReluAutoEncoder": ("jumprelu", _PLAIN | {"threshold_F": "threshold"}, False),
    "GatedAutoEncoder": (
        "gated",
        {"W_enc_DxF": "encoder.weight.T", "b_enc_F": "gate_bias", "W_dec_FxD": "decoder.weight.T"}
        | {"b_dec_D": "decoder_bias", "r_mag_F": "r_mag", "b_mag_F": "mag_bias"},
        True,
    ),
}
_CLASSES["MatroyshkaBatchTopKSAE"] = _CLASSES["MatryoshkaBatchTopKSAE"]  # as it was spelled at first
_WITH_K = ("topk", "batchtopk", "matryoshka")
# Older versions multiply activations by the lengths of decoder rows, newer ones do not, and files do not tell.
_BY_VERSION = ("JumpReluAutoEncoder", "GatedAutoEncoder")
# What science-of-finetuning's classes keep of the normalisation of inputs; old ones keep nothing.
_NORMALISER = ("activation_mean", "activation_std", "activation_global_scale", "target_rms")
_UNIT_ROWS = 4e-3  # by how much the length of a row may differ from 1, as bfloat16 rounds


def find_dictionary_learning(path: Path) -> Path | None:
    """Return the file of a dictionary_learning folder, or the path itself where it is one, as of a checkpoint."""
    file = path if re.fullmatch(r"ae(_\d+)?\.pt", path.name) else path / "ae.pt"
    return file if file.is_file() else None


def parse_dictionary_learning(path: Path) -> tensors.Published:
    """Describe a folder with ``ae.pt`` and ``config.json``, whose ``trainer`` says which class it is.

    Checkpoints are in a folder in it, ``checkpoints/ae_100.pt``.
    """
    weights = find_dictionary_learning(path)
    assert weights is not None
    folder = weights.parent.parent if weights.parent.name == "checkpoints" else weights.parent
    file = folder / "config.json"
    settings = tensors.read_settings(file) if file.is_file() else {}
    trainer = settings.get("trainer") if settings else {}
    if not isinstance(trainer, dict):
        raise UserError(f"{file} has no trainer: it is not the description of a dictionary_learning folder")
    state = tensors.open_tensors(weights)
    name = str(trainer.get("dict_class") or _class_of(file, state))
    if name.endswith("CrossCoder"):
        return _parse_crosscoder(weights, state, trainer)
    if name not in _CLASSES:
        raise UserError(f"{file}: dict_class is {name!r}, which cannot be read: expected one of {', '.join(_CLASSES)}")
    kind, layout, centred = _CLASSES[name]
    if name == "AutoEncoder" and "bias" not in state and "b_dec" in state:
        layout = layout | {"b_dec_D": "b_dec"}
    model = str(trainer.get("lm_name") or "")
    site, target = _dictionary_learning_sites(folder, settings, model)
    sizes: Any = ()
    if kind == "matryoshka":
        sizes = state["group_sizes"].numbers() if "group_sizes" in state else trainer.get("group_sizes") or ()

    normaliser = _normaliser(weights, state) if kind == "batchtopk" else None

    def fold(arrays: Arrays) -> Arrays:
        if normaliser:
            mean_D, scale = normaliser
            arrays |= dict(W_enc_DxF=arrays["W_enc_DxF"] * scale, W_dec_FxD=arrays["W_dec_FxD"] / scale)
            arrays |= dict(b_dec_D=mean_D + arrays["b_dec_D"] / scale)
        if "threshold_F" in arrays:  # a ReLU gives the activations, whatever the threshold
            arrays["threshold_F"] = np.maximum(np.broadcast_to(arrays["threshold_F"], arrays["b_enc_F"].shape), 0)
        if name not in _BY_VERSION:
            return arrays
        length_F = rescale.decoder_lengths(arrays["W_dec_FxD"])
        if np.abs(length_F - 1).max() > _UNIT_ROWS:
            raise UserError(
                f"{weights}: its decoder rows have lengths from {length_F.min():.3g} to {length_F.max():.3g}, by which "
                f"only some versions of {name} multiply activations, and nothing says which version this is: bring "
                "them to length 1 with the version that trained it"
            )
        return arrays

    parsed = tensors.describe(
        weights,
        state,
        layout,
        fold,
        kind=kind,
        site=site,
        target=target,
        k=_k(weights, trainer, state) if kind in _WITH_K else 0,
        groups=tuple(int(end) for end in np.cumsum(np.asarray(sizes, int))),
        centred=centred,
        model=model,
    )
    # Its loader gives the k of the settings, and refuses another one.
    if kind == "topk" and trainer.get("k") not in (None, parsed.config.k):
        described = f"k is {parsed.config.k}, and its description says {trainer['k']!r}"
        raise UserError(f"{weights}: {described}: fetch both again")
    return parsed


def _class_of(file: Path, state: Mapping[str, Any]) -> str:
    """Return the class of a folder without its description ``file``: the only one that has tensors of these names."""
    matching: dict[str, str] = {}  # by kind, as one class has two spellings
    # Later versions of TopK keep a threshold, too, which is not used.
    extra = dict(topk={"threshold"}, matryoshka={"group_sizes"}, batchtopk=set(_NORMALISER))
    for name, (kind, layout, _) in _CLASSES.items():
        needed = {tensor.removesuffix(".T") for tensor in layout.values()} | ({"k"} if kind in _WITH_K else set())
        if needed <= set(state) <= needed | extra.get(kind, set()):
            matching.setdefault(kind, name)
    if len(matching) != 1:
        whose = " and ".join(matching.values()) or "no class that can be read"
        raise UserError(f"{file} names no dict_class, and its tensors are those of {whose}: fetch config.json, too")
    return next(iter(matching.values()))


def _dictionary_learning_sites(folder: Path, settings: Mapping[str, Any], model: str) -> tuple[str, str]:
    """Return what a dictionary reads and predicts, by its settings, or by the names of its folders."""
    trainer, buffer = (settings.get(key) or {} for key in ("trainer", "buffer"))
    if buffer.get("io") == "in":
        model = ""  # a norm after the module changes its output alone
    if trainer.get("submodule_name"):
        site = hooks.to_site(str(trainer["submodule_name"]), model)
    else:
        sites = [hooks.to_site(part, model) for part in reversed(folder.absolute().parts) if "hook_" not in part]
        site = next((site for site in sites if not site.startswith(hooks.MODULE)), hooks.UNKNOWN)
    if buffer.get("io") == "in":  # trained on what the submodule reads
        return _input_of(site), ""
    if buffer.get("io") != "in_and_out":
        return site, ""
    kind, _, layer = site.partition(".")
    return (f"mlp_in.{layer}", f"mlp_out.{layer}") if kind in ("mlp_in", "mlp_out") else (hooks.UNKNOWN, hooks.UNKNOWN)


def _k(file: Path, settings: Mapping[str, Any], state: Mapping[str, tensors.Tensor]) -> int:
    """Return k of the tensors, where most versions keep it, else of the settings, which may have that of the start."""
    return tensors.positive_int(file, "k", int(state["k"].numbers()[0]) if "k" in state else settings.get("k"))


def _normaliser(file: Path, state: Mapping[str, tensors.Tensor]) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the mean that inputs are taken less, and the factor of the difference; outputs undo both. None: as is."""
    if not set(_NORMALISER) & set(state):
        return None
    if missing := [name for name in _NORMALISER[:3] if name not in state]:
        raise UserError(f"{file} lacks {', '.join(missing)} of the normalisation of its inputs: fetch it again")
    mean, std, scale = (state[name].read() for name in _NORMALISER[:3])
    if np.isnan(mean).all() or np.isnan(std).all():  # how its classes say that there is none
        return None
    if not (all(np.isfinite(part).all() for part in (mean, std, scale)) and (scale > 0).all()):
        raise UserError(f"{file}: the mean and scale of its inputs are not finite, or 0: fetch it again")
    return mean, scale


# --- crosscoders of science-of-finetuning, and of dictionary_learning

_CODE_NORMALIZATIONS = ("CROSSCODER", "SAE", "MIXED", "NONE", "DECOUPLED")  # numbered from 1 in tensors
_CROSSCODER = {name: tensor.removesuffix(".T") for name, tensor in (_LINEAR | {"b_dec_D": "decoder.bias"}).items()}


def is_crosscoder(folder: Path) -> bool:
    """Return whether a folder holds a crosscoder: by ``num_layers`` in its description."""
    return (folder / "model.safetensors").is_file() and "num_layers" in tensors.read_settings(folder / "config.json")


def parse_crosscoder(folder: Path) -> tensors.Published:
    """Describe a folder with ``model.safetensors`` and ``config.json`` (activation_dim, dict_size, num_layers)."""
    weights = folder / "model.safetensors"
    return _parse_crosscoder(weights, tensors.open_tensors(weights), tensors.read_settings(folder / "config.json"))


def _parse_crosscoder(
    weights: Path, state: dict[str, tensors.Tensor], settings: Mapping[str, Any]
) -> tensors.Published:
    """Describe a crosscoder: encoder.weight [P, d, F], decoder.weight [P, F, d], decoder.bias [P, d].

    Its parts are a base model and one that was tuned from it, at the layer that the repository's name gives: "L13" or
    "l13".
    """
    batch_topk = "threshold" in state
    arranged, _ = tensors.arrange(weights, state, _CROSSCODER | ({"threshold_F": "threshold"} if batch_topk else {}))
    shape = arranged["W_enc_DxF"].shape
    if len(shape) != 3:
        raise UserError(f"{weights} is no crosscoder: encoder.weight has the shape {shape}, expected 3 axes")
    count, width, features = shape
    _check_parts(weights, arranged, _CROSSCODER, W_dec_FxD=(count, features, width))
    normalised = str(settings.get("code_normalization") or "CROSSCODER").rpartition(".")[2].upper()
    if "code_normalization_id" in state:
        number = int(state["code_normalization_id"].numbers()[0])
        normalised = dict(enumerate(_CODE_NORMALIZATIONS, 1)).get(number, str(number))
    if batch_topk and normalised not in ("CROSSCODER", "NONE"):
        raise UserError(f"{weights}: code_normalization is {normalised}, which cannot be followed: expected CROSSCODER")
    path = weights.absolute().as_posix()
    layer = next(filter(None, (re.findall(rf"-{letter}(\d+)(?:-|/)", path) for letter in "Ll")), [])
    part = f"resid_post.{int(layer[-1])}" if layer and count == 2 else ""
    site = f"{part}+other:{part}" if part else hooks.UNKNOWN
    normaliser = _normaliser(weights, state)
    config = DictionaryConfig(
        kind="batchtopk" if batch_topk else "standard",
        site=site,
        d_in=count * width,
        n_features=features,
        k=_k(weights, settings, state) if batch_topk else 0,
        centred=False,
        widths=(width,) * count,
        scales=tuple(map(float, normaliser[1])) if normaliser else (1.0,) * count,
    )

    def fold(arrays: Arrays) -> Arrays:
        W_dec_FxD = np.moveaxis(arrays["W_dec_FxD"], 0, 1).reshape(features, count * width)
        folded = dict(W_enc_DxF=arrays["W_enc_DxF"].reshape(count * width, features), W_dec_FxD=W_dec_FxD)
        folded |= dict(b_enc_F=arrays["b_enc_F"], b_dec_D=arrays["b_dec_D"].reshape(-1))
        if normaliser:  # the mean; scales are of the joined inputs
            shift_D = (normaliser[0] * normaliser[1][:, None]).reshape(-1)
            folded["b_enc_F"] = folded["b_enc_F"] - shift_D @ folded["W_enc_DxF"]
            folded["b_dec_D"] = folded["b_dec_D"] + shift_D
        if batch_topk:  # it compares activations times the sum of the norms of the decoder's parts
            by_length = normalised == "CROSSCODER"
            length_F = rescale.decoder_lengths(W_dec_FxD, config.widths) if by_length else np.ones(features)
            folded["threshold_F"] = np.broadcast_to(np.maximum(arrays["threshold_F"], 0) / length_F, (features,))
        return folded

    return tensors.Published(config, arranged, fold=fold)


def _check_parts(
    file: Path, arranged: Mapping[str, tensors.Tensor], names: Mapping[str, str], **wanted: tuple[int, ...]
) -> None:
    """Refuse arrays that do not fit a crosscoder's encoder, [P, d, F]; ``names`` are the file's."""
    count, width, features = arranged["W_enc_DxF"].shape
    wanted |= dict(b_enc_F=(features,), b_dec_D=(count, width))
    wrong = [
        f"{names[name]} is {arranged[name].shape}, expected {shape}"
        for name, shape in wanted.items()
        if arranged[name].shape != shape
    ]
    if wrong:
        raise UserError(f"{file} is no crosscoder: {'; '.join(wrong)}")


def _parse_model_diff(file: Path, state: Mapping[str, tensors.Tensor]) -> tensors.Published:
    """Describe a crosscoder of two models by Kissane et al.: W_enc [P, d, F], W_dec [F, P, d], b_dec [P, d]; a ReLU.

    The hook is in ``cfg.json`` beside it. Inputs of the training were scaled by a factor for each model, which no file
    states.
    """
    arranged, _ = tensors.arrange(file, state, _PLAIN)
    count, width, features = arranged["W_enc_DxF"].shape
    _check_parts(file, arranged, _PLAIN, W_dec_FxD=(features, count, width))
    description = file.with_name("cfg.json")
    settings = tensors.read_settings(description) if description.is_file() else {}
    model = str(settings.get("model_name") or "")
    site = hooks.to_site(settings.get("hook_point"), model) if count == 2 else hooks.UNKNOWN
    scales = next((scales for name, scales in _KNOWN_SCALES.items() if name in file.absolute().as_posix()), None)
    if scales is None:
        logging.warning(
            "%s: the factors by which its code scales the activations of each model are in no file and are taken as 1: "
            "for others give its config scales=(...) with dataclasses.replace and dictionary.with_config",
            file,
        )
    config = DictionaryConfig(
        kind="standard",
        site=site if site == hooks.UNKNOWN else f"{site}+other:{site}",
        d_in=count * width,
        n_features=features,
        centred=False,
        widths=(width,) * count,
        scales=scales or (1.0,) * count,
        model=model,
    )

    def fold(arrays: Arrays) -> Arrays:
        joined = dict(W_enc_DxF=(-1, features), W_dec_FxD=(features, count * width), b_enc_F=(-1,), b_dec_D=(-1,))
        return {name: arrays[name].reshape(shape) for name, shape in joined.items()}

    return tensors.Published(config, arranged, fold=fold)


# --- OpenMOSS: Llama Scope (He et al., 2024), Llama-Scope-R1, Llama-Scope-2

_LLAMA_SCOPE = {"hyperparams.json": "checkpoints/final.safetensors", "config.json": "sae_weights.safetensors"}
_NEW_NAMES = {"W_enc_DxF": "W_E", "b_enc_F": "b_E", "W_dec_FxD": "W_D", "b_dec_D": "b_D"}
_NORM = "dataset_average_activation_norm"


def find_llama_scope(folder: Path) -> str:
    """Return the name of the settings file of a Llama Scope folder; "" if it is none."""
    if (folder / "hyperparams.json").is_file():
        return "hyperparams.json"
    file = folder / "config.json"
    return file.name if file.is_file() and "sae_type" in tensors.read_settings(file) else ""


def parse_llama_scope(folder: Path) -> tensors.Published:
    """Describe a folder of any of the three releases.

    The arrays come from training, for inputs and outputs that were scaled to a mean norm of sqrt(d). They become
    those for raw values, with decoder rows of length 1 (unless sparsity_include_decoder_norm is false). The first
    release states one threshold, of activations *then*; Llama-Scope-R1 has thresholds of the scaled activations.
    (SAELens 6 leaves the rows of the first release as they are, hence has other features active.)
    """
    name = find_llama_scope(folder)
    file, weights = folder / name, folder / _LLAMA_SCOPE[name]
    settings, state = tensors.read_settings(file), tensors.open_tensors(weights)
    first_release = name == "hyperparams.json"
    followed: dict[str, tuple[Any, ...]] = dict(
        use_glu_encoder=(False, None), norm_activation=("dataset-wise", "inference"), sae_type=("sae", None)
    )
    followed["act_fn"] = ("jumprelu", "topk") if first_release else ("jumprelu", "topk", "relu")
    for key, values in followed.items():
        if (value := settings.get(key, values[0])) not in values:
            raise UserError(f"{file}: {key} is {value!r}, which no dictionary here has: expected {values[0]!r}")
    kind = "jumprelu" if first_release else {"relu": "standard"}.get(settings["act_fn"], settings["act_fn"])
    layout = dict(_NEW_NAMES if "W_E" in state else _LINEAR | {"b_dec_D": "decoder.bias"})
    if not tensors.flag(file, settings, "use_decoder_bias", True):
        layout.pop("b_dec_D")
    if kind == "jumprelu" and not first_release:
        layout["threshold_F"] = next(
            (name for name in state if name.endswith("log_jumprelu_threshold")), "log_jumprelu_threshold"
        )
    width, features, _ = tensors.sizes(weights, state, layout)
    read, written = (settings.get(f"hook_point_{side}") for side in ("in", "out"))
    config = DictionaryConfig(
        kind=kind,
        site=hooks.to_site(read),
        target="" if written in (read, None) else hooks.to_site(written),
        d_in=width,
        n_features=features,
        k=tensors.positive_int(file, "top_k", settings.get("top_k")) if kind == "topk" else 0,
        centred=tensors.flag(file, settings, "apply_decoder_bias_to_pre_encoder", False),
        bos="always" if first_release else "auto",
    )
    arranged, transposed = tensors.arrange(weights, state, layout, config)
    inputs, outputs = _average_norms(file, settings, state, read, written)
    threshold = settings.get("jump_relu_threshold")
    if first_release and not (isinstance(threshold, int | float) and threshold > 0):
        raise UserError(f"{file}: jump_relu_threshold is {threshold!r}: expected a number above 0")

    with_lengths = tensors.flag(file, settings, "sparsity_include_decoder_norm", True)

    def fold_features(arrays: Arrays) -> Arrays:
        """Return our arrays of some features, in float64."""
        length_F = rescale.decoder_lengths(arrays["W_dec_FxD"])
        scale_F = length_F if with_lengths else np.ones_like(length_F)
        if kind == "jumprelu":  # thresholds of activations times length, in the units of training
            stated_F = np.full_like(length_F, float(threshold or 0) * outputs)
            arrays["threshold_F"] = (stated_F if first_release else np.exp(arrays["threshold_F"])) / scale_F
        arrays = rescale.scale_features(by_name(kind), arrays, scale_F)
        folded = rescale.fold_input_scaling(by_name(kind), arrays, inputs, outputs)
        if first_release and not with_lengths:
            # Then its one threshold is of activations that its inputs' scale alone was folded into.
            folded = rescale.scale_features(by_name(kind), folded, np.full_like(length_F, outputs / inputs))
            folded["threshold_F"] = np.full_like(length_F, threshold)
        return folded

    def fold(arrays: Arrays) -> Arrays:
        arrays.setdefault("b_dec_D", np.zeros(width))
        if "threshold_F" in arrays:
            arrays["threshold_F"] = np.broadcast_to(arrays["threshold_F"], (features,))
        return rescale.change_in_pieces(config, arrays, fold_features, np.float32)

    return tensors.Published(config, arranged, transposed, fold)


def _average_norms(
    file: Path, settings: Mapping[str, Any], state: Mapping[str, tensors.Tensor], read: Any, written: Any
) -> tuple[float, float]:
    """Return the factors that bring inputs and outputs to a mean norm of sqrt(d)."""
    if settings.get("norm_activation", "dataset-wise") == "inference":
        return 1.0, 1.0
    norms = (
        settings.get(_NORM)
        if _NORM in settings
        else {
            side: float(state[f"{_NORM}.{hook}"].read().mean())
            for side, hook in (("in", read), ("out", written or read))
            if f"{_NORM}.{hook}" in state
        }
    )
    if not isinstance(norms, dict) or not all(0 < norms.get(side, 0) < math.inf for side in ("in", "out")):
        raise UserError(f"{file}: {_NORM} is {norms!r}: expected norms above 0, in and out")
    d = settings.get("d_model")
    if not isinstance(d, int) or d < 1:
        raise UserError(f"{file}: d_model is {d!r}: expected a whole number above 0")
    return math.sqrt(d) / norms["in"], math.sqrt(d) / norms["out"]


# --- single files of torch.save


def find_layer_files(folder: Path) -> list[Path]:
    """Return the files of Qwen-Scope's dictionaries in a folder, one for each layer, in order."""
    named = {file: match for file in folder.glob("*.pt") if (match := _QWEN.fullmatch(file.name))}
    return sorted(named, key=lambda file: int(named[file][1]))


def find_pickled(path: Path) -> Path | None:
    """Return the file of ``torch.save`` that a path means: itself, or the only one in the folder."""
    if path.suffix in tensors.PICKLED:
        return path
    files = [file for suffix in (".pt", ".pth") for file in path.glob(f"*{suffix}")]
    # Of files of a layer each there may be one alone because no other was fetched: it is not what the folder means.
    return files[0] if len(files) == 1 and not _QWEN.fullmatch(files[0].name) else None


def parse_pickled(path: Path) -> tensors.Published:
    """Describe a dictionary that is one file, or alone in its folder: of Qwen-Scope, Goodfire, or qresearch.

    layer3.sae.pt            Qwen-Scope: W_enc [F, d], W_dec [d, F], b_enc, b_dec: the k largest of x @ W_enc.T + b_enc,
                             whatever their sign, of the residual stream after layer 3. k is in config.json beside it,
                             or in the repository's name, "...-L0_50".
    NAME-SAE-l19.pth         Goodfire: encoder_linear.weight [F, d], decoder_linear.weight [d, F] and biases; a ReLU
    NAME-SAE-l19.pt          DeepSeek-R1 by qresearch: encoder.weight, decoder.weight and biases; a ReLU
    autoencoders/6.pt        OpenAI (Gao et al., 2024), in a folder such as resid_post_mlp_v5_32k: see ``_parse_openai``
    cc_weights.pt            a crosscoder of two models: see ``_parse_model_diff``
    """
    file = find_pickled(path)
    assert file is not None
    state = tensors.open_tensors(file)
    if "pre_bias" in state and (named := _OPENAI_PATH.search(file.absolute().as_posix())):
        return _parse_openai(file, state, f"{_OPENAI_SITES[named[1]]}.{int(named[2])}")
    if set(_PLAIN.values()) <= set(state) and len(state["W_enc"].shape) == 3:
        return _parse_model_diff(file, state)
    layers = _LAYER_SUFFIX.findall(file.absolute().as_posix())
    site = f"resid_post.{int(layers[-1])}" if layers else hooks.UNKNOWN  # of files whose names end in "-l19"
    layout = _LINEAR | {"b_dec_D": "decoder.bias"}
    qwen = _QWEN.fullmatch(file.name)
    if "encoder_linear.weight" in state:
        layout = {name: tensor.replace("coder.", "coder_linear.") for name, tensor in layout.items()}
    elif qwen:
        site, layout = f"resid_post.{int(qwen[1])}", _PLAIN | {"W_enc_DxF": "W_enc.T", "W_dec_FxD": "W_dec.T"}
    elif not {tensor.removesuffix(".T") for tensor in layout.values()} <= set(state):
        has = tensors.list_names(state) or "no tensors"
        raise UserError(
            f"{file} holds {has}, which no dictionary that can be read has: expected a file of Qwen-Scope, "
            "Goodfire, OpenAI (in a folder such as resid_post_mlp_v5_32k/autoencoders) or qresearch, or a folder of "
            "dictionary_learning or SAELens"
        )
    facts = dict(kind="topk", k=_qwen_k(file), signed=True) if qwen else dict(kind="standard")
    return tensors.describe(file, state, layout, site=site, centred=False, **facts)


def _parse_openai(file: Path, state: Mapping[str, tensors.Tensor], site: str) -> tensors.Published:
    """Describe a file of OpenAI's for GPT-2: pre_bias is subtracted from inputs; those with a TopK normalise tokens."""
    layout = {"W_enc_DxF": "encoder.weight.T", "W_dec_FxD": "decoder.weight.T"}
    layout |= {"b_enc_F": "latent_bias", "b_dec_D": "pre_bias"}
    name = str(state["activation"].numbers()[0]) if "activation" in state else "ReLU"
    facts: dict[str, Any] = dict(kind="standard")
    if name == "TopK":
        settings = state["activation_state_dict"].numbers()[0] if "activation_state_dict" in state else {}
        after = settings.get("postact_fn", "ReLU")
        if after not in ("ReLU", "Identity"):
            raise UserError(f"{file}: postact_fn is {after!r}, which no dictionary here has: expected 'ReLU'")
        facts = dict(kind="topk", k=tensors.positive_int(file, "k", settings.get("k")), input_norm="layer_norm")
        facts |= dict(signed=after == "Identity")
    elif name != "ReLU":
        raise UserError(f"{file}: activation is {name!r}, which no dictionary here has: expected 'TopK' or 'ReLU'")
    return tensors.describe(file, state, layout, site=site, model="gpt2", **facts)


def _qwen_k(file: Path) -> int:
    """Return k from the file ``config.json`` of the folder, or from the repository's name."""
    description = file.with_name("config.json")
    settings = tensors.read_settings(description) if description.is_file() else {}
    named = _L0.findall(file.absolute().as_posix())
    k = settings.get("k", int(named[-1]) if named else None)
    return tensors.positive_int(description if "k" in settings else file, "k", k)
