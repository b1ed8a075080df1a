"""The dictionaries that are compared; each is loaded when it is used, and not kept."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from saejax.dictionaries import Dictionary, DictionaryConfig, load_dictionary, stacks
from saejax.dictionaries.formats import folders_of, hooks, read_config
from saejax.errors import UserError
from saejax.models.sites import Site
from saejax.runner.stage import is_folder

WEIGHTS = ("decoder", "encoder")  # measures that need no text


@dataclasses.dataclass(frozen=True)
class Compared:
    """A dictionary by its name."""

    name: str  #: such as "topk/k32", or its folder
    folder: Path  #: its folder
    config: DictionaryConfig  #: its configuration

    @property
    def dictionary(self) -> Dictionary:
        """The dictionary, loaded anew each time.

        Raises:
          UserError: it is damaged.
        """
        dictionary = load_dictionary(self.folder)
        if not np.isfinite(np.asarray(dictionary.W_dec_FxD[...])).all():
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

    def trained_in(self, workdir: Path) -> tuple[Path, str]:
        """Return the workdir that trained it, or else another one, and its name there."""
        parts = self.folder.absolute().parts
        if not is_folder(self.name) or "train" not in parts:
            return workdir, self.name
        index = len(parts) - 1 - parts[::-1].index("train")
        return Path(*parts[:index]), "/".join(parts[index + 1 :])

    def live(self, workdir: Path) -> np.ndarray | None:
        """Return which features fire on held-out text, bool [F], if ``evaluate`` measured it in the same workdir."""
        root, name = self.trained_in(workdir)
        path = root / "evaluate" / name / "firing_rate.npy"
        return np.load(path) > 0 if path.is_file() else None


def load_compared(names: Sequence[str], units: Mapping[str, Path], flag: str) -> list[Compared]:
    """Find the dictionaries that a flag names, in its order; of a stack all members.

    Args:
      names: kinds, members or folders.
      units: folders of the train units, such as those of "train/topk" or "train/topk/k16".
      flag: the flag, for messages.

    Raises:
      UserError: one does not exist or is named twice.
    """
    compared: list[Compared] = []
    for name in names:
        if is_folder(name):
            compared += [Compared(str(folder), folder, read_config(folder)) for folder in folders_of(name)]
            continue
        folders = stacks.find_trained(name, units, flag)
        compared += [Compared(full_name, folder, read_config(folder)) for full_name, folder in folders.items()]
    resolved = [each.folder.resolve() for each in compared]
    for each, folder in zip(compared, resolved, strict=True):
        if resolved.count(folder) > 1:
            raise UserError(f"{flag}={','.join(names)} names {each.name} twice: name each dictionary once")
    return compared


def same_model(first: Compared, second: Compared) -> bool:
    """Return whether two dictionaries can be of one model: their files state the same one, or one states none."""
    if first.fingerprint and second.fingerprint:
        return first.fingerprint == second.fingerprint
    return first.model_name == second.model_name or not (first.model_name and second.model_name)


def measures_of(wanted: Sequence[str], first: Compared, second: Compared) -> list[str]:
    """Return the measures by which two dictionaries can be compared.

    Directions of two models have nothing to do with each other, whatever their widths: across models only activity on
    shared text is compared.
    """
    # Files that name no model may be of one: widths are then all that speaks against it.
    one_space = same_model(first, second) and first.config.d_in == second.config.d_in
    return [measure for measure in wanted if measure not in WEIGHTS or one_space]
