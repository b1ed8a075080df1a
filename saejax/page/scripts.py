"""The frame of interactive pages: one self-contained HTML file, and scripts for elements, tokens and numbers."""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from saejax.unicode import replace_surrogates

ELEMENTS = "elements.js"
_VIEWER = Path(__file__).parent / "viewer"


def elements_script() -> str:
    """Functions of JavaScript: make, visible, number, percent, token, and the functions of ``visible_script``."""
    return visible_script() + (_VIEWER / ELEMENTS).read_text(encoding="utf-8")


def visible_script() -> str:
    """Functions of JavaScript: visibleText, visibleToken, visibleInLine."""
    return (_VIEWER / "visible.js").read_text(encoding="utf-8")


def interactive(viewer: Path, name: str, scripts: Sequence[str], data: Any, style: str = "", **shown: Any) -> str:
    """Return a page into which its style, script and data are written, so that it loads nothing.

    Args:
      viewer: the folder of its template and style, ``NAME.html.jinja`` and ``NAME.css``.
      name: of these two.
      scripts: JavaScript, put together in this order in one scope.
      data: what the scripts read, as JSON.
      style: more of it, before the page's own.
      shown: what else the template shows.
    """
    script = "(() => {\n'use strict';\n" + "\n".join(scripts) + "})();\n"
    own_style, template = ((viewer / f"{name}.{end}").read_text("utf-8") for end in ("css", "html.jinja"))
    style += own_style
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.from_string(template).render(
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data=embedded(data),
        **shown,
    )
    return replace_surrogates(page)  # in the prompts of other programs' graphs


def embedded(data: Any) -> str:
    """JSON that may stand inside a ``<script>`` element: nothing in it can end the element or open a comment.

    The two line separators are legal in JSON but were line ends in JavaScript for long, so they are escaped, too.
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return replace_surrogates(text)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
