"""``config.yaml`` of a circuit-tracer set: what it means for transcoders here, and what they become in it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

import yaml

from saejax.dictionaries.formats import hooks, origin
from saejax.dictionaries.kinds import by_name
from saejax.dictionaries.modules import DictionaryConfig
from saejax.errors import UserError
from saejax.models.sites import Site

DESCRIPTION, LAYERS = "config.yaml", "layer_*.safetensors"
FORMAT = "circuit_tracer"
THRESHOLD = "activation_function.threshold"
KINDS = ("transcoder_set", "cross_layer_transcoder")
_HOOKS = ("feature_input_hook", "feature_output_hook")
_ACTIVATIONS = {"relu": "standard", "jumprelu": "jumprelu", "jump_relu": "jumprelu", "topk": "topk"}


class SetSettings(TypedDict, total=False):
    """What is read of the description of a set; it may say more, and ``read`` checks the hooks alone."""

    model_kind: str
    model_name: Any
    feature_input_hook: str  #: without its layer
    feature_output_hook: str
    activation: Any
    k: Any
    transcoders: Any  #: files of the layers, where they are listed


def read(file: Path, kinds: Sequence[str] = KINDS) -> SetSettings:
    """The description of a set of one of some kinds, checked.

    Raises:
      UserError: it is missing, damaged, or describes something else.
    """
    if not file.is_file():
        raise UserError(f"{file} is missing: name the folder of a transcoder set")
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        json.dumps(settings, allow_nan=False)  # plain data, which can be kept
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError):
        raise UserError(f"{file} is not the description of a transcoder set: it is damaged; fetch it again") from None
    if not isinstance(settings, dict) or not all(isinstance(settings.get(key), str) for key in _HOOKS):
        raise UserError(f"{file} lacks {' or '.join(_HOOKS)}: name the folder of a transcoder set")
    if settings.get("model_kind") not in kinds:
        raise UserError(
            f"{file}: model_kind is {settings.get('model_kind')!r}, expected {' or '.join(map(repr, kinds))}"
        )
    return cast(SetSettings, settings)


def layer_files(folder: Path, settings: SetSettings, fetch: Callable[[str], Path] | None = None) -> list[Path]:
    """The files of the layers, in order; those that are listed need not exist.

    Args:
      fetch: gives the file of an address on the hub; None: such addresses are refused.
    """
    if listed := settings.get("transcoders"):
        if not isinstance(listed, list):
            raise UserError(f"{folder / DESCRIPTION}: transcoders is {listed!r}: expected a list of files")
        remote = [str(file) for file in listed if "://" in str(file)]
        if remote and fetch:
            return [fetch(str(file)) if "://" in str(file) else folder / str(file) for file in listed]
        if remote:
            raise UserError(
                f"{folder / DESCRIPTION} names files on the hub ({remote[0]}, ...): download them to {folder} as "
                "layer_0.safetensors and so on, and remove the list 'transcoders'"
            )
        return [folder / str(file) for file in listed]
    numbers = [path.stem.removeprefix("layer_") for path in folder.glob(LAYERS)]
    layers = sorted(int(number) for number in numbers if number.isdigit())
    missing = sorted(set(range(max(layers, default=0) + 1)) - set(layers))
    if missing:
        raise UserError(f"{folder} lacks layer_{missing[0]}.safetensors: a transcoder set has every layer from 0")
    return [folder / f"layer_{layer}.safetensors" for layer in layers]


def kind_of(file: Path, settings: SetSettings, layer: int, has_threshold: bool) -> str:
    """The kind of a layer's transcoder.

    Args:
      file: of the settings.
      layer: its number, for messages.
      has_threshold: whether its file has thresholds.

    Raises:
      UserError: the settings name an activation that is unknown or does not go with that.
    """
    stored = "jumprelu" if has_threshold else "standard"
    named = settings.get("activation")
    if named is None:
        return stored
    kind = _ACTIVATIONS.get(str(named).lower())
    if kind is None:
        raise UserError(f"{file}: activation is {named!r}: expected one of {', '.join(_ACTIVATIONS)}")
    if ("threshold_F" in by_name(kind).vectors) != has_threshold:
        has = "has" if has_threshold else "has no"
        raise UserError(f"{file}: activation is {named!r}, but layer {layer} {has} {THRESHOLD}")
    if "k" in by_name(kind).numbers and (not isinstance(settings.get("k"), int) or settings["k"] < 1):
        raise UserError(
            f"{file}: activation is {named}, but k is {settings.get('k')!r}: expected a whole number above 0"
        )
    return kind


def reads_before_gain(settings: SetSettings) -> bool:
    """Whether transcoders read what the norm before the MLP gives before its gain, which is none of the sites."""
    return settings["feature_input_hook"] == "ln2.hook_normalized"


def sites_of(settings: SetSettings, layer: int, site: str, target: str) -> tuple[str, str]:
    """What a layer's transcoder reads and predicts; ``site`` and ``target`` are kinds in place of the hooks."""
    model = str(settings.get("model_name") or "")

    def named(hook: str, given: str) -> str:
        return str(Site.parse(f"{given}.{layer}")) if given else hooks.to_site(f"blocks.{layer}.{hook}", model)

    return named(settings["feature_input_hook"], site), named(settings["feature_output_hook"], target)


