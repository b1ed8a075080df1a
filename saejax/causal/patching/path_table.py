"""The senders of a receiver (``paths``), judged: every one is patched exactly on test pairs, beside what chance gives.

P-values are those of sign flips over pairs, adjusted for all senders of the receiver by maxT (``statistics.max_t_p``).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from saejax.causal.claims import LEVEL
from saejax.causal.clustered import Resampling
from saejax.causal.patching.paths import MLP, Receiver, path_effects, senders_of
from saejax.causal.patching.results import PathReceiver, SenderEffect
from saejax.causal.statistics import max_t_p
from saejax.interventions.columns import Columns
from saejax.models.language_model import LanguageModel
from saejax.results import Interval
from saejax.runner.parts import OnProgress
from saejax.tasks.behaviours import Prompt
from saejax.tasks.scoring import interval_ends

STRONGEST = 10  # senders of a receiver that are kept in its results
_FLIPS = 10_000


@dataclasses.dataclass(frozen=True)
class PathTable(Columns):
    """Every sender of every receiver; arrays [N].

    Attributes:
      receiver: query, key, value or logits.
      receiver_layer, receiver_head, position: of it; of the logits the number of layers, 0, and -1.
      layer, head: of the sender; -1 for an MLP.
      effect, low, high: by how much the logit difference falls, and its 95 % bootstrap interval.
      p_max_t: sign flips over pairs, adjusted for all senders of the receiver.
    """

    kind = "paths"

    receiver: np.ndarray
    receiver_layer: np.ndarray
    receiver_head: np.ndarray
    position: np.ndarray
    layer: np.ndarray
    head: np.ndarray
    effect: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p_max_t: np.ndarray


def judge_paths(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    receivers: Sequence[tuple[Receiver, Interval]],
    resampling: Resampling,
    batch_rows: int,
    on_progress: OnProgress,
) -> tuple[tuple[PathReceiver, ...], PathTable]:
    """The senders of each receiver, the strongest ones of each, and all of them as a table.

    Args:
      model, prompts, batch_rows, on_progress: as for ``path_effects``.
      receivers: each with the effect of patching it whole.
    """
    found: list[PathReceiver] = []
    parts: dict[str, list[np.ndarray]] = {field.name: [] for field in dataclasses.fields(PathTable)}
    for receiver, total in receivers:
        senders_Nx2 = senders_of(model.config, receiver)
        effect_NxP = path_effects(model, prompts, receiver, batch_rows, on_progress)
        has_P = ~np.isnan(effect_NxP[0])
        effect_NxQ, own = effect_NxP[:, has_P], resampling.among(has_P)
        mean_N, p_N = effect_NxQ.mean(axis=1), max_t_p(effect_NxQ, _FLIPS, resampling.seed)
        low_N, high_N = interval_ends(effect_NxQ, own.share_RxP)
        values = (receiver.node, receiver.layer, receiver.head, receiver.position)
        columns = [np.full(len(mean_N), value, object if isinstance(value, str) else int) for value in values]
        for name, values_N in zip(parts, (*columns, *senders_Nx2.T, mean_N, low_N, high_N, p_N), strict=True):
            parts[name].append(values_N)
        strongest = np.argsort(-np.abs(mean_N), kind="stable")[:STRONGEST]
        found.append(
            PathReceiver(
                *values,
                total=total,
                senders=len(mean_N),
                sure=int((p_N <= LEVEL).sum()),
                strongest=tuple(
                    SenderEffect(
                        layer=int(senders_Nx2[n, 0]),
                        head=None if senders_Nx2[n, 1] == MLP else int(senders_Nx2[n, 1]),
                        effect=Interval(float(mean_N[n]), float(low_N[n]), float(high_N[n])),
                        p_max_t=float(p_N[n]),
                    )
                    for n in strongest
                ),
            )
        )
    return tuple(found), PathTable(**{name: np.concatenate(values) for name, values in parts.items()})
