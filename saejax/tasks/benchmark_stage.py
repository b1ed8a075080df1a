"""The stage ``benchmark``: scores the model on one benchmark, item by item.

It goes on where it was interrupted: the file of rows is written anew, whole, after every batch of items.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saejax.errors import Interrupted
from saejax.models.language_model import load_model
from saejax.parallel import make_mesh
from saejax.tasks import benchmark_scores
from saejax.tasks.benchmarks import Item, origin, read_items, way
from saejax.tasks.results import BenchmarkResults
from saejax.workspace import Run, write_text

FILE = "items.jsonl"
_ITEMS = 64  # scored by log-likelihood between two writings


def run_benchmark(run: Run) -> BenchmarkResults:
    """Scores the model on the benchmark named ``run.name``; writes ``items.jsonl``, a line per item.

    Raises:
      UserError: the items or the model cannot be read, an item is longer than the model's context, or a setting does
        not fit.
      Interrupted: asked to stop; finished items are kept.
    """
    name, task, model_config = run.name, run.configs["task"], run.configs["model"]
    items = read_items(name, task)
    rows = _kept(run.folder / FILE, items)
    if rows:
        run.say(f"{len(rows)} of {len(items)} items were done before")
    mesh = make_mesh(run.configs.get("mesh"))
    lm = load_model(model_config.path, model_config.revision, model_config.dtype, mesh)
    step = task.batch if way(name, task) == "generate" else _ITEMS
    for first in range(len(rows), len(items), step):
        if run.stopping():
            raise Interrupted(f"{name}: stopped after {len(rows)} of {len(items)} items, which are kept")
        rows += benchmark_scores.score_items(lm, name, items[first : first + step], task)
        write_text(run.folder / FILE, "".join(_json(row) for row in rows))
        run.say(f"{len(rows)} of {len(items)} items")
    results = benchmark_scores.summarize(name, rows, task, str(origin(name, task)))
    run.say(benchmark_scores.line(results))
    return results


def _json(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _kept(path: Path, items: Sequence[Item]) -> list[dict[str, Any]]:
    """The rows that an interrupted run of the same settings left, which are the first ones."""
    if not path.exists():
        return []
    # Not splitlines: answers may hold other line separators of Unicode.
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    same = [row["id"] for row in rows] == [item.id for item in items[: len(rows)]]
    return rows if same else []
