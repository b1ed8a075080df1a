"""SAELens folders: ``cfg.json`` and ``sae_weights.safetensors``.

Two layouts of ``cfg.json`` are read. Version 6 keeps what was said of the language model under ``metadata``; earlier
versions are flat, with older names for some keys. All settings that change what a dictionary computes are honoured,
folded into the arrays, or refused by name; a line tells of keys that are not known:

- decoder norms that scale a topk's pre-activations (``rescale_acts_by_decoder_norm``): folded;
- ``scaling_factor`` of each feature, in front of the decoder: folded;
- ``normalize_activations``: a constant factor is folded, ``layer_norm`` and ``constant_norm_rescale`` become
  ``DictionaryConfig.input_norm``;
- ``center_writing_weights``: the residual stream of the model as published is centred (``input_norm="center"``), which
  is exact for models with LayerNorms; RMSNorm models have nothing to centre;
- thresholds below 0 act like 0, because SAELens applies a ReLU first.

Written are all kinds but linear. batchtopk and matryoshka become jumprelu, as SAELens itself saves them, and
``metadata`` says what they were trained as. Gated transcoders, of which SAELens has none, become the equal
jumprelu_transcoder.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from saejax.dictionaries import rescale
from saejax.dictionaries.formats import circuit_tracer, hooks, tensors
from saejax.dictionaries.kinds import by_name
from saejax.dictionaries.kinds.base import Arrays
from saejax.dictionaries.modules import Dictionary, DictionaryConfig
from saejax.errors import UserError, one_of
from saejax.files import read_foreign, write_json
from saejax.parallel.collectives import to_host

DESCRIPTION, WEIGHTS = "cfg.json", "sae_weights.safetensors"
# architecture: (kind, is a transcoder, has a skip path)
ARCHITECTURES = {
    "standard": ("standard", False, False),
    "topk": ("topk", False, False),
    "jumprelu": ("jumprelu", False, False),
    "gated": ("gated", False, False),
    "matching_pursuit": ("matching_pursuit", False, False),
    "transcoder": ("standard", True, False),
    "jumprelu_transcoder": ("jumprelu", True, False),
    "skip_transcoder": ("standard", True, True),
    "jumprelu_skip_transcoder": ("jumprelu", True, True),
}
TEMPORAL = "temporal"  # the architecture that ``dictionaries.temporal`` reads
# The kinds that it trains as another architecture than it saves them.
_TRAINED_AS = {"batchtopk": "batchtopk", "matryoshka": "matryoshka_batchtopk"}
_VERSION = "6.0.0"  # the first with the layout that is written
_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
# Tensors without which a dictionary that has them is another one.
_OF_ARCHITECTURES = {"threshold", "r_mag", "b_mag", "b_gate", "W_skip"}
_INPUT_NORMS = {"layer_norm": "layer_norm", "constant_norm_rescale": "token_norm"}
# SAELens folds the factor of the second into the arrays when it saves a finished dictionary, and only warns otherwise.
_NO_NORM = ("none", None, False, "expected_average_only_in", True)
_FACTORS = ("activation_normalization_factor", "norm_scaling_factor")  # of constant_scalar_rescale
# Normalisation of releases whose folders do not state it, by the names of their repositories: SAELens' registry does.
_RELEASES = {
    "GPT2-Small-SAEs-Reformatted": "center",
    "GPT2-Small-Feature-Splitting-Experiment-Layer-8": "center",
    "gpt2-small-mlp-out-saes": "center",
    "Mistral-7B-Residual-Stream-SAEs": "token_norm",
}
# Of version 6 outside of ``metadata``: what is followed, what says nothing of results, and settings of training.
_KNOWN = {"architecture", "metadata", "device", "dtype", "d_in", "d_sae", "d_out", "k", "saejax", "max_iterations"}
_KNOWN |= {"residual_threshold", "stop_on_duplicate_support", "rescale_acts_by_decoder_norm", "apply_b_dec_to_input"}
_KNOWN |= {"normalize_activations", "reshape_activations", "finetuning_scaling_factor", *_FACTORS}
_KNOWN |= {"n_heads", "n_attn_layers", "bottleneck_factor", "sae_diff_type", "kval_topk", "tied_weights"}  # of TEMPORAL
_OF_TRAINING = re.compile(r".*(coefficient|warm_up|init|loss|bandwidth|noise|lp_norm|matryoshka|tanh).*")
_UNIT = 1e-6  # how far from 1 a length is by rounding alone
# What TransformerLens changes of the model's weights besides centring, and the sites whose values it changes.
_PROCESSING = {"fold_ln": ("mlp_in",), "fold_value_biases": ("attn_z",)}


def parse(folder: Path, site: str = "", overrides: Mapping[str, Any] | None = None) -> tensors.Published:
    """Describe the dictionary of a folder.

    Args:
      folder: holds ``cfg.json`` and ``sae_weights.safetensors``.
      site: the site read, in place of the one that the folder names.
      overrides: settings in place of the folder's, as SAELens' registry has them for some releases.

    Raises:
      UserError: it is damaged, or has an architecture or a setting that no dictionary here can follow.
    """
    file = Path(folder) / DESCRIPTION
    settings = read_settings(file, overrides or {})
    state = tensors.open_tensors(file.with_name(WEIGHTS))
    kind, transcoder, skip = ARCHITECTURES[_architecture(file, settings)]
    sizes = tensors.sizes(file.with_name(WEIGHTS), state, _layout(kind, skip), any_output=transcoder)
    config = _parse_config(file, settings, sizes, site)
    layout = _layout(config.kind, config.skip)
    layout |= {name: name for name in ("scaling_factor", "finetuning_scaling_factor") if name in state}
    if strays := sorted(_OF_ARCHITECTURES & set(state) - {name.removesuffix(".T") for name in layout.values()}):
        raise UserError(
            f"{file}: architecture is {settings.get('architecture')!r}, but {WEIGHTS} has {', '.join(strays)}, which "
            "belongs to another one: fetch its description again"
        )
    if "log_threshold" in state and "threshold" not in state:  # a checkpoint of training
        layout["threshold_F"] = "log_threshold"
    arranged, transposed = tensors.arrange(file.with_name(WEIGHTS), state, layout, config)
    log_threshold = layout.get("threshold_F") == "log_threshold"
    path = file.absolute().as_posix()
    norm = next((norm for name, norm in _RELEASES.items() if name in path and "sae_lens_version" not in settings), "")

    def fold(arrays: Arrays) -> Arrays:
        if norm and not config.input_norm:
            logging.warning(
                "%s does not say that its release needs input_norm=%r, so that other features fire: load it by its "
                "name in SAELens' registry (saelens:RELEASE/SAE_ID), or take dictionary.with_config("
                "dataclasses.replace(dictionary.config, input_norm=%r))",
                *(file, norm, norm),
            )
        return _fold(file, settings, arrays, log_threshold)

    return tensors.Published(config, arranged, transposed, fold)


def read_settings(file: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a ``cfg.json`` of any version in one flat mapping, under the names of version 6."""
    settings = read_foreign(file, "the description of a dictionary")
    is_object = isinstance(settings.get("metadata", {}), dict)
    if not is_object or not {"architecture", "d_in"} & settings.keys():  # the first versions have no architecture
        raise UserError(f"{file} is not the description of a dictionary: expected an object with 'architecture'")
    unknown = [name for name in settings.keys() - _KNOWN if not _OF_TRAINING.fullmatch(name)]
    if unknown and "metadata" in settings:
        logging.warning(
            "%s has %s, which saejax does not know: if that changes what SAELens computes, other features fire here",
            *(file, ", ".join(sorted(unknown))),
        )
    if "metadata" not in settings:
        settings.setdefault("prepend_bos", True)  # what SAELens assumes of folders from before version 6
    metadata = settings.pop("metadata", {})
    named = {_OLD_NAMES.get(name, name): value for name, value in {**metadata, **settings, **overrides}.items()}
    layer = named.get("hook_layer", named.get("hook_point_layer"))
    if isinstance(named.get("hook_name"), str) and isinstance(layer, int):  # early versions leave the layer open
        named["hook_name"] = named["hook_name"].replace("{layer}", str(layer))
    return named


