"""How Sphinx builds the site (`make docs`) from the pages that ``pages.py`` wrote."""

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

project = "saejax"
copyright = "the authors of saejax, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
suppress_warnings = ["ref.python"]  # fields called as a built-in type is, such as bytes, and the type itself
html_theme = "furo"
html_title = "saejax"
myst_heading_anchors = 3
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_use_type_comments = False  # there are none, and looking for them takes a twelfth of the time
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
# The fields of dataclasses are their arguments, and settings are a function's.
napoleon_custom_sections = [("Attributes", "params_style"), ("Settings", "params_style")]
napoleon_use_rtype = False
_SECTION = re.compile(r"\s*(Args|Attributes|Settings|Returns|Raises|Yields|References|Example|Note):\s*$", re.MULTILINE)
_DRAWN = re.compile(r"^ {4}|\S {3,}\S|^====", re.MULTILINE)


def plain(text: str) -> str:
    """Return a paragraph with what reStructuredText would take for marks escaped, outside of ``code``."""
    parts = text.split("``")
    parts[::2] = [re.sub(r"[*|`\\]|_\b|(?<=\w)_(?!\w)", r"\\\g<0>", part) for part in parts[::2]]
    parts[1::2] = [f"\\ ``{part}``\\ " for part in parts[1::2]]
    return "".join(parts)


def restructure(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain text: nothing is a mark but ``code``; formulas, tables and drawings stay as they are."""
    paragraphs, in_sections = [], False
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
        in_sections = in_sections or bool(_SECTION.search(paragraph))
        if _DRAWN.search(paragraph) and not in_sections:
            shown = "\n".join(f"    {line}".rstrip() for line in paragraph.splitlines())
            paragraphs += ["::", shown]
        else:
            paragraphs.append(plain(paragraph))
    # Of attributes napoleon takes what stands before a colon in the first line for a type: that line says nothing.
    first = ["\\"] * (what in ("attribute", "data", "property"))
    lines[:] = [*first, *"\n\n".join(paragraphs).splitlines(), ""]


def setup(app) -> None:
    """Before napoleon, which turns sections into lists."""
    app.connect("autodoc-process-docstring", restructure, priority=100)
