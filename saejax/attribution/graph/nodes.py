"""The nodes of an attribution graph: one table, kind after kind, in this order.

feature     an active feature at a position, in the order (layer, position, feature)
error       what a layer's transcoder does not explain of the MLP's output at a position, or an SAE of its site's
            value; (layer, position)
token       the embedding of the token at a position
first_mlp   the MLP's output at the first position (or first few), which no feature explains; one for each layer
bias        what the biases of a layer's attention, norms and decoder add, at all positions; one for each layer
logit       a logit, or a difference of two
"""

import dataclasses
from typing import Any

import numpy as np

from saejax.short_reprs import has_short_repr

KINDS = ("feature", "error", "token", "first_mlp", "bias", "logit")
DTYPES: tuple[Any, ...] = (np.dtype("U9"), np.int32, np.int32, np.int32, np.float32)  # of the columns of ``Nodes``
FEATURE, ERROR, TOKEN, FIRST_MLP, BIAS, LOGIT = KINDS


@has_short_repr
@dataclasses.dataclass(frozen=True)
class Nodes:
    """The table of nodes; plain arrays of one length N."""

    kind_N: np.ndarray  #: kind in words, in the order of ``KINDS``
    layer_N: np.ndarray  #: int32 layer; -1 for tokens, the number of layers for logits
    position_N: np.ndarray  #: int32 position in the prompt; 0 for biases, the last one for logits
    #: int32 number of the feature, id of the token, or id of the logit's token; -1 where there is none.
    index_N: np.ndarray
    value_N: np.ndarray  #: float32 activation of a feature, weight of a logit in influences (its probability), else 0

    def __len__(self) -> int:
        return len(self.kind_N)

    def __getitem__(self, chosen: np.ndarray | slice) -> "Nodes":
        return Nodes(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))

    @classmethod
    def of(cls, kind: str, layer: Any, position: Any, index: Any = -1, value: Any = 0) -> "Nodes":
        """Return nodes of one kind.

        Args:
          kind: one of ``KINDS``.
          layer: the column of layers [N]; in all columns a number stands for an array of it.
          position: of tokens [N].
          index: of features [N], or the node's number in its kind.
          value: activations [N].
        """
        arrays: Any = np.broadcast_arrays(*map(np.atleast_1d, (kind, layer, position, index, value)))
        return cls(*(array.astype(dtype) for array, dtype in zip(arrays, DTYPES, strict=True)))

    @classmethod
    def joined(cls, *parts: "Nodes") -> "Nodes":
        """Return the parts' nodes, one after the other."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def ids(self, n_layers: int) -> list[str]:
        """Return the ids of the nodes, circuit-tracer's and unique, in the order of the table.

        Args:
          n_layers: of the model.
        """
        ids, differences = [], 0
        columns = self.kind_N, self.layer_N, self.position_N, self.index_N
        for kind, layer, position, index in zip(*(column.tolist() for column in columns)):
            if kind == FEATURE:
                ids.append(f"{layer}_{index}_{position}")
            elif kind == ERROR:
                ids.append(f"{layer}_-1_{position}")
            elif kind == TOKEN:
                ids.append(f"E_{index}_{position}")
            elif kind == LOGIT:
                differences += index < 0  # a difference is no token: -1, -2, ...
                ids.append(f"{n_layers + 1}_{index if index >= 0 else -differences}_{position}")
            else:
                ids.append(f"{kind}_{layer}")
        return ids


def name_difference(first: str, second: str) -> str:
    """Return the label of the difference of two logits: their texts as they are, in quotes, as pages show tokens.

    Args:
      first: the text of a token.
      second: the text of the token that is subtracted.
    """
    quoted = (f'"{text}"' if "'" in text else f"'{text}'" for text in (first, second))
    return " - ".join(quoted)
