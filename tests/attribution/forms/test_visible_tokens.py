"""Tokens on pages: what cannot be seen is shown, the same in Python and in scripts; parts of characters are bytes."""

import json

import pytest
from browser import needs_chromium
from tiny_models import byte_level_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from saejax.models.tokens import token_text
from saejax.page.graph.page import page_html
from saejax.page.scripts import elements_script
from saejax.unicode import visible, visible_token

TEXTS = [" Paris", "  ", "", "\n", "a\r\nb\n\tc", "\x00\x1f\x7f", "\x85\u2028", "\u00a0", "\u200b", "\ufeff", "\ue000"]
TEXTS += ["é", "法国", "👨\u200d👩", "\\xe0\\xb8", " \\x98\\x80", "a b", "\ufffd", "<b>", "\U000e0041"]


@pytest.mark.parametrize("text", ["ก", " ก", "😀", "法", "é", "a", " a", "\ufffd"])
def test_pieces_of_characters_are_their_bytes(text):
    tokenizer = byte_level_tokenizer()
    as_text, ids = token_text(tokenizer), tokenizer(text)["input_ids"]
    written = [as_text(token) for token in ids]
    raw = b"".join(piece.encode().decode("unicode_escape").encode("latin-1") for piece in written)
    assert raw == text.encode() and not any("\ufffd" in piece for piece in written)
    if len(ids) > 1 and len(text) == 1:
        assert len(set(written)) == len(set(ids))  # today's replacement signs were all the same
        assert all(visible_token(piece) == piece for piece in written)


def test_pieces_of_a_byte_fallback_are_their_bytes():
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁a": 256, "\ufffd": 257}
    made = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    as_text = token_text(PreTrainedTokenizerFast(tokenizer_object=made))
    assert [as_text(token) for token in (0xE0, 0x61, 256, 257)] == ["\\xe0", "a", " a", "\ufffd"]


def test_what_is_shown():
    shown = dict(zip(TEXTS, map(visible_token, TEXTS), strict=True))
    assert shown[" Paris"] == "␣Paris" and shown["  "] == "␣␣" and shown[""] == "∅" and shown["\u00a0"] == "⍽"
    assert shown["a\r\nb\n\tc"] == "a↵b↵⇥c" and shown["\u200b"] == "\\u200b" and shown["\U000e0041"] == "\\ue0041"
    assert visible_token(" a b", in_line=True) == " a b" and visible_token("  ", in_line=True) == "␣␣"


@needs_chromium
def test_scripts_show_what_python_does(browser, document, tmp_path):
    """Of the graph's page and of all others, whose functions these are."""
    (tmp_path / "page.html").write_text("<script>" + elements_script() + "</script>")
    browser.open((tmp_path / "page.html").as_uri())
    for call, wanted in (
        ("visibleText(text)", visible), ("visibleToken(text)", visible_token), ("visible(text)", _in_line),
    ):  # fmt: skip
        assert browser.js(f"{json.dumps(TEXTS)}.map(text => {call})") == list(map(wanted, TEXTS))
    script = page_html(document).split("<script>")[1]
    assert script.count("visibleToken = ") == 1


def _in_line(text: str) -> str:
    return visible_token(text, in_line=True)
