"""Timing of alternatives by turns, so that other load on the machine affects all of them equally."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Return the seconds of one call, until its results are computed."""
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
    return {name: float(np.median(values)) for name, values in taken.items()}
