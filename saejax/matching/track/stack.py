"""The dictionaries that a text is followed through: at most one of each layer, loaded one at a time."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from saejax.dictionaries import Dictionary
from saejax.dictionaries.description import DictionaryConfig
from saejax.dictionaries.labels import Label
from saejax.models.sites import Site


@dataclasses.dataclass(frozen=True)
class LayerDictionary:
    """The dictionary of a layer."""

    name: str  #: its name on pages and in results, such as "topk/resid_post.3"
    config: DictionaryConfig  #: what it is
    load: Callable[[], Dictionary]  #: loads it
    atlas: Path | None  #: the page that shows its features; None where there is none
    labels: Mapping[int, Label]  #: what its features are called

    @property
    def reads(self) -> Site:
        """The site that it reads."""
        return Site.parse(self.config.site)


Stack = Sequence[LayerDictionary]  # in the order of layers
