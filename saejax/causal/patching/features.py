"""Features patched between prompts and counterparts, and how often that carries the answer over.

*Noising* puts the activations of the counterpart's features into the prompt's run, *denoising* the prompt's into the
counterpart's; error terms and sinks stay those of the base run. The interchange-intervention accuracy (IIA; Geiger et
al., 2021, arXiv 2106.02997) is the share of prompts, among those on which the model is right about the prompt and about
its counterpart, whose answer noising turns into the counterpart's. That of the whole site is a ceiling for its parts:
it says how much of the content stands at this site, not what carries it.
"""

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from saejax.causal import controls
from saejax.causal.claims import randomisation_p
from saejax.causal.clustered import of_prompts
from saejax.causal.patching.grid import measurable
from saejax.causal.patching.pairs import patched_differences
from saejax.causal.patching.results import (
    Disentangled,
    Interchange,
    InterchangeTop,
    PatchedFeature,
    PatchedFeatures,
    PatchedPairs,
    PatchedSet,
    PatchEffect,
)
from saejax.dictionaries import Dictionary
from saejax.dictionaries.matmul import matmul
from saejax.interventions import activity
from saejax.interventions import slopes as screening
from saejax.interventions.engine import ablate_sets
from saejax.interventions.replacement import ActivationReplacement
from saejax.interventions.split_model import CleanRun, SiteRows, SplitModel, active_features
from saejax.models import decoder
from saejax.models.split import SplitPoint
from saejax.parallel.mesh import sharding
from saejax.results import Interval
from saejax.runner.parts import OnProgress, silent
from saejax.settings import PatchConfig
from saejax.tasks.behaviours import Prompt
from saejax.tasks.scoring import interval_ends

COUNTERPART = ActivationReplacement("counterpart")
_ADVICE = "lower --patch.top or --patch.matches, raise --task.test_prompts"


