"""``cfg.json`` of a SAELens folder: what it means for a dictionary here, and what a dictionary becomes in it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saejax.dictionaries.formats import circuit_tracer_settings, hooks
from saejax.dictionaries.kinds import by_name
from saejax.dictionaries.modules import DictionaryConfig
from saejax.errors import UserError, one_of

# architecture: (kind, is a transcoder, has a skip path)
ARCHITECTURES = {
    "standard": ("standard", False, False),
    "topk": ("topk", False, False),
    "jumprelu": ("jumprelu", False, False),
    "gated": ("gated", False, False),
    "transcoder": ("standard", True, False),
    "jumprelu_transcoder": ("jumprelu", True, False),
    "skip_transcoder": ("standard", True, True),
    "jumprelu_skip_transcoder": ("jumprelu", True, True),
}
# The kinds that it trains as another architecture than it saves them.
_TRAINED_AS = {"batchtopk": "batchtopk", "matryoshka": "matryoshka_batchtopk"}
_VERSION = "6.0.0"  # the first with this layout
_NEUTRAL = {  # settings of which only these values leave what a dictionary computes as it is
    "normalize_activations": ("none", None),
    "reshape_activations": ("none", None),
    "finetuning_scaling_factor": (False, None),
    "activation_fn_kwargs": ({}, None),
}
_USED = {
    *("architecture", "d_in", "d_sae", "d_out", "dtype", "device", "apply_b_dec_to_input", "metadata"),
    *("k", "rescale_acts_by_decoder_norm"),
}
_OF_TRAINING = {  # settings of training, in checkpoints that were saved whole; they do not change what is computed
    *("decoder_init_norm", "l1_coefficient", "lp_norm", "l1_warm_up_steps", "l0_coefficient", "l0_warm_up_steps"),
    *("jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode", "jumprelu_tanh_scale"),
    *("jumprelu_ste_to_input", "pre_act_loss_coefficient", "target_l0", "use_sparse_activations"),
    "aux_loss_coefficient",
}
_WHOLE_HOOK = ("hook_head_index", "hook_head_index_out")  # metadata that must be null: the hook is not one head's


def understand(file: Path, settings: Any, site: str = "", target: str = "") -> DictionaryConfig:
    """What a dictionary with these settings is.

    Args:
      file: where they are from, for messages.
      settings: the content of ``cfg.json``.
      site, target: sites in place of those that the settings name.

    Raises:
      UserError: a setting is missing, or is one that no dictionary here has.
    """
    _check_version(file, settings)
    name = _architecture(file, settings)
    kind, transcoder, skip = ARCHITECTURES[name]
    _check_settings(file, settings, transcoder)
    metadata = settings["metadata"]
    k = _number(file, settings, "k") if "k" in by_name(kind).numbers else 0
    width, features = _number(file, settings, "d_in"), _number(file, settings, "d_sae")
    if k > features:
        raise UserError(f"{file}: k is {k}, more than the {features} features")
    _check_width(file, settings, transcoder, width)
    model = str(metadata.get("model_name") or "")
    if not site:
        site = hooks.to_site(metadata.get("hook_name") or metadata.get("hf_hook_name"), model)
    if transcoder and not target:
        target = hooks.to_site(metadata.get("hook_name_out") or metadata.get("hf_hook_name_out"), model)
    try:
        facts = _facts(metadata, features) if kind == "jumprelu" else dict(k=k)
        ours = metadata.get("saejax") or {}
        facts |= dict(max_norm=float(ours.get("max_norm", DictionaryConfig.max_norm)))
        facts |= {key: str(ours.get(key, "")) for key in ("revision", "fingerprint")}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{file}: metadata.saejax or metadata.training_architecture_details is damaged") from error
    return DictionaryConfig(
        **dict(kind=kind) | facts,
        site=site,
        target=target if transcoder else "",
        d_in=width,
        n_features=features,
        skip=skip,
        centred=not transcoder and bool(settings.get("apply_b_dec_to_input", True)),
        model=model,
    )


def architecture(config: DictionaryConfig) -> str:
    """What a dictionary is called in SAELens.

    Raises:
      UserError: it has nothing like it.
    """
    transcoder, also = bool(config.target), ("jumprelu",) if by_name(config.kind).jumprelu else ()
    names = {described: name for name, described in ARCHITECTURES.items()}
    for kind in (config.kind, *also):
        if (kind, transcoder, config.skip) in names:
            return names[kind, transcoder, config.skip]
    form = ("transcoder" if transcoder else "SAE") + (" with a skip path" if config.skip else "")
    raise UserError(
        f"SAELens has no architecture for a {config.kind} {form}: keep it in the format saejax"
        + (", or write circuit_tracer" if transcoder and circuit_tracer_settings.has(config.kind) else "")
    )


def describe(config: DictionaryConfig, dtype: str, before: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``cfg.json``.

    Args:
      config: what the dictionary is; one that ``architecture`` has a name for.
      dtype: of the arrays as written.
      before: what it said in the folder that the dictionary came from, if it came from SAELens.
    """
    name = architecture(config)
    own: dict[str, Any] = dict(d_in=config.d_in, d_sae=config.n_features, dtype=dtype, device="cpu")
    own |= dict(apply_b_dec_to_input=config.centred, normalize_activations="none", reshape_activations="none")
    own["metadata"] = _metadata(config, before.get("metadata", {}))
    if "k" in by_name(config.kind).numbers:
        # Where the folder that it came from had it set, decoder rows have length 1 now, and it makes no difference.
        own |= dict(k=config.k, rescale_acts_by_decoder_norm=before.get("rescale_acts_by_decoder_norm", False))
    if config.target:
        own["d_out"] = config.d_in
    own["architecture"] = name
    kept = before if before.get("architecture") == name else {}
    changed = {key: value for key, value in own.items() if key not in kept or key not in ("device", *_NEUTRAL)}
    return {**kept, **changed}


