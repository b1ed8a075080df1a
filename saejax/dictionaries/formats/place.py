"""Locations of dictionaries: a folder here, one on the hub, or one in SAELens' registry; fetched on first use."""

import functools
import importlib.util
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from saejax.errors import UserError
from saejax.links import resolve_links
from saejax.models import hub

_ADDRESS = re.compile(
    r"hf:/+(?P<repository>[^/@?]+/[^/@?]+)(?:/(?P<folder>[^@?]+?))?/?(?:(?:@|\?revision=)(?P<revision>.+))?"
)
# The hub's own form has the revision first, as in hf://ORG/NAME@REVISION/FOLDER.
_REVISION_FIRST = re.compile(r"(hf:/+[^/@?]+/[^/@?]+)(@(?:refs/[^/@?]+/|(?!refs/))[^/@?]+)(/[^@?]+)$")
REGISTRY = "saelens:"
_FILES = ("*.json", "*.yaml", "*.safetensors", "*.npz")
_PICKLED = ("*.pt", "*.pth")  # fetched where there is nothing else: a repository may hold one for every layer
_SUFFIXES = (".npz", ".safetensors", ".pt", ".pth")  # of addresses of files
BESIDE = ("config.json", "cfg.json", "config.yaml")  # settings beside a dictionary that is one file

_OF_ALL_LAYERS = "is a layer of a cross-layer transcoder, whose features write to later layers: trace with all of it"
# Conversions of SAELens' registry whose dictionaries are none here, and why.
_UNREAD = {
    "temporal": "is a temporal SAE, whose features depend on earlier tokens: saejax.load_temporal reads it",
    "connor_rob_hook_z": "reads what heads give in a model whose value biases TransformerLens folded away "
    "(fold_value_biases), which are not the values of the published model",
    "mntss_clt_layer_transcoder": f"{_OF_ALL_LAYERS} (--graph.transcoders)",
    "cross_layer": f"{_OF_ALL_LAYERS} (--graph.transcoders)",
}

#: Short names of published sets, and where on the hub they are: repository, and folder in it.
SHORT_NAMES = {
    "qwen3-0.6b": "mwhanna/qwen3-0.6b-transcoders-lowl0",
    "qwen3-1.7b": "mwhanna/qwen3-1.7b-transcoders-lowl0",
    "qwen3-4b": "mwhanna/qwen3-4b-transcoders",
    "qwen3-8b": "mwhanna/qwen3-8b-transcoders",
    "qwen3-14b": "mwhanna/qwen3-14b-transcoders-lowl0",
    "gemma-2-2b": "mntss/gemma-scope-transcoders",
    "gemma-2-2b-clt": "mntss/clt-gemma-2-2b-426k",
    "gemma-2-2b-clt-2.5m": "mntss/clt-gemma-2-2b-2.5M",
    "llama-3.2-1b": "mntss/transcoder-Llama-3.2-1B",
    "llama-3.2-1b-clt": "mntss/clt-llama-3.2-1b-524k",
    "llama-3.1-8b-it": "facebook/crv-8b-instruct-transcoders",
    "gpt-oss-20b": "mntss/clt-131k",
}
# Gemma Scope 2 in circuit-tracer's form; a folder of each repository has other widths and sparsities.
SHORT_NAMES |= {
    f"gemma-3-{size}-{tuned}": f"mwhanna/gemma-scope-2-{size}-{tuned}/transcoder_all/width_16k_l0_small_affine"
    for size in ("270m", "1b", "4b", "12b", "27b")
    for tuned in ("pt", "it")
}


def is_address(path: str) -> bool:
    """Return whether a path is an address on the hub, or one in SAELens' registry, and not a file or folder here."""
    return path.startswith(("hf:/", REGISTRY))


def full_name(name: str) -> str:
    """Return the address of a set of transcoders that is named by its short name; any other name as it is."""
    # A folder here goes before a short name.
    return name if Path(name).exists() else SHORT_NAMES.get(name, name)


def resolve_path(path: str | os.PathLike) -> Path:
    """Return the folder or file that a path or an address means, fetched if need be.

    Args:
      path: a folder or file; hf://ORG/NAME[/FOLDER][@REVISION], such as hf://google/gemma-scope-2b-pt-res/layer_12/
        width_16k/average_l0_82, or the hub's hf://ORG/NAME@REVISION/FOLDER; or saelens:RELEASE/SAE_ID. Of a repository
        only that folder's files are fetched. Of repositories with a pickled file for each layer, such as Qwen-Scope,
        the address names a file.

    Raises:
      UserError: the address is none, or the hub has no such repository or revision, or cannot be reached.
    """
    address = os.fspath(path)
    if not address:
        raise UserError("the path of a dictionary is empty: name a folder, or hf://ORG/NAME/FOLDER on the hub")
    if address.startswith(REGISTRY):
        address = find_release(address)[0]
    if address.startswith("hf:/"):
        return _fetch(address)
    try:
        return resolve_links(path)
    except OSError as error:  # such as a name that is too long
        raise UserError(f"{address:.80} cannot be a folder ({os.strerror(error.errno or 0)}): name another") from None


def registry_overrides(path: str | os.PathLike) -> dict[str, Any]:
    """Return the settings that SAELens' registry has in place of a dictionary's own; none for other addresses."""
    address = os.fspath(path)
    return find_release(address)[1] if address.startswith(REGISTRY) else {}


