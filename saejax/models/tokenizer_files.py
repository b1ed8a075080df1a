"""Tokenizers of folders, held to their ``tokenizer.json``.

For many model types transformers builds a tokenizer anew from the vocabulary and merges, with the pre-tokenizer and the
normaliser of a class in place of the file's. Digits, newlines and contractions may then be cut otherwise
than in the model's training.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from saejax.errors import UserError
from saejax.files import read_foreign

# How transformers reads a folder. Unless it is told not to, it asks on the terminal whether to run a model's own code.
LOCAL: dict[str, bool] = dict(local_files_only=True, trust_remote_code=False)
_FILE = "tokenizer.json"
# Families for which transformers takes the class that tokenizer_config.json names.
_PLAIN = ("llama", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox")
# What pre-tokenizers and normalisers treat in different ways, each alone and at a text's start and end.
_PROBE = (
    *(" ".join(map(str, range(start, start + 250))) for start in range(0, 1000, 250)),
    *("0 00 000 0000 1234567 3.14 1,000,000 12:30 a1b22c333 2nd 1234 + 5678 = 6912", "12", " 12", "\n12", "x12"),
    *(f"{before}{space}{after}" for space in ("\n", "\n\n", "\n\n\n", " \n", "\t", "\r\n", "  ", "   ", "\u00a0")
      for before, after in (("a", "b"), ("", "b"), ("a", ""), (".", "("), ("1", "2"))),
    "I'm you're he's she'll they'd we've don't I'M YOU'RE HE'S DON'T it\u2019s 'tis o'clock ''quoted''",
    " leading and trailing ",
    "camelCase XMLHttpRequest snake_case kebab-case http://a.b/c?d=e&f#g user@mail.com",
    "!? ?! ... --- *** == != <= >> :: // \\n ({[<>]}) a,b;c $5 50% #1 @x ~^|`",
    "def f(x):\n    if x > 10:\n        return x['key']\n\n\n# end\n",
    "na\u00efve caf\u00e9 cafe\u0301 Stra\u00dfe \u00c5ngstr\u00f6m A\u030a \ufb01 \u00bd \u2460 \uff11\uff12 x\u00b2",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440 \u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5 "
    "\u4f60\u597d\u4e16\u754c \u3053\u3093\u306b\u3061\u306f\u30ab\u30ca \uc548\ub155 \u0645\u0631\u062d\u0628\u0627 "
    "\u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947 \u0967\u0968 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f600\U0001f44d\U0001f3fd \u200d\u200b\ufeff \u2014\u2026\u201cq\u201d",
)  # fmt: skip


def read_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a folder, with the ids that its ``tokenizer.json`` gives, if it has that file.

    Raises:
      UserError: transformers' classes give other ids than the file, whichever is taken.
      Exception: it cannot be read; of any type, as damaged files make readers raise anything.
    """
    if not (folder / _FILE).is_file():
        return _tokenizer_class(folder).from_pretrained(folder, **LOCAL)
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file = Tokenizer.from_file(str(folder / _FILE))
    try:
        tokenizer = _tokenizer_class(folder).from_pretrained(folder, **LOCAL)
    except Exception:  # of any type: a class for another kind of vocabulary cannot be built from this one
        if "auto_map" in _read_settings(folder):  # the model's own code may do more than the file says
            raise
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **LOCAL)
    file.no_truncation()
    file.no_padding()
    added = {token.content for token in file.get_added_tokens_decoder().values()}
    texts = (*_PROBE, *_with_added(sorted(added | {*tokenizer.added_tokens_encoder})))
    expected = _read_probe(texts, lambda text: file.encode(text, add_special_tokens=False).ids)
    read = _read_probe(texts, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
    if (text := _differing_text(read, expected)) is None:
        return tokenizer
    plain = PreTrainedTokenizerFast.from_pretrained(folder, **LOCAL)
    for name in ("bos_token", "eos_token"):  # transformers may know these from the class alone
        token = getattr(tokenizer, name)
        if getattr(plain, name) is None and token is not None and file.token_to_id(token) is not None:
            setattr(plain, name, token)
    plain_read = _read_probe(texts, lambda text: plain(text, add_special_tokens=False)["input_ids"])
    # Of added tokens tokenizer_config.json may say otherwise than the file, and has the last word.
    if plain_read == read and all(read[text] == expected[text] for text in _PROBE):
        return tokenizer
    if any(plain_read[text] != expected[text] for text in _PROBE):
        raise UserError(
            f"{folder / _FILE} and transformers cut {text!r:.60} into different tokens: save the tokenizer again with "
            "the library that the model was trained with"
        )
    logging.warning(
        "%s: %s of transformers cuts %.60r otherwise than tokenizer.json, which is used", folder,
        type(tokenizer).__name__, text,
    )  # fmt: skip
    return plain


def _with_added(tokens: Sequence[str]) -> list[str]:
    """Return texts with added tokens within words and beside spaces, some in each: a tokenizer may have thousands."""
    return ["".join(f"a{token}b {token} " for token in tokens[i : i + 32]) for i in range(0, len(tokens), 32)]


def _read_probe(texts: Sequence[str], encode: Callable[[str], Sequence[int]]) -> dict[str, list[int] | None]:
    """Return the ids of each text; None where it cannot be read, by a vocabulary without an unknown token."""
    ids: dict[str, list[int] | None] = {}
    for text in texts:
        try:
            ids[text] = list(encode(text))
        except Exception:  # of no type of its own
            ids[text] = None
    return ids


def _differing_text(ids: dict[str, list[int] | None], expected: dict[str, list[int] | None]) -> str | None:
    """Return the shortest text that is cut otherwise than expected; None: there is none."""
    return min((text for text in expected if ids[text] != expected[text]), key=len, default=None)


def _tokenizer_class(folder: Path) -> Any:
    """Return ``AutoTokenizer``, whose import loads torch for seconds, or the class that it would choose."""
    settings = _read_settings(folder)
    plain = settings.get("tokenizer_class") == "TokenizersBackend" and "auto_map" not in settings
    if plain and read_foreign(folder / "config.json", "a model's settings").get("model_type") in _PLAIN:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _read_settings(folder: Path) -> dict[str, Any]:
    """Return the content of ``tokenizer_config.json``; empty without the file."""
    path = folder / "tokenizer_config.json"
    return read_foreign(path, "a tokenizer's settings") if path.is_file() else {}
