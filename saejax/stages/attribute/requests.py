"""Prompts to trace and their targets: from flags, a file, or the baseline's behaviours; labels, and groups of nodes."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saejax.attribution.forms.document import read_state
from saejax.attribution.forms.features import FEATURES, index_on_hub
from saejax.attribution.local.dictionaries import find_folder, is_on_hub
from saejax.attribution.settings import GraphConfig
from saejax.config import counted
from saejax.dictionaries.formats.place import is_address, resolve_path
from saejax.dictionaries.labels import COLUMNS, labels_of_sheets, read_sheet, sheets_in
from saejax.errors import Faults, UserError
from saejax.files import explain_bad_name, fingerprint
from saejax.models.identity import content_sha256
from saejax.runner.labels import labels_of_folders, names_and_sites
from saejax.tasks.behaviours import Prompt
from saejax.tasks.files import decode, read_bytes, read_lines
from saejax.unicode import replace_surrogates

_EXAMPLE = '{"slug": "paris", "prompt": "The capital of France is", "targets": [" Paris"]}'
_KEYS = ("slug", "prompt", "token_ids", "targets")
_LONGEST = 40  # characters of a name that is made of a prompt
_TAKEN = ("graphs", "tables", "features", "searched", "lens", "graph-metadata")  # files and folders of a unit
_GROUPS = '{"paris": [["cities", "3_17_4", "5_208_4"]]}, or a state that the page saved'

TargetText = str | int | tuple[str | int, str | int]


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to trace."""

    slug: str  #: its name
    prompt: str | tuple[int, ...]  #: its text, or its token ids
    #: texts or ids of tokens, or pairs of them for a difference; none: the most probable tokens.
    targets: tuple[TargetText, ...]
    answers: bool = False  #: whether targets are answers, of which the first token is meant, as behaviours are judged


def unit_name(config: GraphConfig) -> str:
    """Return the name of the folder with these settings' graphs; "" if no graph is requested.

    Raises:
      UserError: prompts are given in two ways, transcoders and SAEs are both given or both missing, a difference has
        no target, or a head is malformed.
    """
    named = [f"--graph.{name}" for name in ("prompt", "prompts", "behaviours") if getattr(config, name)]
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)}: expected one of them")
    if not named:
        return ""
    if not config.transcoders and not config.dictionaries:
        raise UserError(
            f"{named[0]} traces a graph, and --graph.transcoders is missing: name a set of transcoders, or SAEs with "
            "--graph.dictionaries"
        )
    if config.transcoders and config.dictionaries:
        raise UserError("--graph.transcoders and --graph.dictionaries: expected one of them")
    if config.dictionaries and (config.query_key or config.l0):
        raise UserError("--graph.query_key and --graph.l0 are for transcoders (--graph.transcoders), not for SAEs")
    if config.transcoders and (config.direct or config.estimate != "gradient"):
        raise UserError("--graph.estimate and --graph.direct are for SAEs (--graph.dictionaries), not for transcoders")
    if config.minus and not config.target:
        raise UserError("--graph.minus is subtracted from --graph.target, which is missing")
    read_heads(config)
    if config.slug:
        return _checked_slug(config.slug, "--graph.slug")
    if config.prompts:
        name = Path(config.prompts).name.removesuffix(".jsonl")
        return name if not _explain_bad_slug(name) and len(name) <= _LONGEST else _add_fingerprint(name)
    if config.behaviours:
        return "behaviours"
    return _slug_of(config.prompt)


def identity(config: GraphConfig) -> str:
    """Return a fingerprint of all input files but the model's: dictionaries, prompts, labels, supernodes, lens."""
    places, marks = _set_files(config)
    if not places:
        return ""
    if labels := labels_of_folders(places):
        marks.append(fingerprint(sorted([*place, label] for place, label in labels.items())))
    named = [Path(file or "-") for file in (config.prompts, config.labels, config.supernodes, config.lens)]
    files = [path for place in named for path in (sorted(place.glob("*.csv")) if place.is_dir() else [place])]
    hashes = [content_sha256(path) if path.is_file() else "" for path in files]  # a lens has gigabytes
    if config.features.startswith("hf://"):
        # Of packed files, gigabytes, the index stands for all: it has the size of every feature.
        hashes.append(content_sha256(index_on_hub(config.features)))
    elif config.features:
        hashes += _marks(Path(config.features).expanduser())
    return fingerprint([*hashes, *marks])


