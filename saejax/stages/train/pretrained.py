"""Pretrained dictionaries in place of ones trained here: the unit ``train/pretrained``.

They are copied in our own format, so every stage reads them as it reads dictionaries that were trained here.
"""

import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from saejax.dictionaries import Dictionary, DictionaryConfig, load_dictionary, rescale, save_dictionary
from saejax.dictionaries.formats import circuit_tracer, folders_of, hooks, read_config
from saejax.dictionaries.formats.place import registry_overrides, resolve_path
from saejax.dictionaries.kinds import PRETRAINED
from saejax.dictionaries.names import folder_name
from saejax.dictionaries.results import TrainedMember
from saejax.errors import UserError
from saejax.models.sites import ModuleSite
from saejax.parallel.collectives import is_first_process, process_count
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.results import MeshShape
from saejax.runner.workspace import Run
from saejax.training.results import TrainResults
from saejax.training.settings import TrainConfig

_FLAG = "--train.pretrained"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A pretrained dictionary."""

    name: str  #: name of the member: its site and, where several read that, the end of its path; "" for one alone
    place: str  #: its address, with the path below it
    config: DictionaryConfig  #: its configuration
    load: Callable[..., Dictionary]  #: returns the dictionary; takes ``mesh``, see ``load_dictionary``

    @property
    def site(self) -> str:
        """The site that is read."""
        return self.config.site

    @property
    def target(self) -> str:
        """The site that is reconstructed or predicted."""
        return self.config.target or self.config.site


def run_pretrained(run: Run) -> TrainResults:
    """Copy the dictionaries that ``--train.pretrained`` names to the folders of trained ones.

    Raises:
      UserError: see ``find_pretrained``.
    """
    config, mesh = run.configs[TrainConfig], make_mesh(run.configs[MeshConfig])
    dictionaries = find_pretrained(config.pretrained)
    for dictionary in dictionaries:
        folder = run.folder / dictionary.name / "dictionary"
        if is_first_process():
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before its summary
        save_dictionary(folder, rescale.to_output_units(dictionary.load(mesh=mesh)))
        kind, features = dictionary.config.kind, dictionary.config.n_features
        run.say(f"{dictionary.place}: {kind} of {features:,} features, {dictionary.site}")
    members = tuple(
        TrainedMember(
            name=dictionary.name,
            site=dictionary.site,
            target=dictionary.target,
            settings={"from": dictionary.place, "kind": dictionary.config.kind}
            | ({"k": dictionary.config.k} if dictionary.config.k else {}),
            input_scale=1.0,
            output_scale=1.0,
            dead_fraction=None,
            final={},
        )
        for dictionary in dictionaries
    )
    return TrainResults(PRETRAINED, 0, 0, 0.0, 0.0, members, MeshShape.of(mesh, process_count()))


def find_pretrained(addresses: Sequence[str]) -> list[Pretrained]:
    """Return the dictionaries of folders, here or on the hub; of a stack or set all.

    Raises:
      UserError: none is named or found, one is damaged, or does not say which site it reads.
    """
    if not addresses:
        raise UserError(f"--train.kinds={PRETRAINED} needs {_FLAG}=FOLDER,...: name what is to be taken")
    dictionaries = [entry for address in addresses for entry in _dictionaries_at(address)]
    for place, config, _ in dictionaries:
        if hooks.UNKNOWN in (config.site, config.target) or ModuleSite.names(config.site):
            raise UserError(
                f"{_FLAG}: {place} does not say which site it reads ({config.site}): load it with site= of "
                "saejax.load_dictionary, save it with saejax.save_dictionary, and name that folder"
            )
    # One dictionary alone has no member name, as one that is trained here has none.
    names = [""] if len(dictionaries) == 1 else _names([(config.site, place) for place, config, _ in dictionaries])
    return [Pretrained(name, *entry) for name, entry in zip(names, dictionaries, strict=True)]


def _names(places: Sequence[tuple[str, str]]) -> list[str]:
    """Return the site of each and, as far as that is needed for distinct names, the last parts of its path."""

    def named(site: str, place: str, parts: int) -> str:
        end = "/".join(Path(place).parts[-parts:])
        return f"{site}-{folder_name(end)}" if parts else site

    names = []
    most = max(len(Path(place).parts) for _, place in places)  # of all: "." has none
    for site, place in places:
        for parts in range(most + 1):
            name = named(site, place, parts)
            if [named(*entry, parts) for entry in places].count(name) == 1:
                names.append(name)
                break
        else:
            raise UserError(f"{_FLAG} names {place} twice: name each dictionary once")
    return names


def _dictionaries_at(address: str) -> Iterator[tuple[str, DictionaryConfig, Callable[..., Dictionary]]]:
    """Yield path, configuration and reader of each dictionary at an address."""
    try:
        folder = resolve_path(address)
        if folder.is_dir() and circuit_tracer.is_set(folder):
            layers = circuit_tracer.open_transcoders(folder)
            for i, config in enumerate(layers.configs):
                yield f"{address}/layer_{i}", config, functools.partial(layers.load, i)
            return
        if registry_overrides(address):  # which belong to this address, not to the folder
            yield address, read_config(address), functools.partial(load_dictionary, address)
            return
        for place in folders_of(folder):
            is_named = place == folder or folder.is_file()  # or a file in it is
            name = address if is_named else f"{address}/{place.relative_to(folder).as_posix()}"
            yield name, read_config(place), functools.partial(load_dictionary, place)
    except UserError as error:
        raise UserError(f"{_FLAG}: {error}") from None
