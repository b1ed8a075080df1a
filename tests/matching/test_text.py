"""Tokens of different tokenizers that end at one place, beside the texts that they have read by then."""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from saejax.matching.transfer.activity import aligned, first_texts, read_text, site_values
from saejax.models.tokens import bos_tokens, encode

_SPEC = importlib.util.spec_from_file_location("kinds", Path(__file__).parents[1] / "tasks" / "tokenizer_kinds.py")
KINDS = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(KINDS)
TEXTS = [
    "The capital of France is the city of Paris, Paris.",
    "  naïve café, Ünïcode — 東京 is 12,345 km away.\n\nNew\tline  two  spaces ",
    "Emoji 👩‍👩‍👧 and 🇫🇷 and 🎉🎉; 1732 + 19 = 1751.\r\n(end)... ",
    "",
]
PAIRS = [("gpt2", "llama3"), ("gpt2", "gemma"), ("llama3", "mistral"), ("gemma", "pythia"), ("qwen3", "qwen3")]


def prefixes(tokenizer, text):
    """How many characters of a text are wholly read after each token, by decoding; and after which it reads no more."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = []
    for stop in range(1, len(ids) + 1):
        read = tokenizer.decode(ids[:stop], clean_up_tokenization_spaces=False)
        found.append(len(read.rstrip("\ufffd")) if read.endswith("\ufffd") else len(read))
    return found


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "pythia", "qwen3", "gemma"])
def test_tokens_end_where_what_was_decoded_ends(kind):
    tokenizer = KINDS.tokenizer(kind)
    read = read_text(tokenizer, TEXTS, 64)
    for number, text in enumerate(TEXTS):
        ends = read.end_N[read.text_N == number].tolist()
        pairs = list(zip(ends, prefixes(tokenizer, text), strict=True))
        # Bytes of a character that is not read to its end are said to end where the character does.
        assert all(end >= seen for end, seen in pairs), pairs
        assert not text or (any(end == seen for end, seen in pairs) and ends[-1] == len(text))


@pytest.mark.parametrize("pair", PAIRS)
def test_pairs_have_read_the_same_text(pair):
    reads = [read_text(KINDS.tokenizer(kind), TEXTS, 64) for kind in pair]
    one, two = aligned(*reads)
    assert len(one) == len(two) > 20 and (np.diff(one) > 0).all() and (np.diff(two) > 0).all()
    assert (reads[0].text_N[one] == reads[1].text_N[two]).all() and (reads[0].end_N[one] == reads[1].end_N[two]).all()
    for number, text in enumerate(TEXTS[:3]):
        for kind, read, at in zip(pair, reads, (one, two), strict=True):
            tokenizer = KINDS.tokenizer(kind)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            first = int(np.flatnonzero(read.text_N == number)[0])
            for token in at[read.text_N[at] == number]:
                decoded = tokenizer.decode(ids[: token - first + 1], clean_up_tokenization_spaces=False)
                assert decoded.strip() == text[: read.end_N[token]].strip()
    if pair[0] == pair[1]:
        whole = {(text, end) for text, end in zip(reads[0].text_N.tolist(), reads[0].end_N.tolist(), strict=True)}
        assert len(one) == len(whole)  # all tokens but the first bytes of characters


def test_pieces_hold_all_tokens_behind_the_special_ones():
    tokenizer = KINDS.tokenizer("llama3")
    read = read_text(tokenizer, TEXTS, 8)
    assert read.front == 1 and all(piece[0] == tokenizer.bos_token_id and len(piece) <= 8 for piece in read.pieces)
    ids = [id for text in TEXTS for id in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert np.concatenate([piece[1:] for piece in read.pieces]).tolist() == ids and len(ids) == len(read.text_N)
    assert first_texts(["a" * 50, "b" * 50, "c" * 50], 12) == ["a" * 50, "b" * 50]
    assert first_texts(["a"], 1000) == ["a"]


@pytest.mark.parametrize("kind", ["llama3", "gemma", "mistral"])
def test_a_text_that_begins_with_bos_gets_no_second(kind):
    tokenizer = KINDS.tokenizer(kind)
    read = read_text(tokenizer, [f"{tokenizer.bos_token}The capital of France"], 64)
    (piece,) = read.pieces
    assert piece.tolist().count(tokenizer.bos_token_id) == 1 and len(piece) == 1 + len(read.text_N)
    assert read.end_N.min() > len(tokenizer.bos_token)


def test_a_text_that_begins_with_a_special_token_of_its_own_gets_no_bos():
    """A chat of Qwen, whose tokenizer has no BOS, with a dictionary that was trained behind one; see ``encode``."""
    tokenizer, own = copy.deepcopy(KINDS.tokenizer("qwen3")), "<|im_start|>"
    tokenizer.add_special_tokens(dict(eos_token="<|endoftext|>", unk_token=own))
    chat, plain = (encode(tokenizer, text, "always") for text in (f"{own}The capital of France is Paris", "The city"))
    front, number = bos_tokens(tokenizer, "always"), tokenizer.convert_tokens_to_ids(own)
    assert chat[0] == number and front == plain[:1] != [number]
    read = read_text(tokenizer, [f"{own}The capital of France is Paris", "The city"], 4, "always")
    pieces = [piece.tolist() for piece in read.pieces]
    assert pieces[0] == chat[:4] and pieces[1] == [*front, *chat[4:7]] and pieces[-1] == plain and read.front == 1
    assert sum(map(len, pieces)) - len(pieces) == len(read.text_N) == len(read.end_N)
    assert read.end_N[read.text_N == 0].min() > len(own)  # it ends no token that is compared, as BOS does not


def test_sites_of_heads_have_the_width_of_their_heads(lm):
    read = read_text(lm.tokenizer, TEXTS[:1], 64)
    values = site_values(lm, read, ["attn_k.1", "resid_post.1"], 256)
    expected = lm(lm.tokenize(TEXTS[:1]), capture=["attn_k.1"]).sites["attn_k.1"][0]
    assert values["attn_k.1"].shape[1] == 32 < values["resid_post.1"].shape[1] == lm.config.d_model
    np.testing.assert_allclose(values["attn_k.1"], expected[read.front :], atol=1e-4)