def _parse_config(file: Path, settings: Mapping[str, Any], sizes: tuple[int, int, int], site: str) -> DictionaryConfig:
    """Return the configuration of a dictionary of these sizes, with a site in place of the one that settings name."""
    kind, transcoder, skip = ARCHITECTURES[_architecture(file, settings)]
    width, features, written = sizes
    for key, size in (("d_in", width), ("d_sae", features), ("d_out", written)):
        if settings.get(key, size) != size:
            raise UserError(f"{file}: {key} is {settings[key]!r}, but the arrays of {WEIGHTS} have {size}")
    check_settings(file, settings, transcoder)
    model = str(settings.get("model_name") or "")
    site, target = site or named_site(settings), named_site(settings, "hook_name_out")
    try:
        facts = _training_facts(settings, features) if kind == "jumprelu" else dict(kind=kind)
        ours = settings.get("saejax") or {}
        norms = {name: ours.get(name) for name in ("max_norm", "target_max_norm")}
        facts |= {name: None if norm is None else float(norm) for name, norm in norms.items()}
        facts |= {key: str(ours.get(key, "")) for key in ("revision", "fingerprint")}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{file}: metadata.saejax or metadata.training_architecture_details is damaged") from error
    if kind == "topk":
        k = settings.get("k")
        if k is None:  # where old versions had it
            k = (settings.get("activation_fn_kwargs") or {}).get("k")
        facts |= dict(k=tensors.positive_int(file, "k", k))
    if kind == "matching_pursuit":
        if settings.get("residual_threshold", 1e-2) or settings.get("stop_on_duplicate_support", True):
            raise UserError(
                f"{file}: residual_threshold and stop_on_duplicate_support end its search early, and a dictionary here "
                "goes on for all of max_iterations: expected 0 and False"
            )
        facts |= dict(k=tensors.positive_int(file, "max_iterations", settings.get("max_iterations")))
    return DictionaryConfig(
        **facts,
        site=site,
        target=target if transcoder else "",
        d_in=width,
        n_features=features,
        target_width=written,
        skip=skip,
        centred=not transcoder and tensors.flag(file, settings, "apply_b_dec_to_input", True),
        input_norm=find_input_norm(file, settings, model, site, transcoder),
        bos={True: "always", False: "never"}.get(settings.get("prepend_bos"), "auto"),  # type: ignore[arg-type]
        model=model,
    )


