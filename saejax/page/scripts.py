"""The script that interactive pages share: elements, tokens and numbers as they are shown."""

from pathlib import Path

ELEMENTS = "elements.js"


def elements_script() -> str:
    """Functions of JavaScript: make, visible, number, percent, token."""
    return (Path(__file__).parent / "viewer" / ELEMENTS).read_text(encoding="utf-8")
