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
    """The location of a parameter, or of its slice of one layer, in a checkpoint.

    Attributes:
      name: the tensor's name; "{}" stands for the layer, a second one for the expert. Several parameters may be parts
        of one tensor.
      view: gives that tensor, or its part, the parameter's shape without copying; a ``ValueError`` if the tensor has
        another shape than it should.
    """

    name: str
    view: View = expect

    @property
    def stacked(self) -> int:
        """Number of the parameter's leading dimensions that count tensors."""
        return self.name.count("{}")


@dataclasses.dataclass(frozen=True)
class Family:
    """Description of one ``model_type``.

    Attributes:
      read_config: from the fields of its ``config.json``.
      weights: the place of every parameter of ``parameters.parameter_table``.
      defaults: what transformers takes for fields that are absent.
    """

    read_config: Callable[[Fields], DecoderConfig]
    weights: Mapping[str, Weight]
    defaults: Mapping[str, Any]
