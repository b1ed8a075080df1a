"""Recipes of behaviours: their templates and content items, and how a prompt is made of both.

===============  ================================================  ==========  ================================
behaviour        prompt                                            correct     counterpart
===============  ================================================  ==========  ================================
agreement        Everyone knows that the keys near the cabinet     " are"      the subject's number (key)
capital          The capital of France is the city of              " Paris"    another place (Italy)
greater_than     The siege lasted from '62 to '                    "75"        a year of another decade ('22)
addition         13+24=37, 58+16=74, 21+45=                        "66"        other numbers (12+26)
two_hop          The capital of the state where Dallas lies is     " Austin"   another city (Oakland)
antonym          ... and the opposite of small is                  " big"      another word (hot)
antonym_french   ... et le contraire de petit est                  " grand"    another word
antonym_spanish  ... y lo contrario de pequeño es                  " grande"   another word
rhyme            ... the cat / ... upon the                        " hat"      another word, another rhyme
acronym          ... the Royal Music Trust has the initials R M    " T"        another last word
sport            ... Babe Ruth plays the sport of                  " baseball" an athlete of another sport
ioi              When Mary and John went ..., John gave ... to      " Mary"     the other giver (Mary)
===============  ================================================  ==========  ================================

Those from ``two_hop`` on, and ``addition``, are of published work on attribution graphs (Lindsey et al., Ameisen et
al., 2025), and ``ioi`` is indirect object identification (Wang et al., 2022, arXiv 2211.00593). The wrong
answer is the counterpart's correct one, so it is as common in these contexts.

Each behaviour has three templates. The last is held out: only test prompts are made of it, so that what train prompts
teach of their wording cannot pass for the behaviour.

- Agreement: the noun beside the verb always has the other number, so following it gives 0 %; half of the subjects are
  singular.
- Greater-than: an end in the decade after the first year's is correct, one before the first year is wrong; in the
  counterpart it is the other way round as far as it can be: both decades are later, the wrong answer's is the next.
  Other later decades would be right, too, so its top-1 share is low in a model that can do it.
- Addition: two numbers of two digits with a sum below 100, after two worked examples that are used for nothing else,
  in either order. The tens of the sums of a prompt and its counterpart differ by two or more.
- Two-hop: the city's state or country, the intermediate step, is in no prompt. A city and its counterpart's are both of
  a state or both of a country, and equally many tokens of SmolLM2.
- Antonyms come after a worked example, which is used for nothing else.
- Indirect objects: the giver is the second name in half of the prompts (ABBA) and the first in the others (BABA). Names
  are single tokens of the model's tokenizer, so that prompts of a template and their counterparts are equally long.

Before an answer that is a number stands a mark ("'", "="), never a space or a digit: some vocabularies keep a space
with the digits after it, some do not, and some join digits by twos or threes; so every one of them begins a token where
the answer begins. Both digits of it are given; a vocabulary of single digits is asked for the first.

Templates and words, in ``data/behaviours.json``, were written for this project. Nouns, events, places (countries and
parts of some), and English antonyms and rhymes are those that are one token in SmolLM2, so that the prompts of a
template are equally long; none was left out for what a model makes of it.
"""

import functools
import importlib.resources
import itertools
import json
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from saejax.errors import Faults, UserError, one_of
from saejax.tasks.files import shown

_Item = TypeVar("_Item")
_PLACES = ("near", "beside", "behind")
_VERBS = (" is", " are")
_LATE_DECADES = range(2, 9)  # leaves two earlier decades and a later one
_EXAMPLES = ((13, 24), (58, 16))  # of addition, in its templates
_LANGUAGES = dict(antonym="english", antonym_french="french", antonym_spanish="spanish")
IOI_WORDS = ("templates", "names", "places", "objects")
_IOI_FIELDS = ("one", "two", "giver", "place", "object")


class Draft(NamedTuple):
    """A prompt that has no split and template yet; it has the fields of ``behaviours.Prompt``."""

    text: str
    correct: str
    counterpart: str
    counterpart_correct: str
    items: tuple[str, ...]


class Recipe(NamedTuple):
    """The templates and content from which a behaviour's prompts are made."""

    templates: Sequence[str]  #: texts with the content's places in braces; the last is for test prompts only
    pools: Mapping[str, Sequence]  #: its content items, by kind
    least: int  #: how many of each kind a split needs for a prompt and its counterpart
    #: from a random generator and a split's items, by kind, a function that drafts a prompt of a template; of those
    #: with an even and an odd number there should be as many.
    drawer: Callable[..., Callable[[int, str], Draft]]
    one_token: str = ""  #: the kind whose items have to be one token after a space; "": none

    def of_split(self, split: str) -> Sequence[str]:
        """Return the templates of a split; of test prompts the held-out one first, so that fewest prompts have it."""
        return self.templates[:-1] if split == "train" else self.templates[::-1]


class Fact(NamedTuple):
    """A content item with the answer to a prompt about it."""

    item: str  #: its name
    answer: str  #: the answer that a prompt asks for, as it follows the text, with its leading space
    fields: Mapping[str, str]  #: values of the template's fields, by name