def set_identity(config: GraphConfig) -> str:
    """Return a fingerprint of the dictionaries alone: their names, files, and the choice among these.

    Feature files that lie with a set say what pages show of its features, and change no number of a trace.
    """
    settings = counted(config)
    chosen = [settings[f"graph.{name}"] for name in ("transcoders", "dictionaries", "l0")]
    return fingerprint([*chosen, _set_files(config, but=FEATURES)[1]])


def _set_files(config: GraphConfig, but: str = "") -> tuple[list[Path], list[str]]:
    """Return the folders of the dictionaries, and what stands for their content without the folder ``but`` in each."""
    places, commit = list(map(Path, config.dictionaries)), ""
    read = list(map(resolve_path, config.dictionaries))
    if config.transcoders:
        _, folder, commit = find_folder(config.transcoders, choice=config.l0)
        places = read = [folder]
    # A commit stands for the content of all files.
    return places, [commit] if commit else [mark for place in read for mark in _marks(place, but)]


def _marks(place: Path, but: str = "") -> list[str]:
    """Return the path and hash of a file, or of each in a folder; checkpoints of training are left out.

    Args:
      place: of dictionaries, or of feature files.
      but: name of a folder in it that is left out; "": none is.

    Raises:
      UserError: it does not exist.
    """
    if not place.exists():  # nothing would have a hash, too
        raise UserError(f"{place} does not exist: expected a folder")
    kinds = ("*.json", "*.json.gz", "*.yaml", "*.safetensors", "*.npz")
    paths = [place] if place.is_file() else sorted(path for kind in kinds for path in place.rglob(kind))
    names = {path: path.relative_to(place) for path in paths}
    return [f"{name} {content_sha256(path)}" for path, name in names.items() if name.parts[:1] != (but,)]


def read_requests(config: GraphConfig, behaviours: Mapping[str, Sequence[Prompt]] | None = None) -> list[Request]:
    """Return the prompts that are to be traced, each under a name of its own.

    Args:
      config: of the stage.
      behaviours: the prompts of the behaviours that ``config`` names, if any.

    Raises:
      UserError: a file cannot be read, or a line is no such request or repeats a name.
    """
    target: TargetText = (config.target, config.minus) if config.minus else config.target
    targets = (target,) if config.target else ()
    if config.behaviours:
        assert behaviours is not None
        names = [_checked_slug(name, "--graph.behaviours") for name in behaviours]
        return [of_behaviour(name, behaviours[name], targets) for name in names]
    if not config.prompts:
        return [Request(unit_name(config), config.prompt, targets)]
    path, requests = Path(config.prompts), list[Request]()
    text = decode(read_bytes(path, "--graph.prompts", "name a file of prompts"), path)

    def read(record: Any, where: str) -> None:
        """Keep a line if it is a request."""
        request = _of_line(record, targets, where)
        # Some disks take names that differ in case alone for one.
        if request.slug.lower() in {earlier.slug.lower() for earlier in requests}:
            raise UserError(
                f"{where} has the slug {request.slug!r} of an earlier line: give it another, as in {_EXAMPLE}"
            )
        requests.append(request)

    read_lines(text, path, _EXAMPLE, read)
    if not requests:
        raise UserError(f"--graph.prompts={path} holds no prompts: expected lines such as {_EXAMPLE}")
    return requests


def check_files(config: GraphConfig) -> None:
    """Read the files of prompts, labels and supernodes as far as that takes neither model nor dictionaries.

    Raises:
      UserError: some cannot be read, or are no such files; all faults are named.
    """
    faults, slugs = Faults("graph", "cannot be used", "files"), [*config.behaviours]
    if not config.behaviours:
        with faults.collect("prompts"):
            slugs = [request.slug for request in read_requests(config)]
    with faults.collect("supernodes"):
        read_states(config, slugs)
    with faults.collect("labels"):
        check_labels(config)
    faults.refuse()


