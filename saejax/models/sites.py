"""Sites: the named places of a decoder where values are captured and edited.

In the order in which layer L computes them, all of width ``d_model``:

- ``resid_pre.L``: the residual stream entering the layer;
- ``attn_out.L``: what attention adds to it;
- ``resid_mid.L``: the stream after that;
- ``mlp_in.L``: what the MLP reads, after its norm;
- ``mlp_out.L``: what the MLP adds;
- ``resid_post.L``: the stream leaving the layer, equal to ``resid_pre.(L+1)``.
"""

import dataclasses
from typing import Self

from saejax.errors import UserError
from saejax.models.config import DecoderConfig

KINDS = ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")


@dataclasses.dataclass(frozen=True)
class Site:
    """One place: a kind, which is one of ``KINDS``, and a layer, counted from 0."""

    kind: str
    layer: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """The site that a text such as "resid_post.15" names.

        Raises:
          UserError: the text names none.
        """
        kind, _, layer = text.partition(".")
        if kind not in KINDS or not (layer.isascii() and layer.isdigit()):
            raise UserError(
                f"there is no site {text!r}: expected one of {', '.join(KINDS)}, a dot and a layer, as in resid_post.15"
            )
        return cls(kind, int(layer))

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}"

    def check(self, config: DecoderConfig) -> Self:
        """Returns the site; a ``UserError`` if the model has no such layer."""
        if not 0 <= self.layer < config.n_layers:
            raise UserError(
                f"there is no site {self}: the model has {config.n_layers} layers, 0 to {config.n_layers - 1}"
            )
        return self

    def width(self, config: DecoderConfig) -> int:
        """Size of the last dimension of the values at this site."""
        return config.d_model
