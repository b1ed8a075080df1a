"""The stage ``transfer``: what dictionaries of different layers, seeds, sizes and models have in common.

Every pair is compared by every measure that applies to it (``matching``), and beside it the first dictionary with one
that shares nothing with it. Where it is asked for, models read the same text (``text``, ``activity``), and dictionaries
stand in each other's place (``reconstruction``). From the pairs of features follow shares and chains (``chains``).

Written to the unit's folder, for the first dictionary of each pair: ``<part>.json``, the figures of its pairs, and
``<part>-<measure>.parquet``, the pairs of features; then ``pairs.csv`` and ``chains.parquet``.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy.stats import norm

from saejax.errors import UserError
from saejax.parallel.mesh import make_mesh
from saejax.results import Interval
from saejax.runner.parts import Measure, Measured, OnProgress, each_part, part_file
from saejax.runner.stage import folder_name
from saejax.runner.workspace import Run
from saejax.settings import MeshConfig
from saejax.stages.transfer import TransferConfig
from saejax.tasks.scoring import wilson
from saejax.transfer import spaces
from saejax.transfer.causal import RemovalEffects, load_effects
from saejax.transfer.chains import Link
from saejax.transfer.compared import Compared, chance, load_compared, measures_of, rows
from saejax.transfer.matching import Matched, match
from saejax.transfer.reading import Reading
from saejax.transfer.results import ComparedPair, ComparedRows, MatchScores, TransferResults
from saejax.transfer.summary import FeaturePairs, together

CLOSE = 0.9
_FLAG = "--transfer.dictionaries"
_Z = float(norm.ppf(0.975))


def run_transfer(run: Run) -> TransferResults:
    """Compares the dictionaries of ``--transfer.dictionaries``, those pairs left from an earlier run excepted.

    Raises:
      UserError: dictionaries or text are missing, or two dictionaries have nothing to be compared by.
      Interrupted: asked to stop.
    """
    config = run.configs[TransferConfig]
    compared = load_compared(config.dictionaries, run.inputs, _FLAG)
    if len(compared) < 2:
        raise UserError(f"{_FLAG}={','.join(config.dictionaries)} is one dictionary: name two at least")
    for first, second in itertools.combinations(compared, 2):
        if not measures_of(config.measures, first, second):
            raise UserError(
                f"{first.name} and {second.name} have nothing that --transfer.measures={','.join(config.measures)} "
                "compares: add activity"
            )
    effects = load_effects(config.ablations, compared)
    parts = [f"{place:03d}-{folder_name(one.name)}" for place, one in enumerate(compared)][:-1]

    def begin() -> Measure:
        comparison = Comparison(run, compared, effects)
        return lambda part, on_progress: comparison.measure(part, parts.index(part), on_progress)

    found = each_part(run, parts, begin, tuple[ComparedPair, ...], "assignments")
    return together(run, compared, parts, [pair for part in parts for pair in found[part]])


class Comparison:
    """Compares dictionaries; what they are compared by is made once.

    Args:
      effects: of their features, where they are known.
    """

    def __init__(self, run: Run, compared: Sequence[Compared], effects: RemovalEffects):
        self._run, self._config, self._compared, self._effects = run, run.configs[TransferConfig], compared, effects
        self._mesh = make_mesh(run.configs[MeshConfig])
        self._moves = self._config.reconstruction or self._config.tune_tokens > 0
        wants_text = "activity" in self._config.measures or self._moves
        self._reading = Reading.of(run, compared, self._mesh) if wants_text else None
        self._rows = functools.cache(lambda measure, place: rows(measure, compared[place].dictionary))
        self._chance = functools.cache(
            lambda measure, place: chance(self._rows(measure, place), [self._config.seed, place])
        )

    def measure(self, part: str, place: int, on_progress: OnProgress) -> Measured:
        """Compares the dictionary at a ``place`` with all after it, and writes the pairs of features as a ``part``."""
        seconds = range(place + 1, len(self._compared))
        wanted = {
            second: measures_of(self._config.measures, self._compared[place], self._compared[second])
            for second in seconds
        }
        total = 2 * sum(map(len, wanted.values()))
        found: dict[tuple[str, int, bool], Matched] = {}
        on_progress(0, total)
        for key, matched in match(self._problems(place, wanted), self._mesh):
            found[key] = matched
            on_progress(len(found), total)
        by_measure: dict[str, list[FeaturePairs]] = {}
        pairs = []
        for second, measures in wanted.items():
            judged = {}
            for measure in measures:
                both = [
                    self._judged(measure, place, second, null, found[measure, second, null]) for null in (False, True)
                ]
                judged[measure] = both
                by_measure.setdefault(measure, []).append(_table(second, *both))
            pairs.append(self._pair(place, second, judged))
        for measure, tables in by_measure.items():
            columns = {name: np.concatenate([table.columns[name] for table in tables]) for name in tables[0].columns}
            FeaturePairs(**columns).save(part_file(self._run, part, f"-{measure}.parquet"))
        return Measured(tuple(pairs), _line(self._compared[place], pairs))

    def _problems(
        self, place: int, wanted: Mapping[int, Sequence[str]]
    ) -> Iterator[tuple[tuple[str, int, bool], np.ndarray, np.ndarray]]:
        """What is to be matched: measure, second dictionary and whether it is the null, and the rows of both."""
        for second, measures in wanted.items():
            for measure, null in itertools.product(measures, (False, True)):
                if measure == "activity":
                    assert self._reading
                    yield (measure, second, null), *self._reading.rows(place, second, null, judge=False)
                else:
                    others = self._chance if null else self._rows
                    yield (measure, second, null), self._rows(measure, place), others(measure, second)

    def _judged(self, measure: str, place: int, second: int, null: bool, matched: Matched) -> Matched:
        """The same assignment with the values that are told: cosines of folded rows, correlations on the other text."""
        if measure == "activity":
            assert self._reading
            parts = self._reading.rows(place, second, null, judge=True)
        elif measure == "folded":
            other = (
                chance(self._rows("decoder", second), [self._config.seed, second])
                if null
                else self._rows("decoder", second)
            )
            parts = self._rows("decoder", place), other
        else:
            return matched
        has = np.flatnonzero(matched.partner_F >= 0)
        value_F = np.full(len(matched.partner_F), np.nan)
        value_F[has] = np.einsum("fd,fd->f", parts[0][has], parts[1][matched.partner_F[has]])
        return dataclasses.replace(matched, value_F=value_F)

    def _pair(self, place: int, second: int, judged: Mapping[str, Sequence[Matched]]) -> ComparedPair:
        """What there is to say of two dictionaries."""
        first_one, second_one = self._compared[place], self._compared[second]
        least = self._config.shared
        measures = {
            name: ComparedRows(scores(found, least), scores(null, least)) for name, (found, null) in judged.items()
        }
        if "activity" in judged and self._reading:
            alike = self._reading.alike(place, second, judged["activity"][0].partner_F)
            measures["activity"] = dataclasses.replace(measures["activity"], alike=alike)
        about: dict = dict(tokens=self._reading.tokens(place, second)) if self._reading else {}
        if "decoder" in judged and "encoder" in judged:
            one_F, two_F = (judged[name][0].partner_F for name in ("decoder", "encoder"))
            if (one_F >= 0).any():
                about["agreeing"] = float((one_F == two_F)[one_F >= 0].mean())
        main = judged["activity" if "activity" in judged else next(iter(judged))][0]
        link = Link.shared(main.partner_F, main.value_F, least)
        has = np.flatnonzero(link.partner_F >= 0)
        W_dec = [np.asarray(one.dictionary.W_dec_FxD[...], np.float32) for one in (first_one, second_one)]
        about["spaces"] = spaces.similarity(W_dec[0][has], W_dec[1][link.partner_F[has]], self._config.seed)
        if self._moves and self._reading:
            about |= self._reading.transfers(place, second)
        about["causal"] = self._effects.compared(place, second, link, self._config.seed)
        return ComparedPair(first_one.name, second_one.name, measures, **about)


def scores(matched: Matched, shared: float) -> MatchScores:
    """The figures of an assignment; features of the smaller dictionary that stay alone count as pairs of value 0."""
    pairs_N = np.zeros(min(len(matched.nearest_F), len(matched.nearest_G)))
    values = matched.value_F[matched.partner_F >= 0]
    pairs_N[: len(values)] = values
    return MatchScores(
        nearest=mean(matched.nearest_F),
        nearest_back=mean(matched.nearest_G),
        matched=mean(pairs_N),
        shared=wilson(pairs_N >= shared),
        close=wilson(pairs_N >= CLOSE),
        mutual=matched.mutual / max(len(pairs_N), 1),
        gap=max(matched.gap, 0.0),
    )


def mean(values_N: np.ndarray) -> Interval:
    """The mean of many values and the normal 95 % interval of it."""
    values_N = values_N.astype(np.float64)
    middle = float(values_N.mean())
    half = _Z * float(values_N.std(ddof=1)) / len(values_N) ** 0.5 if len(values_N) > 1 else 0.0
    return Interval(middle, middle - half, middle + half)


def _table(second: int, found: Matched, null: Matched) -> FeaturePairs:
    features = len(found.partner_F)
    return FeaturePairs(
        np.full(features, second, np.int32),
        np.arange(features, dtype=np.int32),
        found.partner_F.astype(np.int32),
        found.value_F.astype(np.float32),
        null.partner_F.astype(np.int32),
        null.value_F.astype(np.float32),
    )


def _line(first: Compared, pairs: Sequence[ComparedPair]) -> str:
    """The figures of a dictionary's pairs in a line."""
    main = [next(iter(pair.measures.values())) for pair in pairs]
    most = max(range(len(pairs)), key=lambda i: main[i].found.shared.mean)
    return (
        f"{first.name} beside {len(pairs)}: shares most with {pairs[most].second}, "
        f"{main[most].found.shared.mean:.1%} of the pairs (by chance {main[most].null.shared.mean:.1%}), "
        f"mean {main[most].found.matched.mean:.3f} ({main[most].null.matched.mean:.3f})"
    )
