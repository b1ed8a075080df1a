"""Characters that cannot stand everywhere: unpaired surrogates, line breaks, control characters, parts of characters.

JSON and byte-level tokens can hold surrogates, but no file in UTF-8 and no tokenizer can.
"""

import codecs
import re
import unicodedata
from collections.abc import Sequence

_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED = "".join(map(chr, range(0xDC80, 0xDD00)))  # bytes from 0x80 on, as PEP 383 writes them
_BYTES = re.compile(f"[{_ESCAPED}]+")
# GPT-2's letters: a byte that is a printable character of Latin 1 stands for itself, the others for those from 256 on.
_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PLAIN]
_BYTE_OF_LETTER = {chr(byte): byte for byte in _PLAIN} | {chr(256 + k): byte for k, byte in enumerate(_OTHERS)}


def has_surrogates(text: str) -> bool:
    """Return whether a text holds surrogates, as text that was decoded properly never does."""
    return bool(_SURROGATE.search(text))


def replace_surrogates(text: str) -> str:
    """Return a text with each unpaired surrogate as a replacement character; two that make a pair are joined."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if has_surrogates(text) else text


def visible(text: str) -> str:
    """Return the text on one line: a line break becomes ↵, a tab ⇥, another control character ·."""
    text = re.sub("\r\n|[\n\r\u0085\u2028\u2029]", "↵", text).replace("\t", "⇥")
    return re.sub("[\0-\x1f\x7f]", "·", text)


def visible_token(text: str, in_line: bool = False) -> str:
    """Return a token as pages show it; ``page/viewer/visible.js`` has the same for scripts.

    Args:
      text: the token; it may be empty.
      in_line: the token stands in a line of text, where only what is nothing but spaces becomes visible.

    Returns:
      ``visible``, each space as ␣, a hard one as ⍽, and invisible characters as their numbers.
    """
    if not text:
        return "∅"
    hidden = ("Cc", "Cf", "Co", "Cs")
    text = visible(text).replace("\u00a0", "⍽")
    text = "".join(f"\\u{ord(char):04x}" if unicodedata.category(char) in hidden else char for char in text)
    return text if in_line and text.replace(" ", "") else text.replace(" ", "␣")


def text_of_piece(piece: str | bytes, decoded: str) -> str:
    r"""Return the text of a token in which bytes of an incomplete character are surrogates (PEP 383).

    ``show_bytes`` makes ``\xe0\xb8`` of these, ``join_pieces`` the characters that several tokens spell together.

    Args:
      piece: the token as the tokenizer stores it: in GPT-2's letters for bytes, as <0xE0>, or as bytes.
      decoded: its text, in which all such bytes are the same replacement character.
    """
    if "\ufffd" not in decoded or not isinstance(piece, str | bytes):
        return decoded
    if isinstance(piece, str):
        if byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece):
            piece = bytes.fromhex(byte[1])
        elif set(piece) <= _BYTE_OF_LETTER.keys():
            piece = bytes(_BYTE_OF_LETTER[letter] for letter in piece)
        else:
            return decoded
    return piece.decode("utf-8", "surrogateescape")


def show_bytes(text: str) -> str:
    r"""Return a text of ``text_of_piece``, or several in turn, with characters that are incomplete as ``\xe0\xb8``."""
    return _BYTES.sub(lambda run: _as_bytes(run[0]).decode("utf-8", "backslashreplace"), text)


def join_pieces(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return successive tokens as pieces of whole characters.

    Args:
      texts: of the tokens, as ``text_of_piece`` gives them.

    Returns:
      The text of each piece: of one token, or of as many as spell a character together; bytes at the ends whose
      character is not complete are shown by ``show_bytes``. The index of the first token of each piece.
    """
    pieces, firsts, piece = list[str](), list[int](), ""
    for number, (text, following) in enumerate(zip(texts, [*texts[1:], ""], strict=True)):
        if not piece:
            firsts.append(number)
        piece += text
        # Bytes from 0x80 to 0xbf never begin a character.
        if not ("\udc80" <= following[:1] <= "\udcbf" and _is_open(piece)):
            pieces.append(show_bytes(piece))
            piece = ""
    return pieces, firsts


def _is_open(text: str) -> bool:
    """Return whether a text ends within a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(_as_bytes(text[len(text.rstrip(_ESCAPED)) :]))
    return bool(decoder.getstate()[0])


def _as_bytes(escaped: str) -> bytes:
    return escaped.encode("utf-8", "surrogateescape")
