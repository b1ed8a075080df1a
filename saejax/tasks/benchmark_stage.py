"""The stage ``benchmark``: scores the model on one benchmark, item by item.

A batch of items is an item of ``Run.each``: its rows are kept as soon as they are there, and put together at the end.
"""

import functools
import shutil
from pathlib import Path

from saejax.errors import Interrupted
from saejax.files import read_lines, write_lines
from saejax.results import from_json, to_json
from saejax.runner.workspace import Run
from saejax.settings import TaskConfig
from saejax.tasks import benchmark_scores
from saejax.tasks.benchmark_definitions import way
from saejax.tasks.benchmarks import origin, read_items
from saejax.tasks.results import BenchmarkResults
from saejax.tasks.run_inputs import load_run_model
from saejax.tasks.scored_items import WAYS

FILE, BATCHES = "items.jsonl", "batches"
_ITEMS = 64  # scored by log-likelihood between two writings


def run_benchmark(run: Run) -> BenchmarkResults:
    """Score the model on the benchmark named ``run.name``; write ``items.jsonl``, a line per item.

    Raises:
      UserError: the items or the model cannot be read, an item is longer than the model's context, or a setting does
        not fit.
      Interrupted: asked to stop; finished items are kept.
    """
    name, task = run.name, run.configs[TaskConfig]
    items = read_items(name, task)
    scored = way(name, task)
    # Generation takes long, so each of its batches is kept; log-likelihoods are grouped by length over more items.
    step = task.batch if scored == "generate" else _ITEMS
    starts = range(0, len(items), step)
    (run.folder / BATCHES).mkdir(exist_ok=True)

    def file(first: int) -> Path:
        # With the step in its name, as batches of another size hold other items.
        return run.folder / BATCHES / f"{step}-{first}.jsonl"

    def done() -> str:
        return f"{sum(len(items[first : first + step]) for first in starts if file(first).exists())} of {len(items)}"

    # Loaded when a batch is left to do: a run that is continued at its end needs no model.
    lm = functools.cache(lambda: load_run_model(run))

    def score(first: int) -> None:
        if run.stopping():
            raise Interrupted(f"{name}: stopped after {done()} items, which are kept")
        rows = benchmark_scores.score_items(lm(), name, items[first : first + step], task)
        write_lines(file(first), map(to_json, rows))
        if run.share.leads:
            run.say(f"{done()} items")

    if any(file(first).exists() for first in starts):
        run.say(f"{done()} items were done before")
    run.each(starts, file, score)
    rows = [from_json(WAYS[scored], row, file(first)) for first in starts for row in read_lines(file(first))]
    write_lines(run.folder / FILE, map(to_json, rows))
    results = benchmark_scores.summarize(name, rows, task, str(origin(name, task)))
    run.say(benchmark_scores.line(results))
    shutil.rmtree(run.folder / BATCHES)
    return results