@functools.cache
def recipes() -> Mapping[str, Recipe]:
    """Return the recipe of every behaviour, by name."""
    words = json.loads((importlib.resources.files(__package__) / "data" / "behaviours.json").read_text("utf-8"))
    templates = words["templates"]
    sums = [pair for pair in itertools.combinations(range(11, 90), 2) if sum(pair) < 100]
    places = [Fact(place, f" {city}", dict(place=place)) for place, city in words["places"].items()]
    cities = {
        name: [Fact(city, f" {capital}", dict(city=city, kind=name.split()[0])) for city, (_, capital) in items.items()]
        for name, items in words["cities"].items()
    }
    athletes = [
        Fact(name, f" {sport}", dict(athlete=name)) for sport, names in words["athletes"].items() for name in names
    ]
    pairs = {name: words["antonyms"][language] for name, language in _LANGUAGES.items()} | dict(rhyme=words["rhymes"])
    return dict(
        agreement=Recipe(templates["agreement"], dict(nouns=list(words["nouns"].items())), least=2, drawer=_agreement),
        capital=Recipe(templates["capital"], dict(places=places), 2, _fact),
        greater_than=Recipe(
            templates["greater_than"], dict(digits=range(10), events=words["events"]), least=1, drawer=_greater_than
        ),
        addition=Recipe(
            templates["addition"],
            dict(pairs=[pair for pair in sums if not {pair, pair[::-1]} & set(_EXAMPLES)]),
            least=366,  # of so many drawn pairs some sums are far from any other
            drawer=_addition,
        ),
        two_hop=Recipe(templates["two_hop"], cities, 2, _fact),
        **{name: Recipe(templates[name], dict(pairs=list(some.items())), 2, _partner) for name, some in pairs.items()},
        acronym=Recipe(templates["acronym"], words["names"], least=5, drawer=_acronym),
        # Of 12 athletes some have another sport.
        sport=Recipe(templates["sport"], dict(athletes=athletes), 12, _fact),
        ioi=ioi_recipe(dict(templates=templates["ioi"], **words["ioi"])),
    )


def ioi_recipe(words: Mapping[str, Sequence[str]]) -> Recipe:
    """Return the recipe of indirect object identification.

    Args:
      words: "templates", "names", "places" and "objects"; saejax's own stand for missing ones.

    Raises:
      UserError: a list is unknown or too short, or a template lacks a name's place.
    """
    words = dict(words)
    if missing := [name for name in IOI_WORDS if name not in words]:
        recipe = recipes()["ioi"]
        words |= {name: recipe.templates if name == "templates" else recipe.pools[name] for name in missing}
    faults = Faults("the words of ioi", "do not fit", "lists or templates")
    for name, some in words.items():
        with faults.collect(name):
            least = 2 if one_of(name, IOI_WORDS, "list of words of ioi") == "templates" else 4
            if not isinstance(some, list | tuple) or not all(isinstance(text, str) and text.strip() for text in some):
                raise UserError(f"{name!r} of ioi is {shown(some)}: expected a list of strings that are not blank")
            if len(set(some)) < least:
                raise UserError(f"ioi has {len(set(some))} {name}: expected at least {least} that differ")
    faults.refuse()
    for template in words["templates"]:
        with faults.collect(template):
            try:
                fields = [field for _, field, *_ in string.Formatter().parse(template) if field is not None]
            except ValueError:  # a brace without its partner
                fields = []
            if sorted(fields) != sorted({*fields, "one", "two", "giver"}) or set(fields) - set(_IOI_FIELDS):
                raise UserError(
                    f"the template {template!r} of ioi has {', '.join(fields) or 'no fields'} in braces: expected "
                    "one, two and giver, and perhaps place and object, once each"
                )
    faults.refuse()
    pools = {name: list(dict.fromkeys(words[name])) for name in IOI_WORDS[1:]}
    return Recipe(tuple(dict.fromkeys(words["templates"])), pools, 2, _ioi, one_token="names")


def _deal(rng: np.random.Generator, items: Sequence[_Item]) -> Iterator[_Item]:
    """Yield every item once in random order, then again in another, without end."""
    while True:
        yield from (items[i] for i in rng.permutation(len(items)))


def _pick(rng: np.random.Generator, items: Sequence[_Item]) -> _Item:
    return items[int(rng.integers(len(items)))]


def _agreement(rng: np.random.Generator, nouns: list[tuple[str, str]]) -> Callable[[int, str], Draft]:
    deck = _deal(rng, nouns)

    def draft(i: int, template: str) -> Draft:
        # Alternating, so that singular and plural are equally frequent and always answering one of them scores half.
        number, subject, attractor = i % 2, next(deck), next(deck)
        while attractor == subject:
            attractor = next(deck)
        place = _pick(rng, _PLACES)
        text, counterpart = (
            template.format(subject=subject[n], place=place, other=attractor[1 - number]) for n in (number, 1 - number)
        )
        return Draft(text, _VERBS[number], counterpart, _VERBS[1 - number], (subject[0], attractor[0]))

    return draft


