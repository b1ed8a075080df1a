"""The dictionaries that are compared; each is loaded when it is used, and not kept."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh

from saejax.dictionaries import Dictionary, DictionaryConfig, load_dictionary
from saejax.dictionaries.formats import hooks
from saejax.errors import UserError
from saejax.models.sites import Site

WEIGHTS = ("decoder", "encoder")  # measures that need no text


@dataclasses.dataclass(frozen=True)
class Compared:
    """A dictionary by its name."""

    name: str  #: such as "topk/k32", or its folder
    folder: Path  #: its folder
    config: DictionaryConfig  #: its configuration

    def load(self, mesh: Mesh | None = None) -> Dictionary:
        """Load the dictionary, on a mesh's devices or as ``load_dictionary`` does without one.

        Raises:
          UserError: it is damaged.
        """
        dictionary = load_dictionary(self.folder, mesh=mesh)
        if not jnp.isfinite(dictionary.W_dec_FxD[...]).all():
            raise UserError(f"{self.folder} has NaN or infinite decoder rows: train it again")
        return dictionary

    @property
    def fingerprint(self) -> str:
        """Fingerprint of its model; "" where its files do not state it."""
        return self.config.fingerprint

    @property
    def model_name(self) -> str:
        """Short name of its model; "" where its files do not state it."""
        return hooks.short_model_name(self.config.model)

    @property
    def model_key(self) -> str:
        """Mark of its model: the fingerprint, or else the name; "" where its files state neither."""
        return self.fingerprint or self.model_name

    @property
    def target(self) -> str:
        """The site that its features write to."""
        return self.config.target or self.config.site

    @property
    def layer(self) -> int:
        """The layer of the target."""
        return Site.parse(self.target).layer


def same_model(first: Compared, second: Compared) -> bool:
    """Return whether two dictionaries can be of one model: their files state the same one, or one states none."""
    if first.fingerprint and second.fingerprint:
        return first.fingerprint == second.fingerprint
    return first.model_name == second.model_name or not (first.model_name and second.model_name)


def measures_of(wanted: Sequence[str], first: Compared, second: Compared) -> list[str]:
    """Return the measures that can compare two dictionaries.

    Directions of two models have nothing to do with each other, whatever their widths: across models only activity on
    shared text is compared.
    """
    # Files that name no model may be of one: widths are then all that speaks against it.
    widths = [dict(decoder=entry.config.d_out, encoder=entry.config.d_in) for entry in (first, second)]
    comparable = [name for name in WEIGHTS if same_model(first, second) and widths[0][name] == widths[1][name]]
    return [measure for measure in wanted if measure not in WEIGHTS or measure in comparable]
