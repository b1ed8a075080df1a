"""Prompts: the answers are true, the splits share no content, and the choice is reproducible."""

import dataclasses
import functools
import json
import re
from collections import Counter
from importlib import resources

import pytest

from saejax.errors import UserError
from saejax.tasks.answer_tokens import ALIKE
from saejax.tasks.behaviours import PromptScore, read_prompts, write_prompts
from saejax.tasks.draw import TooFewPrompts, make_prompts
from saejax.tasks.own_prompts import identity, read_ioi
from saejax.tasks.recipes import ioi_recipe, recipes
from saejax.tasks.settings import BEHAVIOURS, DEMO_BEHAVIOURS, TaskConfig

NOUNS = recipes()["agreement"].pools["nouns"]
SINGULAR_OF = {form: singular for singular, plural in NOUNS for form in (singular, plural)}
CAPITAL_OF = {fact.item: fact.answer.strip() for fact in recipes()["capital"].pools["places"]}
SPORT_OF = {fact.item: fact.answer for pool in recipes()["sport"].pools.values() for fact in pool}
PAIRED = ("antonym", "antonym_french", "antonym_spanish", "rhyme")
PAIR_OF = {name: {word: pair for pair in recipes()[name].pools["pairs"] for word in pair} for name in PAIRED}
OF_ONE_LENGTH = (*DEMO_BEHAVIOURS, "two_hop", "antonym", "rhyme", "acronym", "ioi")  # in SmolLM2


def letters(text, **options):
    """A tokenizer of words' first letters with the space before them, and of all other letters."""
    return dict(input_ids=[hash(piece) for piece in re.findall(r" \w|.", text, re.DOTALL)])


def words(text, **options):
    """A tokenizer of words with the space before them."""
    return dict(input_ids=[hash(piece) for piece in re.findall(r" ?\w+|.", text, re.DOTALL)])


def reads(behaviour):
    """A tokenizer that suits a behaviour: the names of ioi have to be single tokens."""
    return words if behaviour == "ioi" else letters


@functools.cache
def make(behaviour, train=80, test=20, seed=42):
    return make_prompts(behaviour, train, test, seed, reads(behaviour)).prompts


def fields_of(prompt, text: str) -> dict[str, str]:
    """What stands at the template's places, read from the text alone."""
    pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[\\w ]+)", re.escape(prompt.template))
    return re.fullmatch(pattern, text).groupdict()


def content(prompt, text: str) -> set[str]:
    """The content items of a text; of a sum in one order, so that a commuted one is the same."""
    found = fields_of(prompt, text)
    match prompt.behaviour:
        case "agreement":
            return {SINGULAR_OF[found["subject"]], SINGULAR_OF[found["other"]]}
        case "addition":
            return {"+".join(sorted(found.values()))}
        case "two_hop":
            return {found["city"]}
        case "acronym":
            return {found[name] for name in ("first", "second", "third")}
        case name if name in PAIRED:
            return {PAIR_OF[name][found["word"]][0]}
    return set(found.values())