def describe(config: DictionaryConfig) -> dict[str, Any]:
    """The content of ``config.yaml`` for a set of such transcoders."""
    settings = {key: value for key, value in origin.settings_of(config, FORMAT).items() if key != "transcoders"}
    settings |= dict(model_name=config.model, model_kind="transcoder_set") | _hooks(config)
    if _ACTIVATIONS.get(str(settings.get("activation")).lower()) != config.kind:
        settings.pop("activation", None)
    return settings | _sparsity(config)


def has(kind: str) -> bool:
    """Whether a set can hold transcoders of a kind."""
    return kind in _ACTIVATIONS.values() or by_name(kind).jumprelu


def _sparsity(config: DictionaryConfig) -> dict[str, Any]:
    """What a set says of kinds with a k at inference; those of others are told by their arrays."""
    return dict(activation=config.kind, k=config.k) if "k" in by_name(config.kind).numbers else {}


def check(configs: Sequence[DictionaryConfig]) -> None:
    """Raises a ``UserError`` if such transcoders do not make a set."""
    if not configs:
        raise UserError("a transcoder set has one transcoder for every layer from 0, but none was given")
    for config in configs:
        if not config.target:
            raise UserError(f"a transcoder set holds no SAEs, but one of {config.site} was given: write saelens")
        if not has(config.kind):
            raise UserError(f"circuit-tracer has no {config.kind} transcoders: keep them in the format saejax")
        if Site.parse(config.site).layer != Site.parse(config.target).layer:
            raise UserError(
                f"a transcoder of a set stays in its layer, but one predicts {config.target} of {config.site}"
            )
    layers = sorted(Site.parse(config.target).layer for config in configs)
    if layers != list(range(len(layers))):
        missing = sorted(set(range(layers[-1] + 1)) - set(layers))
        told = f"layers {missing} are missing" if missing else f"the layers are {layers}"
        raise UserError(f"a transcoder set has one transcoder for every layer from 0, but {told}")
    same: dict[str, set] = {
        "model": {config.model for config in configs},
        "width": {config.d_in for config in configs},
        "number of features": {config.n_features for config in configs},
        "skip path": {config.skip for config in configs},
        "hooks": {tuple(_hooks(config).values()) for config in configs},
        "sparsity": {tuple(_sparsity(config).items()) for config in configs},
    }
    differ = [what for what, values in same.items() if len(values) > 1]
    if differ:
        raise UserError(f"the transcoders of a set must be of one {' and '.join(differ)}, and these are not")


def _hooks(config: DictionaryConfig) -> dict[str, str]:
    """The hooks without the layer. Published sets have ``mlp.hook_out`` for models without a norm after the MLP."""
    before = origin.settings_of(config, FORMAT)
    named = {}
    for key, site in zip(_HOOKS, (config.site, config.target), strict=True):
        layer = Site.parse(site).layer
        hook = str(hooks.to_hook(site)).removeprefix(f"blocks.{layer}.")
        if hook == "hook_mlp_out" and not hooks.has_post_norms(config.model):
            hook = "mlp.hook_out"
        old = before.get(key)
        named[key] = old if old and hooks.kept(f"blocks.{layer}.{old}", site, config.model) else hook
    return named
