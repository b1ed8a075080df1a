"""Time to go of a study: the expected time of each unit, corrected by that of finished units."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

Key = tuple[str, str]  # row, unit
_OTHER = 10.0  # seconds of a unit of which preflight expects nothing: to start a process and write a report
# Of the time since it began, which a unit needs at least: who is late says no longer that it is nearly done.
_LATE = 0.25


class TimeToGo:
    """Seconds that are left, as far as they are known.

    A unit is expected to take what preflight says, times what units of its stage took in proportion, in this row or
    another; or, before there are any, all units together. A unit at work that is late counts with the time that it has
    taken so far.

    Args:
      at_once: units that run at once, each of another row.
    """

    def __init__(self, at_once: int = 1) -> None:
        self._at_once = at_once
        self._expected: dict[Key, float] = {}
        self._took: dict[Key, float] = {}

    def expect(self, row: str, units: Sequence[str], seconds: Mapping[str, float]) -> None:
        """Record the durations that preflight expects of a row.

        Args:
          row: its name.
          units: all of its units.
          seconds: of each stage, of all its units together.
        """
        counts = Counter(map(_stage, units))
        for unit in units:
            stage = _stage(unit)
            self._expected[row, unit] = seconds[stage] / counts[stage] if stage in seconds else _OTHER

    def took(self, row: str, unit: str, seconds: float) -> None:
        """Record the duration of a finished unit, in seconds."""
        self._took[row, unit] = seconds

    def left(self, waiting: Iterable[Key], running: Mapping[Key, float] = MappingProxyType({})) -> float | None:
        """Return the seconds that are left; None where a row's preflight has not run.

        Args:
          waiting: units that have not begun.
          running: those at work, with the seconds since each began.
        """
        every = [*waiting, *running]
        if not all(key in self._expected for key in every):
            return None
        rates = self._rates(self._took)
        late = {key: spent for key, spent in running.items() if spent > self._usual(key, rates)}
        rates, rows = self._rates(self._took | late), defaultdict[str, float](float)
        for key in every:
            elapsed = running.get(key, 0.0)
            rows[key[0]] += max(self._usual(key, rates) - elapsed, _LATE * elapsed)
        return max([sum(rows.values()) / self._at_once, *rows.values()])  # a row's units run one after the other

    def _usual(self, key: Key, rates: Mapping[str, float]) -> float:
        return self._expected[key] * rates.get(_stage(key[1]), rates[""])

    def _rates(self, seconds_of: Mapping[Key, float]) -> dict[str, float]:
        """Return the time of units over the expected one, by stage; of all together under ""."""
        took, expected = defaultdict[str, float](float), defaultdict[str, float](float)
        for key, seconds in seconds_of.items():
            for name in (_stage(key[1]), "") if key in self._expected else ():
                took[name] += seconds
                expected[name] += self._expected[key]
        return {"": 1.0} | {name: took[name] / expected[name] for name in took if expected[name] > 0}


def _stage(unit: str) -> str:
    return unit.partition("/")[0]
