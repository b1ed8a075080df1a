"""The answers' tokens, in small tokenizers of every family's format."""

import functools
import types

import pytest
from tokenizer_kinds import KINDS, tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from saejax.errors import UserError
from saejax.models.tokens import single_token_id
from saejax.tasks.answer_tokens import ALIKE, MERGED, OTHER, UNKNOWN, answer_ids, fault, first_answer_ids
from saejax.tasks.behaviours import Prompt
from saejax.tasks.draw import _single_tokens, make_prompts
from saejax.tasks.settings import BEHAVIOURS

ACCENTED = ("antonym_french", "antonym_spanish")


def ask(text, correct, wrong, counterpart=""):
    return Prompt("own", "train", text, correct, wrong, counterpart)


def model(reads, vocab=10**6):
    """What has a tokenizer, and embeddings for so many tokens."""
    return types.SimpleNamespace(tokenizer=reads, config=types.SimpleNamespace(vocab=vocab))


# Merges of bytes, pieces of SentencePiece with a first space, and digits that stand alone.
QUICK = ("gpt2", "mistral", "qwen3")


@pytest.mark.parametrize(
    "kind", [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind not in QUICK)]
)
def test_every_family_has_the_behaviours_by_default(kind, monkeypatch):
    # Prompts and their counterparts are read several times, and a letter alone with each: once is enough.
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", functools.cache(PreTrainedTokenizerFast.__call__))
    reads = tokenizer(kind)
    for behaviour in set(BEHAVIOURS) - {"ioi"}:  # its names have to be single tokens
        prompts, replaced = make_prompts(behaviour, 80, 100, 42, reads)
        # Letters with accents may have no token with a space before them: a few answers begin with the space alone.
        assert len(prompts) == 180 and sum(replaced.values()) <= (5 if behaviour in ACCENTED else 0)
        # A fifth of the prompts: the step shares no factor with the numbers of templates and variants, so all occur.
        checked = prompts[::5]
        for p, (first, second) in zip(checked, first_answer_ids(model(reads), checked), strict=True):
            ids = reads(p.text)["input_ids"]
            for answer, token in ((p.correct, first), (p.wrong, second)):
                whole = reads(p.text + answer)["input_ids"]
                assert whole[: len(ids)] == ids and whole[len(ids)] == token
                assert reads.decode(whole[len(ids) :]).strip() == answer.strip()
            assert first != second


def test_an_answer_that_the_tokenizer_does_not_know_is_refused():
    """All such answers have one token: their logits would be those of any other."""
    words = ["<unk>", "(", "The", "capital", "is", "Paris", "Rome"]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    reads = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    assert single_token_id(reads, [" Paris"]) == 5 and single_token_id(reads, [" <unk>"]) == 0
    with pytest.raises(UserError, match=r"the answer ' Oslo' is unknown to the tokenizer: '<unk>' \(0\); give the id"):
        single_token_id(reads, [" Oslo"])
    assert fault(reads, ask("The capital is", " Paris", " Rome")) == ""
    assert fault(reads, ask("The capital is", " Paris", " Oslo")) == UNKNOWN
    with pytest.raises(UserError, match="the answer ' Oslo' has the token of all unknown texts"):
        first_answer_ids(model(reads), [ask("The capital is", " Oslo", " Paris")])
    with pytest.raises(UserError, match="2 of 5 capitals of own are single tokens of this tokenizer"):
        _single_tokens("own", "capitals", ["Paris", "Rome", "Oslo", "Bern", "Lima"], reads)


def test_an_answer_alone_may_have_another_token():
    reads = tokenizer("mistral")
    alone, after = reads("66", add_special_tokens=False)["input_ids"][0], answer_ids(reads, "21+45=", "66")[0]
    assert alone != after and reads.convert_ids_to_tokens([after]) == ["6"]
    assert answer_ids(reads, "21+45=", "66") == [after, after]


def test_an_answer_that_the_model_has_no_token_for_is_named():
    """A defect: the logit difference was called not finite, and the gradient of the log-probability was 0."""
    reads = tokenizer("mistral")
    prompts, ids = [ask("It is", " one", " two")], answer_ids(reads, "It is", " two")
    with pytest.raises(UserError, match=f"'It is' begins with the token id .*: expected 0 to {ids[0] - 1}"):
        first_answer_ids(model(reads, ids[0]), prompts)


@pytest.mark.parametrize(
    ("kind", "prompt", "why"),
    [
        ("gpt2", ask("2 + 6 = ", "8", "5"), MERGED),
        ("llama3", ask("The siege lasted from 1762 to 17", "75", "35"), MERGED),
        ("qwen3", ask("The siege lasted from 1762 to 17", "75", "35"), ""),
        ("qwen3", ask("21+45=", "66", "69"), ALIKE),
        ("gpt2", ask("21+45=", "66", "69"), ""),
        ("gpt2", ask("2+6=", "8", "5", "1+4= "), MERGED),
        ("mistral", ask("21+45=", "66", "38", "12+26="), ""),
    ],
)
def test_what_is_wrong_with_a_prompt(kind, prompt, why):
    assert fault(tokenizer(kind), prompt) == why


def test_a_counterpart_must_leave_the_answers_as_they_are():
    def letters(text, **options):  # "x" takes what follows into its token, but for the last letter
        return dict(input_ids=[ord(letter) + 1000 * (i > 0 and text[i - 1] == "y") for i, letter in enumerate(text)])

    assert fault(letters, ask("a", "b", "c", "a")) == ""
    assert fault(letters, ask("a", "b", "c", "y")) == OTHER


def test_a_merged_answer_is_named():
    with pytest.raises(UserError, match="the answer '8' has no token of its own after '2 . 6 = '"):
        answer_ids(tokenizer("gpt2"), "2 + 6 = ", "8")
