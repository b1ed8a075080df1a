"""Characters that cannot stand everywhere: unpaired surrogates, line breaks and control characters.

JSON and byte-level tokens can hold surrogates, but no file in UTF-8 and no tokenizer can.
"""

import re

_SURROGATE = re.compile("[\ud800-\udfff]")


def has_surrogates(text: str) -> bool:
    """Return whether a text holds surrogates, as text that was decoded properly never does."""
    return bool(_SURROGATE.search(text))


def replace_surrogates(text: str) -> str:
    """Return a text with each unpaired surrogate as a replacement character; two that make a pair are joined."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if has_surrogates(text) else text


def visible(text: str) -> str:
    """Return the text on one line: a line break becomes ↵, a tab ⇥, any other control character ·."""
    text = text.replace("\r\n", "↵").replace("\n", "↵").replace("\t", "⇥")
    return "".join("·" if ord(char) < 32 or ord(char) == 127 else char for char in text)
