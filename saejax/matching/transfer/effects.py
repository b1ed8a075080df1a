"""Agreement of the effects of shared features, ablated one at a time in each dictionary."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from saejax.errors import UserError
from saejax.interventions.answers import AblateResults
from saejax.interventions.importance import Importance
from saejax.matching.transfer.chains import Link
from saejax.matching.transfer.compared import Compared
from saejax.matching.transfer.results import MatchedDrops
from saejax.matching.transfer.stability import Matches, compare
from saejax.results import load_results
from saejax.runner.stage import is_folder

_FLAG = "--transfer.ablations"


class AblationEffects:
    """Effects of ablating features on behaviours.

    Args:
      folders: folder of the ablate unit of each dictionary that has one, by its number.
      behaviours: behaviours that each measured.
    """

    def __init__(self, folders: Mapping[int, Path], behaviours: Mapping[int, Sequence[str]]):
        self._behaviours = behaviours
        self._of = functools.cache(lambda place, name: Importance.load(Importance.file(folders[place], name)))

    def compared(self, first: int, second: int, link: Link, seed: int) -> dict[str, MatchedDrops] | None:
        """Return whether shared features have the same effects, by behaviour; None where effects were not measured.

        Args:
          first: number of a dictionary.
          second: number of another.
          link: the features that they share.
          seed: seed of the controls.
        """
        if not {first, second} <= self._behaviours.keys():
            return None
        has = (link.partner_F >= 0).nonzero()[0]
        matches = Matches(has, link.partner_F[has], link.value_F[has])
        common = [name for name in self._behaviours[first] if name in self._behaviours[second]]
        return {name: compare(self._of(first, name), self._of(second, name), matches, seed=seed) for name in common}


def load_effects(ablations: Sequence[str], compared: Sequence[Compared]) -> AblationEffects:
    """Find the dictionary of each ablate unit.

    Raises:
      UserError: a folder is not an ablate unit that measured all effects, or its dictionary is not compared.
    """
    folders: dict[int, Path] = {}
    behaviours: dict[int, list[str]] = {}
    for folder in map(Path, ablations):
        results = load_results(folder)
        if not isinstance(results, AblateResults):
            raise UserError(f"{_FLAG}={folder} is not an ablate unit: name one, such as runs/demo/ablate/topk")
        name = results.dictionary
        tested = Path(name) if is_folder(name) else folder.absolute().parent.parent / "train" / name
        places = [place for place, dictionary in enumerate(compared) if dictionary.folder.resolve() == tested.resolve()]
        if not places:
            raise UserError(f"{_FLAG}={folder} tested {tested}, which --transfer.dictionaries does not name: add it")
        measured = list(results.importance or {})
        if not measured:
            raise UserError(f"{folder} has no effects of all features: run ablate with --ablate.effects=all")
        folders[places[0]], behaviours[places[0]] = folder, measured
    return AblationEffects(folders, behaviours)
