"""The dictionaries that are compared; each is loaded when it is used, and not kept."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from saejax.activations.store import Store
from saejax.dictionaries import Dictionary, DictionaryConfig, load_dictionary
from saejax.dictionaries.formats import folders_of, hooks, read_config
from saejax.dictionaries.names import is_folder
from saejax.errors import UserError
from saejax.evaluation.reconstruction import read_blocks, reconstruct
from saejax.models.sites import Site
from saejax.runner import stacks

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

    def knows_live(self, workdir: Path) -> bool:
        """Return whether ``live`` gives an answer."""
        return bool(self._evaluated(workdir) or self._store(workdir))

    def live(self, workdir: Path, mesh: Mesh, batch: int) -> np.ndarray | None:
        """Return which features fire on held-out text, bool [F]; None if the workdir that trained it has none.

        Where ``evaluate`` has not measured it, it is measured here, in the same way.

        Args:
          workdir: of the run.
          mesh: devices that encode.
          batch: tokens in a batch.
        """
        if path := self._evaluated(workdir):
            return np.load(path) > 0
        if not (store := self._store(workdir)):
            return None
        dictionary = self.dictionary.with_sink_norms(store.max_norm, True)
        blocks = read_blocks(store, "held_out", (self.config.site, self.target), batch)
        return reconstruct([dictionary], blocks, mesh, batch)[0].firing_rate_F > 0

    def _evaluated(self, workdir: Path) -> Path | None:
        """Return the firing rates that ``evaluate`` wrote; None if there are none of this dictionary."""
        root, name = self.trained_in(workdir)
        path = stacks.results_folder(root, "evaluate", name) / "firing_rate.npy"
        return path if path.is_file() and stacks.is_of_trained(root, "evaluate", name) else None

    def _store(self, workdir: Path) -> Store | None:
        """Return the store of the workdir that trained it; None if it has no held-out text at its sites."""
        sites = {self.config.site, self.target}
        try:
            store = Store.open(self.trained_in(workdir)[0] / "capture")
        except UserError:  # there is none, or its values were deleted when training was done
            return None
        fits = store.model.fingerprint == self.fingerprint and sites <= {*store.sites}
        return store if fits and len(store.rows("held_out", *sites)) else None


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
