"""The stage ``transfer``: what dictionaries of different layers, seeds, sizes and models have in common.

1. Dictionaries of one model are compared in every pair; of pairs of different models all, or a sample.
2. Where it is needed, models read the same text, one model at a time (``reading``).
3. For each first dictionary of a pair: match its features with those of each second one by every measure that applies
   (``matching.match``), and beside it with rows that share nothing with it; evaluate each dictionary at the other's
   site if asked for (``reconstruction``).
4. Shares and chains follow from the pairs of features (``summary``).

Dictionaries are loaded when they are used; rows are kept in a cache of limited size.

Written for the first dictionary of each pair: ``<part>.json``, the figures of its pairs, and
``<part>-<measure>.parquet``, the pairs of features; then ``pairs.csv`` and ``chains.parquet``.
"""

import collections
import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from scipy.stats import norm

from saejax.errors import UserError
from saejax.matching.match import Matched, match
from saejax.matching.rows import independent_rows, weight_rows
from saejax.matching.transfer.chains import SHARED
from saejax.matching.transfer.compared import Compared, load_compared, measures_of, same_model
from saejax.matching.transfer.reading import Reading, read_shared_text
from saejax.matching.transfer.reconstruction import ROWS_PER_DIMENSION, has_few_rows
from saejax.matching.transfer.results import (
    ComparedPair,
    ComparedRows,
    MatchScores,
    ReconstructionTransfer,
    TransferResults,
)
from saejax.matching.transfer.summary import FeaturePairs, Pair, summarize
from saejax.parallel.mesh import make_mesh
from saejax.results import Interval
from saejax.runner.parts import Measure, Measured, OnProgress, each_part, part_file
from saejax.runner.stage import folder_name
from saejax.runner.workspace import Run
from saejax.settings import MeshConfig
from saejax.stages.transfer import TransferConfig
from saejax.tasks.scoring import wilson

CLOSE = 0.9
_FLAG = "--transfer.dictionaries"
_ROW_BYTES = 1 << 30  # rows of dictionaries kept in memory
_Z = float(norm.ppf(0.975))
_SCORES, _NULL, _CEILING = "scores", "null", "ceiling"
Key = tuple[str, int, str]  # measure, number of the second dictionary, one of the three above


def run_transfer(run: Run) -> TransferResults:
    """Compare the dictionaries of ``--transfer.dictionaries``; pairs finished in an earlier run are kept.

    Raises:
      UserError: dictionaries or text are missing, or two dictionaries cannot be compared by any measure.
      Interrupted: asked to stop.
    """
    config = run.configs[TransferConfig]
    compared = load_compared(config.dictionaries, run.inputs, _FLAG)
    if len(compared) < 2:
        raise UserError(f"{_FLAG}={','.join(config.dictionaries)} is one dictionary: name two at least")
    wanted = select_pairs(compared, config.between, config.seed)
    for first, second in ((compared[i], compared[j]) for i, j in wanted):
        if not measures_of(config.measures, first, second):
            raise UserError(
                f"{first.name} and {second.name} are of different models or widths, so directions cannot be compared: "
                f"add activity to --transfer.measures={','.join(config.measures)}"
            )
    # The last dictionary is the first of no pair.
    parts = [f"{number:03d}-{folder_name(each.name)}" for number, each in enumerate(compared)][:-1]

    def begin() -> Measure:
        comparison = Comparison(run, compared, wanted)
        return lambda part, on_progress: comparison.measure(part, parts.index(part), on_progress)

    pairs_of = each_part(run, parts, begin, tuple[ComparedPair, ...], "assignments")
    results = summarize(run, compared, parts, [pair for part in parts for pair in pairs_of[part]], wanted)
    # Last, as a run that is continued needs the text's activations for the remaining pairs.
    shutil.rmtree(run.folder / "text", ignore_errors=True)
    return results


def select_pairs(compared: Sequence[Compared], between: int, seed: int) -> list[Pair]:
    """Return the pairs to compare: all of one model, and some of different models.

    Args:
      compared: the dictionaries.
      between: number of random pairs of different models; 0: all.
      seed: of the random choice.
    """
    pairs = list(itertools.combinations(range(len(compared)), 2))
    across = [pair for pair in pairs if not same_model(*(compared[index] for index in pair))]
    if between and len(across) > between:
        chosen = np.random.default_rng(seed).choice(len(across), between, replace=False)
        dropped = set(across) - {across[number] for number in chosen}
        pairs = [pair for pair in pairs if pair not in dropped]
    return pairs


