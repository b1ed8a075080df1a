"""Dose-effect curves: values between measured doses, never beyond them."""

import numpy as np


def interpolation_weights(doses: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return weights that interpolate linearly along a measured dose curve.

    The curve is walked from its first point; a dose is where it is reached first. (A dose by KL may fall again as an
    edit grows, and an effect "at this dose" means the smallest edit that has it.)

    Args:
      doses: along the curve, ``[A]``, beginning at 0 for no edit; at least 1.
      at: doses to interpolate at, ``[M]``, at least 0.

    Returns:
      Float64 array ``[M, A]``: ``weights @ values`` are the values at these doses. NaN for doses that the curve does
      not reach: nothing is extrapolated.
    """
    dose_A, at_M = np.asarray(doses, np.float64), np.asarray(at, np.float64)
    reach_A = np.maximum.accumulate(dose_A)
    # A dose that was measured may differ from its own copy in the last bits.
    end_M = np.searchsorted(reach_A, at_M - 1e-9 * reach_A[-1], side="left")
    reached_M = end_M < len(dose_A)
    end_M = np.minimum(end_M, len(dose_A) - 1)
    start_M = np.maximum(end_M - 1, 0)
    step_M = dose_A[end_M] - dose_A[start_M]
    # Only the first point has no step before it: a dose up to there gets all of its weight.
    share_M = np.clip((at_M - dose_A[start_M]) / np.where(step_M > 0, step_M, 1.0), 0.0, 1.0)
    share_M = np.where(step_M > 0, share_M, 1.0)
    row_M, weight_MxA = np.arange(len(at_M)), np.zeros((len(at_M), len(dose_A)))
    weight_MxA[row_M, start_M] += 1.0 - share_M
    weight_MxA[row_M, end_M] += share_M
    weight_MxA[~reached_M] = np.nan
    return weight_MxA