def check_labels(config: GraphConfig) -> None:
    """Read the labels of ``--graph.labels``; of sheets only their form where dictionaries are not there yet.

    Raises:
      UserError: as ``read_given_labels``.
    """
    path = Path(config.labels)
    if not config.labels or not path.exists():  # see ``list_places``
        return
    if (path.is_dir() or path.suffix == ".csv") and not all(Path(folder).exists() for folder in folders(config)):
        # Lines may name dictionaries that this run trains.
        for sheet in sheets_in(path, "--graph.labels"):
            read_sheet(sheet, (*COLUMNS, "dictionary"), "--graph.labels")
    else:
        read_given_labels(config)


def list_places(config: GraphConfig) -> dict[str, list[str]]:
    """Return the files and folders that must be there, or be made before, by setting; see ``Stage.places``."""
    # A set that is trained here is named like a repository, too: runs/mine/train/topk.
    chosen, features = (Path(name).expanduser() for name in (config.transcoders, config.features))
    is_here = config.transcoders and ("train" in chosen.parts or not is_on_hub(config.transcoders))
    named: dict[str, Sequence[str]] = dict(
        transcoders=[str(chosen)] if is_here else [],
        dictionaries=config.dictionaries,
        labels=[config.labels],
        features=[str(features)] if config.features and not is_address(config.features) else [],
        lens=[config.lens],
    )
    return {
        f"graph.{name}": [place for place in some if place and not is_address(place)] for name, some in named.items()
    }


def read_labels(config: GraphConfig) -> dict[tuple[int, int], str]:
    """Return labels of features by layer and index: a file's go before labels of the dictionaries' workdir.

    Raises:
      UserError: a file cannot be read, or is no such file.
    """
    # Labels by hand go before labels found by rules.
    return labels_of_folders(folders(config)) | read_given_labels(config)


def folders(config: GraphConfig) -> Sequence[str]:
    """Return the folder or hub id of the transcoders, or the folders of the SAEs."""
    return [config.transcoders] if config.transcoders else config.dictionaries


def read_given_labels(config: GraphConfig) -> dict[tuple[int, int], str]:
    """Return the labels of features in the file or folder that ``--graph.labels`` names, by layer and index.

    Raises:
      UserError: as ``read_labels``.
    """
    if not config.labels:
        return {}
    path = Path(config.labels)
    if path.is_dir() or path.suffix == ".csv":
        return labels_of_sheets(path, "--graph.labels", names_and_sites(folders(config)))
    text = decode(read_bytes(path, "--graph.labels", "name a file of labels"), path)
    try:
        labels = json.loads(text)
    except (ValueError, RecursionError):
        labels = None
    features = [re.fullmatch(r"(\d{1,18})_(\d{1,18})", key) for key in labels] if isinstance(labels, dict) else [None]
    if not all(features) or not all(isinstance(label, str) for label in labels.values()):
        raise UserError(f'{path} holds no labels: expected {{"3_17": "cities"}}, by layer and number of the feature')
    texts = map(replace_surrogates, labels.values())  # JSON may hold what no page can
    return {(int(at[1]), int(at[2])): label for at, label in zip(features, texts, strict=True) if at}


def read_heads(config: GraphConfig) -> list[tuple[int, int, int]]:
    """Return the heads whose scores are to be split: layer, head, position of the query.

    Raises:
      UserError: a text is no head.
    """
    heads = []
    for text in config.query_key:
        parts = re.fullmatch(r"(\d+)\.(\d+)(?:@(-?\d+))?", text.strip())
        if not parts:
            raise UserError(f"--graph.query_key={text}: expected layer.head or layer.head@position")
        heads.append((int(parts[1]), int(parts[2]), int(parts[3] or -1)))
    return list(dict.fromkeys(heads))


def of_behaviour(name: str, prompts: Sequence[Prompt], targets: tuple[TargetText, ...] = ()) -> Request:
    """Return the first test prompt of a behaviour; its target is the difference of the answers if no other is named."""
    # A test prompt: train prompts may be in the text that the transcoders were trained on.
    first = next((prompt for prompt in prompts if prompt.split == "test"), prompts[0])
    if targets:
        return Request(name, first.text, targets)
    return Request(name, first.text, ((first.correct, first.wrong),), answers=True)