def _greater_than(rng: np.random.Generator, digits: list[int], events: list[str]) -> Callable[[int, str], Draft]:
    # A year and its counterpart end in the same digit, so that they differ in the decade's alone.
    digit_deck, event_deck, decade_deck = _deal(rng, digits), _deal(rng, events), _deal(rng, _LATE_DECADES)

    def draft(i: int, template: str) -> Draft:
        digit, event, late, end = next(digit_deck), next(event_deck), next(decade_deck), int(rng.integers(10))
        early = int(rng.integers(late - 1))
        years = [f"{decade}{digit}" for decade in (late, early)]
        text, counterpart = (template.format(event=event, year=year) for year in years)
        return Draft(text, f"{late + 1}{end}", counterpart, f"{early + 1}{end}", (event, *years))

    return draft


def _addition(rng: np.random.Generator, pairs: list[tuple[int, int]]) -> Callable[[int, str], Draft]:
    deck = _deal(rng, pairs)

    def draft(i: int, template: str) -> Draft:
        pair = next(deck)
        swapped = _pick(rng, [other for other in pairs if abs(sum(other) // 10 - sum(pair) // 10) > 1])
        texts = []
        for a, b in (pair, swapped):
            # In random order, since pairs have the smaller number first.
            a, b = (a, b) if rng.integers(2) else (b, a)
            texts.append(template.format(a=a, b=b))
        items = tuple(f"{a}+{b}" for a, b in (pair, swapped))  # whatever the order in the text
        return Draft(texts[0], str(sum(pair)), texts[1], str(sum(swapped)), items)

    return draft


def _fact(rng: np.random.Generator, **pools: list[Fact]) -> Callable[[int, str], Draft]:
    """Return the drafter of prompts whose counterpart asks for a fact of the same pool, with another answer."""
    deck = _deal(rng, [(fact, pool) for pool in pools.values() for fact in pool])

    def draft(i: int, template: str) -> Draft:
        fact, pool = next(deck)
        candidates = [other for other in pool if other.answer != fact.answer]
        # Another first letter is another first token in every tokenizer.
        swapped = _pick(rng, [other for other in candidates if other.answer[1] != fact.answer[1]] or candidates)
        text, counterpart = template.format(**fact.fields), template.format(**swapped.fields)
        return Draft(text, fact.answer, counterpart, swapped.answer, (fact.item, swapped.item))

    return draft


def _partner(rng: np.random.Generator, pairs: list[tuple[str, str]]) -> Callable[[int, str], Draft]:
    """Return the drafter of prompts that name one word of a pair and ask for the other."""
    deck = _deal(rng, pairs)

    def draft(i: int, template: str) -> Draft:
        pair = next(deck)
        word, answer = pair[:: 1 if rng.integers(2) else -1]
        candidates = [(*words[::way], words[0]) for words in pairs if words != pair for way in (1, -1)]
        # Another first letter is another first token in every tokenizer.
        differing = [candidate for candidate in candidates if candidate[1][0] != answer[0]]
        swapped, wrong, first = _pick(rng, differing or candidates)
        text, counterpart = template.format(word=word), template.format(word=swapped)
        return Draft(text, f" {answer}", counterpart, f" {wrong}", (pair[0], first))

    return draft


def _acronym(
    rng: np.random.Generator, first: list[str], second: list[str], third: list[str]
) -> Callable[[int, str], Draft]:
    decks = [_deal(rng, words) for words in (first, second, third)]

    def draft(i: int, template: str) -> Draft:
        first_word, second_word, last = (next(deck) for deck in decks)
        swapped = _pick(rng, [word for word in third if word[0] != last[0]])
        text, counterpart = (
            template.format(first=first_word, second=second_word, third=word, a=first_word[0], b=second_word[0])
            for word in (last, swapped)
        )
        return Draft(text, f" {last[0]}", counterpart, f" {swapped[0]}", (first_word, second_word, last, swapped))

    return draft


def _ioi(
    rng: np.random.Generator, names: list[str], places: list[str], objects: list[str]
) -> Callable[[int, str], Draft]:
    decks = [_deal(rng, words) for words in (names, places, objects)]

    def draft(i: int, template: str) -> Draft:
        receiver, place, thing = (next(deck) for deck in decks)
        others = [name for name in names if name != receiver]
        # Another first letter is another first token in every tokenizer.
        giver = _pick(rng, [name for name in others if name[0] != receiver[0]] or others)
        # In turn, so that the giver is the second of the two names as often as the first.
        pair = (receiver, giver) if i % 2 == 0 else (giver, receiver)
        fill = functools.partial(template.format, one=pair[0], two=pair[1], place=place, object=thing)
        text, counterpart = fill(giver=giver), fill(giver=receiver)
        return Draft(text, f" {receiver}", counterpart, f" {giver}", (receiver, giver, place, thing))

    return draft