def save(folder: Path, dictionary: Dictionary) -> None:
    """Write a folder that SAELens loads with ``SAE.load_from_disk``; ``cfg.json`` is written last.

    Raises:
      UserError: SAELens has nothing like this dictionary, or the folder holds one already.
    """
    trained_as, dictionary = dictionary.config, _as_saelens_has_it(dictionary)
    config = dictionary.config
    arrays = dictionary.arrays
    if "threshold_F" in arrays and to_host(arrays["threshold_F"]).min(initial=0) < 0:
        raise UserError("this dictionary has thresholds below 0, under which SAELens would not let anything pass")
    with tensors.whole_folder(folder, DESCRIPTION, WEIGHTS) as unfinished:
        named = {
            name.removesuffix(".T"): arrays[ours].T if name.endswith(".T") else arrays[ours]
            for ours, name in _layout(config.kind, config.skip).items()
        }
        tensors.write(unfinished / WEIGHTS, named)
        write_json(unfinished / DESCRIPTION, _describe(trained_as, config.centred, arrays["W_enc_DxF"].dtype.name))


def check(config: DictionaryConfig) -> None:
    """Raise a ``UserError`` for a dictionary that SAELens cannot express."""
    architecture(config)
    if config.signed or config.widths:
        feature = "TopK that keeps negative activations" if config.signed else "crosscoders"
        raise UserError(f"SAELens has no {feature}: keep the dictionary in the format saejax")
    hooks.to_hook(config.site), hooks.to_hook(config.target)


def architecture(config: DictionaryConfig) -> str:
    """Return SAELens' name for a dictionary's architecture; a ``UserError`` if it has nothing like it."""
    transcoder, also = bool(config.target), ("jumprelu",) if by_name(config.kind).jumprelu else ()
    names = {described: name for name, described in ARCHITECTURES.items()}
    for kind in (config.kind, *also):
        if (kind, transcoder, config.skip) in names:
            return names[kind, transcoder, config.skip]
    form = ("transcoder" if transcoder else "SAE") + (" with a skip path" if config.skip else "")
    raise UserError(
        f"SAELens has no architecture for a {config.kind} {form}: keep it in the format saejax"
        + (", or write circuit_tracer" if transcoder and circuit_tracer.holds_kind(config.kind) else "")
    )