def steps(top: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... below ``top``, and ``top``; none for 0."""
    round_numbers = [digit * 10**power for power in range(7) for digit in (1, 2, 5)]
    return [*(k for k in round_numbers if k < top), *([top] if top else [])]


class FeaturePatching:
    """The features of one behaviour.

    Args:
      name: of the behaviour; with the seed it decides the draws.
      train: prompts with counterparts of as many tokens, which choose the features: those whose counterparts'
        activations, by the estimate, lower the logit difference most.
      pairs: test prompts of that sort, which judge them.
      on_progress: called with the tokens done and to do; may raise to stop.

    Attributes:
      top, drawn_NxK: the features that were chosen, and draws of matched ones.
      clean_P, corrupted_P: logit differences of the test prompts and of their counterparts, float64.

    Raises:
      UserError: too few features fire for matched controls, or something is not finite.
    """

    def __init__(
        self,
        split: SplitModel,
        name: str,
        train: Sequence[Prompt],
        pairs: Sequence[Prompt],
        config: PatchConfig,
        on_progress: OnProgress = silent,
    ):
        self._split, self._config, self._on_progress = split, config, on_progress
        self._resampling = of_prompts(pairs, config.bootstrap, config.seed)
        self._sides = split.run(pairs), split.run_counterparts(pairs)
        sides = split.run(train), split.run_counterparts(train)
        attribution_PxF = screening.attribution(split, sides[0], config.estimate, COUNTERPART, sides[1])
        self.top = screening.leaders(attribution_PxF.mean(axis=0, dtype=np.float64), config.top)
        statistics = activity.statistics(split, [*self._sides[0], *self._sides[1]])
        self._firing = statistics.firing(self.top)
        self.drawn_NxK = controls.draw_alike(
            statistics, self._firing, config.draws, config.matches, [config.seed, *name.encode()], _ADVICE
        )
        self._measure()

    def _measure(self) -> None:
        ks, every = steps(len(self.top)), self._split.dictionary.config.n_features
        singles = [[feature] for feature in self.top]
        nested = [self.top[:k] for k in ks]
        firing = [sum(feature in self._firing for feature in self.top[:k]) for k in ks]  # so many have a matched one
        random = [drawn_K[:count] for count in firing for drawn_K in self.drawn_NxK]
        sets = [*singles, *nested, list(range(every)), *random]
        noised, denoised = (
            ablate_sets(
                self._split,
                base,
                chosen,
                self._config.batch_rows,
                self._on_progress,
                source=COUNTERPART,
                counterparts=source,
            )
            for base, source, chosen in (
                (*self._sides, sets),
                (*self._sides[::-1], sets[: len(singles) + len(nested) + 1]),
            )
        )
        self.clean_P, self.corrupted_P = noised.clean_P, denoised.clean_P
        ends = np.cumsum([len(singles), len(nested), 1])
        self._noised_SxP, self._random_XxP = noised.ablated_SxP[: ends[-1]], noised.ablated_SxP[ends[-1] :]
        self._effect_DxSxP = np.stack([-denoised.drop_SxP, noised.drop_SxP[: ends[-1]]])

    def results(self, pairs: PatchedPairs, disentangled: tuple[Disentangled, ...] = ()) -> PatchedFeatures:
        """Effects of the features one by one and together, and the IIA of growing sets; ``pairs`` are those of both."""
        ks, single = steps(len(self.top)), len(self.top)
        both_P = (self.clean_P > 0) & (self.corrupted_P < 0)
        names: list[int | Literal["all"]] = [*ks, "all"]
        return PatchedFeatures(
            **vars(pairs),
            features=tuple(PatchedFeature(feature, *self._effects(i)) for i, feature in enumerate(self.top)),
            together=tuple(PatchedSet(name, *self._effects(single + i)) for i, name in enumerate(names)),
            interchange=self._interchange(ks, both_P),
            disentangled=disentangled,
        )

    def _effects(self, place: int) -> list[PatchEffect]:
        """Of one set, by direction."""
        whole_P, share_RxP = self.clean_P - self.corrupted_P, self._resampling.share_RxP
        measured = measurable(self.clean_P, self.corrupted_P, self._resampling)
        found = []
        for effect_SxP in self._effect_DxSxP:
            effect_1xP, share = effect_SxP[place : place + 1], None
            if measured:
                low_1, high_1 = interval_ends(effect_1xP, share_RxP, whole_P)
                share = Interval(float(effect_1xP.mean() / whole_P.mean()), float(low_1[0]), float(high_1[0]))
            found.append(PatchEffect(self._resampling.mean(effect_1xP[0]), share))
        return found

    def _interchange(self, ks: Sequence[int], both_P: np.ndarray) -> Interchange:
        prompts = int(both_P.sum())
        if not prompts:
            message = "on no prompt is the model right both about it and about its counterpart"
            return Interchange(0, (), all=None, error=None, ceiling=None, said=message)
        own = self._resampling.among(both_P)
        flipped_SxP = (self._noised_SxP < 0)[:, both_P]
        random_KxNxP = (self._random_XxP < 0)[:, both_P].reshape(len(ks), self._config.draws, prompts)
        nested_KxP = flipped_SxP[len(self.top) : len(self.top) + len(ks)]
        top = tuple(
            InterchangeTop(
                k,
                accuracy=own.share(own_P),
                random=own.mean(drawn_NxP.mean(axis=0)),
                p_value=float(randomisation_p(np.concatenate([own_P[None], drawn_NxP]).mean(axis=1))[0]),
            )
            for k, own_P, drawn_NxP in zip(ks, nested_KxP, random_KxNxP, strict=True)
        )
        every = own.share(flipped_SxP[-1])
        ceiling, error = (
            own.share((patch_parts(self._split, *self._sides, parts) < 0)[both_P]) for parts in ("site", "error")
        )
        best = f"the top {ks[-1]} features {100 * top[-1].accuracy.mean:.0f} %, " if ks else "no top features, "
        message = (
            f"answers carried over: {best}all features {100 * every.mean:.0f} %, the error "
            f"term {100 * error.mean:.0f} %; the ceiling, the whole site, {100 * ceiling.mean:.0f} %"
        )
        return Interchange(prompts, top, every, error, ceiling, message)


def patch_parts(split: SplitModel, base: Sequence[CleanRun], source: Sequence[CleanRun], parts: str) -> np.ndarray:
    """The logit difference of each base prompt with a part of the source's value of the site, float64 [P].

    A value x is features and error term: x = sum_i f_i W_dec_i + error. Features and error term are patched at the
    positions that the dictionary reads in the base run, as everywhere here; sites at all positions.

    Args:
      base, source: runs of the prompts and of others of as many tokens, row by row.
      parts: "site", "features", "error", or "both": features and error term together.

    Raises:
      UserError: a logit difference is not finite.
    """

    def patched(own: CleanRun, other: CleanRun, some: slice) -> jax.Array:
        sides = split.placed(own.rows(some)), split.placed(other.rows(some))
        return run_parts(split.point, parts, split.params, split.dictionary, *sides)

    return patched_differences(split, base, source, patched)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_parts(
    point: SplitPoint,
    parts: str,
    params: decoder.Params,
    dictionary: Dictionary,
    own: SiteRows,
    other: SiteRows,
) -> jax.Array:
    """The program of ``patch_parts``."""
    value_BxTxD, patched_BxTxD = own.value_BxTxD, other.value_BxTxD
    if parts != "site":
        change_BxTxD = other.value_BxTxD - value_BxTxD
        if parts != "both":
            f_BxTxF, other_BxTxF = (active_features(dictionary, one.read_BxTxD, one.domain_BxT) for one in (own, other))
            W_dec_FxD = dictionary.W_dec_FxD[...]
            featured_BxTxD = matmul(other_BxTxF - f_BxTxF, W_dec_FxD).astype(value_BxTxD.dtype)
            change_BxTxD = featured_BxTxD if parts == "features" else change_BxTxD - featured_BxTxD
        patched_BxTxD = value_BxTxD + jnp.where(own.domain_BxT[..., None], change_BxTxD, jnp.zeros_like(change_BxTxD))
    x_BxTxD = point.run_suffix(params, own.stream_BxTxD, patched_BxTxD)
    diff_B = point.logit_difference(params, x_BxTxD, own.last_B, own.answers_Bx2)
    return jax.lax.with_sharding_constraint(diff_B, sharding(point.mesh))