def sums_in(text: str) -> set[str]:
    """The pairs of numbers that a text adds, worked examples among them, each in one order."""
    return {"+".join(sorted(pair)) for pair in re.findall(r"(\d+)\+(\d+)", text)}


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("test", [20, 100])
def test_splits_share_no_content_and_one_template_is_for_test_prompts_alone(behaviour, test):
    prompts, templates = make(behaviour, test=test), recipes()[behaviour].templates
    assert [p.split for p in prompts] == ["train"] * 80 + ["test"] * test
    assert len({p.text for p in prompts}) == 80 + test
    of_split = {"train": set(), "test": set()}
    for p in prompts:
        own = content(p, p.text) | content(p, p.counterpart)
        assert own == set(p.items)
        of_split[p.split] |= own
        # The counterpart turns the answer around.
        assert p.counterpart_correct == p.wrong and p.counterpart != p.text
        assert p.correct.strip()[0] != p.wrong.strip()[0]
    assert not of_split["train"] & of_split["test"]
    count = Counter((p.split, p.template) for p in prompts)
    assert [count["train", template] for template in templates] == [40, 40, 0]
    assert [count["test", template] for template in templates] == [test // 3, (test + 1) // 3, (test + 2) // 3]
    assert make(behaviour, 1, 1)[1].template == templates[-1]  # the last to be without prompts


def test_no_worked_example_and_no_commuted_sum():
    prompts = make("addition", 80, 100)
    asked = {p.split: set() for p in prompts}
    for p in prompts:
        own = content(p, p.text) | content(p, p.counterpart)
        examples = sums_in(p.template)
        assert len(examples) == 2 and not own & examples
        asked[p.split] |= own
    seen = asked["train"].union(*(sums_in(p.text) for p in prompts if p.split == "train"))
    assert not asked["test"] & seen


def test_agreement_answers():
    prompts = make("agreement")
    for p in prompts:
        subject, attractor = (fields_of(p, p.text)[name] for name in ("subject", "other"))
        plural = SINGULAR_OF[subject] != subject
        assert p.correct == (" are" if plural else " is")
        assert (SINGULAR_OF[attractor] != attractor) is not plural
        changed = fields_of(p, p.counterpart)
        assert SINGULAR_OF[changed["subject"]] == SINGULAR_OF[subject] and changed["subject"] != subject
        assert changed["other"] == attractor
    for split, half in (("train", 40), ("test", 10)):
        assert Counter(p.correct for p in prompts if p.split == split) == {" is": half, " are": half}
    # The template does not tell the answer, either.
    assert set(Counter((p.template, p.correct) for p in prompts[:80]).values()) == {20}


def test_capital_answers():
    for p in make("capital"):
        (place,), (counterpart_place,) = content(p, p.text), content(p, p.counterpart)
        assert p.correct == " " + CAPITAL_OF[place] and p.wrong == " " + CAPITAL_OF[counterpart_place]
    assert len(set(CAPITAL_OF.values())) == len(CAPITAL_OF)  # no answer of a split stands in the other


def test_greater_than_answers():
    prompts = make("greater_than")
    for p in prompts:
        year, counterpart_year = (int(fields_of(p, text)["year"]) for text in (p.text, p.counterpart))
        right, wrong = int(p.correct), int(p.wrong)
        # Every year of the correct decade is later, none of the wrong one's is.
        assert len(p.correct) == len(p.wrong) == 2 and right // 10 * 10 > year > wrong // 10 * 10 + 9
        assert counterpart_year < wrong // 10 * 10 <= counterpart_year + 10 and year % 10 == counterpart_year % 10
    assert set(Counter(p.correct[0] for p in prompts[80:]).values()) <= {2, 3}  # of 7 digits, none is favoured


def test_addition_answers():
    prompts = make("addition")
    for p in prompts:
        for text, answer in ((p.text, p.correct), (p.counterpart, p.wrong)):
            found = fields_of(p, text)
            assert int(answer) == int(found["a"]) + int(found["b"]) and len(answer) == 2
        assert all(eval(left) == int(right) for left, right in re.findall(r"([\d+]+)=(\d+)", p.template))
        assert abs(int(p.correct[0]) - int(p.wrong[0])) > 1 and len(p.text) == len(p.counterpart)
    assert len({p.items[0] for p in prompts}) == 100  # no sum is asked twice


def test_two_hop_answers():
    """The answer is the capital of the city's state or country, which no text names."""
    places = json.loads((resources.files("saejax.tasks") / "data" / "behaviours.json").read_text("utf-8"))["cities"]
    place_of = {city: (group, *fact) for group, cities in places.items() for city, fact in cities.items()}
    for p in make("two_hop"):
        asked = [fields_of(p, text)["city"] for text in (p.text, p.counterpart)]
        (group, place, capital), (counterpart_group, counterpart_place, wrong) = (place_of[city] for city in asked)
        assert (p.correct, p.wrong) == (f" {capital}", f" {wrong}") and group == counterpart_group
        assert fields_of(p, p.text)["kind"] == group.split()[0]
        assert place not in p.text and counterpart_place not in p.counterpart and capital not in p.text
    for group, cities in places.items():
        assert len(cities) > 3 and group.split()[0] in ("state", "country")
    facts = [fact for cities in places.values() for fact in cities.values()]
    for column in zip(*facts):
        assert len(set(column)) == len(facts)  # one city of each place, so that splits share no place and no capital


@pytest.mark.parametrize("behaviour", PAIRED)
def test_antonym_and_rhyme_answers(behaviour):
    for p in make(behaviour):
        word, counterpart_word = (fields_of(p, text)["word"] for text in (p.text, p.counterpart))
        pair, counterpart_pair = (set(PAIR_OF[behaviour][asked]) for asked in (word, counterpart_word))
        assert {word, p.correct.strip()} == pair and {counterpart_word, p.wrong.strip()} == counterpart_pair != pair
    words = [word for pair in recipes()[behaviour].pools["pairs"] for word in pair]
    assert len(words) == len(set(words))  # one partner each
    assert not set(words) & set(re.findall(r"\w+", " ".join(recipes()[behaviour].templates)))


def test_acronym_and_sport_answers():
    for p in make("acronym"):
        asked, counterpart = (fields_of(p, text) for text in (p.text, p.counterpart))
        assert (p.correct, p.wrong) == (f" {asked['third'][0]}", f" {counterpart['third'][0]}")
        initials = asked["first"][0], asked["second"][0]
        assert (asked["a"], asked["b"]) == initials == (counterpart["a"], counterpart["b"])
    for p in make("sport"):
        names = [fields_of(p, text)["athlete"] for text in (p.text, p.counterpart)]
        assert [p.correct, p.wrong] == [SPORT_OF[name] for name in names]
        assert p.correct not in p.text


def test_ioi_prompts_are_abba_and_baba():
    """The giver is named twice; its counterpart gives to it. Either order is as frequent, in every template."""
    orders = Counter()
    for p in make("ioi"):
        found, changed = fields_of(p, p.text), fields_of(p, p.counterpart)
        names = {found["one"], found["two"]}
        assert names == {found["giver"], changed["giver"]} == {p.correct.strip(), p.wrong.strip()}
        assert p.wrong == f" {found['giver']}" and p.correct == f" {changed['giver']}"
        assert {**found, "giver": ""} == {**changed, "giver": ""}
        orders[p.split, p.template, found["giver"] == found["two"]] += 1
    train = [count for (split, *_), count in orders.items() if split == "train"]
    assert train == [20] * 4 and {count for count in orders.values() if count < 20} <= {3, 4}


def test_ioi_takes_words_of_ones_own_and_names_of_one_token(tmp_path):
    names = ["Ada", "Bob", "Cy", "Dan", "Eva", "Mary-Ann"]
    own = ioi_recipe(dict(templates=["{one} met {two}; {giver} paid", "{two}, {one}: {giver} called"], names=names))
    prompts = make_prompts("ioi", 4, 4, 1, words, own).prompts
    assert {p.template for p in prompts if p.split == "train"} == {own.templates[0]}
    assert {p.correct.strip() for p in prompts} <= set(names[:-1])  # the last is several tokens
    with pytest.raises(TooFewPrompts, match="0 of 80 names of ioi are single tokens of this tokenizer"):
        make_prompts("ioi", 4, 4, 1, letters)
    path = tmp_path / "ioi.json"
    task = TaskConfig(behaviours=("ioi",), ioi=str(path))
    for content, message in (
        ("{", "holds no JSON object"),
        ('{"words": []}', "unknown list of words of ioi 'words'"),
        ('{"names": "Ada"}', "expected a list of strings"),
        ('{"names": ["Ada", "Bob"]}', "ioi has 2 names: expected at least 4"),
        ('{"templates": ["{one} and {two}", "{one} {two} {giver}"]}', "has one, two in braces"),
        ('{"templates": ["{one", "{one} {two} {giver}"]}', "has no fields in braces"),
        (
            '{"templates": ["{one", "{two}"]}',
            "2 lists or templates do not fit: .*'{one' .*; .*'{two}' of ioi has two in",
        ),
        ('{"names": ["Ada"], "words": []}', "ioi has 1 names.*; unknown list of words of ioi 'words'"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            read_ioi(task)
    with pytest.raises(UserError, match="ioi is not among --task.behaviours"):
        read_ioi(dataclasses.replace(task, behaviours=("capital",)))
    path.write_text(json.dumps(dict(names=names)))
    assert read_ioi(task).pools["names"] == names and len(identity(task)) == 64
    assert read_ioi(task).templates == recipes()["ioi"].templates and not identity(TaskConfig())


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_the_choice_depends_on_its_seed_alone_and_may_be_small(behaviour):
    prompts = make(behaviour)
    assert prompts == make_prompts(behaviour, 80, 20, 42, lambda text, **options: reads(behaviour)("x" + text)).prompts
    assert prompts != make(behaviour, seed=43)
    for train, test in ((1, 1), (2, 50), (60, 2)):
        few = make(behaviour, train, test, seed=1)
        assert Counter(p.split for p in few) == {"train": train, "test": test}
        assert all(p.text != p.counterpart and p.correct != p.wrong for p in few)


def test_too_many_prompts_says_how_many_there_can_be():
    # 177 places, of each split a share; two templates of train prompts and three of test prompts.
    with pytest.raises(UserError, match=r"capital give 336 train prompts of 400, .* lower --task\.train_prompts or"):
        make("capital", 400, 20)
    assert len({p.text for p in make("capital", 334, 20)}) == 354
    with pytest.raises(UserError, match=r"capital give 46 train prompts of 90, .* or --task\.test_prompts"):
        make("capital", 90, 600)  # most places are for test prompts then
    with pytest.raises(UserError, match="unknown behaviour 'haiku': expected one of agreement, capital"):
        make("haiku")
    with pytest.raises(UserError, match="0 test prompts"):
        make("capital", 5, 0)


def test_what_a_tokenizer_cannot_be_asked_is_counted_and_replaced():
    def no_letter_b(text, **options):  # capitals with B begin with the token of those with C
        return letters(text.replace(" B", " C"))

    prompts, replaced = make_prompts("capital", 80, 100, 42, no_letter_b)
    assert len(prompts) == 180 and list(replaced) == [ALIKE] and 0 < replaced[ALIKE] < 40
    assert all({p.correct[1], p.wrong[1]} != {"B", "C"} for p in prompts)
    assert not {item for p in prompts[:80] for item in p.items} & {item for p in prompts[80:] for item in p.items}
    with pytest.raises(UserError, match="the word lists of capital give .* lower --task.train_prompts") as refused:
        make_prompts("capital", 80, 1000, 42, no_letter_b)
    assert refused.type is UserError  # not left out as one that does not suit the tokenizer

    def merging(text, **options):  # a comma takes what follows into its token
        return letters(re.sub(",.*", "", text))

    with pytest.raises(TooFewPrompts, match=r"1 of 5 train prompts .* 'The government of {place} .*joined .* drafts"):
        make_prompts("capital", 5, 5, 42, merging)


@pytest.mark.parametrize("behaviour", OF_ONE_LENGTH)
def test_smollm2_reads_prompts_and_counterparts_of_one_length(behaviour, smollm2):
    prompts, replaced = make_prompts(behaviour, 80, 100, 42, smollm2.tokenizer)
    assert replaced == {}
    length_N = smollm2.tokenize([p.text for p in prompts]).lengths_B
    assert (length_N == smollm2.tokenize([p.counterpart for p in prompts]).lengths_B).all()
    if behaviour in DEMO_BEHAVIOURS:
        assert len(set(zip(length_N.tolist(), (p.template for p in prompts)))) == 3  # one for each template


def test_prompts_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "prompts.jsonl"
    prompts = make("capital", 3, 2) + make("addition", 2, 2)
    write_prompts(path, prompts)
    assert read_prompts(path) == prompts
    old = [{key: value for key, value in json.loads(line).items() if key != "template"} for line in path.open()]
    (tmp_path / "old.jsonl").write_text("\n".join(map(json.dumps, old)))
    assert read_prompts(tmp_path / "old.jsonl") == [dataclasses.replace(p, template="") for p in prompts]
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