class RowCache:
    """Rows by key, the least recently used dropped when they exceed a number of bytes."""

    def __init__(self, limit: int = _ROW_BYTES):
        self._limit, self._rows = limit, collections.OrderedDict[tuple, np.ndarray]()

    def get(self, key: tuple, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the rows of a key, made if they are not kept."""
        if key not in self._rows:
            self._rows[key] = make()
        self._rows.move_to_end(key)
        # The rows asked for stay, however large.
        while len(self._rows) > 1 and sum(rows.nbytes for rows in self._rows.values()) > self._limit:
            self._rows.popitem(last=False)
        return self._rows[key]


class Comparison:
    """Compares dictionaries.

    Args:
      run: the run.
      compared: the dictionaries.
      wanted: numbers of the pairs to compare.
    """

    def __init__(self, run: Run, compared: Sequence[Compared], wanted: Sequence[Pair]):
        self._run, self._config, self._compared = run, run.configs[TransferConfig], compared
        self._mesh, self._wanted, self._cache = make_mesh(run.configs[MeshConfig]), wanted, RowCache()
        self._live = [each.live(run.folder.parent) for each in compared]
        self._reading = None
        if "activity" in self._config.measures or self._config.reconstruction:
            text = read_shared_text(
                run,
                compared,
                self._mesh,
                self._config.tokens,
                self._config.batch_tokens,
                self._config.seed,
                keep_values=self._config.reconstruction,
            )
            self._reading = Reading(run, compared, self._mesh, text)

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
        total = sum(len(self._sides(measure)) for some in measures.values() for measure in some)
        matched_by_key: dict[Key, Matched] = {}
        on_progress(0, total)
        for key, matched in match(self._problems(first, measures), self._mesh):
            # An assignment picks what correlates by chance, too: its correlations are measured on text that did not
            # pick.
            matched_by_key[key] = self._with_measured_values(first, key, matched)
            on_progress(len(matched_by_key), total)
        tables: dict[str, list[FeaturePairs]] = {}
        pairs = []
        for second, names in measures.items():
            for name in names:
                table = _table(second, matched_by_key[name, second, _SCORES], matched_by_key[name, second, _NULL])
                tables.setdefault(name, []).append(table)
            pairs.append(self._pair(first, second, names, matched_by_key))
        for name, some in tables.items():
            columns = {column: np.concatenate([table.columns[column] for table in some]) for column in some[0].columns}
            FeaturePairs(**columns).save(part_file(self._run, part, f"-{name}.parquet"))
        return Measured(tuple(pairs), _line(self._compared[first], pairs))

    def _sides(self, measure: str) -> tuple[str, ...]:
        return (_SCORES, _NULL, _CEILING) if measure == "activity" else (_SCORES, _NULL)

    def _problems(
        self, first: int, measures: Mapping[int, Sequence[str]]
    ) -> Iterator[tuple[Key, np.ndarray, np.ndarray]]:
        """Yield the rows to match, a few at a time."""
        for second, names in measures.items():
            for name in names:
                for side in self._sides(name):
                    yield (name, second, side), *self._rows(first, name, second, side, measures=False)

    def _rows(self, first: int, name: str, second: int, side: str, measures: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of both dictionaries; those of features that are not compared are 0."""
        if name == "activity":
            assert self._reading
            if side == _CEILING:
                rows = self._reading.ceiling_rows(first, second, measures)
                return rows, rows
            return self._reading.rows(first, second, side == _NULL, measures)
        return self._weights(name, first, False), self._weights(name, second, side == _NULL)

    def _weights(self, name: str, index: int, null: bool) -> np.ndarray:
        if null:
            # By the dictionary's number, so that a continued run draws the same null.
            seed = [self._config.seed, index]
            return self._cache.get(
                (name, index, True), lambda: independent_rows(self._weights(name, index, False), seed)
            )

        def make() -> np.ndarray:
            rows_FxD = weight_rows(name, self._compared[index].dictionary)
            live_F = self._live[index]
            # A feature that never fires means nothing: a pair with its direction would still count as shared.
            return rows_FxD if live_F is None else np.where(live_F[:, None], rows_FxD, np.float32(0))

        return self._cache.get((name, index, False), make)

    def _with_measured_values(self, first: int, key: Key, matched: Matched) -> Matched:
        """Return the assignment with correlations on the half of the text that did not choose the pairs."""
        name, second, side = key
        if name != "activity":
            return matched
        first_FxN, second_GxN = self._rows(first, name, second, side, measures=True)
        paired = np.flatnonzero(matched.partner_F >= 0)
        value_F = np.full(len(matched.partner_F), np.nan)
        value_F[paired] = np.einsum("fd,fd->f", first_FxN[paired], second_GxN[matched.partner_F[paired]])
        return matched.with_values(value_F)

    def _compared_features(self, name: str, first: int, second: int) -> tuple[np.ndarray, np.ndarray]:
        """Return which features of both are compared by a measure, bool [F], [G]."""
        if name == "activity":
            assert self._reading
            return self._reading.compared_features(first, second)
        rows = self._weights(name, first, False), self._weights(name, second, False)
        return np.any(rows[0], axis=1), np.any(rows[1], axis=1)

    def _pair(self, first: int, second: int, names: Sequence[str], matched: Mapping[Key, Matched]) -> ComparedPair:
        """Return the results of two dictionaries."""
        measures = {}
        for name in names:
            features = self._compared_features(name, first, second)
            ceiling = rate_matched = None
            if name == "activity" and self._reading:
                itself = score(matched[name, second, _CEILING], (features[0], features[0]))
                ceiling = itself.shared.mean
                rate_matched = self._reading.rate_matched(first, second, matched[name, second, _SCORES].partner_F)
            measures[name] = ComparedRows(
                score(matched[name, second, _SCORES], features),
                score(matched[name, second, _NULL], features),
                compared=tuple(int(some.sum()) for some in features),  # type: ignore[arg-type]
                left_out=tuple(int((~some).sum()) for some in features),  # type: ignore[arg-type]
                ceiling=ceiling,
                rate_matched=rate_matched,
            )
        agreeing = None
        if "decoder" in names and "encoder" in names:
            # Two assignments that know nothing of each other agree on pairs that are more than chance.
            by_decoder_F, by_encoder_F = (matched[name, second, _SCORES].partner_F for name in ("decoder", "encoder"))
            paired = by_decoder_F >= 0
            agreeing = float((by_decoder_F == by_encoder_F)[paired].mean()) if paired.any() else None
        transfers: dict[str, ReconstructionTransfer] = {}
        if self._config.reconstruction and self._reading:
            transfers = self._reading.transfers(first, second)
            self._warn(first, second, transfers)
        return ComparedPair(
            self._compared[first].name,
            self._compared[second].name,
            measures,
            agreeing=agreeing,
            tokens=self._reading.tokens(first, second) if self._reading else None,
            **transfers,
        )

    def _warn(self, first: int, second: int, transfers: Mapping[str, ReconstructionTransfer]) -> None:
        """Log maps that were fitted on too few rows, with what they explain of held-out rows."""
        for name, moved, native in (("onto_second", first, second), ("onto_first", second, first)):
            if name not in transfers:
                continue
            maps = ((native, transfers[name].into), (moved, transfers[name].back))
            for source, fitted in maps:
                width = self._compared[source].config.d_in
                if has_few_rows(width, fitted.rows):
                    self._run.say(
                        f"warning: the map from {self._compared[source].name}'s site has {fitted.rows:,} rows for "
                        f"{width:,} dimensions, fewer than {ROWS_PER_DIMENSION} per dimension (held-out R² "
                        f"{fitted.r2:.2f}): raise --transfer.tokens to {2 * ROWS_PER_DIMENSION * width:,} or more"
                    )


def score(matched: Matched, features: tuple[np.ndarray, np.ndarray]) -> MatchScores:
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
        shared=_share(pairs_N >= SHARED),
        close=_share(pairs_N >= CLOSE),
        mutual=float((matched.mutual_F & first_F).sum()) / max(len(pairs_N), 1),
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


def _share(is_N: np.ndarray) -> Interval:
    return wilson(is_N) if len(is_N) else Interval(0.0, 0.0, 0.0)


def _table(second: int, matched: Matched, null: Matched) -> FeaturePairs:
    features = len(matched.partner_F)
    return FeaturePairs(
        np.full(features, second, np.int32),
        np.arange(features, dtype=np.int32),
        matched.partner_F.astype(np.int32),
        matched.value_F.astype(np.float32),
        null.partner_F.astype(np.int32),
        null.value_F.astype(np.float32),
    )


def _line(first: Compared, pairs: Sequence[ComparedPair]) -> str:
    """Return the figures of a dictionary's pairs as a log line."""
    if not pairs:
        return f"{first.name}: no pairs"
    main = [next(iter(pair.measures.values())) for pair in pairs]
    most = max(range(len(pairs)), key=lambda i: main[i].scores.shared.mean)
    line = (
        f"{first.name}, {len(pairs)} pairs: shares most with {pairs[most].second}, "
        f"{main[most].scores.shared.mean:.1%} of the pairs of features (null {main[most].null.shared.mean:.1%}), mean "
        f"{main[most].scores.matched.mean:.3f} ({main[most].null.matched.mean:.3f})"
    )
    moved = [transfer for pair in pairs for transfer in (pair.onto_second, pair.onto_first) if transfer]
    if moved:
        line += f"; held-out R² of maps {min(each.into.r2 for each in moved):.2f} or more"
    return line
