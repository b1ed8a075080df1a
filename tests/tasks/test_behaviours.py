"""Prompts: the answers are true, the splits share no content, and the choice is reproducible."""

import dataclasses
import json
import re
from collections import Counter

import pytest

from saejax.errors import UserError
from saejax.settings import BEHAVIOURS
from saejax.tasks.behaviours import PromptScore, make_prompts, read_prompts, write_prompts
from saejax.tasks.recipes import recipes

SINGULAR_OF = {
    form: singular for singular, plural in recipes()["agreement"].pools["nouns"] for form in (singular, plural)
}
CAPITAL_OF = dict(recipes()["capital"].pools["countries"])


def first_letter(answer: str) -> int:
    return ord(answer.strip()[0])


def make(behaviour, train=80, test=20, seed=42):
    return make_prompts(behaviour, train, test, seed, first_letter)


def in_agreement(text: str) -> tuple[str, str]:
    """Subject and distractor, as they stand in the text."""
    return re.fullmatch(r"Everyone knows that the (\w+) (?:near|beside|behind) the (\w+)", text).groups()


def pairs_in(text: str) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in re.findall(r"(\d) \+ (\d) =", text)]


def content(behaviour: str, text: str) -> set[str]:
    """The content items of a text, read from the text alone."""
    match behaviour:
        case "agreement":
            return {SINGULAR_OF[noun] for noun in in_agreement(text)}
        case "capital":
            return {re.fullmatch(r"The capital of (.+) is the city of", text)[1]}
        case "greater_than":
            return set(re.fullmatch(r"The (\w+) lasted from (\d{4}) to \d\d", text).groups())
        case "addition":
            return {"{} + {}".format(*pairs_in(text)[-1])}


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_splits_have_their_sizes_and_share_no_content(behaviour):
    prompts = make(behaviour)
    assert [p.split for p in prompts] == ["train"] * 80 + ["test"] * 20
    assert len({p.text for p in prompts}) == 100
    of_split = {"train": set(), "test": set()}
    for p in prompts:
        own = content(behaviour, p.text) | content(behaviour, p.counterpart)
        assert own == set(p.items)
        of_split[p.split] |= own
    assert not of_split["train"] & of_split["test"]


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_the_counterpart_turns_the_answer_around(behaviour):
    for p in make(behaviour):
        assert p.counterpart_correct == p.wrong
        assert first_letter(p.correct) != first_letter(p.wrong)
        assert p.counterpart != p.text


def test_agreement_answers():
    prompts = make("agreement")
    for p in prompts:
        subject, distractor = in_agreement(p.text)
        plural = SINGULAR_OF[subject] != subject
        assert p.correct == (" are" if plural else " is")
        assert (SINGULAR_OF[distractor] != distractor) is not plural
        other, rest = in_agreement(p.counterpart)
        assert SINGULAR_OF[other] == SINGULAR_OF[subject] and other != subject and rest == distractor
    for split, half in (("train", 40), ("test", 10)):
        assert Counter(p.correct for p in prompts if p.split == split) == {" is": half, " are": half}


def test_capital_answers():
    for p in make("capital"):
        (country,), (other,) = content("capital", p.text), content("capital", p.counterpart)
        assert p.correct == " " + CAPITAL_OF[country] and p.wrong == " " + CAPITAL_OF[other]


def test_greater_than_answers():
    prompts = make("greater_than")
    for p in prompts:
        year, century = map(int, re.findall(r"\d+", p.text))
        assert century == year // 100
        # Every year of the correct decade is later, none of the wrong one's is.
        assert year < int(f"{century}{p.correct}0") and int(f"{century}{p.wrong}9") < year
        other = int(re.search(r"\d{4}", p.counterpart)[0])
        assert other < int(f"{century}{p.wrong}0") <= other + 10
        assert [a != b for a, b in zip(str(year), str(other), strict=True)] == [False, False, True, False]
    assert set(Counter(p.correct for p in prompts[80:]).values()) <= {2, 3}  # of 7 digits, none is favoured


