"""The stage ``transfer``: what dictionaries of different layers, seeds, sizes and models have in common.

1. Dictionaries of one model are compared in every pair; of pairs of different models all, or a sample.
2. Where it is needed, models read the same text, one model at a time (``matching.transfer.reading``).
3. For each first dictionary of a pair: match its features with each second one's by every measure that applies
   (``matching.match``), and beside it with rows that share nothing with it; evaluate each dictionary at the other's
   site if asked for (``matching.transfer.reconstruction``).
4. Chains through the layers follow from the pairs of features (``summary``).

Dictionaries are loaded when they are used, and the rows of a few are kept: memory does not grow with their number.

Written for the first dictionary of each pair: ``<part>.json``, the figures of its pairs, and
``<part>-<measure>.parquet``, the pairs of features; then ``pairs.csv``.
"""

import functools
import itertools
import shutil
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy.special import ndtri

from saejax.dictionaries.names import folder_name
from saejax.errors import UserError
from saejax.matching.match import Matched, match, measure_pairs
from saejax.matching.rows import Rows, independent_rows, weight_rows
from saejax.matching.transfer.chains import SHARED, FeaturePairs, Pair
from saejax.matching.transfer.compared import WEIGHTS, Compared, measures_of
from saejax.matching.transfer.reading import CEILING, NULL, SCORES, Reading, is_movable
from saejax.matching.transfer.reconstruction import ROWS_PER_DIMENSION
from saejax.matching.transfer.results import (
    ComparedPair,
    ComparedRows,
    MatchScores,
    ReconstructionTransfer,
    TransferResults,
)
from saejax.matching.transfer.settings import TransferConfig
from saejax.parallel.mesh import make_mesh, on_host
from saejax.parallel.settings import MeshConfig
from saejax.progress import OnProgress
from saejax.results import Interval
from saejax.runner.parts import Measure, Measured, each_part, part_file
from saejax.runner.workspace import Run
from saejax.stages.transfer.inputs import live_features, load_compared, read_run_text
from saejax.stages.transfer.summary import summarize
from saejax.statistics.intervals import wilson
from saejax.wording import counted

_FLAG = "--transfer.dictionaries"
_ROW_BYTES = 1 << 30  # rows of dictionaries kept in memory
_Z = float(ndtri(0.975))
Key = tuple[int, str, str]  # number of the second dictionary, measure, side


def run_transfer(run: Run) -> TransferResults:
    """Compare the dictionaries of ``--transfer.dictionaries``; pairs finished in an earlier run are kept.

    Raises:
      UserError: dictionaries or text are missing, or two dictionaries cannot be compared by any measure.
      Interrupted: asked to stop.
    """
    config = run.configs[TransferConfig]
    compared = load_compared(config.dictionaries, run.inputs, _FLAG)
    refuse_one(config.dictionaries, len(compared))
    wanted = list(itertools.combinations(range(len(compared)), 2))
    for first, second in ((compared[i], compared[j]) for i, j in wanted):
        if not measures_of(config.measures, first, second):
            raise UserError(
                f"{first.name} and {second.name} are of different models or widths, so directions cannot be compared: "
                f"add activity to --transfer.measures={','.join(config.measures)}"
            )
    # The last dictionary is the first of no pair.
    parts = [f"{number:03d}-{folder_name(entry.name)}" for number, entry in enumerate(compared)][:-1]

    def begin() -> Measure:
        comparison = Comparison(run, compared, wanted)
        return lambda part, on_progress: comparison.measure(part, parts.index(part), on_progress)

    pairs_of = each_part(run, parts, begin, tuple[ComparedPair, ...], "assignments")
    results = summarize(run, compared, parts, [pair for part in parts for pair in pairs_of[part]])
    # Last, as a run that is continued needs the text's activations for the remaining pairs.
    shutil.rmtree(run.folder / "text", ignore_errors=True)
    return results


def refuse_one(names: Sequence[str], count: int) -> None:
    """Raise a ``UserError`` where the dictionaries that are named are fewer than two."""
    if count < 2:
        raise UserError(f"{_FLAG}={','.join(names)} is one dictionary: name two at least")