def named_site(settings: Mapping[str, Any], key: str = "hook_name") -> str:
    """Return the site that a setting ``key`` names, or else the site of the module of transformers named beside it."""
    model = str(settings.get("model_name") or "")
    named = [hooks.to_site(settings[name], model) for name in (key, f"hf_{key}") if settings.get(name)]
    sites = [site for site in named if not site.startswith((hooks.NO_SITE, hooks.MODULE))]
    return next(iter([*sites, *named]), hooks.UNKNOWN)


def _architecture(file: Path, settings: Mapping[str, Any]) -> str:
    """Return the architecture, which folders from before version 4 do not name."""
    name = settings.get("architecture") or "standard"
    if name in _TRAINED_AS.values():
        raise UserError(f"{file} is a checkpoint of training ({name}): save it with sae.save_inference_model(folder)")
    if name == TEMPORAL:
        raise UserError(
            f"{file} is a temporal SAE, whose features depend on all tokens before: saejax.load_temporal reads it, and "
            "saejax.evaluate scores it on whole texts; expected a dictionary of single tokens here"
        )
    one_of(str(name), ARCHITECTURES, f"architecture in {file}")
    activation = settings.get("activation_fn") or "relu"
    if activation == "topk" and name == "standard":
        return "topk"
    if activation != "relu" and not (activation == name == "topk"):
        raise UserError(f"{file}: activation_fn is {activation!r}, which no dictionary here has: expected 'relu'")
    return name


def check_settings(file: Path, settings: Mapping[str, Any], transcoder: bool) -> None:
    """Refuse settings that would change what is computed and that no dictionary here has."""
    wrong = []
    # Heads side by side are how ``attn_z`` has them.
    if (reshaped := settings.get("reshape_activations", "none")) not in ("none", "hook_z", None):
        wrong.append(f"reshape_activations is {reshaped!r}, expected 'none' or 'hook_z'")
    if transcoder and settings.get("apply_b_dec_to_input", True):
        wrong.append("apply_b_dec_to_input is True, expected False for a transcoder")
    heads = {key: settings.get(key) for key in ("hook_head_index", "hook_head_index_out")}
    wrong += [
        f"{key} is {head!r}, expected null: a site here has all heads"
        for key, head in heads.items()
        if head is not None
    ]
    if wrong:
        raise UserError(f"{file} has settings that a dictionary here cannot follow: {'; '.join(wrong)}")


def find_input_norm(file: Path, settings: Mapping[str, Any], model: str, site: str, transcoder: bool) -> str:
    """Return the normalisation of tokens that settings ask for, of which the weights' processing is a part.

    Args:
      file: the description, for messages.
      settings: its settings.
      model: name of the model.
      site: the site that is read.
      transcoder: whether it is a transcoder's.

    Raises:
      UserError: no dictionary here can follow them.
    """
    norm = settings.get("normalize_activations", "none")
    if norm not in (*_NO_NORM, *_INPUT_NORMS, "constant_scalar_rescale"):
        raise UserError(f"{file}: normalize_activations is {norm!r}: expected one of none, {', '.join(_INPUT_NORMS)}")
    if norm in _INPUT_NORMS and transcoder:
        raise UserError(f"{file}: normalize_activations is {norm!r}, which transcoders here do not have")
    ours = _INPUT_NORMS.get(norm, "")
    processing = settings.get("model_from_pretrained_kwargs") or {}
    for key, kinds in _PROCESSING.items():
        if processing.get(key) and site.partition(".")[0] in kinds:
            raise UserError(f"{file}: {key} changes the values at {site}, which are those of the published model here")
    if not processing.get("center_writing_weights") or ours == "layer_norm":  # which subtracts the mean itself
        return ours
    layer_norms = hooks.has_layer_norms(model)
    if layer_norms is None or ours or (transcoder and layer_norms):
        reason = "of which it is not known whether it has LayerNorms" if layer_norms is None else "in this combination"
        raise UserError(
            f"{file}: its model's weights were centred (center_writing_weights), which saejax cannot undo for "
            f"{model or 'an unnamed model'}, {reason}: use a dictionary of the model as published"
        )
    # What the heads and an MLP read is centred by their norms already.
    return (
        "center" if layer_norms and site.partition(".")[0] not in ("attn_z", "mlp_in", "mlp_act", hooks.NORMED) else ""
    )


