"""The dictionaries that a text is followed through: at most one of each layer, loaded one at a time."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from saejax.attribution.local.dictionaries import check_dictionary
from saejax.attribution.local.transcoders import open_transcoders
from saejax.dictionaries import Dictionary, load_dictionary
from saejax.dictionaries.description import DictionaryConfig
from saejax.dictionaries.formats import circuit_tracer
from saejax.dictionaries.labels import Label, labels_of
from saejax.errors import UserError
from saejax.matching.transfer.compared import load_compared
from saejax.models.language_model import LanguageModel
from saejax.models.sites import KINDS, Site
from saejax.runner.stage import is_folder

_FLAG = "--track.dictionaries"


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

    @property
    def layer(self) -> int:
        """The layer of that site."""
        return self.reads.layer


Stack = Sequence[LayerDictionary]  # in the order of layers


def open_stack(names: Sequence[str], units: Mapping[str, Path], workdir: Path, model: LanguageModel) -> Stack:
    """Return the dictionaries that a flag names, in the order of layers.

    Args:
      names: trained stacks ("topk"), members ("topk/resid_post.3"), or folders.
      units: folders of the train units that are read, such as those of "train/topk" or "train/topk/k16".
      workdir: of the run, which has labels and pages of what was trained there.
      model: that they are of.

    Raises:
      UserError: one does not exist, is of another model or of a layer that the model does not have, or two are of one
        layer.
    """
    by_layer: dict[int, LayerDictionary] = {}
    for name in names:
        for each in _of_name(name, units, workdir):
            each.reads.check(model.config)
            check_dictionary(each.config, model, f"{_FLAG}: {each.name}")
            if each.layer in by_layer:
                raise UserError(
                    f"{_FLAG}: {by_layer[each.layer].name} and {each.name} are both of layer {each.layer}: name one of "
                    "each layer, such as the members of a stack by themselves"
                )
            by_layer[each.layer] = each
    return tuple(by_layer[layer] for layer in sorted(by_layer))


def _of_name(name: str, units: Mapping[str, Path], workdir: Path) -> list[LayerDictionary]:
    """Return the dictionaries of a name in the order of layers; of a circuit-tracer set its transcoders."""
    if is_folder(name) and circuit_tracer.is_set(Path(name)):
        opened = open_transcoders(name)
        if opened.reads != "mlp_in":
            raise UserError(
                f"{name}: transcoders that read before the norm's gain cannot be followed: use experiments.attribute"
            )
        return [
            LayerDictionary(f"{Path(name).name}/{layer}", config, functools.partial(opened.load, layer), None, {})
            for layer, config in enumerate(opened.configs)
        ]
    dictionaries = []
    for each in load_compared([name], units, _FLAG):
        root, full_name = each.trained_in(workdir)
        page = root / "atlas" / full_name / "index.html"
        labels = labels_of(root, full_name)
        load = functools.partial(load_dictionary, each.folder)
        dictionaries.append(LayerDictionary(full_name, each.config, load, page if page.exists() else None, labels))
    return sorted(dictionaries, key=lambda each: (each.layer, KINDS.index(each.reads.kind)))
