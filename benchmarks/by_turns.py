"""Ways of doing one thing, timed by turns, so that whatever else the machine does meets them alike."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Of one call, until what it returns is there."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def medians(ways: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Return the median of each way over some rounds; a first round, in which programs compile, does not count."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            value = way()
            taken[name] += [value] if turn else []
    return {name: float(np.median(each)) for name, each in taken.items()}
