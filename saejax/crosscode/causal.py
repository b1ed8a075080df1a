"""Whether features that are one model's own matter there: removed together, beside matched shared ones.

The features of a crosscoder of two models are read in clean passes of both on the same prompts. In the model whose own
they seem to be, what they write is taken off the site,

    x_p' = x_p - sum_j f_j d_jp / s_p,

at all positions that are no attention sinks. The draws are sets of the tested features and of shared ones that fire as
often and as strongly on these prompts; the rule is that of ``causal.claims``.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saejax.causal.claims import Rule, SetEffects, claims, run_draws
from saejax.causal.clustered import Resampling
from saejax.causal.controls import TooFewControls, disjoint_sets, draw_alike
from saejax.causal.patching.heads import answer_difference
from saejax.crosscode.results import CrosscodeBehaviour
from saejax.crosscode.shares import Shares
from saejax.dictionaries import Dictionary
from saejax.dictionaries.joined import is_not_sink, join, unjoin
from saejax.dictionaries.matmul import matmul
from saejax.dictionaries.sparsity import row
from saejax.evaluation.parts import Parts, clean_values
from saejax.interventions.feature_statistics import FeatureStatistics
from saejax.models.edits import Positions, SiteEdit, Values
from saejax.models.language_model import forward
from saejax.models.sites import Site
from saejax.stages.crosscode import CrosscodeConfig
from saejax.tasks.answer_tokens import first_answer_ids
from saejax.tasks.behaviours import Prompt

_difference = jax.jit(answer_difference, static_argnums=0)
_ADVICE = "lower --crosscode.top or --crosscode.matches, raise --task.test_prompts"


class _Read(NamedTuple):
    """Prompts as both models read them.

    Attributes:
      ids_BxT, lengths_B, answers_Bx2: tokens.
      f_BxTxF: the crosscoder's activations, 0 at padding and attention sinks.
    """

    ids_BxT: jax.Array
    lengths_B: jax.Array
    answers_Bx2: jax.Array
    f_BxTxF: jax.Array


def rule_of(config: CrosscodeConfig) -> Rule:
    """The numbers of the rule."""
    return Rule(min_accuracy_drop=config.min_accuracy_drop, resamples=config.resamples, seed=config.seed)


def remove_private(
    dictionary: Dictionary,
    models: Sequence[Parts],
    shares: Shares,
    prompts: Mapping[str, Sequence[Prompt]],
    config: CrosscodeConfig,
) -> tuple[dict[str, CrosscodeBehaviour], dict[str, str]]:
    """What removing each model's own features costs the behaviours, and what could not be tested, and why.

    Args:
      dictionary: a crosscoder with one part of each of two models.
      models: its parts.
      shares: which features are whose own.
      prompts: of each behaviour, of both splits.
    """
    found, left_out = dict[str, CrosscodeBehaviour](), dict[str, str]()
    reads = {
        (name, split): _read(dictionary, models, [prompt for prompt in own if prompt.split == split])
        for name, own in prompts.items()
        for split in ("train", "test")
    }
    for at, part in enumerate(shares.own):
        own = [one.feature for one in shares.measured if one.part == part and one.private]
        if not own:
            left_out[part] = "it has no private features"
            continue
        tested: dict[str, tuple[list[int], SetEffects, float | None]] = {}
        for name in prompts:
            key = f"{part}: {name}"
            test = [prompt for prompt in prompts[name] if prompt.split == "test"]
            chosen = _strongest(reads[name, "train"], own, config.top)
            statistics = _statistics(reads[name, "test"])
            chosen = statistics.firing(chosen)
            if not chosen:
                left_out[key] = "none of its private features fires on the prompts"
                continue
            try:
                effects = _effects(
                    dictionary, models, at, reads[name, "test"], test, chosen, shares, statistics, config
                )
            except TooFewControls as error:
                left_out[key] = f"{error.fact}, of those that are shared"
                continue
            tested[key] = chosen, effects, _elsewhere(dictionary, models, 1 - at, reads[name, "test"], chosen)
        judged = claims({key: effects for key, (_, effects, _) in tested.items()}, rule_of(config))
        for key, (chosen, effects, other) in tested.items():
            over = Resampling.of(effects.template_P, config.resamples, config.seed)
            found[key] = CrosscodeBehaviour(
                part,
                tuple(chosen),
                drop=over.mean(effects.drop_P),
                matched_drop=float(effects.draw_drop_NxP.mean()),
                other_drop=other,
                claim=judged[key],
            )
    return found, left_out


def _read(dictionary: Dictionary, models: Sequence[Parts], prompts: Sequence[Prompt]) -> _Read:
    lm = models[0].lm
    tokens = lm.tokenize([prompt.text for prompt in prompts])
    for each in models:
        tokens.check(each.lm.config.vocab, each.lm.config.context)
    ids_BxT, lengths_B = jnp.asarray(tokens.ids_BxT), jnp.asarray(tokens.lengths_B)
    x_BxTxD = join(dictionary.config, clean_values(models, ids_BxT, lengths_B))
    counts_BxT = is_not_sink(dictionary.config, x_BxTxD) & (jnp.arange(ids_BxT.shape[1])[None] < lengths_B[:, None])
    f_BxTxF = jnp.where(counts_BxT[..., None], dictionary.encode(x_BxTxD), 0.0)
    return _Read(ids_BxT, lengths_B, jnp.asarray(first_answer_ids(lm.tokenizer, prompts)), f_BxTxF)


def _strongest(read: _Read, features: Sequence[int], count: int) -> list[int]:
    """Those of some features whose activations on prompts add up to most."""
    total_N = np.asarray(read.f_BxTxF[..., np.asarray(features)], np.float64).sum((0, 1))
    return [features[place] for place in np.argsort(-total_N, kind="stable")[:count]]


def _statistics(read: _Read) -> FeatureStatistics:
    """How often and how strongly features fire, and where, from each prompt's last token."""
    f_BxTxF = np.asarray(read.f_BxTxF)
    from_end_BxT = np.asarray(read.lengths_B)[:, None] - np.arange(f_BxTxF.shape[1])[None]
    fires_BxTxF = f_BxTxF > 0
    place_F = (fires_BxTxF * np.maximum(from_end_BxT, 0)[..., None]).sum((0, 1)).astype(np.float64)
    positions = int(np.asarray(read.lengths_B).sum())
    sums = fires_BxTxF.sum((0, 1)), f_BxTxF.sum((0, 1), dtype=np.float64)
    return FeatureStatistics(positions, *sums, place_F=place_F)