def _metadata(config: DictionaryConfig, before: Mapping[str, Any]) -> dict[str, Any]:
    metadata = dict(before)
    if not before:
        metadata = dict(sae_lens_version=_VERSION, sae_lens_training_version=None, model_name=config.model)
        of_modules = config.site.startswith(hooks.MODULE)
        metadata["model_class_name"] = "AutoModelForCausalLM" if of_modules else "HookedTransformer"
        # Our activations are those of the model as it is; TransformerLens would rewrite its weights.
        kept = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
        metadata["model_from_pretrained_kwargs"] = {} if of_modules else dict.fromkeys(kept, False)
        metadata["hook_head_index"] = None
    for key, site in (("hook_name", config.site), ("hook_name_out", config.target)):
        named = metadata.get(key) or metadata.get(f"hf_{key}")
        if site and not hooks.kept(named, site, config.model):
            metadata[key] = hooks.to_hook(site)
    if config.kind in _TRAINED_AS and not before:
        details: dict[str, Any] = dict(k=config.k)
        if config.groups:
            details["matryoshka_widths"] = list(config.groups)
        metadata |= dict(training_architecture=_TRAINED_AS[config.kind], training_architecture_details=details)
    fields = ("max_norm", "revision", "fingerprint")
    ours = {key: getattr(config, key) for key in fields if getattr(config, key) != getattr(DictionaryConfig, key)}
    return metadata | (dict(saejax=ours) if ours else {})


def _check_version(file: Path, settings: Any) -> None:
    if not isinstance(settings, dict):
        raise UserError(f"{file} is not the description of a dictionary: expected an object with 'architecture'")
    metadata = settings.get("metadata")
    version = str((metadata if isinstance(metadata, dict) else {}).get("sae_lens_version", ""))
    if not version.partition(".")[0].isdigit() or int(version.partition(".")[0]) < 6:
        raise UserError(
            f"{file} is from before SAELens 6 (metadata.sae_lens_version is {version or 'missing'}): load it with "
            "SAELens 6 and save it again"
        )


def _architecture(file: Path, settings: Mapping[str, Any]) -> str:
    name = settings.get("architecture")
    if name in _TRAINED_AS.values():
        raise UserError(f"{file} is a checkpoint of training ({name}): save it with sae.save_inference_model(folder)")
    return one_of(str(name), ARCHITECTURES, f"architecture in {file}")


def _check_settings(file: Path, settings: Mapping[str, Any], transcoder: bool) -> None:
    """Refuses settings that would change what is computed and that no dictionary here has."""
    activation = "topk" if settings["architecture"] == "topk" else "relu"
    neutral = _NEUTRAL | dict(activation_fn=(activation, None))
    wrong = [
        f"{key} is {settings[key]!r}, expected {values[0]!r}"
        for key, values in neutral.items()
        if key in settings and settings[key] not in values
    ]
    if transcoder and settings.get("apply_b_dec_to_input", True):
        wrong.append("apply_b_dec_to_input is True, expected False for a transcoder")
    heads = {key: settings["metadata"].get(key) for key in _WHOLE_HOOK}
    wrong += [f"metadata.{key} is {head!r}, expected null" for key, head in heads.items() if head is not None]
    unknown = sorted(set(settings) - _USED - _OF_TRAINING - set(neutral))
    wrong += [f"{key} is not known" for key in unknown]
    if wrong:
        raise UserError(f"{file} has settings that a dictionary here cannot follow: {'; '.join(wrong)}")


def _check_width(file: Path, settings: Mapping[str, Any], transcoder: bool, width: int) -> None:
    if transcoder and (out := _number(file, settings, "d_out")) != width:
        raise UserError(f"{file}: d_out is {out} but d_in {width}: here a transcoder's output is as wide as its input")


def _number(file: Path, settings: Mapping[str, Any], key: str) -> int:
    value = settings.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        told = "missing" if value is None else repr(value)
        raise UserError(f"{file}: {key} is {told}: expected a whole number above 0")
    return value


def _facts(metadata: Mapping[str, Any], features: int) -> dict[str, Any]:
    """Kind, k and groups of what is saved as jumprelu."""
    trained_as = metadata.get("training_architecture")
    kind = next((kind for kind, name in _TRAINED_AS.items() if name == trained_as), "jumprelu")
    if kind == "jumprelu":
        return dict(kind=kind)
    details = metadata.get("training_architecture_details") or {}
    widths = details.get("matryoshka_widths") or () if kind == "matryoshka" else ()
    return dict(kind=kind, k=round(details.get("k") or 0), groups=tuple(sorted({*widths, features})) if widths else ())
