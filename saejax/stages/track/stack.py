"""The dictionaries that ``--track.dictionaries`` names, with what their workdirs tell of the features."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from saejax.attribution.local.dictionaries import check_dictionary
from saejax.dictionaries.names import is_folder
from saejax.errors import UserError
from saejax.matching.track.stack import LayerDictionary, Stack
from saejax.models.language_model import LanguageModel
from saejax.runner.labels import labels_of
from saejax.runner.stacks import find_results
from saejax.stages.transfer.inputs import load_compared, trained_in

_FLAG = "--track.dictionaries"


def open_stack(names: Sequence[str], units: Mapping[str, Path], workdir: Path, model: LanguageModel) -> Stack:
    """Return the dictionaries that a flag names, in the order of layers.

    Args:
      names: trained stacks ("topk"), members ("topk/resid_post.3"), or folders.
      units: folders of the units that are read, such as of "train/topk", "train/topk/k16" or "atlas/topk".
      workdir: of the run, which has labels and pages of what was trained there.
      model: that they are of.

    Raises:
      UserError: one does not exist, is of another model or of a layer that the model does not have, or two are of one
        layer.
    """
    by_layer: dict[int, LayerDictionary] = {}
    for entry in load_compared(names, units, _FLAG):
        root, name = trained_in(entry, workdir)
        read = {} if is_folder(entry.name) else units
        atlas, load = find_results(root, "atlas", name, entry.folder, read), functools.partial(entry.load, model.mesh)
        shown = page if atlas and (page := atlas / "index.html").exists() else None
        dictionary = LayerDictionary(name, entry.config, load, shown, labels_of(root, name, entry.folder, read))
        layer = dictionary.reads.check(model.config).layer
        check_dictionary(entry.config, model, f"{_FLAG}: {name}")
        if layer in by_layer:
            raise UserError(
                f"{_FLAG}: {by_layer[layer].name} and {name} are both of layer {layer}: name one of each layer, such "
                "as the members of a stack by themselves"
            )
        by_layer[layer] = dictionary
    return tuple(by_layer[layer] for layer in sorted(by_layer))
