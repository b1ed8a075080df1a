"""Whether a prompt's graph fits into what is free, and how many tokens would."""

from typing import NamedTuple

import psutil
from jax.sharding import Mesh

from saejax.attribution.trace.memory import GIB, Bytes, GraphSize, graph_bytes
from saejax.errors import UserError
from saejax.parallel.mesh import free_bytes

PHASES = dict(
    layers="the layers and their transcoders",
    rows="the graph's rows",
    heads="finding the heads of its edges",
    checks="running parts of the graph to check it",
)


class Room(NamedTuple):
    """What is free on each device, and on the host; CPU devices have the host's memory together."""

    device: int
    host: int

    def holds(self, need: Bytes, mesh: Mesh) -> bool:
        """Whether a phase fits."""
        if mesh.devices.flat[0].platform == "cpu":
            return need.device * mesh.size + need.host <= self.host
        return need.device <= self.device and need.host <= self.host


def fitting_tokens(size: GraphSize, mesh: Mesh, room: Room) -> int:
    """The most tokens of a prompt whose graph fits, at most as many as the model reads; below 2: none."""
    low, high = 1, size.model.context
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(size, middle, mesh, room) else (low, middle - 1)
    return low


def free_room(mesh: Mesh) -> Room:
    """What is free now."""
    return Room(free_bytes(mesh), psutil.virtual_memory().available)


def fits(size: GraphSize, tokens: int, mesh: Mesh, room: Room | None = None) -> bool:
    """Whether a prompt's graph fits into some room; None: into what is free now."""
    room = room or free_room(mesh)
    return all(room.holds(need, mesh) for need in graph_bytes(size, tokens, mesh).values())


def check_room(size: GraphSize, tokens: int, mesh: Mesh, room: Room | None = None) -> None:
    """Refuses a prompt whose graph does not fit.

    Args:
      room: None: what is free now.

    Raises:
      UserError: it does not; the message says first how many tokens would.
    """
    room = room or free_room(mesh)
    if fits(size, tokens, mesh, room):
        return
    needs = graph_bytes(size, tokens, mesh)
    short = {name: need for name, need in needs.items() if not room.holds(need, mesh)}
    name = max(short, key=lambda name: sum(short[name]))
    most = fitting_tokens(size, mesh, room)
    told = f"about {most:,} tokens fit" if most > 1 else "no prompt fits"
    raise UserError(
        f"{told} into the memory that is free, {_said(room, mesh)}, and the prompt has {tokens:,} tokens, for which "
        f"{PHASES[name]} would take {_said(short[name], mesh)}: shorten it{_advice(size, tokens, name)}"
    )


def _said(amount: Bytes | Room, mesh: Mesh) -> str:
    if mesh.devices.flat[0].platform != "cpu":
        return f"{amount.device / GIB:.1f} GiB a device and {amount.host / GIB:.1f} on the host"
    total = amount.host if isinstance(amount, Room) else amount.device * mesh.size + amount.host
    return f"{total / GIB:.1f} GiB"


def _advice(size: GraphSize, tokens: int, phase: str) -> str:
    if phase == "checks":
        return ", or leave the checks out (--graph.circuits=false --graph.doubled=0)"
    if phase == "heads":
        return ", or leave the heads out (--graph.heads=false)"
    if phase == "rows" and size.traced(tokens):
        return f", or trace fewer features than {size.traced(tokens):,} (max_features)"
    return ""
