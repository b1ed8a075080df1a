"""How well single inputs tell classes apart."""

import numpy as np


def mean_differences(x_NxC: np.ndarray, class_N: np.ndarray) -> np.ndarray:
    """By how much the mean of each input x is larger in each class than in the others, [K, C]; in units of the input.

    Of two classes its size, so that both have the same order. Of more it has its sign: what one class alone raises
    would otherwise seem to tell each of the others, too.
    """
    member_KxN = class_N[None, :] == np.unique(class_N)[:, None]
    weight_KxN = member_KxN / member_KxN.sum(axis=1, keepdims=True)
    others_KxN = ~member_KxN / np.maximum((~member_KxN).sum(axis=1, keepdims=True), 1)
    difference_KxC = (weight_KxN - others_KxN) @ x_NxC
    return np.abs(difference_KxC) if len(difference_KxC) == 2 else difference_KxC


def f_statistics(x_NxC: np.ndarray, class_N: np.ndarray) -> np.ndarray:
    """How well each input x tells each class from the others, [K, C]: its F statistic in an analysis of variance.

    That is the variance between the class and the others over the variance within the two; infinite where nothing
    varies within them, 0 for an input that varies nowhere.
    """
    member_KxN = (class_N[None, :] == np.unique(class_N)[:, None]).astype(float)
    centred_NxC = x_NxC - x_NxC.mean(axis=0)
    total_C, count_Kx1 = (centred_NxC**2).sum(axis=0), member_KxN.sum(axis=1, keepdims=True)
    others_Kx1 = len(class_N) - count_Kx1
    between_KxC = (member_KxN @ centred_NxC) ** 2 * len(class_N) / (count_Kx1 * others_Kx1)
    within_KxC = total_C - between_KxC
    within_KxC[within_KxC < 1e-12 * total_C] = 0.0  # rounding
    certain_KxC = np.where(between_KxC > 0, np.inf, 0.0)
    return np.divide(between_KxC * (len(class_N) - 2), within_KxC, out=certain_KxC, where=within_KxC > 0)