def _training_facts(settings: Mapping[str, Any], features: int) -> dict[str, Any]:
    """Return kind, k and groups of what is saved as jumprelu."""
    trained_as = settings.get("training_architecture")
    kind = next((kind for kind, name in _TRAINED_AS.items() if name == trained_as), "jumprelu")
    details = settings.get("training_architecture_details") or {}
    k = round(details.get("k") or 0)
    # A k that no dictionary of this width has says nothing of how it was trained. Its threshold is in the file.
    if kind == "jumprelu" or not 0 < k <= features:
        return dict(kind="jumprelu")
    widths = details.get("matryoshka_widths") or () if kind == "matryoshka" else ()
    return dict(kind=kind, k=k, groups=tuple(sorted({*widths, features})) if widths else ())


def _layout(kind: str, skip: bool) -> dict[str, str]:
    """Return SAELens' names of arrays."""
    names = ["W_enc_DxF", "b_enc_F", "W_dec_FxD", "b_dec_D", *by_name(kind).vectors]
    layout = {ours: ours.rpartition("_")[0] for ours in names}
    if kind == "matching_pursuit":  # which has no encoder
        return {name: layout[name] for name in ("W_dec_FxD", "b_dec_D")} | dict(W_enc_DxF="W_dec.T")
    layout |= {"W_skip_DxD": "W_skip.T"} if skip else {}
    return layout | ({"b_enc_F": "b_gate"} if kind == "gated" else {})


def _fold(file: Path, settings: Mapping[str, Any], arrays: Arrays, log_threshold: bool) -> Arrays:
    """Fold settings into the arrays; see the top of this module."""
    scale = next((arrays.pop(name) for name in ("finetuning_scaling_factor", "scaling_factor") if name in arrays), None)
    arrays.pop("scaling_factor", None)
    is_scaled = tensors.flag(file, settings, "finetuning_scaling_factor", False)
    if scale is None and is_scaled:
        raise UserError(f"{file}: finetuning_scaling_factor is set, but {WEIGHTS} has none: it is damaged")
    if scale is not None and not np.allclose(scale, 1):
        if not is_scaled:
            raise UserError(
                f"{file}: there is a scaling_factor, but finetuning_scaling_factor is not set: it is damaged"
            )
        arrays["W_dec_FxD"] = arrays["W_dec_FxD"] * np.reshape(scale, (-1, 1))
    kind = by_name(ARCHITECTURES[_architecture(file, settings)][0])
    arrays.setdefault("b_enc_F", np.zeros_like(arrays["W_dec_FxD"][:, 0]))
    if kind.name == "matching_pursuit" and not tensors.flag(file, settings, "apply_b_dec_to_input", True):
        arrays["b_dec_D"] = np.zeros_like(arrays["b_dec_D"])  # SAELens adds what it has subtracted, or nothing
    if "threshold_F" in arrays:
        threshold_F = np.exp(arrays["threshold_F"]) if log_threshold else arrays["threshold_F"]
        arrays["threshold_F"] = np.maximum(threshold_F, 0)  # SAELens multiplies max(pre, 0) by the gate
    if kind.name == "topk" and tensors.flag(file, settings, "rescale_acts_by_decoder_norm", False):
        length_F = rescale.decoder_lengths(arrays["W_dec_FxD"])
        if np.abs(length_F - 1).max() > _UNIT:  # SAELens trains with the setting, and saves rows of length 1
            arrays = rescale.scale_features(kind, arrays, length_F)
    norm = settings.get("normalize_activations", "none")
    named = next((key for key in _FACTORS if settings.get(key)), "")
    factor = settings[named] if named else None
    if named and (not isinstance(factor, int | float) or not 0 < factor < np.inf):
        raise UserError(f"{file}: {named} is {factor!r}: expected a number above 0")
    if norm == "constant_scalar_rescale" and factor is None:
        raise UserError(f"{file}: normalize_activations is {norm}, but {_FACTORS[0]} is missing: it cannot be folded")
    if factor is None and norm in ("expected_average_only_in", True):
        logging.warning(
            "%s: inputs of the training were scaled to a mean norm of sqrt(d) (normalize_activations), and the factor "
            "is not in the folder: unless it was folded into the arrays, other features fire. SAELens' registry has "
            "the factors of its releases: load such by their name, saelens:RELEASE/SAE_ID",
            file,
        )
    if factor is not None and norm in ("constant_scalar_rescale", "expected_average_only_in", True):
        # Inputs and outputs get the units of the model. Features keep those in which they were trained, except those of
        # matching pursuit, which searches with the rows of the decoder: these keep their length.
        if kind.name != "matching_pursuit":
            arrays["W_enc_DxF"] = arrays["W_enc_DxF"] * factor
            arrays["W_dec_FxD"] = arrays["W_dec_FxD"] / factor
        arrays["b_dec_D"] = arrays["b_dec_D"] / factor
    return arrays


