"""Feature descriptions: contexts, logits and labels, from files.

These are of two programs:

1. circuit-tracer's feature files: ``index.json.gz`` names for each layer a file and the byte range of each feature,
   where 4 bytes of length are followed by gzipped JSON; or one JSON file for each feature, ``<n>.json``, named by the
   Cantor pairing of layer and index. Of a set on the hub the index and the bytes of the features are fetched, no more.
2. Neuronpedia's JSON of a feature, ``<layer>_<index>.json`` or ``<n>.json``.

Bytes that were fetched from the hub are kept in the folder ``features`` of the cache.
"""

import contextlib
import dataclasses
import functools
import gzip
import itertools
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from saejax.attribution.forms.neuronpedia import cantor_pair
from saejax.dictionaries.formats.place import fetch_file, full_name, split_address
from saejax.errors import UserError
from saejax.files import read_foreign, whole_file, write_json
from saejax.models.hub import hub_errors
from saejax.models.identity import cache_folder, content_sha256
from saejax.unicode import replace_surrogates, visible_token

Feature = tuple[int, int]  # layer, index of the feature
# Gives the JSON of a feature, None: it is not known; the flag says whether it may be fetched from the hub.
ReadFeature = Callable[[Feature, bool], Mapping[str, Any] | None]
# Gives the bytes of a file beside an index, from one to before another; b"": they are not here.
ReadRange = Callable[[str, int, int, bool], bytes]
FEATURES = "features"  # folder of feature files, in that of a set and in that of a unit
EXAMPLES = 5  # contexts of a feature that a page shows
_OF_QUANTILE = 2  # contexts of each quantile
_NAMING = 2  # tokens that name a feature without a label
_TOKENS = 24  # of a context, on each side of its strongest token
_INDEX = "index.json.gz"
_BARS = ("values", "heights")  # of a histogram, in Neuronpedia's JSON
_CONNECTIONS = 16  # features that are fetched from the hub at once


@dataclasses.dataclass(frozen=True)
class FeatureDetails:
    """The label, examples and logit effects of a feature."""

    #: contexts in which it fires most strongly, each with ``tokens`` and ``activations``, strongest first.
    examples: tuple[Mapping[str, list], ...] = ()
    #: top_logits and bottom_logits: tokens whose logits it raises and lowers most.
    top_logits: tuple[str, ...] = ()
    bottom_logits: tuple[str, ...] = ()
    label: str = ""  #: its name; "": none
    #: parts of the range of its activations, such as quantiles: of each its name and contexts; (): they are not told.
    quantiles: tuple[tuple[str, tuple[Mapping[str, list], ...]], ...] = ()
    #: how often it is active so strongly: of each bar the activation and the height; (): that is not told.
    histogram: tuple[tuple[float, float], ...] = ()

    def peaks(self) -> Counter[str]:
        """Return the tokens at which the contexts are strongest, quoted, with weights."""
        tokens = Counter[str]()
        for rank, context in enumerate(self.examples):
            if context["tokens"]:
                peak = max(range(len(context["tokens"])), key=context["activations"].__getitem__)
                tokens[quoted(context["tokens"][peak])] += 3 if rank == 0 else 2  # of ties, the strongest context
        return tokens

    @property
    def name(self) -> str:
        """Its label, or else the tokens on which it fires most strongly, or tokens that it promotes; "": unknown."""
        promoted = dict.fromkeys(f"→{quoted(token)}" for token in self.top_logits[:_NAMING])
        return self.label or " ".join([token for token, _ in self.peaks().most_common(_NAMING)] or promoted)


def quoted(token: str) -> str:
    """Return a token in quotation marks, on one line and without spaces around it."""
    return f"“{visible_token(token.strip(' ') or ' ', in_line=True)}”"


def read_details(
    dictionaries: Sequence[str | Path],
    folders: Sequence[str | Path],
    features: Iterable[Feature],
    fetched: Collection[Feature] | None = None,
) -> dict[Feature, FeatureDetails]:
    """Return what files tell of some features.

    Args:
      dictionaries: the set of transcoders or SAEs, folders or hub ids; its own ``features/`` is read, too. A set on the
        hub has none where there is no such folder, or the hub is out of reach.
      folders: of feature files; hf://ORG/NAME[/FOLDER][@REVISION] is one on the hub.
      features: layers and indices.
      fetched: those whose files may be fetched from the hub, where they are not in the cache; None: all.

    Raises:
      UserError: a file is damaged, or ``folders`` names one that is not there.
    """
    wanted = list(dict.fromkeys(features))
    # Folders that are named are opened first, so that a wrong name is refused. Opening a set on the hub fetches its
    # index, so this is done only if features are still missing.
    reads: list[ReadFeature | None] = [open_folder(folder) for folder in folders]
    details: dict[Feature, FeatureDetails] = {}
    for source, opened in zip([*folders, *dictionaries], [*reads, *[None] * len(dictionaries)], strict=True):
        missing = [feature for feature in wanted if feature not in details]
        if not missing:
            break
        if read := opened or _open_set_features(source):
            with ThreadPoolExecutor(_CONNECTIONS) as pool:
                may_fetch = [fetched is None or feature in fetched for feature in missing]
                for (layer, index), data in zip(missing, pool.map(read, missing, may_fetch), strict=True):
                    try:
                        details |= {} if data is None else {(layer, index): parse_feature(data)}
                    except UserError as error:
                        raise UserError(f"{source}: feature {index} of layer {layer}: {error}") from None
    return details


