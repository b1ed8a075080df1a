"""Dose-effect curves of the edits of a table, and comparisons at equal dose."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from saejax.errors import UserError
from saejax.interventions.table import TESTED, TEXT, EditDefinition, EffectsTable, PromptDefinition
from saejax.statistics.curves import interpolation_weights


@dataclasses.dataclass(frozen=True)
class EffectCurve:
    """The effect of one set of features, ablated by growing fractions."""

    #: the A - 1 measured edits, by fraction; before them stands no edit, with dose and effect 0.
    edits: tuple[EditDefinition, ...]
    dose_A: np.ndarray  #: dose of each, beginning at 0
    drop_AxP: np.ndarray  #: by how much each lowers the objective (``EffectsTable.objective``) of each prompt

    @property
    def reach(self) -> float:
        """The largest measured dose."""
        return float(self.dose_A.max())

    def drop_at(self, doses: np.ndarray | float) -> np.ndarray:
        """Return the drop of each prompt at M doses, ``[M, P]``; NaN beyond the reach."""
        return interpolation_weights(self.dose_A, np.atleast_1d(doses)) @ self.drop_AxP


def read_curves(
    table: EffectsTable,
    behaviour: str,
    group: str,
    dictionary: str = TESTED,
    prompts: Sequence[PromptDefinition] | None = None,
    dose: str = "norm",
) -> list[EffectCurve]:
    """Return the curve of every set of a group.

    Args:
      table: effects table of the run.
      behaviour: the behaviour whose edits are read, on its own prompts.
      group: such as ``random``; see ``saejax.interventions.table.GROUPS``.
      dictionary: the dictionary of the features.
      prompts: P test prompts; all by default.
      dose: ``norm``, or ``kl`` for the mean KL divergence on held-out documents.

    Returns:
      The curves by index; with ``kl`` only of the edits that were measured on documents.

    Raises:
      UserError: an edit was not measured on some of the prompts.
    """
    prompts = table.select_prompts(behaviour) if prompts is None else prompts
    edits = table.select_edits(behaviour, group, dictionary)
    documents = table.select_prompts(TEXT)
    if not edits or not prompts or (dose == "kl" and not documents):
        return []
    objective = table.objective(behaviour)
    drop_ExP = table.drops(edits, prompts, objective)
    norm_ExP = table.values(edits, prompts, "change_norm")
    if not np.isfinite(drop_ExP + norm_ExP).all():
        first = edits[int(np.argmin(np.isfinite(drop_ExP + norm_ExP).all(axis=1)))]
        raise UserError(f"edit {first.id} of {behaviour} was not measured on all its test prompts: run the stage again")
    if dose == "norm":
        # Root mean square: this is the norm of the changes of all prompts together, but for their number.
        dose_E = np.sqrt(np.mean(np.square(norm_ExP), axis=1))
    else:
        dose_E = table.values(edits, documents, "kl").mean(axis=1)
    curves = []
    for index in dict.fromkeys(edit.index for edit in edits):
        # Edits of a curve without a dose were not measured on documents.
        place = [e for e, edit in enumerate(edits) if edit.index == index and np.isfinite(dose_E[e])]
        if place:
            # No edit has no effect: the curve needs no measurement there.
            dose_A = np.concatenate([[0.0], dose_E[place]])
            drop_AxP = np.concatenate([np.zeros((1, len(prompts))), drop_ExP[place]])
            curves.append(EffectCurve(tuple(edits[e] for e in place), dose_A, drop_AxP))
    return curves


def compare_at_equal_dose(
    tested: EffectCurve, controls: Sequence[EffectCurve]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the drops of a tested set and of N control sets, each pair at the smaller of its two doses.

    Returns:
      The drops of the tested set and of the controls, both ``[N, P]``, and the doses ``[N]``.
    """
    # The smaller of both doses, as curves are not extrapolated.
    dose_N = np.minimum(tested.reach, np.array([control.reach for control in controls]))
    control_NxP = np.concatenate([control.drop_at(dose_N[n]) for n, control in enumerate(controls)])
    return tested.drop_at(dose_N), control_NxP, dose_N