def _effects(
    dictionary: Dictionary,
    models: Sequence[Parts],
    at: int,
    read: _Read,
    prompts: Sequence[Prompt],
    chosen: Sequence[int],
    shares: Shares,
    statistics: FeatureStatistics,
    config: CrosscodeConfig,
) -> SetEffects:
    """What removing the chosen features costs, and the draws, no more of them than can change a no."""
    pool_F = shares.shared_F.copy()
    pool_F[list(chosen)] = True
    among = FeatureStatistics(
        statistics.positions,
        np.where(pool_F, statistics.fires_F, 0),
        statistics.sum_F,
        shares.norm_PxF[at],
        statistics.place_F,
    )
    draws_NxK = draw_alike(among, chosen, config.draws, config.matches, [config.seed, at], _ADVICE)
    disjoint = disjoint_sets(among, chosen, config.matches)
    measure = functools.partial(_without, dictionary, models[at], read)
    template_P = np.asarray([prompt.template for prompt in prompts])
    clean_P, joint_P = measure(()), measure(chosen)
    _, effects = run_draws(
        lambda block: np.stack([measure(one) for one in draws_NxK[block].tolist()]),
        lambda found_NxP: SetEffects.of(clean_P, joint_P, found_NxP, template_P, disjoint),
        config.draws,
        rule_of(config),
    )
    return effects


def _elsewhere(dictionary: Dictionary, models: Sequence[Parts], at: int, read: _Read, chosen: Sequence[int]) -> float:
    """What removing the same features' rows from the other model's part costs there."""
    measure = functools.partial(_without, dictionary, models[at], read)
    return float((measure(()) - measure(chosen)).mean())


def _without(dictionary: Dictionary, parts: Parts, read: _Read, features: Sequence[int]) -> np.ndarray:
    """Logit differences [P] in a model with what some features write there removed; none: as it is."""
    name, site = next(iter(parts.sites.items()))
    mask_F = np.zeros(dictionary.config.n_features, np.float32)
    mask_F[list(features)] = 1.0
    change_BxTxD = _change(dictionary, read.f_BxTxF, mask_F)
    delta_BxTxD = unjoin(dictionary.config, change_BxTxD)[name]
    edit = SiteEdit(jnp.float32(1), Values(-delta_BxTxD, True), Positions.parse("all"), site)
    lm = parts.lm
    last = (Site("resid_post", lm.config.n_layers - 1),)
    _, (stream_BxTxD,) = forward(lm.config, last, False, lm.params, read.ids_BxT, read.lengths_B, (edit,))
    diff_B = _difference(lm.config, lm.params, stream_BxTxD, read.lengths_B - 1, read.answers_Bx2)
    return np.asarray(diff_B, np.float64)


@jax.jit
def _change(dictionary: Dictionary, f_BxTxF: jax.Array, mask_F: jax.Array) -> jax.Array:
    """What the masked features write, [B, T, D]."""
    return matmul(f_BxTxF * row(mask_F, f_BxTxF.ndim), dictionary.W_dec_FxD[...])
