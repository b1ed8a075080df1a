"""Layout of the boxes in a graph's figure.

A box is as large as its text. The boxes of one layer and position form a cell, some to a line; columns of cells stand
as close together as each row allows, so a position at which little happens takes little room. Labels are wrapped and
cells are spread in the way that fits a page best. Lengths are inches, from the lower left corner.
"""

import dataclasses
import functools
import itertools
import re
import textwrap
import unicodedata
from collections.abc import Mapping

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from saejax.attribution.forms.document import DocumentNode, GraphDocument

SIZE = 6.5  # points, of all text
GAP, GUTTER = 0.05, 0.32  # between boxes; for the names of layers
_PAD, _ROW_GAP, _PAGE = 0.045, 0.3, (7.2, 10.0)
_LABELS = ((16, 2), (12, 3), (9, 4))  # letters in a line, and lines of a label; longer labels are cut
_SPREADS = (1.0, 1.6, 0.0)  # boxes to a line, as a multiple of the root of the number in the cell
_KINDS = {"embedding": "token", "logit": "output", "mlp reconstruction error": "error"}
_DIFFERENCE = re.compile(r"""(['"])(.*)\1 - (['"])(.*)\3""", re.DOTALL)  # of logits, as ``targets`` names it
Row = tuple[str, float, float]  # name, middle, upper edge


@dataclasses.dataclass
class Box:
    """A node: what it is, its text, its size, and where its middle is."""

    kind: str  # "token", "output", "error" or "feature"
    layer: int  # -1: tokens
    position: int
    text: str
    width: float
    height: float
    x: float = 0.0
    y: float = 0.0
    upright: bool = False


def fitted(nodes: list[DocumentNode], document: GraphDocument) -> tuple[dict[str, Box], list[Row], tuple[float, float]]:
    """Return the boxes of nodes by their ids, the rows, and the figure's width and height."""
    best: tuple = (float("inf"),)
    for spread, (letters, lines) in itertools.product(_SPREADS, _LABELS):
        boxes = {node["node_id"]: _box(node, document, letters, lines) for node in nodes}
        rows, size = _place(list(boxes.values()), spread)
        excess = max(size[0] / _PAGE[0], size[1] / _PAGE[1], 1.0)
        if excess < best[0]:
            best = excess, boxes, rows, size
    return best[1:]


def visible_token(text: str) -> str:
    """Return a token with visible signs for spaces, line ends and invisible characters."""
    sign_of = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"}
    invisible = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")
    signs = (sign_of.get(c) or (f"\\u{ord(c):04x}" if unicodedata.category(c) in invisible else c) for c in text)
    return "".join(signs) or "∅"


def _output_text(node: DocumentNode) -> str:
    """Return an output's token and its probability, or the two tokens of a difference of logits."""
    quoted = node["clerp"].removeprefix('Output "').rsplit('" (p=', 1)[0]
    if pair := _DIFFERENCE.fullmatch(quoted):
        return f"{visible_token(pair[2])} − {visible_token(pair[4])}"
    chance = node.get("token_prob") or 0.0
    return f"{visible_token(quoted)}\n{'<1' if 0 < chance < 0.01 else f'{100 * chance:.0f}'} %"


@functools.lru_cache(10_000)
def text_width(text: str) -> float:
    """Return the width of one line in inches."""
    plain = text.replace("$", "\\$")  # a single dollar sign is none to TextPath
    return TextPath((0, 0), plain, size=SIZE, prop=FontProperties(family="DejaVu Sans")).get_extents().width / 72


def _box(node: DocumentNode, document: GraphDocument, letters: int, most: int) -> Box:
    kind, parts = _KINDS.get(node["feature_type"], "feature"), node["node_id"].split("_")
    if kind == "token":
        token = visible_token(document["metadata"]["prompt_tokens"][node["ctx_idx"]])
        text = token if len(token) <= 16 else f"{token[:15]}…"
    elif kind == "output":
        text = _output_text(node)
    elif kind == "error":
        text = "error"
    else:
        label = node["clerp"] or f"#{parts[1]}"
        wrapped = textwrap.wrap(label, letters) or [label]
        text = "\n".join(wrapped[:most]) + ("…" if len(wrapped) > most else "")
    lines = text.split("\n")
    width = max(text_width(line) for line in lines) + 2 * _PAD
    layer = -1 if kind == "token" else int(node["layer"])
    return Box(kind, layer, node["ctx_idx"], text, max(width, 0.2), len(lines) * SIZE * 1.25 / 72 + 1.2 * _PAD)


