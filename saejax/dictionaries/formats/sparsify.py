"""sparsify folders: ``cfg.json`` and ``sae.safetensors``; read only.

Tensors: encoder.weight [F, d], encoder.bias [F], W_dec [F, d], b_dec [d] and, with a skip path, W_skip [d, d], applied
as x @ W_skip.T. The folder's name is the module that it reads, such as ``layers.10``; a transcoder predicts that
module's output from its input.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from saejax.dictionaries.formats import hooks, origin, tensors
from saejax.dictionaries.modules import Dictionary, DictionaryConfig
from saejax.errors import UserError
from saejax.files import read_json

DESCRIPTION, WEIGHTS = "cfg.json", "sae.safetensors"
_NAMES = {"W_enc_DxF": "encoder.weight", "b_enc_F": "encoder.bias", "W_dec_FxD": "W_dec", "b_dec_D": "b_dec"}
_INPUTS = {"mlp_out": "mlp_in", "resid_post": "resid_pre"}  # what a module with this output reads


def load(folder: Path, matmul_dtype: str = "float32", site: str = "", target: str = "") -> Dictionary:
    """Reads a folder.

    Args:
      folder: holds ``cfg.json`` and ``sae.safetensors``.
      matmul_dtype: dtype of the operands of matrix products.
      site, target: sites in place of those that the folder's name means.

    Raises:
      UserError: it is damaged, or of a kind that is not known here.
    """
    file = Path(folder).absolute() / DESCRIPTION
    settings = read_json(file)
    found = tensors.find(file.with_name(WEIGHTS))
    d, f, k = _sizes(file, settings)
    skip, transcoder = (bool(settings.get(key, False)) for key in ("skip_connection", "transcode"))
    read, predicted = _sites(file.parent, transcoder)
    shapes = {"encoder.weight": (f, d), "encoder.bias": (f,), "W_dec": (f, d), "b_dec": (d,)}
    tensors.check(file.with_name(WEIGHTS), found, shapes | ({"W_skip": (d, d)} if skip else {}))
    arrays = {own: tensors.widened(found[name]) for own, name in _NAMES.items()}
    arrays["W_enc_DxF"] = arrays["W_enc_DxF"].T
    if skip:
        arrays["W_skip_DxD"] = tensors.widened(found["W_skip"]).T
    config = DictionaryConfig(
        kind="topk",
        site=site or read,
        target=(target or predicted) if transcoder else "",
        d_in=d,
        n_features=f,
        k=k,
        skip=skip,
        centred=not transcoder,
        model=_model(file.parent),
        origin=origin.describe("sparsify", found["W_dec"].dtype, settings),
    )
    return Dictionary(config, matmul_dtype, **{name: jnp.asarray(array) for name, array in arrays.items()})


def _sizes(file: Path, settings: Any) -> tuple[int, int, int]:
    """Width, features and k of a folder whose settings can be followed."""
    if not isinstance(settings, dict):
        raise UserError(f"{file} is not the description of a sparsify folder")
    activation = settings.get("activation", "topk")
    if activation != "topk":
        raise UserError(f"{file}: activation is {activation!r}, which no dictionary here has: expected 'topk'")
    if settings.get("signed", False):
        raise UserError(f"{file}: signed is true (activations below 0), which no dictionary here has")
    features = settings.get("num_latents") or settings.get("expansion_factor", 0) * settings.get("d_in", 0)
    sizes = dict(d_in=settings.get("d_in"), num_latents=features, k=settings.get("k"))
    wrong = [f"{key} is {value!r}" for key, value in sizes.items() if not isinstance(value, int) or value < 1]
    if wrong:
        raise UserError(f"{file}: {', '.join(wrong)}: expected whole numbers above 0")
    if sizes["k"] > features:
        raise UserError(f"{file}: k is {sizes['k']}, more than the {features} features")
    return sizes["d_in"], features, sizes["k"]


def _sites(folder: Path, transcoder: bool) -> tuple[str, str]:
    """What the module of the folder's name reads, for a transcoder, or gives; and what a transcoder predicts."""
    if "." not in folder.name:
        return hooks.UNKNOWN, hooks.UNKNOWN
    given = hooks.to_site(folder.name, _model(folder))
    if not transcoder:
        return given, ""
    kind, _, layer = given.partition(".")
    return f"{_INPUTS[kind]}.{layer}" if kind in _INPUTS else hooks.UNKNOWN, given


def _model(folder: Path) -> str:
    """The model's name, which sparsify writes beside the folders of its dictionaries."""
    description = folder.parent / "config.json"
    if not description.is_file():
        return ""
    settings = read_json(description)
    return str(settings.get("model") or "") if isinstance(settings, dict) else ""
