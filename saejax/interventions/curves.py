"""Dose-effect curves of the edits of a table, and comparisons at equal dose."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from saejax.errors import UserError
from saejax.interventions.answers import RESAMPLED
from saejax.interventions.table import TESTED, TEXT, EditDefinition, EffectsTable, PromptDefinition
from saejax.results import Interval
from saejax.statistics import bootstrap
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


@dataclasses.dataclass(frozen=True)
class MeasuredBehaviour:
    """Measurements of the top features of one behaviour."""

    behaviour: str  #: its name
    prompts: Sequence[PromptDefinition]  #: its P test prompts
    objective: str  #: the readout whose drop is the effect
    top: EffectCurve  #: the curve of the top features
    weight_RxP: np.ndarray  #: weight of each prompt in each bootstrap sample of a mean; see ``resampling_weights``

    @classmethod
    def read(
        cls, table: EffectsTable, behaviour: str, dictionary: str, resamples: int, seed: int
    ) -> "MeasuredBehaviour":
        """Read the top features of a behaviour, check its control sets, and draw bootstrap samples by ``seed``.

        Raises:
          UserError: there are fewer than 2 test prompts, or see ``check_controls`` and ``read_curves``.
        """
        prompts = table.select_prompts(behaviour)
        if len(prompts) < 2:
            raise UserError(
                f"{behaviour} has {len(prompts)} test prompts: expected at least 2; raise --task.test_prompts"
            )
        strata = [prompt.template for prompt in prompts]
        weight_RxP = bootstrap.resampling_weights(strata, resamples, seed)
        check_controls(table, behaviour, dictionary)
        (top,) = read_curves(table, behaviour, "top", dictionary, prompts)
        return cls(behaviour, prompts, table.objective(behaviour), top, weight_RxP)

    @property
    def k(self) -> int:
        """The number of top features."""
        return len(self.top.edits[-1].features)

    @property
    def templates(self) -> list[str]:
        """The template of each prompt."""
        return [prompt.template for prompt in self.prompts]

    def interval(self, value_P: np.ndarray) -> tuple[Interval, np.ndarray]:
        """Return the mean of a number per prompt with its interval, and its bootstrap samples."""
        sample_R = self.weight_RxP @ value_P
        return Interval(float(value_P.mean()), *bootstrap.percentile_interval(sample_R)), sample_R


def ablation_readouts(table: EffectsTable, measured: MeasuredBehaviour) -> list[str]:
    """Return the readouts of question 1 (``answers.ABLATION_READOUTS``), the objective first."""
    if measured.objective == "logit_diff":
        return ["logit_diff", "log_prob", "two_way", "top1"]
    resampled = table.select_edits(measured.behaviour, "resample", measured.top.edits[-1].dictionary)
    readouts = ["answer_log_prob", "accuracy"]
    return readouts + [name + RESAMPLED for name in readouts if resampled]


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


def mean_drops_at_equal_dose(
    tested: Sequence[EffectCurve], controls: Sequence[EffectCurve]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean drops of R sets and of N control sets, ``[R, N]`` each, a pair at the smaller of its doses."""
    dose_RxN = np.minimum.outer([curve.reach for curve in tested], [curve.reach for curve in controls])
    pairs = zip(tested, dose_RxN, strict=True), zip(controls, dose_RxN.T, strict=True)
    tested_RxN, control_NxR = (np.stack([curve.drop_at(doses).mean(axis=1) for curve, doses in some]) for some in pairs)
    return tested_RxN, control_NxR.T


def begins_answer(token: str, answers: Iterable[str]) -> bool:
    """Return whether a token is the beginning of an answer, whatever the case and the spaces around it.

    Tokenizers of SentencePiece decode a word's first token without the space that the answer begins with.
    """
    word = token.strip().casefold()
    return any(answer.strip().casefold().startswith(word) for answer in answers)


def check_controls(table: EffectsTable, behaviour: str, dictionary: str) -> None:
    """Check that the control sets of a behaviour and a dictionary are what the rule says they are.

    Raises:
      UserError: a random set shares a feature with the tested set or another random set, or has another size; or a
        token of a placebo target is (the beginning of) an answer.
    """
    advice = "its figures are no controls; run the stage again"
    tested = table.select_edits(behaviour, "top", dictionary)[-1].features
    used = dict.fromkeys(tested, "the top features")
    full = {edit.index: edit.features for edit in table.select_edits(behaviour, "random", dictionary)}
    for index, features in full.items():
        shared = next((feature for feature in features if feature in used), None)
        if shared is not None:
            raise UserError(f"random set {index} of {behaviour} shares feature {shared} with {used[shared]}: {advice}")
        if len(set(features)) != len(tested):
            raise UserError(
                f"random set {index} of {behaviour} has {len(features)} features, not {len(tested)}: {advice}"
            )
        # Sets that share features have similar effects: several of them would count as controls and be one.
        used |= dict.fromkeys(features, f"random set {index}")
    prompts = [prompt for prompt in table.prompts if prompt.behaviour == behaviour]
    answers = {answer for prompt in prompts for answer in (prompt.correct, prompt.wrong) if answer.strip()}
    for edit in table.select_edits(behaviour, "placebo", dictionary):
        for token in edit.target or ():
            if begins_answer(token, answers):
                raise UserError(f"placebo target {edit.index} of {behaviour} is an answer ({token!r}): {advice}")
