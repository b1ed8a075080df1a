"""Items of benchmarks: read from the hub or from local files, and chosen by seed."""

import zlib
from collections.abc import Callable, Sequence

import numpy as np

from saejax.errors import Faults, UserError
from saejax.files import fingerprint
from saejax.tasks.benchmark_definitions import Benchmark, Item, definition
from saejax.tasks.benchmark_files import TRAIN, Origin, find, training_files
from saejax.tasks.hub import hub_configurations
from saejax.tasks.settings import TaskConfig


def origin(name: str, task: TaskConfig) -> Origin:
    """Return the source of a benchmark's items.

    Raises:
      UserError: ``--task.path`` names no file or data set, or the hub's data set lacks a configuration.
    """
    benchmark = definition(name)
    if here := _origin_here(name, task):
        return here
    (hub, _, revision), names = (task.path or benchmark.hub).partition("@"), benchmark.configurations
    revision = revision or "main"
    if hub != benchmark.hub:
        available = hub_configurations(hub, revision)
        missing = [wanted for wanted in names if wanted not in available]
        if missing and len(benchmark.parts) > 1:
            raise UserError(
                f"the data set {hub} has no configuration {', '.join(missing)}, only {', '.join(available)}: expected "
                "one for each task of logic"
            )
        # A copy of a benchmark with configurations of other names is read as a whole.
        names = tuple(available) if missing else names
    by_part = {part: (part,) for part in benchmark.parts} if len(benchmark.parts) > 1 else {"": names}
    return Origin(hub=hub, configurations=by_part, revision=revision, split=benchmark.splits[0])


def _origin_here(name: str, task: TaskConfig) -> Origin | None:
    """Return the source of a benchmark whose items are in local files or made from templates; None if on the hub."""
    benchmark = definition(name)
    if not benchmark.hub:
        return Origin(is_generated=True)
    if not task.path:
        return None
    files = find(
        task.path,
        name,
        len(task.benchmarks) > 1,
        benchmark.parts,
        benchmark.configurations,
        benchmark.splits,
        benchmark.training[1],
    )
    return None if files is None else Origin(files=files)


def check_items(
    names: Sequence[str], task: TaskConfig, use: Callable[[str, list[Item]], object] = lambda name, items: None
) -> None:
    """Read the items of benchmarks that are here; what is on the hub is not fetched.

    Args:
      names: of the benchmarks.
      task: which items are asked, and where they are.
      use: what else is done with the items of each, which may refuse them.

    Raises:
      UserError: see ``read_items``; the faults of all benchmarks are named.
    """
    faults = Faults("task", "cannot be asked", "benchmarks")
    for name in names:
        with faults.collect(name):
            if _origin_here(name, task):
                use(name, read_items(name, task))
    faults.refuse()


def identity(name: str, task: TaskConfig) -> str:
    """Return a hash, 16 hexadecimal digits, of the content of local files, or of the hub's id and commit.

    Raises:
      UserError: see ``origin``.
    """
    return fingerprint([name, *origin(name, task).identity()])


def read_items(name: str, task: TaskConfig) -> list[Item]:
    """Return the items to ask: ``task.examples`` of them, in an order drawn from ``task.seed``.

    Raises:
      UserError: a file or the hub cannot be read, a row lacks a column or an answer, or there are too few items.
    """
    benchmark, source = definition(name), origin(name, task)
    items = _parse_rows(benchmark, source)
    wanted = task.examples or benchmark.examples
    if len(items) < wanted:
        reason = "were asked for" if task.examples else f"are asked by default of {name}"
        advice = f"give --task.examples={len(items)} or fewer" if items else "name another file"
        raise UserError(f"{name} has {len(items)} examples in {source}, but {wanted} {reason}: {advice}")
    # By the benchmark's name, so that its items do not depend on which others are asked; ``hash`` differs by process.
    rng = np.random.default_rng((task.seed, zlib.crc32(name.encode())))
    return [items[i] for i in rng.permutation(len(items))[:wanted]]


def _parse_rows(benchmark: Benchmark, source: Origin) -> list[Item]:
    """Return the items of all rows; one message names all rows that hold none."""
    faults, items = Faults(source, "are no questions with answers", "rows"), list[Item]()
    for row in source.rows():
        with faults.collect(row.name):
            items.append(benchmark.parse(row))
    faults.refuse()
    return items


def training_items(name: str, task: TaskConfig) -> list[Item]:
    """Return the items to train on: items of the train split, or of the whole source, that are not asked.

    Raises:
      UserError: see ``read_items``; or all items are asked.
    """
    benchmark, asked_questions = definition(name), {item.question for item in read_items(name, task)}
    source = _training_origin(name, task) or origin(name, task)
    # By text, since copies of a question would be asked about after training on them.
    training = [item for item in _parse_rows(benchmark, source) if item.question not in asked_questions]
    if not training:
        raise UserError(
            f"--corpus.path={name}: all examples in {source} are asked, none is left as text: lower --task.examples, "
            "or give a folder with a train split"
        )
    return training


def training_identity(name: str, task: TaskConfig) -> str:
    """Return a hash, 16 hexadecimal digits, of what ``training_items`` depends on; see ``identity``."""
    source = _training_origin(name, task)
    selection = [task.examples or definition(name).examples, task.seed]
    return fingerprint(
        ["groups by benchmark", identity(name, task), *selection, *(source.identity() if source else [])]
    )


def _training_origin(name: str, task: TaskConfig) -> Origin | None:
    """Return the source of a benchmark's train split; None if it has none."""
    benchmark, test_origin = definition(name), origin(name, task)
    if test_origin.files:
        files = training_files(test_origin.files, benchmark.parts)
        return Origin(files=files) if files else None
    if test_origin.hub != benchmark.hub or not benchmark.training[0]:
        return None
    hub, configurations = benchmark.training
    return Origin(hub=hub, configurations={"": configurations}, revision="main", split=TRAIN[0])
