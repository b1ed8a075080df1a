"""Descriptions of model families: a reader of the configuration, and the names of weights."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from saejax.models.config import DecoderConfig
from saejax.models.fields import Fields

View = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


def expect(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the tensor, if it has that shape; otherwise raise a ``ValueError`` that says which it has."""
    if tensor.shape != shape:
        raise ValueError(f"has shape {list(tensor.shape)}, expected {list(shape)}")
    return tensor


def vector(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a bias, whose heads and their width are one dimension, by heads."""
    return expect(tensor, (math.prod(shape),)).reshape(shape)


def linear(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the matrix of a torch Linear, [out, in], as [in, out], where out may be heads by width."""
    return expect(tensor, (math.prod(shape[1:]), shape[0])).T.reshape(shape)


def linear_of_heads(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the matrix of a torch Linear, [out, in], as [heads, width, out]."""
    return expect(tensor, (shape[2], shape[0] * shape[1])).T.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Weight:
    """The location of a parameter, or of its slice of one layer, in a checkpoint."""

    #: the tensor's name; "{}" stands for the layer, a second one for the expert. Several parameters may be parts of one
    #: tensor.
    name: str
    #: gives that tensor, or its part, the parameter's shape without copying; a ``ValueError`` if the tensor has another
    #: shape than it should.
    view: View = expect

    @property
    def stacked(self) -> int:
        """Number of the parameter's leading dimensions that count tensors."""
        return self.name.count("{}")


# Axes of the projections' matrices and biases; attention's are split into heads.
_PROJECTIONS = {
    "q": ("DxHxK", "HxK"),
    "k": ("DxNxK", "NxK"),
    "v": ("DxNxK", "NxK"),
    "o": ("HxKxD", "D"),
    "gate": ("DxF", "F"),
    "up": ("DxF", "F"),
    "down": ("FxD", "D"),
}


def linear_weights(layer: str, **modules: str) -> dict[str, Weight]:
    """Return the locations of matrices and biases of torch Linears, whether a model has the biases or not.

    Args:
      layer: what names of a layer's tensors start with, such as "model.layers.{}.".
      modules: module in the layer of each projection, such as ``q="self_attn.q_proj"``.
    """
    weights = {}
    for name, module in modules.items():
        matrix, bias = _PROJECTIONS[name]
        view = linear_of_heads if name == "o" else linear
        weights[f"layers.{name}_{matrix}"] = Weight(f"{layer}{module}.weight", view)
        weights[f"layers.{name}_bias_{bias}"] = Weight(f"{layer}{module}.bias", vector)
    return weights


def norm_weights(letter: str = "D", **modules: str) -> dict[str, Weight]:
    """Return the locations of norms' parameters, whether a model has the biases or not.

    Args:
      letter: of the dimension that is normalised, "D" or "K".
      modules: module of each norm, such as ``final_norm="model.norm"``; with "{}" in its name it is of layers.
    """
    weights: dict[str, Weight] = {}
    for name, module in modules.items():
        name = f"layers.{name}" if "{}" in module else name
        weights |= {f"{name}_{letter}": Weight(f"{module}.weight"), f"{name}_bias_{letter}": Weight(f"{module}.bias")}
    return weights


@dataclasses.dataclass(frozen=True)
class Family:
    """Description of one ``model_type``."""

    read_config: Callable[[Fields], DecoderConfig]  #: from the fields of its ``config.json``
    weights: Mapping[str, Weight]  #: the place of every parameter of ``parameters.parameter_table``
    defaults: Mapping[str, Any]  #: what transformers takes for fields that are absent
