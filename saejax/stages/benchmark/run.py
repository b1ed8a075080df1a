"""The stage ``benchmark``: the model's answer to every item of a benchmark, and the figures over all items.

A batch of items is an item of ``Run.make_each``: its rows are kept as soon as they are there, and put together at the
end.
"""

import functools
import shutil
from pathlib import Path

from saejax.errors import Interrupted
from saejax.files import read_lines, write_lines
from saejax.results import Interval, from_json, to_json
from saejax.runner.workspace import Run
from saejax.stages.inputs import load_run_model
from saejax.tasks.benchmark_definitions import way
from saejax.tasks.benchmark_scores import score_items, summarize
from saejax.tasks.benchmarks import origin, read_items
from saejax.tasks.results import BenchmarkResults
from saejax.tasks.scored_items import WAYS
from saejax.tasks.settings import TaskConfig
from saejax.wording import counted

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
        rows = score_items(lm(), name, items[first : first + step], task)
        write_lines(file(first), map(to_json, rows))
        if run.share.leads:
            run.say(f"{done()} items")

    if any(file(first).exists() for first in starts):
        run.say(f"{done()} items were done before")
    run.make_each(starts, file, score)
    rows = [from_json(WAYS[scored], row, file(first)) for first in starts for row in read_lines(file(first))]
    write_lines(run.folder / FILE, map(to_json, rows))
    results = summarize(name, rows, task, str(origin(name, task)))
    run.say(line(results))
    shutil.rmtree(run.folder / BATCHES)
    return results


def line(results: BenchmarkResults) -> str:
    """Return the figures in a line of text."""
    n = counted(results.n, "item")
    if results.log_likelihood_per_token and results.token_accuracy:
        nats = results.log_likelihood_per_token
        return (
            f"{n}: log-likelihood per token {nats.mean:.3f} [{nats.low:.3f}, {nats.high:.3f}] nats, token accuracy "
            f"{_percent(results.token_accuracy)}"
        )
    accuracy = ", ".join(f"{rule} {_percent(value)}" for rule, value in (results.accuracy or {}).items())
    if results.chance is not None:
        return f"{n}: accuracy {accuracy}; chance {100 * results.chance:.1f} %"
    unparsed = ", ".join(f"{rule} {count}" for rule, count in (results.unparsed or {}).items())
    return f"{n}: accuracy {accuracy}; no answer found: {unparsed}; cut at the token limit: {results.cut}"


def _percent(value: Interval) -> str:
    return f"{100 * value.mean:.1f} % [{100 * value.low:.1f}, {100 * value.high:.1f}]"