def split_address(path: str, revision: str, folder: str) -> tuple[str, str, str]:
    """Return repository, revision and folder of an address on the hub; other paths as they are.

    Args:
      path: hf://ORG/NAME[/FOLDER][@REVISION], or a path or hub id.
      revision: revision to use where the address names none.
      folder: folder inside the one that the address names.
    """
    named = _match(path)
    if not named:
        return path, revision, folder
    return named["repository"], named["revision"] or revision, "/".join(filter(None, (named["folder"], folder)))


def _match(address: str) -> re.Match[str] | None:
    """Return the parts of an address on the hub by name; None if it is none."""
    return _ADDRESS.fullmatch(_REVISION_FIRST.sub(r"\1\3\2", address))


def fetch_file(address: str) -> Path:
    """Return the file of an address such as hf://ORG/NAME/layer_0.safetensors@REVISION.

    Raises:
      UserError: it names no file, or cannot be fetched.
    """
    named = _match(address)
    if not named or not named["folder"]:
        raise UserError(f"{address} is no file on the hub: expected hf://ORG/NAME/FILE")
    from huggingface_hub import hf_hub_download

    repository, file, revision = named["repository"], named["folder"], named["revision"] or "main"
    with hub.hub_errors(repository, revision, "dictionary", file, "a dictionary"):
        return Path(hf_hub_download(repository, file, revision=revision))


@functools.lru_cache
def _fetch(address: str) -> Path:
    """Fetch the files of an address on the hub; return its folder or file here."""
    named = _match(address)
    if not named:
        raise UserError(f"{address} names no folder on the hub: expected hf://ORG/NAME[/FOLDER][@REVISION]")
    repository, revision = named["repository"], named["revision"] or "main"
    folder = PurePosixPath(named["folder"] or ".")
    fetch = functools.partial(hub.hub_folder, repository, revision, what="dictionary")
    if folder.suffix in _SUFFIXES:
        files = [(folder.parent / name).as_posix() for name in (folder.name, *BESIDE)]
        # Settings may lie above, and some folders are called like files.
        files += [(folder.parent.parent / "config.json").as_posix(), *(f"{folder}/{name}" for name in _FILES)]
        return fetch(files) / folder
    prefix = "" if folder == PurePosixPath(".") else f"{folder}/"
    below = [f"{prefix}*/*"]  # in patterns a star stands for slashes, too
    # sparsify says there which model it was.
    runs = [(above / "config.json").as_posix() for above in (folder.parent, folder.parent.parent)]
    root = fetch([*(prefix + name for name in _FILES), *runs], below)
    # Settings are fetched first: they tell which format it is, and so which large files are needed.
    if (root / prefix / "dictionary.json").exists():
        root = fetch([f"{prefix}*"])
    elif (root / prefix / "hyperparams.json").exists():
        root = fetch([f"{prefix}checkpoints/final.safetensors"])
    elif not any(file.suffix in _SUFFIXES for file in (root / prefix).glob("*")):
        root = fetch([prefix + name for name in _PICKLED], [*below, f"{prefix}layer*.sae.pt"])
    return root / prefix


def find_release(address: str, temporal: bool = False) -> tuple[str, dict[str, Any]]:
    """Return the hub address of a dictionary of SAELens' registry, and the settings that the registry overrides.

    Args:
      address: saelens:RELEASE/SAE_ID.
      temporal: whether it may be a temporal SAE.

    Raises:
      UserError: SAELens is not installed, or its registry has no such release or dictionary.
    """
    release, _, sae_id = address.removeprefix("saelens:").partition("/")
    spec = importlib.util.find_spec("sae_lens")  # finds the package without importing it, and torch with it
    folders = list(spec.submodule_search_locations or ()) if spec else []
    registry = next((file for folder in folders if (file := Path(folder) / "pretrained_saes.yaml").is_file()), None)
    if registry is None:
        raise UserError(
            f"{address} names a release of SAELens' registry, and SAELens is not installed: install it "
            "(pip install sae-lens), or give the address on the hub, hf://ORG/NAME/FOLDER"
        )
    entry = _registry_entry(registry, release)
    listed = entry.get("saes") or []
    chosen = next((sae for sae in listed if sae["id"] == sae_id), None)
    if chosen is None:
        ids = ", ".join(sae["id"] for sae in listed[:5]) or "none"
        raise UserError(f"{address}: the release {release} has no dictionary {sae_id!r}: expected one such as {ids}")
    conversion = "cross_layer" if "clt" in str(chosen.get("path")) else entry.get("conversion_func")
    if conversion in _UNREAD and not (temporal and conversion == "temporal"):
        raise UserError(f"{address} {_UNREAD[conversion]}")
    overrides = dict(entry.get("config_overrides") or {}) | dict(chosen.get("config_overrides") or {})
    if "norm_scaling_factor" in chosen:
        overrides["norm_scaling_factor"] = chosen["norm_scaling_factor"]
    return f"hf://{entry['repo_id']}/{chosen.get('path', sae_id)}", overrides


def _registry_entry(registry: Path, release: str) -> dict[str, Any]:
    """Return a release's entry. The file has 40,000 lines, which PyYAML reads in a minute: only these are parsed."""
    lines = registry.read_text(encoding="utf-8").splitlines()
    heads = [index for index, line in enumerate(lines) if line[:1].isalnum()]
    for start, end in zip(heads, [*heads[1:], len(lines)], strict=True):
        if lines[start].rstrip(": ") == release:
            return yaml.safe_load("\n".join(lines[start:end]))[release]
    names = [lines[index].rstrip(": ") for index in heads]
    near = [name for name in names if release.partition("-")[0] in name][:5] or names[:5]
    raise UserError(f"SAELens' registry has no release {release!r}: expected one such as {', '.join(near)}")
