"""Qwen-Scope's SAEs, a file for each layer; read only.

layer3.sae.pt   W_enc [F, d], W_dec [d, F], b_enc [F], b_dec [d]: the k largest of x @ W_enc.T + b_enc, of the residual
                stream after layer 3
config.json     beside them: k; else it is in the repository's name, "...-L0_50"

Nothing but tensors is unpickled. A token of which fewer than k pre-activations are above 0 has fewer active features
here; as published, it would keep negative ones.
"""

import pickle
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from saejax.dictionaries.formats import origin
from saejax.dictionaries.modules import Dictionary, DictionaryConfig
from saejax.errors import UserError
from saejax.files import read_json

DESCRIPTION = "config.json"
_FILE = re.compile(r"layer(\d+)\.sae\.pt")
_L0 = re.compile(r"-L0_(\d+)")
_NAMES = {"W_enc": "W_enc_DxF", "W_dec": "W_dec_FxD", "b_enc": "b_enc_F", "b_dec": "b_dec_D"}


def find_layers(folder: Path) -> list[Path]:
    """The files of a folder's dictionaries, in the order of layers."""
    return sorted((file for file in folder.glob("*.pt") if is_one(file)), key=_layer)


def is_one(file: Path) -> bool:
    """Whether a file is, by its name, of this format."""
    return bool(_FILE.fullmatch(file.name))


def load(file: Path, matmul_dtype: str = "float32", site: str = "", target: str = "") -> Dictionary:
    """Reads a file.

    Args:
      file: such as layer3.sae.pt.
      matmul_dtype: dtype of the operands of matrix products.
      site: in place of what the file's name says.
      target: must be "": these predict what they read.

    Raises:
      UserError: it is missing or damaged, or nothing says what k is.
    """
    if target:
        raise UserError(f"{file} is an SAE, which predicts what it reads: give no target")
    arrays = _arrays(file)
    d, f = arrays["W_enc_DxF"].shape
    config = DictionaryConfig(
        kind="topk",
        site=site or f"resid_post.{_layer(file)}",
        d_in=d,
        n_features=f,
        k=_k(file, f),
        centred=False,
        origin=origin.describe("qwen_scope", np.dtype(np.float32), {}),
    )
    return Dictionary(config, matmul_dtype, **{name: jnp.asarray(array) for name, array in arrays.items()})


def _layer(file: Path) -> int:
    named = _FILE.fullmatch(file.name)
    assert named is not None
    return int(named[1])


def _arrays(file: Path) -> dict[str, np.ndarray]:
    import torch

    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{file} is missing: fetch the dictionary again") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise UserError(f"{file} is damaged, or holds more than tensors: {str(error).splitlines()[0]}") from None
    shapes = {name: tuple(found[name].shape) for name in _NAMES if name in found} if isinstance(found, dict) else {}
    f, d = shapes.get("W_enc", (0, 0))
    wanted = dict(W_enc=(f, d), W_dec=(d, f), b_enc=(f,), b_dec=(d,))
    if not f or shapes != wanted:
        raise UserError(f"{file} is no dictionary of Qwen-Scope: its arrays are {shapes or 'none'}, expected {wanted}")
    return {own: found[name].float().numpy().T for name, own in _NAMES.items()}


def _k(file: Path, features: int) -> int:
    description = file.with_name(DESCRIPTION)
    settings = read_json(description) if description.is_file() else {}
    named = _L0.findall(file.absolute().as_posix())
    k = settings.get("k") if isinstance(settings, dict) and "k" in settings else int(named[-1]) if named else None
    if not isinstance(k, int) or not 0 < k <= features:
        raise UserError(f"{file}: k is {k}: expected a number up to {features} in {description.name} beside it")
    return k