def write_details(folder: Path, details: Mapping[Feature, FeatureDetails]) -> None:
    """Write contexts and histogram of features, ``<layer>_<index>.json`` of each, which ``open_folder`` reads."""
    folder.mkdir(exist_ok=True)
    for (layer, index), feature in details.items():
        named = [(name, context) for name, contexts in feature.quantiles for context in contexts]
        unnamed = list(feature.examples)
        for _, context in named:  # each stands in the file once, as the strongest of all are the examples again
            if context in unnamed:
                unnamed.remove(context)
        activations = [
            dict(tokens=context["tokens"], values=context["activations"]) | (dict(quantile_name=name) if name else {})
            for name, context in [*(("", context) for context in unnamed), *named]
        ]
        bars = {f"freq_hist_data_bar_{name}": [bar[k] for bar in feature.histogram] for k, name in enumerate(_BARS)}
        if activations:
            write_json(folder / f"{layer}_{index}.json", dict(activations=activations, **bars))


def parse_feature(data: Mapping[str, Any]) -> FeatureDetails:
    """Return the details in the JSON of a feature, circuit-tracer's or Neuronpedia's.

    Raises:
      UserError: it is neither.
    """
    groups: dict[str, list[dict[str, list]]] = {}  # contexts by the name of their quantile
    try:
        if "examples_quantiles" in data:
            contexts = [
                (str(quantile.get("quantile_name") or ""), example["tokens"], example["tokens_acts_list"])
                for quantile in data["examples_quantiles"] or ()
                for example in quantile["examples"] or ()
            ]
            label, up, down = data.get("label"), data.get("top_logits"), data.get("bottom_logits")
        else:  # Neuronpedia
            # A feature that never fired, or whose contexts were not exported, may have no more than a label.
            if data.keys().isdisjoint(("activations", "explanations", "pos_str")):
                raise KeyError("activations")
            examples = data.get("activations") or ()
            contexts = [(_bin_of(example), example["tokens"], example["values"]) for example in examples]
            described = [explained.get("description") for explained in data.get("explanations") or ()]
            label, up, down = next(filter(None, described), ""), data.get("pos_str"), data.get("neg_str")
        for quantile, tokens, values in contexts:
            if tokens and values:
                groups.setdefault(quantile, []).append(cut_context(tokens, values))
        cut = sorted(itertools.chain(*groups.values()), key=lambda context: -max(context["activations"]))
        raised, lowered = (tuple(replace_surrogates(str(token)) for token in some or ()) for some in (up, down))
        columns = (data.get(f"freq_hist_data_bar_{name}") or () for name in _BARS)
        bars = [(float(value), float(height)) for value, height in zip(*columns, strict=False)]
        return FeatureDetails(
            tuple(cut[:EXAMPLES]),
            raised,
            lowered,
            replace_surrogates(str(label or "")),
            name_quantiles(groups),
            tuple(bar for bar in bars if all(map(math.isfinite, bar))),
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise UserError(
            "this is no feature of circuit-tracer or Neuronpedia: expected examples_quantiles or activations"
        ) from None


def _bin_of(example: Mapping[str, Any]) -> str:
    """Return the part of the activations that a context was drawn from, by name or as Neuronpedia; "": none is told."""
    if name := example.get("quantile_name"):  # of ``write_details``
        return str(name)
    low, high = (example.get(name) for name in ("binMin", "binMax"))
    return f"activation {low:.3g} to {high:.3g}" if low is not None and high is not None and 0 <= low < high else ""


def name_quantiles(groups: Mapping[str, Sequence[Any]]) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """Return groups of contexts as details have them, the strongest first; those without a name are in none."""
    named = [(replace_surrogates(name), tuple(some[:_OF_QUANTILE])) for name, some in groups.items() if name]
    return tuple(sorted(named, key=lambda group: -max(max(context["activations"]) for context in group[1])))


def cut_context(tokens: Sequence[str], values: Sequence[float | None]) -> dict[str, list]:
    """Return the tokens around the strongest one, and their activations; what has only one of both is left out."""
    numbers = [float(value or 0) for _, value in zip(tokens, values, strict=False)]
    numbers = [value if math.isfinite(value) else 0.0 for value in numbers]
    peak = max(range(len(numbers)), key=numbers.__getitem__, default=0)
    near = slice(max(peak - _TOKENS, 0), peak + _TOKENS + 1)
    return dict(
        tokens=[replace_surrogates(str(token)) for token in tokens[: len(numbers)][near]], activations=numbers[near]
    )


def open_folder(folder: str | Path) -> ReadFeature:
    """Return what reads the JSON of a feature in a folder.

    Raises:
      UserError: there is no such folder.
    """
    if str(folder).startswith("hf://"):
        index = index_on_hub(str(folder))
        return functools.partial(_read_packed, index, _range_on_hub(str(folder), index))
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise UserError(f"there is no folder {folder} of feature files: expected one, or hf://ORG/NAME/FOLDER")
    if (place / _INDEX).is_file():
        return functools.partial(_read_packed, place / _INDEX, functools.partial(_range_of_file, place))
    # The folders in it are looked for once: some hold a file for each of a million features.
    with os.scandir(place) as entries:
        below = sorted(entry.path for entry in entries if entry.is_dir())
    return functools.partial(_read_single, [place, *map(Path, below)])


def index_on_hub(address: str) -> Path:
    """Return the index of packed feature files on the hub, which is fetched if need be.

    Raises:
      UserError: there is none, or the hub is out of reach.
    """
    folder, at, revision = address.partition("@")
    return fetch_file(f"{folder}/{_INDEX}{at}{revision}")


@functools.cache  # the hub is asked once, also for an index that is not there
def _set_features_on_hub(address: str) -> ReadFeature | None:
    try:
        return open_folder(address)
    except UserError:
        return None


def _open_set_features(dictionaries: str | Path) -> ReadFeature | None:
    """Return what reads the feature files that come with a set, as ``open_folder``; None where there are none."""
    local = Path(dictionaries).expanduser()
    if local.exists():
        return open_folder(local / FEATURES) if (local / FEATURES).is_dir() else None
    address = full_name(str(dictionaries)).removeprefix("hf://")
    name, revision, folder = split_address(f"hf://{address}", "main", FEATURES)
    return _set_features_on_hub(f"hf://{name}/{folder}@{revision}")


def _range_of_file(place: Path, file: str, start: int, stop: int, fetch: bool) -> bytes:
    if not (place / file).is_file():
        return b""  # its layer was not fetched
    with (place / file).open("rb") as opened:
        opened.seek(start)
        return opened.read(stop - start)


def _range_on_hub(address: str, index: Path) -> ReadRange:
    from huggingface_hub import HfFileSystem

    name, revision, folder = split_address(address, "main", "")
    kept = cache_folder() / "features" / content_sha256(index)[:16]  # other files have another index

    def read(file: str, start: int, stop: int, fetch: bool) -> bytes:
        place = kept / f"{file.replace('/', '-')}-{start}-{stop}"
        if place.is_file():
            return place.read_bytes()
        if not fetch:
            return b""
        with hub_errors(name, revision, "set of feature files", file, "feature files"):
            part = HfFileSystem().cat_file(f"{name}@{revision}/{folder}/{file}", start=start, end=stop)
        with contextlib.suppress(OSError):  # a cache that cannot be written to is none
            kept.mkdir(parents=True, exist_ok=True)
            with whole_file(place) as temporary:
                temporary.write_bytes(part)
        return part

    return read


def _read_single(places: Sequence[Path], feature: Feature, fetch: bool) -> Mapping[str, Any] | None:
    for name in (f"{cantor_pair(*feature)}.json", "{}_{}.json".format(*feature)):
        for place in places:
            if (place / name).is_file():
                return read_foreign(place / name, "a feature of circuit-tracer or Neuronpedia")
    return None


@functools.lru_cache(8)
def _packed_index(path: Path, changed: float) -> Mapping[str, Any]:
    try:
        index = json.loads(gzip.decompress(path.read_bytes()))
        # Of each layer where its file is and, ascending, where each feature begins in it.
        for entry in index.values():
            offsets_N = np.asarray(entry["offsets"] or [0])
            if offsets_N.dtype.kind != "i" or (np.diff(offsets_N) < 0).any() or not isinstance(entry["filename"], str):
                raise ValueError
    except (OSError, EOFError, ValueError, zlib.error, AttributeError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: fetch the feature files again") from None
    return index


def _read_packed(path: Path, read: ReadRange, feature: Feature, fetch: bool) -> Mapping[str, Any] | None:
    layer, index = feature
    entry = _packed_index(path, path.stat().st_mtime).get(str(layer))
    if not entry or index + 1 >= len(entry["offsets"]):
        return None
    # Only the feature's own bytes are read: a layer's file has gigabytes.
    start, stop = entry["offsets"][index : index + 2]
    part = read(entry["filename"], start, stop, fetch) if stop > start else b""  # else it never fired
    if not part:
        return None
    try:
        size = int.from_bytes(part[:4], "little")
        return json.loads(gzip.decompress(part[4 : 4 + size]))
    except (OSError, EOFError, ValueError, zlib.error):
        raise UserError(f"{path.with_name(entry['filename'])} is damaged: fetch the feature files again") from None