def test_addition_answers():
    prompts = make("addition")
    asked = {pair for p in prompts for text in (p.text, p.counterpart) for pair in pairs_in(text)[-1:]}
    for p in prompts:
        for text, answer in ((p.text, p.correct), (p.counterpart, p.wrong)):
            *examples, (a, b) = pairs_in(text)
            assert len(answer) == 1
            assert (
                eval(text.rpartition(", ")[2].partition(" = ")[0]) == int(text.rpartition(" = ")[2] + answer) == a + b
            )
            assert len(examples) == 2 and not asked & set(examples)
            for shown in text.split(", ")[:-1]:
                left, right = shown.split(" = ")
                assert eval(left) == int(right)
        assert len(p.text) == len(p.counterpart)
    assert len({pairs_in(p.text)[-1] for p in prompts[80:]}) == 20  # no test pair is asked twice


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_the_choice_depends_on_its_seed_alone(behaviour):
    prompts = make(behaviour)
    assert prompts == make_prompts(behaviour, 80, 20, 42, first_token=hash)
    assert prompts != make(behaviour, seed=43)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("train, test", [(1, 1), (2, 50), (60, 2)])
def test_any_small_numbers(behaviour, train, test):
    prompts = make(behaviour, train, test, seed=1)
    assert Counter(p.split for p in prompts) == {"train": train, "test": test}
    assert all(p.text != p.counterpart and p.correct != p.wrong for p in prompts)


def test_too_many_prompts_says_how_many_there_can_be():
    with pytest.raises(
        UserError, match="capital give at most 92 train prompts beside 20 test prompts, but 93 were asked"
    ):
        make("capital", 93, 20)
    assert len({p.text for p in make("capital", 92, 20)}) == 112
    with pytest.raises(UserError, match=r"at most 22 test prompts beside 90 train .* lower --task\.test_prompts"):
        make("capital", 90, 100)
    with pytest.raises(UserError, match="at most 112 prompts in all"):
        make("capital", 500, 500)
    for behaviour in ("agreement", "greater_than", "addition"):
        with pytest.raises(UserError, match=f"{behaviour} give at most [0-9]+ train prompts beside 20 test prompts"):
            make(behaviour, 10**7, 20)
    with pytest.raises(UserError) as error:
        make("addition", 10_000, 20)
    most = int(re.search(r"at most (\d+)", str(error.value))[1])
    assert len({p.text for p in make("addition", most, 20)}) == most + 20
    with pytest.raises(UserError):
        make("addition", most + 1, 20)


def test_bad_requests():
    with pytest.raises(UserError, match="unknown behaviour 'rhyme': expected one of agreement, capital"):
        make("rhyme")
    with pytest.raises(UserError, match="0 test prompts"):
        make("capital", 5, 0)
    prompt = make("capital")[0]
    with pytest.raises(
        UserError, match=re.escape(f"{prompt.text!r}: the answers {prompt.correct!r} and {prompt.wrong!r}")
    ):
        make_prompts("capital", 80, 20, 42, lambda answer: 7)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_smollm2_reads_prompts_and_counterparts_of_one_length(behaviour, smollm2):
    prompts = make_prompts(behaviour, 80, 20, 42, smollm2.token_id)
    length_N = smollm2.tokenize([p.text for p in prompts]).lengths_B
    assert (length_N == smollm2.tokenize([p.counterpart for p in prompts]).lengths_B).all()
    assert length_N.max() - length_N.min() <= 1
    for p in prompts:
        # The prompt's tokens are the beginning of the answered prompt's: the answer's first token comes next.
        ids = smollm2.tokenizer(p.text)["input_ids"]
        assert smollm2.tokenizer(p.text + p.correct)["input_ids"][: len(ids) + 1] == [*ids, smollm2.token_id(p.correct)]


def test_prompts_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "prompts.jsonl"
    prompts = make("capital", 3, 2) + make("addition", 2, 2)
    write_prompts(path, prompts)
    assert read_prompts(path) == prompts
    scores = [PromptScore(logit_diff=0.5, top1=True, counterpart_logit_diff=-1.0)] * len(prompts)
    write_prompts(path, prompts, scores)
    assert read_prompts(path) == prompts
    line = json.loads(path.read_text().splitlines()[0])
    assert line["logit_diff"] == 0.5 and line["text"] == prompts[0].text and line["items"] == list(prompts[0].items)


@pytest.mark.parametrize("damage", ["{", "[]", '{"text": "a"}', '{"items": [], "extra": 1}'])
def test_damaged_prompts_name_the_line(tmp_path, damage):
    path = tmp_path / "prompts.jsonl"
    write_prompts(path, make("capital", 2, 2))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], damage, *lines[1:]]))
    with pytest.raises(UserError, match="line 2 of .*prompts.jsonl is not a prompt"):
        read_prompts(path)
    with pytest.raises(UserError, match="run the stage baseline first"):
        read_prompts(tmp_path / "nothing.jsonl")


def test_a_prompt_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make("capital", 2, 2)[0].text = "other"