def _as_saelens_has_it(dictionary: Dictionary) -> Dictionary:
    """Return the same dictionary in a form that SAELens has, with activations as it has them."""
    config = dataclasses.replace(dictionary.config, output_units=False)
    dictionary = Dictionary(config, dictionary.matmul_dtype, **dictionary.arrays)
    check(dictionary.config)
    kind, transcoder, _ = ARCHITECTURES[architecture(dictionary.config)]
    if kind != dictionary.config.kind:
        dictionary = rescale.as_jumprelu(dictionary)
    return rescale.centre(dictionary, False) if transcoder else dictionary  # its transcoders do not centre


def _describe(config: DictionaryConfig, centred: bool, dtype: str) -> dict[str, Any]:
    """Return the content of ``cfg.json`` of a dictionary."""
    norm = next((name for name, ours in _INPUT_NORMS.items() if ours == config.input_norm), "none")
    settings: dict[str, Any] = dict(d_in=config.d_in, d_sae=config.n_features, dtype=dtype, device="cpu")
    reshaped = "hook_z" if config.site.startswith("attn_z.") else "none"
    settings |= dict(apply_b_dec_to_input=centred, normalize_activations=norm, reshape_activations=reshaped)
    settings["metadata"] = _metadata(config)
    if config.kind == "matching_pursuit":
        settings |= dict(max_iterations=config.k, residual_threshold=0.0, stop_on_duplicate_support=False)
    elif "k" in by_name(config.kind).numbers:
        settings |= dict(k=config.k, rescale_acts_by_decoder_norm=False)
    if config.target:
        settings["d_out"] = config.d_out
    return settings | dict(architecture=architecture(config))


def _metadata(config: DictionaryConfig) -> dict[str, Any]:
    """Return what ``cfg.json`` says of the language model and the training."""
    of_modules = config.site.startswith(hooks.MODULE)
    metadata: dict[str, Any] = dict(sae_lens_version=_VERSION, sae_lens_training_version=None, model_name=config.model)
    metadata["model_class_name"] = "AutoModelForCausalLM" if of_modules else "HookedTransformer"
    # Our activations come from the model as it is; TransformerLens would rewrite its weights.
    kept = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    processing: dict[str, bool] = {} if of_modules else dict.fromkeys(kept, False)
    if config.input_norm == "center":
        processing["center_writing_weights"] = True
    metadata |= dict(model_from_pretrained_kwargs=processing, hook_head_index=None)
    metadata |= dict(hook_name=hooks.to_hook(config.site)) if config.site else {}
    metadata |= dict(hook_name_out=hooks.to_hook(config.target)) if config.target else {}
    metadata |= dict(prepend_bos=config.bos == "always") if config.bos != "auto" else {}
    if config.kind in _TRAINED_AS:
        details: dict[str, Any] = dict(k=config.k)
        if config.groups:
            details["matryoshka_widths"] = list(config.groups)
        metadata |= dict(training_architecture=_TRAINED_AS[config.kind], training_architecture_details=details)
    fields = ("max_norm", "target_max_norm", "revision", "fingerprint")
    ours = {key: getattr(config, key) for key in fields if getattr(config, key) != getattr(DictionaryConfig, key)}
    return metadata | (dict(saejax=ours) if ours else {})
