"""Items of benchmarks: read from the hub or from local files, and chosen by seed."""

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np

from saejax.errors import UserError
from saejax.runner.workspace import fingerprint
from saejax.settings import TaskConfig
from saejax.tasks.benchmark_definitions import Item, definition, way
from saejax.tasks.benchmark_files import TRAIN, Origin, find, training_files
from saejax.tasks.hub import hub_configurations
from saejax.tasks.number_choices import number_choices, plain_number


def origin(name: str, task: TaskConfig) -> Origin:
    """Return where the items of a benchmark come from.

    Raises:
      UserError: ``--task.path`` names no such place, or the hub data set has not what is expected.
    """
    known = definition(name)
    if not known.hub:
        return Origin(made=True)
    if task.path:
        files = find(task.path, name, len(task.benchmarks) > 1, known.parts, known.configurations, known.splits)
        if files is not None:
            return Origin(files=files)
    hub, names = task.path or known.hub, known.configurations
    if hub != known.hub:
        there = hub_configurations(hub, task.revision)
        missing = [wanted for wanted in names if wanted not in there]
        if missing and len(known.parts) > 1:
            raise UserError(
                f"the data set {hub} has no configuration {', '.join(missing)}, only {', '.join(there)}: expected one "
                "for each task of logic"
            )
        names = tuple(there) if missing else names
    by_part = {part: (part,) for part in known.parts} if len(known.parts) > 1 else {"": names}
    return Origin(hub=hub, configurations=by_part, revision=task.revision, split=known.splits[0])


def identity(name: str, task: TaskConfig) -> str:
    """Return a hash, 16 hexadecimal digits, of what is read: local files' content; of the hub, id and commit.

    Raises:
      UserError: see ``origin``.
    """
    return fingerprint([name, *origin(name, task).identity()])


def read_items(name: str, task: TaskConfig) -> list[Item]:
    """Return the items to ask: ``task.examples`` of them, in an order drawn from ``task.seed``.

    Raises:
      UserError: a file or the hub cannot be read, a row lacks a column or an answer, or there are too few items.
    """
    known, source = definition(name), origin(name, task)
    items = [known.parse(row) for row in source.rows()]
    if way(name, task) == "choice":
        items = _with_choices(items)
    wanted = task.examples or known.examples
    if len(items) < wanted:
        asked = "were asked for" if task.examples else f"are asked by default of {name}"
        advice = f"give --task.examples={len(items)} or fewer" if items else "name another file"
        raise UserError(f"{name} has {len(items)} examples in {source}, but {wanted} {asked}: {advice}")
    rng = np.random.default_rng((task.seed, zlib.crc32(name.encode())))
    return [items[i] for i in rng.permutation(len(items))[:wanted]]


def _with_choices(items: Sequence[Item]) -> list[Item]:
    """Return items as multiple choice: those that have no choices get numbers to choose among."""
    bare = [item for item in items if not item.choices]
    right = [plain_number(item.answer, item.id) for item in bare]
    made = {
        item.id: dataclasses.replace(item, answer=answer, solution=answer, choices=choices)
        for item, answer, choices in zip(bare, right, number_choices(right), strict=True)
    }
    return [made.get(item.id, item) for item in items]


def training_items(name: str, task: TaskConfig) -> list[Item]:
    """Return the items that are not asked, to train on: of the train split where there is one, else those left over.

    Raises:
      UserError: see ``read_items``; or all items are asked.
    """
    known, asked = definition(name), {item.question for item in read_items(name, task)}
    source = _training_origin(name, task) or origin(name, task)
    left = [item for item in map(known.parse, source.rows()) if item.question not in asked]
    if not left:
        raise UserError(
            f"--corpus.path={name}: all examples in {source} are asked, none is left as text: lower --task.examples, "
            "or give a folder with a train split"
        )
    return left


def training_identity(name: str, task: TaskConfig) -> str:
    """Return a hash, 16 hexadecimal digits, of what ``training_items`` depends on; see ``identity``."""
    source = _training_origin(name, task)
    asked = [task.examples or definition(name).examples, task.seed]
    return fingerprint([identity(name, task), *asked, *(source.identity() if source else [])])


def _training_origin(name: str, task: TaskConfig) -> Origin | None:
    """Return the train split that goes with a benchmark; None if there is none."""
    known, asked = definition(name), origin(name, task)
    if asked.files:
        files = training_files(asked.files, known.parts)
        return Origin(files=files) if files else None
    if asked.hub != known.hub or not known.training[0]:
        return None
    hub, configurations = known.training
    return Origin(hub=hub, configurations={"": configurations}, revision="main", split=TRAIN[0])
