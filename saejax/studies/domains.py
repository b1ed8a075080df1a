"""Transfer to unseen domains: features chosen on one benchmark, ablated on the items of another.

The effect is compared at equal dose with the other benchmark's random sets, but those that hold one of the features.
"""

import dataclasses

from saejax.interventions.curves import read_curves
from saejax.interventions.table import EffectsTable
from saejax.results import Interval
from saejax.statistics.bootstrap import percentile_interval, resampling_weights
from saejax.studies.primitives import rank_among, without

GROUP = "chosen on "  # and the benchmark: the group of such edits


@dataclasses.dataclass(frozen=True)
class DomainEffect:
    """The effect of features that were chosen on another benchmark."""

    effect: Interval  #: drop of the reference's log-likelihood, nats
    random: float | None  #: mean drop under random sets at equal dose; None without any
    p_value: float | None  #: rank among random sets at equal dose, not corrected
    random_sets: int  #: that hold none of the features
    common: int  #: features that were also chosen here


def judge_domains(table: EffectsTable, name: str, resamples: int, seed: int) -> dict[str, DomainEffect]:
    """Return the effects of features that other benchmarks chose, a function of the table alone.

    Args:
      table: effects table of a benchmark.
      name: the benchmark.
      resamples: bootstrap samples of the intervals.
      seed: seed of the bootstrap.
    """
    groups = dict.fromkeys(edit.group for edit in table.edits if edit.group.startswith(GROUP))
    effects, prompts = {}, table.select_prompts(name)
    (top,) = read_curves(table, name, "top")
    random = read_curves(table, name, "random")
    weight_RxP = resampling_weights([prompt.template for prompt in prompts], resamples, seed)
    for group in groups:
        (curve,) = read_curves(table, name, group)
        features, drop_P = curve.edits[-1].features, curve.drop_AxP[-1]
        controls = without(features, random)
        random_mean, p_value = rank_among(curve, controls)
        effects[group.removeprefix(GROUP)] = DomainEffect(
            effect=Interval(float(drop_P.mean()), *percentile_interval(weight_RxP @ drop_P)),
            random=random_mean,
            p_value=p_value,
            random_sets=len(controls),
            common=len({*features} & {*top.edits[-1].features}),
        )
    return effects