class Comparison:
    """Compares dictionaries, which its methods name by their numbers."""

    def __init__(self, run: Run, compared: Sequence[Compared], wanted: Sequence[Pair]):
        self._run, self._config, self._compared = run, run.configs[TransferConfig], compared
        self._mesh, self._wanted = make_mesh(run.configs[MeshConfig]), wanted
        self._live: list[np.ndarray | None] = [None] * len(compared)
        if {*WEIGHTS} & {*self._config.measures}:
            workdir, batch = run.folder.parent, self._config.batch_tokens
            self._live = [live_features(entry, workdir, self._mesh, batch) for entry in compared]
            unknown = [entry.name for entry, live_F in zip(compared, self._live, strict=True) if live_F is None]
            if unknown:
                run.say(f"compared with their dead features, for want of held-out text: {', '.join(unknown)}")
        largest = max(4 * entry.config.n_features * entry.config.d_in for entry in compared)
        # At least both rows of a pair and the second's null.
        self._weights = functools.lru_cache(maxsize=max(4, _ROW_BYTES // largest))(self._make_weights)
        self._reading = None
        if "activity" in self._config.measures or self._config.reconstruction:
            settings = self._config.tokens, self._config.batch_tokens, self._config.seed, self._config.reconstruction
            fixed = [entry.name for entry in compared if not is_movable(entry.config)]
            if self._config.reconstruction and fixed:
                why = "as transcoders, without an encoder or with tokens normalised"
                run.say(f"not evaluated at other sites, {why}: {', '.join(fixed)}")
            shared = read_run_text(run, compared, self._mesh, *settings)
            self._reading = Reading(self._config, compared, self._mesh, shared)

    def measure(self, part: str, first: int, on_progress: OnProgress) -> Measured:
        """Compare a dictionary with all later ones that are wanted, and write the pairs of features of a part.

        Args:
          part: name of the part, in the sense of ``runner.parts``.
          first: number of the dictionary.
          on_progress: takes the number of comparisons done and in all.
        """
        measures = {
            second: measures_of(self._config.measures, self._compared[first], self._compared[second])
            for index, second in self._wanted
            if index == first
        }
        keys = [(second, name, side) for second, names in measures.items() for name in names for side in _sides(name)]
        problems = ((key, *self._rows(first, key, measures=False)) for key in keys)
        matched: dict[int, dict[tuple[str, str], Matched]] = {second: {} for second in measures}
        pairs: dict[int, ComparedPair] = {}
        tables: dict[str, dict[int, FeaturePairs]] = {}
        on_progress(0, len(keys))
        for done, (key, assignment) in enumerate(match(problems, self._mesh), 1):
            second, name, side = key
            if name == "activity":
                assignment = measure_pairs(assignment, *self._rows(first, key, measures=True))
            matched[second][name, side] = assignment
            if len(matched[second]) == sum(len(_sides(measure)) for measure in measures[second]):
                by_side = matched.pop(second)  # only figures and partners are kept of a finished pair
                pairs[second] = self._pair(first, second, measures[second], by_side)
                for measure in measures[second]:
                    of_pair = FeaturePairs.of(second, by_side[measure, SCORES], by_side[measure, NULL])
                    tables.setdefault(measure, {})[second] = of_pair
            on_progress(done, len(keys))
        for name, by_second in tables.items():
            ordered = [by_second[second] for second in measures if second in by_second]
            FeaturePairs.joined(ordered).save(part_file(self._run, part, f"-{name}.parquet"))
        in_order = tuple(pairs[second] for second in measures)
        return Measured(in_order, _line(self._compared[first], in_order))

    def _rows(self, first: int, key: Key, measures: bool) -> tuple[Rows, Rows]:
        """Return the rows of both dictionaries; rows of features that are not compared are 0."""
        second, name, side = key
        if name == "activity":
            assert self._reading
            return self._reading.rows(first, second, side, measures)
        return self._weights(name, first, False), self._weights(name, second, side == NULL)

    def _make_weights(self, name: str, index: int, null: bool) -> np.ndarray:
        if null:
            # By the dictionary's number, so that a continued run draws the same null.
            return independent_rows(self._weights(name, index, False), [self._config.seed, index])
        with on_host():  # devices get rows by pairs
            rows_FxD, live_F = weight_rows(name, self._compared[index].load()), self._live[index]
        # A feature that never fires means nothing: a pair with its direction would still count as shared.
        return rows_FxD if live_F is None else np.where(live_F[:, None], rows_FxD, np.float32(0))

    def _pair(
        self, first: int, second: int, names: Sequence[str], matched: Mapping[tuple[str, str], Matched]
    ) -> ComparedPair:
        """Return the results of two dictionaries."""
        measures = {}
        for name in names:
            features: tuple[np.ndarray, ...]
            ceiling = None
            if name == "activity":
                assert self._reading
                features = self._reading.compared_features(first, second)
                ceiling = score(matched[name, CEILING], (features[0], features[0])).shared.mean
            else:
                features = tuple(np.any(self._weights(name, index, False), axis=1) for index in (first, second))
            measures[name] = ComparedRows(
                score(matched[name, SCORES], features),
                score(matched[name, NULL], features),
                compared=(int(features[0].sum()), int(features[1].sum())),
                left_out=(int((~features[0]).sum()), int((~features[1]).sum())),
                ceiling=ceiling,
            )
        transfers: dict[str, ReconstructionTransfer] = {}
        if self._config.reconstruction and self._reading:
            transfers = self._reading.transfers(first, second)
            self._warn(transfers.values())
        tokens = self._reading.tokens(first, second) if self._reading else None
        return ComparedPair(
            self._compared[first].name, self._compared[second].name, measures, tokens=tokens, **transfers
        )

    def _warn(self, transfers: Iterable[ReconstructionTransfer]) -> None:
        """Log maps that were fitted on too few rows, with what they explain of held-out rows."""
        for fitted in (fitted for transfer in transfers for fitted in (transfer.into, transfer.back)):
            if fitted.rows < ROWS_PER_DIMENSION * fitted.width:
                self._run.say(
                    f"warning: the map from {fitted.site} has {fitted.rows:,} rows for {fitted.width:,} dimensions, "
                    f"fewer than {ROWS_PER_DIMENSION} per dimension (held-out R² {fitted.r2:.2f}): raise "
                    f"--transfer.tokens to {2 * ROWS_PER_DIMENSION * fitted.width:,} or more"
                )


def _sides(measure: str) -> tuple[str, ...]:
    return (SCORES, NULL, CEILING) if measure == "activity" else (SCORES, NULL)


def score(matched: Matched, features: tuple[np.ndarray, ...]) -> MatchScores:
    """Return the figures of an assignment over the compared features; unassigned ones count as pairs of value 0.

    Args:
      matched: the assignment.
      features: compared features of the first and of the second dictionary, bool [F], [G].
    """
    first_F, second_G = features
    # So many pairs are possible; features left over because the other dictionary is smaller do not count against it.
    pairs_N = np.zeros(min(first_F.sum(), second_G.sum()))
    values = matched.value_F[(matched.partner_F >= 0) & first_F][: len(pairs_N)]
    pairs_N[: len(values)] = np.nan_to_num(values)
    return MatchScores(
        nearest=mean_interval(matched.nearest_F[first_F]),
        nearest_back=mean_interval(matched.nearest_G[second_G]),
        matched=mean_interval(pairs_N),
        shared=wilson(pairs_N >= SHARED) if len(pairs_N) else Interval(0.0, 0.0, 0.0),
        gap=max(matched.gap, 0.0),
    )


def mean_interval(values_N: np.ndarray) -> Interval:
    """Return the mean of many values with its normal 95 % interval; 0 without values."""
    if not len(values_N):
        return Interval(0.0, 0.0, 0.0)
    values_N = values_N.astype(np.float64)
    mean = float(values_N.mean())
    half = _Z * float(values_N.std(ddof=1)) / len(values_N) ** 0.5 if len(values_N) > 1 else 0.0
    return Interval(mean, mean - half, mean + half)


def _line(first: Compared, pairs: Sequence[ComparedPair]) -> str:
    """Return the figures of a dictionary's pairs as a log line."""
    if not pairs:
        return f"{first.name}: no pairs"
    most = max(pairs, key=lambda pair: next(iter(pair.measures.values())).scores.shared.mean)
    measure, both = next(iter(most.measures.items()))
    if not min(both.compared):
        return f"{first.name}, {counted(len(pairs), 'pair')}: by {measure}, no feature could be compared"
    return (
        f"{first.name}, {counted(len(pairs), 'pair')}: by {measure}, shares most with {most.second}, "
        f"{both.scores.shared.mean:.1%} of the pairs of features (null {both.null.shared.mean:.1%}), mean "
        f"{both.scores.matched.mean:.3f} ({both.null.matched.mean:.3f})"
    )