Cell = list[list[Box]]  # the boxes of one layer and position, line by line


def _wide(line: list[Box]) -> float:
    return sum(box.width + GAP for box in line) - GAP


def _tall(cell: Cell) -> float:
    return sum(max(box.height for box in line) + GAP for line in cell) - GAP


def _place(boxes: list[Box], spread: float) -> tuple[list[Row], tuple[float, float]]:
    """Place each box, and return the rows of the layers and the figure's width and height."""
    boxes_at: dict[tuple[int, int], list[Box]] = {}
    for box in boxes:
        if box.kind != "output":
            boxes_at.setdefault((box.layer, box.position), []).append(box)
    cells: dict[tuple[int, int], Cell] = {}
    for key, members in boxes_at.items():
        most = max(1, round(spread * len(members) ** 0.5))
        cells[key] = [members[k : k + most] for k in range(0, len(members), most)]
    width = _place_columns(cells)
    if width > _PAGE[0]:  # tokens upright take the least room
        for box in boxes:
            if box.kind == "token":
                box.width, box.height, box.upright = box.height, box.width, True
        width = _place_columns(cells)
    width = max(width, 3.4)
    layers = sorted({layer for layer, _ in cells})
    gap, y, rows = min(_ROW_GAP, max(0.1, 3.0 / len(layers))) if layers else 0.0, 0.24, []
    for layer in layers:
        layer_cells = [cell for (row, _), cell in cells.items() if row == layer]
        tall = max(_tall(cell) for cell in layer_cells)
        for cell in layer_cells:
            _place_cell(cell, y + (tall if layer < 0 else (tall + _tall(cell)) / 2))
        y += tall + gap
        rows.append(("E" if layer < 0 else str(layer), y - gap - tall / 2, y - gap / 2))
    top = _place_outputs([box for box in boxes if box.kind == "output"], width, y)
    return [*rows, ("out", (y + top - GAP) / 2, -1.0)], (width, top + 0.02)


def _place_columns(cells: Mapping[tuple[int, int], Cell]) -> float:
    """Place columns as close together as the cells of each row allow; return the width that all take."""
    right: dict[int, float] = {}  # of the last cell in each row so far
    middle = GUTTER
    for column in sorted({column for _, column in cells}):
        here = {layer: max(map(_wide, cell)) for (layer, c), cell in cells.items() if c == column}
        starts = (right.get(layer, GUTTER) + GAP + wide / 2 for layer, wide in here.items())
        middle = max(middle + 2 * GAP, *starts)
        for layer, wide in here.items():
            right[layer] = middle + wide / 2 + GAP
            for line in cells[layer, column]:
                x = middle - _wide(line) / 2
                for box in line:
                    box.x = x + box.width / 2
                    x += box.width + GAP
    return max(right.values(), default=0.0) + GAP


def _place_cell(cell: Cell, top: float) -> None:
    for line in cell:
        tall = max(box.height for box in line)
        for box in line:
            box.y = top - (box.height if box.upright else tall) / 2
        top -= tall + GAP


def _place_outputs(outputs: list[Box], width: float, y: float) -> float:
    """Place outputs side by side, the last one at the right edge, in as many lines as needed; return where they end."""
    lines: Cell = [[]]
    for box in outputs:
        if lines[-1] and _wide([*lines[-1], box]) > width - GUTTER - 2 * GAP:
            lines.append([])
        lines[-1].append(box)
    for line in lines:
        right = width - GAP
        for box in reversed(line):
            box.x, box.y = right - box.width / 2, y + box.height / 2
            right -= box.width + GAP
        y += max((box.height for box in line), default=0.0) + GAP
    return y
