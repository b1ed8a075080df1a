"""Feature descriptions: contexts, logits and labels, from files of other programs and of our own runs.

Three sources, of which the first that knows a feature is used:

1. Our stage ``interpret``, for sets that were trained in a workdir: ``interpret/<kind>/<member>/features/*.json``.
2. circuit-tracer's feature files: ``index.json.gz`` names for each layer a file and the byte range of each feature,
   where 4 bytes of length are followed by gzipped JSON; or one JSON file for each feature, ``<n>.json``, named by the
   Cantor pairing of layer and index.
3. Neuronpedia's JSON of a feature, ``<layer>_<index>.json`` or ``<n>.json``.
"""

import dataclasses
import functools
import gzip
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from saejax.attribution.forms.neuronpedia import cantor_pair
from saejax.dictionaries.labels import trained_units
from saejax.dictionaries.stacks import kind_and_member
from saejax.errors import UserError
from saejax.files import read_json

Feature = tuple[int, int]  # layer, index of the feature
EXAMPLES = 5  # contexts of a feature that a page shows
_TOKENS = 24  # of a context, on each side of its strongest token
_INDEX = "index.json.gz"


@dataclasses.dataclass(frozen=True)
class FeatureDetails:
    """What is known of a feature.

    Attributes:
      examples: contexts in which it fires most strongly, each with ``tokens`` and ``activations``, strongest first.
      top_logits, bottom_logits: tokens whose logits it raises and lowers most.
      label: what it is called; "": nothing.
    """

    examples: tuple[Mapping[str, list], ...] = ()
    top_logits: tuple[str, ...] = ()
    bottom_logits: tuple[str, ...] = ()
    label: str = ""


def read_details(
    dictionaries: Sequence[str | Path], folders: Sequence[Path], features: Iterable[Feature]
) -> dict[Feature, FeatureDetails]:
    """Return what is known of some features.

    Args:
      dictionaries: folders of the set of transcoders or of SAEs; its own ``features/`` is read, too.
      folders: of feature files.
      features: layers and indices.

    Raises:
      UserError: a file is damaged.
    """
    wanted = list(dict.fromkeys(features))
    places = [*folders, *(Path(folder).expanduser() / "features" for folder in dictionaries)]
    places = [place for place in dict.fromkeys(places) if place.is_dir()]
    found = _from_interpret(dictionaries, wanted)
    for feature in wanted:
        for place in places if feature not in found else ():
            if (data := _read_file(place, feature)) is not None:
                found[feature] = parse_feature(data)
                break
    return found


def parse_feature(data: Mapping[str, Any]) -> FeatureDetails:
    """Return the details in the JSON of a feature, circuit-tracer's or Neuronpedia's.

    Raises:
      UserError: it is neither.
    """
    try:
        if "examples_quantiles" in data:
            examples = [one for quantile in data["examples_quantiles"] for one in quantile["examples"]]
            contexts = [(one["tokens"], one["tokens_acts_list"]) for one in examples]
            label, up, down = data.get("label"), data.get("top_logits"), data.get("bottom_logits")
        else:  # Neuronpedia
            contexts = [(one["tokens"], one["values"]) for one in data["activations"]]
            explained = data.get("explanations") or [{}]
            label, up, down = explained[0].get("description"), data.get("pos_str"), data.get("neg_str")
        contexts.sort(key=lambda context: -max(context[1], default=0.0))
        cut = tuple(_cut(tokens, values) for tokens, values in contexts[:EXAMPLES])
        return FeatureDetails(cut, tuple(map(str, up or ())), tuple(map(str, down or ())), str(label or ""))
    except (KeyError, TypeError, AttributeError, IndexError):
        raise UserError(
            "this is no feature of circuit-tracer or Neuronpedia: expected examples_quantiles or activations"
        ) from None


def _cut(tokens: Sequence[str], values: Sequence[float | None]) -> dict[str, list]:
    """Return the tokens around the strongest one, and their activations."""
    numbers = [0.0 if value is None else float(value) for value in values]
    peak = max(range(len(numbers)), key=numbers.__getitem__, default=0)
    near = slice(max(peak - _TOKENS, 0), peak + _TOKENS + 1)
    return dict(tokens=[str(token) for token in tokens[near]], activations=numbers[near])


def _from_interpret(dictionaries: Sequence[str | Path], features: Sequence[Feature]) -> dict[Feature, FeatureDetails]:
    found = {}
    trained = trained_units(dictionaries)
    for layer in {layer for layer, _ in features} & set(trained):
        workdir, name = trained[layer]
        kind, member = kind_and_member(name)
        wanted = {index for own_layer, index in features if own_layer == layer}
        for path in sorted((workdir / "interpret" / kind / member / "features").glob("*.json")):
            for record in read_json(path):
                if record["feature"] in wanted and "examples" in record:
                    contexts = tuple(_cut(one["tokens"], one["acts"]) for one in record["examples"][:EXAMPLES])
                    up, down = (tuple(text for text, _ in record.get(name, ())) for name in ("up", "down"))
                    found[layer, record["feature"]] = FeatureDetails(contexts, up, down)
    return found


def _read_file(place: Path, feature: Feature) -> Mapping[str, Any] | None:
    """Return the JSON of a feature in a folder; None: the folder does not know it."""
    layer, index = feature
    if (place / _INDEX).is_file():
        return _read_packed(place, layer, index)
    for name in (f"{cantor_pair(layer, index)}.json", f"{layer}_{index}.json"):
        for path in (place / name, *sorted(place.glob(f"*/{name}"))):
            if path.is_file():
                return read_json(path)
    return None


@functools.lru_cache(8)
def _packed_index(path: Path, changed: float) -> Mapping[str, Any]:
    try:
        return json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError, zlib.error):
        raise UserError(f"{path} is damaged: fetch the feature files again") from None


def _read_packed(place: Path, layer: int, index: int) -> Mapping[str, Any] | None:
    path = place / _INDEX
    entry = _packed_index(path, path.stat().st_mtime).get(str(layer))
    if not entry or index + 1 >= len(entry["offsets"]):
        return None
    start, stop = entry["offsets"][index : index + 2]
    if stop <= start or not (place / entry["filename"]).is_file():
        return None  # it never fired, or its layer was not fetched
    with (place / entry["filename"]).open("rb") as file:
        file.seek(start)
        part = file.read(stop - start)
    try:
        size = int.from_bytes(part[:4], "little")
        return json.loads(gzip.decompress(part[4 : 4 + size]))
    except (OSError, EOFError, ValueError, zlib.error):
        raise UserError(f"{place / entry['filename']} is damaged: fetch the feature files again") from None
