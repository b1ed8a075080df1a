"""How much of a behaviour circuits of growing sizes keep: the scores of MIB (Mueller et al., 2025, arXiv 2504.13151).

Let m(C) be the mean logit difference with only the units C kept, m(M) that of the model and m(0) that without any. The
*faithfulness* of a circuit is f(C) = (m(C) - m(0)) / (m(M) - m(0)). Over the share k of units that circuits hold,

    CPR = integral of f dk        from an order by signed attribution: higher is better;
    CMD = integral of |f - 1| dk  from an order by its size: lower is better.
"""

import numpy as np

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def faithfulness(score_xS: np.ndarray) -> np.ndarray:
    """Return f of growing circuits from their mean scores [..., S]; the first holds nothing, the last everything."""
    none, every = score_xS[..., :1], score_xS[..., -1:]
    return (score_xS - none)[..., 1:] / (every - none)


def area(faithfulness_xS: np.ndarray, share_S: np.ndarray, score: str) -> np.ndarray:
    """Return the score "cpr" or "cmd" of faithfulness at each rising share of the units, [...]."""
    height_xS = faithfulness_xS if score == "cpr" else np.abs(faithfulness_xS - 1)
    return np.trapezoid(height_xS, share_S, axis=-1)
