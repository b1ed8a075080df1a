"""Collectives and products of a compiled program, from the compiler's text: what devices send, and compute.

A ring over n devices makes each send (n - 1) / n of what is gathered, scattered or exchanged, and twice that of what is
reduced for all. An operation in a loop counts as often as the loop runs.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

# One line of the text: its name, the shapes of its results, the operation, and what is said of it.
_LINE = re.compile(r"^\s*(?P<root>ROOT )?%?(?P<name>\S+) = (?P<shapes>\(.*?\)|\S+) (?P<kind>[a-z-]+)\((?P<rest>.*)$")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_BODY = re.compile(r"body=%?([\w.-]+)")
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_BELOW = re.compile(r"^[^%]*%?[\w.-]+,[^%]*?%?([\w.-]+)\),.*direction=LT")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
_SHAPE = re.compile(r"([a-z]\w*?)(\d*)\[([\d,]*)\]")
_LISTED = re.compile(r"replica_groups=\{(\{.*?\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXES = re.compile(r"replica_groups=\w*mesh\w*\[([^\]]*)\][^{]*\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{.*?\})\}")
_SCATTER = "all-reduce-scatter"  # the fusion of a TPU's compiler that keeps a part of what it says to reduce
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Line(NamedTuple):
    """An operation of a computation, as the compiler writes it."""

    name: str
    shapes: str
    kind: str
    rest: str
    root: bool  #: whether the computation returns it


def sent_bytes(text: str, devices: int, of_node: int) -> dict[str, int]:
    """Return the bytes that one device sends when a program runs once.

    Args:
      text: of the compiled program, as ``jax.stages.Compiled.as_text`` gives it.
      devices: on which it runs.
      of_node: how many consecutive devices share a node, 1 or more; those of other nodes are farther away.

    Returns:
      By kind of collective, those that stay in a node and, with " between nodes" after the kind, those of which a group
      has devices of several nodes; kinds that there are none of are left out.
    """
    lines, entry = _computations(text)
    sent: dict[str, float] = {}
    for name, times in _runs(lines, entry):
        for _, shapes, kind, rest, _ in lines[name]:
            base = kind.removesuffix("-start")
            if base not in KINDS:
                continue
            groups = _groups(rest, devices)
            size = len(groups[0])
            if size < 2:
                continue
            result = _bytes(shapes, kind)
            if name.startswith(_SCATTER) and base == "all-reduce":
                base, result = "reduce-scatter", result // size
            apart = any(len({device // of_node for device in group}) > 1 for group in groups)
            label = base + (" between nodes" if apart else "")
            sent[label] = sent.get(label, 0.0) + times * _sent(base, result, size)
    return {label: round(count) for label, count in sorted(sent.items())}


def product_flops(text: str, unknown: int = 1) -> float:
    """Return the floating-point operations of one device in the matrix products of a program that runs once.

    Products that the compiler hands to a library of its own, as those of GPUs do, are not found.

    Args:
      text: as for ``sent_bytes``.
      unknown: how often loops run whose length depends on the program's arguments.
    """
    lines, entry = _computations(text)
    total = 0.0
    for name, times in _runs(lines, entry, unknown):
        shapes = {line.name: line.shapes for line in lines[name]}
        for line in lines[name]:
            if line.kind != "dot":
                continue
            left = re.match(r"(?:[^%]*%)?([\w.-]+)", line.rest)
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.rest)
            assert left and contracted, line
            sizes = _sizes(shapes[left[1]])
            summed = math.prod(sizes[int(axis)] for axis in contracted[1].split(",") if axis)
            total += times * 2.0 * math.prod(_sizes(line.shapes)) * summed
    return total


def _sizes(shape: str) -> list[int]:
    (match,) = _SHAPE.findall(shape)
    return [int(n) for n in match[2].split(",") if n]


def _sent(kind: str, result: int, size: int) -> float:
    """Return the bytes that each of ``size`` devices sends around a ring; ``result``: bytes that it has in the end."""
    share = (size - 1) / size
    return {"all-reduce": 2 * share, "reduce-scatter": size - 1.0, "collective-permute": 1.0}.get(kind, share) * result


def _computations(text: str) -> tuple[dict[str, list[Line]], str]:
    """Return the operations of each computation, and the name of the one that is run."""
    lines: dict[str, list[Line]] = {}
    entry = here = ""
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            here = begins["name"]
            lines[here] = []
            entry = here if begins["entry"] else entry
        elif here and (parts := _LINE.match(line)):
            lines[here].append(Line(parts["name"], parts["shapes"], parts["kind"], parts["rest"], bool(parts["root"])))
    return lines, entry


def _runs(lines: Mapping[str, list[Line]], name: str, unknown: int = 1, times: int = 1) -> Iterator[tuple[str, int]]:
    """Yield the computations that run when ``name`` does, and how often, with loops of unknown length as given."""
    yield name, times
    for _, _, kind, rest, _ in lines[name]:
        called = _CALLED.findall(rest)
        for branches in _BRANCHES.findall(rest):
            called += [branch.strip().lstrip("%") for branch in branches.split(",")]
        for callee in called:
            if callee in lines and kind not in KINDS:
                yield from _runs(lines, callee, unknown, times)
        for body in _BODY.findall(rest):
            yield from _runs(lines, body, unknown, times * (_trips(lines, rest) or unknown))


def _trips(lines: Mapping[str, list[Line]], rest: str) -> int:
    """Return how often a loop runs, from the rest of its line; 0 if that is not known.

    A TPU's compiler says it by the loop's condition alone: that a count, which begins with 0, is below a constant.
    """
    if count := _TRIPS.search(rest):
        return int(count[1])
    condition = _CONDITION.search(rest)
    operations = lines.get(condition[1], []) if condition else []
    constants = {line.name: line.rest for line in operations if line.kind == "constant"}
    for line in operations:
        below = _BELOW.match(line.rest) if line.root and line.kind == "compare" else None
        if below and (count := re.match(r"(\d+)\)", constants.get(below[1], ""))):
            return int(count[1])
    return 0


def _bytes(shapes: str, kind: str) -> int:
    """Return the bytes of the results; a collective that is only begun lists its inputs first, unless it reduces."""
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n) * max(1, int(bits or 8) // 8)
        for _, bits, dims in _SHAPE.findall(shapes)
    ]
    if kind in ("all-gather-start", "collective-permute-start"):
        sizes = sizes[len(sizes) // 2 :] if kind.startswith("all") else sizes[1:2]
    return sum(sizes)


def _groups(rest: str, devices: int) -> np.ndarray:
    """Return the devices that work together [groups, size], by their indices in the program."""
    if axes := _AXES.search(rest):
        return _along(axes[1], axes[2], devices)
    if iota := _IOTA.search(rest):
        shape, dims = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        return (ids.transpose([int(n) for n in iota[3].split(",")]) if iota[3] else ids).reshape(shape)
    if listed := _LISTED.search(rest) or _PAIRS.search(rest):
        return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    return np.arange(devices)[None]


def _along(mesh: str, axes: str, devices: int) -> np.ndarray:
    """Return the groups along axes of a mesh such as "'a'=2,'b'=4" and "'b'"; along parts of an axis: all devices."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    along = re.findall(r"'([^']+)'", axes)
    if ":" in axes or not along or math.prod(sizes.values()) != devices:
        return np.arange(devices)[None]
    names = list(sizes)
    ids = np.arange(devices).reshape(list(sizes.values()))
    moved = np.moveaxis(ids, [names.index(name) for name in along], range(-len(along), 0))
    return moved.reshape(-1, math.prod(sizes[name] for name in along))
