"""The configuration of a dictionary: all of it but the arrays."""

import dataclasses
from collections.abc import Callable
from typing import Any

from saejax.config import Config, setting
from saejax.dictionaries.input_norm import NORMS
from saejax.dictionaries.kinds import kind_names
from saejax.errors import UserError
from saejax.models.sites import is_joined, site_parts

BOS = ("auto", "always", "never")


@dataclasses.dataclass(frozen=True)
class DictionaryConfig(Config):
    """Kind, sites, sizes and conventions of a dictionary."""

    kind: str = setting("topk", "sparsity, one of kinds.KINDS", choices=kind_names)
    site: str = setting("", "site that is read, such as resid_post.15")
    target: str = setting("", "site that a transcoder of mlp_in.15 predicts, such as mlp_out.15; empty: an SAE")
    d_in: int = setting(1, "width of the site", low=1)
    n_features: int = setting(1, "number of features F", low=1)
    target_width: int = setting(0, "width of a transcoder's target; 0: as wide as the site", low=0)
    k: int = setting(
        0, "active features per token (topk, matching_pursuit; a mean for batchtopk and matryoshka; else 0)", low=0
    )
    groups: tuple[int, ...] = setting((), "numbers of leading features that reconstruct alone, ascending to F", low=1)
    skip: bool = setting(False, "add a linear map of the input to what is predicted (skip transcoder)")
    centred: bool = setting(True, "subtract the decoder's bias from the input, as in an SAE")
    fires_above: float = setting(0.0, "|f| above which a feature of a linear dictionary counts as firing", low=0.0)
    #: None: not known yet.
    max_norm: float | None = setting(None, "norm at the site above which a position is an attention sink", low=0.0)
    target_max_norm: float | None = setting(None, "the same at a transcoder's target", low=0.0)
    #: (): it is one site. See ``dictionaries.joined``.
    widths: tuple[int, ...] = setting((), "widths of the parts of a joined site, which sum to d_in", low=1)
    scales: tuple[float, ...] = setting((), "factors of the parts' values before they are put side by side", low=0.0)
    max_norms: tuple[float, ...] = setting((), "maximum norm of each part before that; empty: not known yet", low=0.0)
    model: str = setting("", "language model whose activations it was trained on")
    revision: str = setting("", "its revision")
    fingerprint: str = setting("", "its fingerprint")
    signed: bool = setting(False, "keep the k largest pre-activations below 0, too, where fewer are above (topk)")
    input_norm: str = setting("", "per-token normalisation of what is read; empty: none", choices=NORMS)
    #: What a feature adds is then its activation times its decoder row; stages take dictionaries so.
    output_units: bool = setting(False, "multiply activations by the scale of the token's normalisation")
    #: "auto": as the tokenizer does.
    bos: str = setting("auto", "whether texts of its training began with the BOS token", choices=BOS)

    def __post_init__(self):
        super().__post_init__()
        if self.target_width == self.d_in:  # so that equal ones compare as such
            object.__setattr__(self, "target_width", 0)
        if self.target_width and (self.centred or self.widths):
            raise UserError(
                f"a dictionary that reads {self.d_in} dimensions and writes {self.d_out} is a transcoder of one site: "
                "expected centred=False, as its decoder's bias belongs to the target, and no widths of parts"
            )
        if is_joined(self.site) and not self.widths:
            raise UserError(
                f"a dictionary of the joined site {self.site} is a crosscoder, which has widths of its parts: name "
                "one site for any other dictionary"
            )

    @property
    def d_out(self) -> int:
        """Width of what is rebuilt: a transcoder's target, or the site."""
        return self.target_width or self.d_in

    @property
    def sizes(self) -> str:
        """Widths and number of features in words, such as "576 -> 4608"; of a target of another width this, too."""
        return f"{self.d_in} -> {self.n_features:,}" + (f" -> {self.d_out}" if self.d_out != self.d_in else "")

    def bos_conflict(self, begins_with_bos: bool) -> str:
        """Return in words how texts differ from the texts of training; "": they do not, or it is not known.

        Args:
          begins_with_bos: whether the texts at hand begin with the BOS token.
        """
        if self.bos == "auto" or (self.bos == "always") == begins_with_bos:
            return ""
        trained, here = ("with", "without") if self.bos == "always" else ("without", "with")
        return (
            f"the dictionary was trained on texts {trained} a BOS token in front, and these are {here}: its features "
            f"mean little at the first positions (--capture.bos={self.bos} makes texts like its own)"
        )

    @property
    def knows_sinks(self) -> bool:
        """True if the attention-sink rule is known at every site that is read or written."""
        if self.widths:
            return len(self.max_norms) == len(self.widths)
        return self.max_norm is not None and (not self.target or self.target_max_norm is not None)

    def with_sink_norms(self, sink_norm: Callable[[str], float], replace: bool = False) -> "DictionaryConfig":
        """Return the config with the attention-sink rule of its sites; see ``Dictionary.with_sink_norms``."""
        if self.knows_sinks and not replace:
            return self
        if self.widths:
            return dataclasses.replace(self, max_norms=tuple(float(sink_norm(part)) for part in site_parts(self.site)))
        changes: dict[str, Any] = {}  # measured only where it is missing: it takes a pass of the model
        if replace or self.max_norm is None:
            changes["max_norm"] = float(sink_norm(self.site))
        if self.target and (replace or self.target_max_norm is None):
            changes["target_max_norm"] = float(sink_norm(self.target))
        return dataclasses.replace(self, **changes)

    def require_sink_norms(self) -> None:
        """Raise a ``UserError`` unless the attention-sink rule is known."""
        if not self.knows_sinks:
            raise UserError(
                f"the dictionary of {self.site} does not know yet which positions are attention sinks: take "
                "dictionary.with_sink_norms(lm.sink_norm) of its model"
            )

    def check_model(self, name: str, fingerprint: str, what: str = "the dictionary") -> None:
        """Raise a ``UserError`` that begins with ``what`` if the dictionary was trained on another model than this.

        The model has a name and a fingerprint. Files of other tools say nothing of a model's state: theirs fit any.
        """
        if self.fingerprint and self.fingerprint != fingerprint:
            raise UserError(
                f"{what} was trained on {self.model} (fingerprint {self.fingerprint}), but the model is {name} "
                f"({fingerprint}): use the model it was trained on, or train one for this model"
            )
