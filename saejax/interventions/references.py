"""Whole answers on a model split at a dictionary's site: their log-likelihood under edits, and its attribution.

The readout of a reference is its teacher-forced log-likelihood,

    L = sum_c log p(answer token c | context, answer tokens before c), in nats,

and the attribution of feature i is activation x gradient, as in ``slopes``,

    a_i = sum_t f_{t,i} <dL/dx_t, W_dec_i>.

One backward pass per reference; attention sinks and padding contribute nothing. Under an edit only the layers above the
site are run, on the references that the edit changes. Long contexts are the rule, so batches are bounded by tokens, and
the layers below the site are run once more for each call, not kept.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.interventions.activity import FeatureStatistics, count_firings
from saejax.interventions.controls import Changes, GatheredPrompts, change_norms, measure_changes
from saejax.interventions.edits import ZERO, ActivationReplacement, FeatureEdits
from saejax.interventions.rows import edit_value, gather
from saejax.interventions.slopes import weighted
from saejax.interventions.split_model import SplitModel, active_features, run_head
from saejax.models import decoder
from saejax.models.lengths import even_batches
from saejax.models.split import SplitPoint
from saejax.parallel.mesh import document_devices, sharding
from saejax.progress import OnProgress, silent
from saejax.tasks.likelihood import align, token_scores

_PROGRAM = 4096  # tokens that run in the time in which programs of another shape are compiled, roughly
_NOT_RUN = 1.0  # where an edit changes nothing: no log-likelihood is above 0


@dataclasses.dataclass(frozen=True)
class Reference:
    """An answer after its context."""

    context: list[int]  #: token ids, at least one
    answer: list[int]  #: token ids, at least one

    def __len__(self) -> int:
        return len(self.context) + len(self.answer)


class ReferenceBatch(NamedTuple):
    """References after the layers below the site; of the B rows some are copies that pad the batch."""

    #: stream_BxTxX, value_BxTxD, read_BxTxD: as in ``CleanRun``.
    stream_BxTxX: jax.Array
    value_BxTxD: jax.Array
    read_BxTxD: jax.Array
    real_BxT: jax.Array  #: True at the tokens of references; False in padding and in copies
    #: True where features of the split's dictionary are editable: at real tokens but attention sinks.
    domain_BxT: jax.Array
    #: positions_BxC and targets_BxC: where each answer token is predicted, and which it is; see ``likelihood.align``.
    positions_BxC: jax.Array
    targets_BxC: jax.Array
    weight_BxC: jax.Array  #: 1 at answer tokens; 0 elsewhere, and in copies


class References:
    """References on a model split at a dictionary's site.

    Args:
      split: the model.
      references: N of them, at least one.
      batch_tokens: tokens per batch, padding included.
      check_stop: called before each batch; may raise to stop.
    """

    def __init__(
        self,
        split: SplitModel,
        references: Sequence[Reference],
        batch_tokens: int,
        check_stop: Callable[[], None] = lambda: None,
    ):
        self._split, self._references = split, references
        self._batch_tokens, self._check_stop = batch_tokens, check_stop
        self._kept: list[tuple[np.ndarray, ReferenceBatch]] | None = None

    replacement = ZERO  #: what replaces the activations of ablated features

    def __len__(self) -> int:
        return len(self._references)

    @property
    def split(self) -> SplitModel:
        """The model, split at a dictionary's site."""
        return self._split

    def keep_batches(self) -> None:
        """Run the layers below the site now, and keep their values for later calls."""
        self._kept = list(self.batches())

    def with_split(self, split: SplitModel, train: "References | None" = None) -> "References":
        """Return the references for another dictionary, with kept batches and slopes where these are the same.

        ``train`` is not used: nothing that replaces activations depends on other references.
        """
        other = References(split, self._references, self._batch_tokens, self._check_stop)
        if split.reads_like(self._split):
            other._kept = self._kept
        if "slopes" in vars(self) and split.point == self._split.point:
            other.slopes = self.slopes
        return other

    def statistics(self) -> FeatureStatistics:
        """Return firing statistics of every feature; references are its prompts.

        Raises:
          UserError: a feature's activation is not finite.
        """
        split = self._split
        return FeatureStatistics.total(
            # Nothing is editable in copies, so all rows count.
            count_firings(
                split.point, split.dictionary, batch.read_BxTxD, batch.domain_BxT, np.ones(len(batch.domain_BxT), bool)
            )
            for _, batch in self.batches()
        )

    def values(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield what the dictionary reads [N, D] and the site's value [N, O] at editable positions, batch by batch."""
        for _, batch in self.batches():
            domain_BxT = np.asarray(batch.domain_BxT)
            read_BxTxD, value_BxTxO = np.asarray(batch.read_BxTxD), np.asarray(batch.value_BxTxD)
            yield read_BxTxD[domain_BxT].astype(np.float32), value_BxTxO[domain_BxT].astype(np.float32)

    def site_values(self) -> np.ndarray:
        """Return the site's values at editable positions, [N, D]."""
        return np.concatenate([value_NxD for _, value_NxD in self.values()])

    def pools(self, features: Sequence[int], most: int, seed: int) -> dict[int, list[float]]:
        """Return activations of each feature where it fires: all, or ``most`` drawn by ``seed``, for each by itself."""
        parts: list[list[np.ndarray]] = [[] for _ in features]
        for _, batch in self.batches() if len(features) else ():
            f_BxTxK, _ = self._gather(batch, np.asarray(features, np.int32))
            fires_BxTxK = np.asarray(self._split.dictionary.fires(f_BxTxK))
            for k, part in enumerate(parts):
                part.append(np.asarray(f_BxTxK)[:, :, k][fires_BxTxK[:, :, k]])
        pools = {}
        for feature, part in zip(features, parts, strict=True):
            pool = np.concatenate(part)
            if len(pool) > most:
                # A generator for each feature, so that its pool does not depend on the others.
                pool = np.random.default_rng([seed, feature]).choice(pool, most, replace=False)
            pools[feature] = pool.tolist()
        return pools

    def change_norms(self, edits: FeatureEdits) -> np.ndarray:
        """Return the norm of each edit's change at the site, over all positions, float64 [E, N]."""
        return change_norms(self._parts(edits.replacement), edits, len(self._references))

    def changes(self, features: Sequence[int] | np.ndarray) -> Changes:
        """Return the changes that setting each of some features to zero makes, alone and with each other."""
        return measure_changes(self._parts(ZERO), features, len(self._references))

    def _parts(self, source: ActivationReplacement) -> Iterator[GatheredPrompts]:
        for number, (places_Q, batch) in enumerate(self.batches()):
            gather_features = functools.partial(self._gather, batch, source=source.of_run(number))
            yield GatheredPrompts(places_Q, np.asarray(batch.domain_BxT)[: len(places_Q)], gather_features)

    @functools.cached_property
    def slopes(self) -> list[np.ndarray]:
        """Slopes of each reference's log-likelihood at the site, [B, T, D] for each batch."""
        point = _keeping_little(self._split.point)
        return [np.asarray(_answer_slopes(point, self._split.params, batch)) for _, batch in self.batches()]

    @functools.cached_property
    def attribution_NxF(self) -> np.ndarray:
        """Attribution of each feature for each reference."""
        batch_tokens, check_stop = self._batch_tokens, self._check_stop
        return attributions([self._split], self._references, batch_tokens, check_stop, slopes_of=self.slopes)[0]

    @property
    def attribution_F(self) -> np.ndarray:
        """Attribution of each feature, mean over the references."""
        # float64, because features of nearly equal attribution are ranked.
        return self.attribution_NxF.mean(axis=0, dtype=np.float64)

    def measure(
        self, edits: FeatureEdits, on_progress: OnProgress = silent, full: bool = False
    ) -> dict[str, np.ndarray]:
        """Return ``log_likelihoods`` as a readout; there are no further ones that ``full`` could ask for."""
        return dict(answer_log_prob=self.log_likelihoods(edits, on_progress))

    def _gather(
        self, batch: ReferenceBatch, features_K: np.ndarray, source: ActivationReplacement = ZERO
    ) -> tuple[jax.Array, jax.Array]:
        """Return by how much activations of some features on a batch fall, [B, T, K], and their directions [K, D]."""
        arrays = [batch.read_BxTxD, batch.domain_BxT]
        if source.kind == "counterpart":  # texts have none: there a swapped feature is taken away
            source = ZERO
        return gather(self._split.point, self._split.dictionary, source, arrays, features_K, len(batch.domain_BxT))

    def log_likelihoods(
        self, edits: FeatureEdits, on_progress: OnProgress = silent, clean_N: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the log-likelihood of each reference without an edit, then with each edit, in nats, [1 + E, N].

        Args:
          edits: edits of features, at all positions.
          on_progress: called with the rows done and in total; may raise to stop.
          clean_N: the log-likelihoods without an edit, if an earlier call returned them.

        Raises:
          UserError: a log-likelihood is not finite.
        """
        if clean_N is None:
            edits = edits.with_clean_rows(1)  # the last edit changes nothing
        value_MxN, done = np.full((len(edits), len(self._references)), np.nan), 0
        for number, (places_Q, batch) in enumerate(self.batches()):
            of_batch = dataclasses.replace(edits, replacement=edits.replacement.of_run(number))
            for chosen, features_K in edits.chunks():
                size = len(chosen) * len(places_Q)

                def on_share(share: float, done: int = done, size: int = size) -> None:
                    on_progress(done + int(share * size), value_MxN.size)

                value_LxQ = self._run(batch, len(places_Q), of_batch, chosen, features_K, on_share)
                value_MxN[np.array(chosen)[:, None], places_Q] = value_LxQ
                done += size
        if not np.isfinite(value_MxN).all():
            raise UserError(
                "log-likelihoods under edits are not finite: the model or the dictionary holds NaN or overflows; try "
                "--model.dtype=float32, or train the dictionary again"
            )
        edited_ExN = value_MxN if clean_N is not None else value_MxN[:-1]
        clean_N = value_MxN[-1] if clean_N is None else clean_N
        return np.vstack([clean_N, np.where(edited_ExN == _NOT_RUN, clean_N, edited_ExN)])

    def _run(
        self,
        batch: ReferenceBatch,
        count: int,
        edits: FeatureEdits,
        chosen: Sequence[int],
        features_K: np.ndarray,
        on_share: Callable[[float], None],
    ) -> np.ndarray:
        """Return the log-likelihood of a batch's first ``count`` references under some edits, float32 [M, N].

        ``on_share`` is called with the share of the work that is done; it may raise to stop.
        """
        split, rows = self._split, len(batch.domain_BxT)
        fall_BxTxK, W_dec_KxD = self._gather(batch, features_K, edits.replacement)
        falls_NxK = np.asarray((fall_BxTxK != 0).any(axis=1))[:count]
        fraction_MxK, addend_MxK = edits.over(chosen, features_K)
        # An edit that lowers nothing on a reference, and adds nothing, is not run there.
        runs_MxN = (fraction_MxK != 0).astype(np.float32) @ falls_NxK.T.astype(np.float32) > 0
        runs_MxN |= np.array([not len(edits.sets[e]) for e in chosen])[:, None]
        if addend_MxK is not None:
            runs_MxN |= addend_MxK.any(axis=1, keepdims=True)
        value_MxN = np.full(runs_MxN.shape, _NOT_RUN, np.float32)
        edit_R, place_R = np.nonzero(runs_MxN)
        for first in range(0, len(edit_R), rows):
            on_share(first / len(edit_R))
            part = slice(first, first + rows)
            # Filled up with copies to the batch's rows: one program for all parts.
            some_B, which_B = np.resize(place_R[part], rows), np.resize(edit_R[part], rows)
            amounts = fraction_MxK[which_B], None if addend_MxK is None else addend_MxK[which_B]
            total_B = _run_answers(split.point, split.params, batch, fall_BxTxK, W_dec_KxD, some_B, *amounts)
            value_MxN[edit_R[part], place_R[part]] = np.asarray(total_B)[: len(edit_R[part])]
        return value_MxN

    def batches(self) -> Iterator[tuple[np.ndarray, ReferenceBatch]]:
        """Yield the indices of the references of every batch, and the batch; similar lengths are together.

        Raises:
          UserError: the site's value is not finite.
        """
        if self._kept is not None:
            yield from self._kept
            return
        lengths_N = np.array([len(reference) for reference in self._references])
        row_multiple = document_devices(self._split.point.mesh)
        for places_Q, rows, length in even_batches(lengths_N, self._batch_tokens, row_multiple, _PROGRAM):
            self._check_stop()
            yield places_Q, self._batch(places_Q, rows, length)

    def _batch(self, places_Q: np.ndarray, rows: int, length: int) -> ReferenceBatch:
        split, count = self._split, len(places_Q)
        # Copies are real texts, so that no row is without tokens; their weights are 0.
        filled = [self._references[i] for i in np.resize(places_Q, rows)]
        pairs = [(reference.context, reference.answer) for reference in filled]
        tokens, positions_BxC, targets_BxC = align(pairs, length)
        kept_Bx1 = np.arange(rows)[:, None] < count
        real_BxT = kept_Bx1 & (np.arange(tokens.ids_BxT.shape[1])[None, :] <= tokens.last_B[:, None])
        ids_BxT, last_B, wanted_BxT = split.by_row(tokens.ids_BxT, tokens.last_B, real_BxT)
        stream, value, read, domain, finite_B = run_head(
            split.point, split.error, split.params, split.dictionary, ids_BxT, last_B, wanted_BxT
        )
        if not np.asarray(finite_B).all():
            raise UserError(
                f"the value of {split.point.site} is not finite on some of the texts: the model's weights hold NaN "
                "or it overflows; try --model.dtype=float32 or another model"
            )
        length_Bx1 = np.array([len(reference.answer) for reference in filled])[:, None]
        is_answer_BxC = np.arange(positions_BxC.shape[1])[None, :] < length_Bx1
        weight_BxC = (is_answer_BxC & kept_Bx1).astype(np.float32)
        answers = split.by_row(positions_BxC, targets_BxC, weight_BxC)
        return ReferenceBatch(stream, value, read, wanted_BxT, domain, *answers)


def attributions(
    splits: Sequence[SplitModel],
    references: Sequence[Reference],
    batch_tokens: int,
    check_stop: Callable[[], None] = lambda: None,
    *,
    weight_MxN: np.ndarray | None = None,
    slopes_of: Sequence[np.ndarray] | None = None,
) -> list[np.ndarray]:
    """Return each feature's attribution for each of N references, in nats, or sums of these, of each dictionary.

    The slopes, which take nearly all of the time, are computed once for all dictionaries of a site.

    Args:
      splits: the model, split at the site of each dictionary.
      references: N references, at least one.
      batch_tokens: tokens per batch, padding included.
      check_stop: called before each batch; may raise to stop.
      weight_MxN: weight of each reference in each sum. There may be thousands of references, of which sums alone fit
        into memory.
      slopes_of: ``References.slopes`` of the same references, if they were computed before.

    Returns:
      Float32 arrays ``[N, F]``; with weights float64 ``[M, F]``.

    Raises:
      UserError: an attribution is not finite.
    """
    count, dtype = (len(references), np.float32) if weight_MxN is None else (len(weight_MxN), np.float64)
    totals = [np.zeros((count, split.dictionary.config.n_features), dtype) for split in splits]
    for point in dict.fromkeys(split.point for split in splits):
        # The backward pass takes nearly all of the time and does not depend on the dictionary.
        group = [place for place, split in enumerate(splits) if split.point == point]
        first, keeping_little = splits[group[0]], _keeping_little(point)
        batches = References(first, references, batch_tokens, check_stop).batches()
        for number, (places_Q, batch) in enumerate(batches):
            known_BxTxD = slopes_of[number] if slopes_of else None
            slope_BxTxD = _answer_slopes(keeping_little, first.params, batch) if known_BxTxD is None else known_BxTxD
            for place in group:
                rows_BxF = np.asarray(_attribute(point, splits[place].dictionary, batch, slope_BxTxD))
                rows_QxF = rows_BxF[: len(places_Q)]
                if not np.isfinite(rows_QxF).all():
                    raise UserError(
                        f"the gradient of the log-likelihood with respect to {point.site} is not finite: the model or "
                        "the dictionary holds NaN or overflows; try --model.dtype=float32, or train the dictionary "
                        "again"
                    )
                if weight_MxN is None:
                    totals[place][places_Q] = rows_QxF
                else:
                    totals[place] += weight_MxN[:, places_Q] @ rows_QxF.astype(np.float64)
    return totals


def _keeping_little(point: SplitPoint) -> SplitPoint:
    # Rematerialised: what is kept of each layer for the gradient of long prompts would not fit.
    return dataclasses.replace(point, rules=dataclasses.replace(point.rules, remat=True))


def answer_pairs(sizes: Sequence[int], count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return distinct placebo targets: for each item two of its corrupted answers, in random order.

    Args:
      sizes: number of corrupted answers of each of N items, at least 2.
      count: number of targets, at most.
      seed: seed of the draws.

    Returns:
      For each target the places of the first and of the second answers, [N] each, where the corrupted answers of all
      items stand one after the other.
    """
    start_N = np.cumsum([0, *sizes[:-1]])
    targets: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
    for number in range(4 * count if len(sizes) else 0):
        rng = np.random.default_rng([seed, number])
        pair_Nx2 = start_N[:, None] + np.array([rng.permutation(size)[:2] for size in sizes])
        # The same pairs the other way round are the same target with another sign.
        if pair_Nx2[:, ::-1].tobytes() not in targets:
            targets.setdefault(pair_Nx2.tobytes(), (pair_Nx2[:, 0], pair_Nx2[:, 1]))
        if len(targets) == count:
            break
    return list(targets.values())


@functools.partial(jax.jit, static_argnums=0)
def _answer_slopes(point: SplitPoint, params: decoder.Params, batch: ReferenceBatch) -> jax.Array:
    """Return the slope of each row's log-likelihood with respect to the site's value, [B, T, D].

    Logits exist only where answer tokens are predicted, a piece of them at a time; see ``likelihood.token_scores``.
    """

    def objective(value_BxTxD: jax.Array) -> jax.Array:
        # Rows do not see each other, so the gradient of the sum holds every row's own.
        x = point.run_suffix(params, batch.stream_BxTxX, value_BxTxD)
        logp_BxC, _ = token_scores(point.config, params, x, batch.positions_BxC, batch.targets_BxC)
        return (batch.weight_BxC * logp_BxC).sum()

    return jax.lax.with_sharding_constraint(jax.grad(objective)(batch.value_BxTxD), sharding(point.mesh))


@functools.partial(jax.jit, static_argnums=0)
def _attribute(point: SplitPoint, dictionary: Dictionary, batch: ReferenceBatch, slope_BxTxD: jax.Array) -> jax.Array:
    """Return activation x slope of each row's log-likelihood, [B, F], for a dictionary of the site."""
    # Anew, since the batch's own domain belongs to the first dictionary of the site.
    domain_BxT = batch.real_BxT & dictionary.is_not_sink(batch.read_BxTxD, batch.value_BxTxD)
    f_BxTxF = active_features(dictionary, batch.read_BxTxD, domain_BxT)
    attribution_BxF = weighted(f_BxTxF, slope_BxTxD, dictionary.W_dec_FxD[...])
    return jax.lax.with_sharding_constraint(attribution_BxF, sharding(point.mesh))


@functools.partial(jax.jit, static_argnums=0)
def _run_answers(
    point: SplitPoint,
    params: decoder.Params,
    batch: ReferenceBatch,
    fall_BxTxK: jax.Array,
    W_dec_KxD: jax.Array,
    some_R: jax.Array,
    fraction_RxK: jax.Array,
    addend_RxK: jax.Array | None,
) -> jax.Array:
    """Return the log-likelihood of R rows [R]: some references of a batch, each with amounts of an edit."""
    # Rows are gathered on the device: the batch stays there for all edits.
    rows = ReferenceBatch(*(array[some_R] for array in batch))
    addend_RxTxK = None
    if addend_RxK is not None:
        addend_RxTxK = jnp.where(rows.domain_BxT[..., None], addend_RxK[:, None, :], 0.0)
    fall_RxTxK = fall_BxTxK[some_R]
    edited_RxTxD = edit_value(rows.value_BxTxD, fall_RxTxK, W_dec_KxD, fraction_RxK[:, None, :], addend_RxTxK)
    x = point.run_suffix(params, rows.stream_BxTxX, edited_RxTxD)
    logp_RxC, _ = token_scores(point.config, params, x, rows.positions_BxC, rows.targets_BxC)
    return jax.lax.with_sharding_constraint((rows.weight_BxC * logp_RxC).sum(axis=1), sharding(point.mesh))
