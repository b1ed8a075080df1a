"""The dictionaries that a text is followed through: at most one of each layer, loaded one at a time."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from saejax.attribution.local.dictionaries import check_dictionary
from saejax.attribution.local.transcoders import LayerTranscoders, open_transcoders
from saejax.dictionaries import Dictionary, load_dictionary, stacks
from saejax.dictionaries.description import DictionaryConfig
from saejax.dictionaries.formats import circuit_tracer, folders_of, read_config
from saejax.dictionaries.labels import Label, labels_of
from saejax.errors import UserError
from saejax.models.language_model import LanguageModel
from saejax.models.sites import KINDS, Site
from saejax.runner.stage import is_folder


@dataclasses.dataclass(frozen=True)
class LayerDictionary:
    """The dictionary of a layer.

    Attributes:
      name: its name on pages and in results, such as "topk/resid_post.3".
      config: what it is.
      load: loads it.
      atlas: the page that shows its features; None where there is none.
      labels: what its features are called.
    """

    name: str
    config: DictionaryConfig
    load: Callable[[], Dictionary]
    atlas: Path | None
    labels: Mapping[int, Label]

    @property
    def reads(self) -> Site:
        """The site that it reads."""
        return Site.parse(self.config.site)

    @property
    def layer(self) -> int:
        """The layer of that site."""
        return self.reads.layer


@dataclasses.dataclass(frozen=True)
class Stack:
    """Dictionaries in the order of layers; if they are the transcoders of all layers, also as a set."""

    layers: tuple[LayerDictionary, ...]
    transcoders: LayerTranscoders | None


def open_stack(names: Sequence[str], units: Mapping[str, Path], model: LanguageModel) -> Stack:
    """Return the dictionaries that a flag names.

    Args:
      names: trained stacks ("topk"), members ("topk/resid_post.3"), or folders.
      units: folders of the train units that are read, such as those of "train/topk" or "train/topk/k16".
      model: that they are of.

    Raises:
      UserError: one does not exist, is of another model or of a layer that the model does not have, or two are of one
        layer.
    """
    by_layer: dict[int, LayerDictionary] = {}
    for name in names:
        for each in _of_name(name, units):
            each.reads.check(model.config)
            check_dictionary(each.config, model, f"--track.dictionaries: {each.name}")
            if each.layer in by_layer:
                raise UserError(
                    f"--track.dictionaries: {by_layer[each.layer].name} and {each.name} are both of layer "
                    f"{each.layer}: name one of each layer, such as the members of a stack by themselves"
                )
            by_layer[each.layer] = each
    layers = tuple(by_layer[layer] for layer in sorted(by_layer))
    whole = len(names) == 1 and len(layers) == model.config.n_layers
    transcoders = None
    if whole and all((each.config.site, each.config.target) == _of_mlp(each.layer) for each in layers):
        trained = units.get(f"train/{names[0]}") or units.get(f"train/{stacks.kind_and_member(names[0])[0]}")
        path = names[0] if is_folder(names[0]) else str(trained)
        transcoders = open_transcoders(path).check(model)
    return Stack(layers, transcoders)


def _of_mlp(layer: int) -> tuple[str, str]:
    """Return the sites that the transcoder of a layer reads and predicts."""
    return f"mlp_in.{layer}", f"mlp_out.{layer}"


def _of_name(name: str, units: Mapping[str, Path]) -> list[LayerDictionary]:
    flag = "--track.dictionaries"
    if is_folder(name):
        folder = Path(name)
        if circuit_tracer.is_set(folder):
            return _of_set(folder)
        try:
            inside = {place.relative_to(folder).as_posix(): place for place in folders_of(folder)}
        except UserError as error:
            raise UserError(f"{flag}: {error}") from None
        places = {stacks.full_name(folder.name, "" if at == "." else at): place for at, place in inside.items()}
        workdir = folder.parent.parent
    else:
        places = stacks.find_trained(name, units, flag)
        workdir = next(folder for unit, folder in units.items() if unit.startswith("train/")).parent.parent
    dictionaries = []
    for full_name, place in places.items():
        page = workdir / "atlas" / full_name / "index.html"
        dictionaries.append(
            LayerDictionary(
                full_name,
                read_config(place),
                lambda place=place: load_dictionary(place),  # type: ignore[misc]
                page if page.exists() else None,
                labels_of(workdir, full_name),
            )
        )
    return sorted(dictionaries, key=lambda each: (each.layer, KINDS.index(each.reads.kind)))


def _of_set(folder: Path) -> list[LayerDictionary]:
    """Return the transcoders of a circuit-tracer set."""
    opened = open_transcoders(folder)
    if opened.reads != "mlp_in":
        raise UserError(
            f"{folder}: transcoders that read before the norm's gain cannot be followed: use experiments.attribute"
        )

    def layer_dictionary(layer: int, config: DictionaryConfig) -> LayerDictionary:
        name = f"{folder.name}/{layer}"
        return LayerDictionary(name, config, lambda: opened.load(layer), None, {})

    return [layer_dictionary(layer, config) for layer, config in enumerate(opened.configs)]
