"""Behaviours of published work on attribution graphs (Lindsey et al., Ameisen et al., 2025), with prompts of our own.

===============  ==================================================  ==========  ================================
behaviour        prompt                                              correct     counterpart
===============  ==================================================  ==========  ================================
two_hop          The capital of the state where Dallas lies is       " Austin"   another city (Oakland)
antonym          ... and the opposite of small is                    " big"      another word (hot)
antonym_french   ... et le contraire de petit est                    " grand"    another word
antonym_spanish  ... y lo contrario de pequeño es                    " grande"   another word
rhyme            ... the cat / ... upon the                          " hat"      another word, another rhyme
acronym          ... the Royal Music Trust has the initials R M      " T"        another last word
sport            ... Babe Ruth plays the sport of                    " baseball" an athlete of another sport
===============  ==================================================  ==========  ================================

Their two-digit addition is the behaviour ``addition``. The wrong answer is always the counterpart's correct one, so it
is as common in these contexts. The city's state or country, the intermediate step of two_hop, is in no prompt. A city
and its counterpart's are both of a state or both of a country, and equally many tokens of SmolLM2.

Antonyms come after a worked example, which is used for nothing else. Words and templates were written for this project;
antonyms and rhymes in English are one token of SmolLM2 each, those in French and Spanish are not.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from saejax.tasks.facts import Fact, draw_fact
from saejax.tasks.recipe import Draft, Recipe, deal, pick

_ANTONYM_TEMPLATES = dict(
    antonym=(
        "The opposite of beautiful is ugly, and the opposite of {word} is",
        "Opposites: beautiful and ugly, {word} and",
        "If it is not beautiful it is ugly; if it is not {word} it is",
    ),
    antonym_french=(
        "Le contraire de vide est plein, et le contraire de {word} est",
        "Les contraires : vide et plein, {word} et",
        "Le mot vide s'oppose au mot plein, et le mot {word} s'oppose au mot",
    ),
    antonym_spanish=(
        "Lo contrario de nuevo es usado, y lo contrario de {word} es",
        "Los contrarios: nuevo y usado, {word} y",
        "La palabra nuevo se opone a la palabra usado, y la palabra {word} se opone a la palabra",
    ),
)
_LANGUAGES = dict(antonym="english", antonym_french="french", antonym_spanish="spanish")


def published_recipes(words: Mapping[str, Any]) -> dict[str, Recipe]:
    """Return the recipes by name.

    Args:
      words: content items, from ``data/behaviours.json``.
    """
    cities = {
        name: [Fact(city, f" {capital}", dict(city=city, kind=name.split()[0])) for city, (_, capital) in items.items()]
        for name, items in words["cities"].items()
    }
    athletes = [
        Fact(name, f" {sport}", dict(athlete=name)) for sport, names in words["athletes"].items() for name in names
    ]
    pairs = {name: list(words["antonyms"][language].items()) for name, language in _LANGUAGES.items()}
    return dict(
        two_hop=Recipe(
            (
                "The capital of the {kind} where {city} lies is",
                "They moved from {city} to the capital of the same {kind}, which is",
                "As we know, {city} is a city; the capital of its {kind} is",
            ),
            cities,
            least=2,
            capacity=lambda **counts: sum(counts.values()),
            drawer=draw_fact,
        ),
        **{
            name: Recipe(templates, dict(pairs=pairs[name]), 2, lambda pairs: 2 * pairs, _draw_partner)
            for name, templates in _ANTONYM_TEMPLATES.items()
        },
        rhyme=Recipe(
            (
                "Here is a little rhyme about the {word},\nand every line that follows ends upon the",
                "She sang a song of the {word},\nand in the second line she rhymed it with the",
                "The first line of the poem names the {word},\nthe second has to rhyme, and names the",
            ),
            dict(pairs=list(words["rhymes"].items())),
            least=2,
            capacity=lambda pairs: 2 * pairs,
            drawer=_draw_partner,
        ),
        acronym=Recipe(
            (
                "The {first} {second} {third} has the initials {a} {b}",
                "Letter by letter, the {first} {second} {third} is {a} {b}",
                "On its door the {first} {second} {third} has three letters, {a} {b}",
            ),
            words["names"],
            least=5,
            capacity=lambda first, second, third: first * second * third,
            drawer=_draw_acronym,
        ),
        sport=Recipe(
            (
                "It is a fact that {athlete} plays the sport of",
                "Everyone who saw {athlete} play knows the sport,",
                "{athlete} became famous in the sport of",
            ),
            dict(athletes=athletes),
            least=12,  # of so many some have another sport
            capacity=lambda athletes: athletes,
            drawer=draw_fact,
        ),
    )


def _draw_partner(rng: np.random.Generator, pairs: list[tuple[str, str]]) -> Callable[[int, str], Draft]:
    """Return the drafter of prompts that name one word of a pair and ask for the other."""
    deck = deal(rng, pairs)

    def draft(i: int, template: str) -> Draft:
        pair = next(deck)
        word, answer = pair[:: 1 if rng.integers(2) else -1]
        others = [(other, way) for other in pairs if other != pair for way in (1, -1)]
        # Another first letter is another first token in every tokenizer.
        other, way = pick(rng, [each for each in others if each[0][:: each[1]][1][0] != answer[0]] or others)
        other_word, wrong = other[::way]
        text, counterpart = template.format(word=word), template.format(word=other_word)
        return Draft(text, f" {answer}", counterpart, f" {wrong}", (pair[0], other[0]))

    return draft


def _draw_acronym(
    rng: np.random.Generator, first: list[str], second: list[str], third: list[str]
) -> Callable[[int, str], Draft]:
    decks = deal(rng, first), deal(rng, second), deal(rng, third)

    def draft(i: int, template: str) -> Draft:
        first_word, second_word, last = (next(deck) for deck in decks)
        other = pick(rng, [word for word in third if word[0] != last[0]])
        text, counterpart = (
            template.format(first=first_word, second=second_word, third=word, a=first_word[0], b=second_word[0])
            for word in (last, other)
        )
        return Draft(text, f" {last[0]}", counterpart, f" {other[0]}", (first_word, second_word, last, other))

    return draft