def _of_line(record: Any, targets: tuple[TargetText, ...], where: str) -> Request:
    if not isinstance(record, dict) or set(record) - set(_KEYS) or ("prompt" in record) == ("token_ids" in record):
        raise UserError(f"{where} is no prompt to trace: expected {_EXAMPLE}, or token_ids in place of prompt")
    text, ids, named = record.get("prompt", ""), record.get("token_ids", ()), record.get("targets")
    named = [named] if isinstance(named, str) else named  # one target, not one for each of its letters
    if text == "" and not ids:
        raise UserError(f"{where}: the prompt is empty: expected {_EXAMPLE}")
    right = isinstance(text, str) and isinstance(ids, list | tuple) and all(type(token) is int for token in ids)
    listed = named is None or (isinstance(named, list) and all(map(_is_target, named)))
    if not (right and (text or ids) and listed):
        raise UserError(
            f"{where}: prompt and targets are texts (of a difference a list of two), token_ids whole numbers: expected "
            f"{_EXAMPLE}"
        )
    slug = record.get("slug")
    slug = _slug_of(text or f"ids: {ids}") if slug is None else _checked_slug(slug, where)
    named_targets = (tuple(target) if isinstance(target, list) else target for target in named or ())
    return Request(slug, text or tuple(ids), targets if named is None else tuple(named_targets))


def _is_target(target: Any) -> bool:
    """Return whether this is a token's text, or a list of two for the difference of their logits."""
    pair = target if isinstance(target, list) else [target]
    return all(isinstance(text, str) for text in pair) and (pair is not target or len(pair) == 2)


def _slug_of(text: str) -> str:
    """Return the name of a prompt's graph, another one for each text.

    It is the text's words where these tell all of it; otherwise their beginning and a fingerprint of the text.
    """
    words = _words(text)
    return words if words.replace("-", " ") == text and words not in _TAKEN else _add_fingerprint(text)


def _add_fingerprint(text: str) -> str:
    """Return the beginning of a text's words, with a fingerprint of all of it."""
    return f"{_words(text) or 'graph'}-{fingerprint(text)[:8]}"


def _words(text: str) -> str:
    """Return the Latin letters and digits of a text, in small letters, as the beginning of a file's name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()[:_LONGEST].strip("-")


def _explain_bad_slug(slug: Any) -> str:
    """Return why a value cannot be the name of a graph and of its files; "" if it can."""
    return explain_bad_name(slug) or (f"use none of {', '.join(_TAKEN)}" if slug.lower() in _TAKEN else "")


def _checked_slug(slug: Any, where: str) -> str:
    if wanted := _explain_bad_slug(slug):
        raise UserError(f"{where}: {slug!r:.60} cannot name a graph: {wanted}")
    return slug


def read_states(config: GraphConfig, slugs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return by graph what the file of ``--graph.supernodes`` says of its pins, as ``document.read_state`` does.

    The file holds supernodes, or states, by graph, "*" for all others; or what the page saves, its state or the whole
    graph.

    Args:
      config: of the stage.
      slugs: the graphs of this run; empty: they are not known, and all that the file names are returned.

    Raises:
      UserError: the file cannot be read, is no such file, or is for none of these graphs.
    """
    if not config.supernodes:
        return {}
    path = Path(config.supernodes)
    text = decode(read_bytes(path, "--graph.supernodes", "name a file of supernodes"), path)
    read = {slug: read_state(saved) for slug, saved in _by_graph(text).items()}
    states = {slug: state for slug, state in read.items() if state is not None}
    if len(states) < len(read) or not states:
        raise UserError(f"{path} holds no supernodes: expected {_GROUPS}")
    if slugs and not {"*", *slugs} & set(states):
        raise UserError(f"{path} has supernodes for {', '.join(states)}: expected {', '.join(slugs)}, or * for all")
    return {slug: states.get(slug, states.get("*", {})) for slug in slugs} if slugs else states


def _by_graph(text: str) -> dict[str, Any]:
    """Return what a file of supernodes holds for each graph, groups or states, unchecked."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    params, metadata = content.get("qParams"), content.get("metadata")
    if isinstance(params, dict) and isinstance(metadata, dict):  # a whole graph
        return {str(metadata.get("slug", "*")): params}
    return {"*": content} if "pinnedIds" in content else content
