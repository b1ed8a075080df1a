"""Scores of the messages of chats by role, such as the user's and the assistant's.

A store holds token ids alone, so a message is recognised by the tokens with which the model's chat template opens
messages of its role, and lasts to the next such tokens. What stands before the first message has no role.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from saejax.activations.documents import Documents
from saejax.activations.store import Store
from saejax.dictionaries import Dictionary
from saejax.evaluation.loss_recovered import Losses
from saejax.evaluation.reconstruction import read_rows, reconstruct
from saejax.evaluation.results import RoleScores
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import bos_tokens

_CONTENTS = ("qz1zq", "qz2zq", "qz3zq")  # of messages: no template writes such words
_IN_PLACE = ("Xk9", "\nXk9\n", "\n\nXk9\n\n", " Xk9")  # of one of them: other letters, and white space that merges
Openers = dict[str, tuple[int, ...]]  # token ids that open a message, by role


def message_openers(tokenizer: Any) -> Openers:
    """Return the token ids that open a message of each role; none if the template does not tell roles apart.

    A template is a program: what it writes around messages is read off chats whose messages are known. A system
    message that the template writes into the user's is part of it.
    """
    around = _tokens_around(tokenizer, "user", "assistant", "user")
    if around is None:
        return {}
    before, to_assistant, to_user, end = around
    # The first message of a user has no other before it, and the last one ends as those before an assistant's do.
    user = to_user[len(to_user) - _common(before[::-1], to_user[::-1]) :]
    assistant = to_assistant[_common(end, to_assistant) :] or to_assistant
    if not user or not assistant or user == assistant:
        return {}
    openers = dict(user=user, assistant=assistant)
    of_system = _tokens_around(tokenizer, "system", "user")
    front = before[: len(before) - len(user)]  # of all chats
    system = of_system[0] if of_system else []
    system = system[len(front) :] if system[: len(front)] == front else system
    if of_system and system and of_system[1][-len(user) :] == user:
        # Unless the template writes it as a message of another role.
        shorter = ((opener, min(len(system), len(opener))) for opener in (user, assistant))
        if all(_common(system[::-1], opener[::-1]) < size for opener, size in shorter):
            openers["system"] = system
    return {role: tuple(ids) for role, ids in openers.items()}


def _tokens_around(tokenizer: Any, *roles: str) -> list[list[int]] | None:
    """Return the token ids before, between and after messages of these roles; None: there is no such chat.

    They are those that stay where a message has another content, as its ends may become one token with the template's.
    """

    def encode(contents: Sequence[str]) -> list[int]:
        messages = [dict(role=role, content=content) for role, content in zip(roles, contents, strict=True)]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    contents, starts, stops = _CONTENTS[: len(roles)], [], [0]
    try:
        ids = encode(contents)
        for i in range(len(roles)):
            others = [encode([*contents[:i], content, *contents[i + 1 :]]) for content in _IN_PLACE]
            starts.append(min(_common(ids, other) for other in others))
            stops.append(len(ids) - min(_common(ids[::-1], other[::-1]) for other in others))
    except Exception:  # of any type: a template is a program that refuses roles in its own words
        return None
    starts.append(len(ids))
    if not all(start < stop for start, stop in zip(starts, stops[1:], strict=False)):  # a message is left out
        return None
    before, *others = [ids[stop:start] for stop, start in zip(stops, starts, strict=True)]
    # A BOS token stands in front of each piece of text, unless every message begins with it.
    bos = getattr(tokenizer, "bos_token_id", None)
    return [before[before[:1] == [bos] and not any(bos in other for other in others) :], *others]


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens at the beginning are the same."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def roles_of_tokens(documents: Documents, openers: Openers, front: Sequence[int]) -> list[np.ndarray]:
    """Return the role of every token of each document, its index in ``openers``; -1: none.

    A document that goes on in the middle of a text goes on with the role at the end of the piece before, if that is
    among the documents.

    Args:
      documents: pieces of texts.
      openers: result of ``message_openers``.
      front: special tokens that stand in front of documents, where they have no role.
    """
    roles = [np.full(length, -1, np.int8) for length in documents.lengths_N.tolist()]
    source_N, start_N = documents.column("source"), documents.column("start")
    # Pieces that follow one another in a text, as their tokens that have roles: what opens a message may be cut, too.
    runs: list[list[tuple[np.ndarray, np.ndarray]]] = []
    before = (-1, -1)  # source of the last piece, and where the next one would start
    for document in np.lexsort((start_N, source_N)).tolist():
        ids_T, source, start = documents[document], int(source_N[document]), int(start_N[document])
        count = len(front) if ids_T[: len(front)].tolist() == [*front] else 0
        if not start or before != (source, start):
            runs.append([])
        # The first message of a text may open with what stands in front of it.
        first = count if start else 0
        runs[-1].append((ids_T[first:], roles[document][first:]))
        before = (source, start + len(ids_T) - count)
    for run in runs:
        ids_T = np.concatenate([piece_T for piece_T, _ in run])
        role_T = np.full(len(ids_T), -1, np.int8)
        for position, role in _openings(ids_T, openers):
            role_T[position:] = role
        ends = np.cumsum([len(piece_T) for piece_T, _ in run])
        for (_, of_piece), part in zip(run, np.split(role_T, ends[:-1]), strict=True):
            of_piece[:] = part  # a view of what is returned
    return roles


def _openings(ids_T: np.ndarray, openers: Openers) -> Iterator[tuple[int, int]]:
    """Yield where messages begin, ascending, and the index of their role; of two at one place the longer counts."""
    role_of_place: dict[int, int] = {}
    for role, opener in sorted(enumerate(openers.values()), key=lambda pair: len(pair[1])):
        count = len(ids_T) - len(opener) + 1
        if count > 0:
            is_here = np.all([ids_T[i : i + count] == token for i, token in enumerate(opener)], axis=0)
            role_of_place |= dict.fromkeys(np.flatnonzero(is_here).tolist(), role)
    yield from sorted(role_of_place.items())


@dataclasses.dataclass(frozen=True)
class TokenRoles:
    """The roles of the tokens of held-out chats."""

    rows: Mapping[str, np.ndarray]  #: the store's rows of each role that occurs
    #: of each held-out document the role of every token, [T]: its place in ``rows`` from 1 on; 0: none.
    groups: Sequence[np.ndarray]


def find_roles(lm: LanguageModel, store: Store, sites: Sequence[str]) -> TokenRoles | None:
    """Return the roles of held-out tokens; None where the held-out text has no two roles.

    Args:
      lm: the model whose chat template the text was written with.
      store: the store.
      sites: the sites of which no row is an attention sink.
    """
    openers = message_openers(lm.tokenizer)
    if not openers:
        return None
    first = store.documents.train_count
    held_out = store.documents.select(np.arange(first, len(store.documents)))
    # As the store's documents begin, whatever the tokenizer does.
    front = bos_tokens(lm.tokenizer, store.bos)
    by_document = roles_of_tokens(held_out, openers, front)
    rows = store.rows("held_out", *dict.fromkeys(sites))
    document_N, position_N, _ = store.tokens(rows)
    role_N = np.concatenate(by_document)[held_out.starts_N[document_N - first] + position_N]
    present = [index for index in range(len(openers)) if np.any(role_N == index)]
    if len(present) < 2:
        return None
    # The last place holds tokens without a role, -1.
    group_of_role = np.zeros(len(openers) + 1, np.int32)
    group_of_role[present] = 1 + np.arange(len(present))
    by_role = {[*openers][index]: rows[role_N == index] for index in present}
    return TokenRoles(by_role, [group_of_role[roles_T] for roles_T in by_document])


def score_roles(
    roles: TokenRoles,
    dictionaries: Sequence[Dictionary],
    losses: Sequence[Losses],
    store: Store,
    sites: Sequence[str],
    mesh: Mesh,
    batch: int,
) -> list[dict[str, RoleScores]]:
    """Return the scores on the messages of each role, by dictionary.

    Args:
      roles: result of ``find_roles``.
      dictionaries: dictionaries that ``reconstruct`` scores together.
      losses: the losses of each dictionary, with the groups of ``roles``.
      store: the store.
      sites: the sites that the dictionaries read and predict.
      mesh: the devices.
      batch: tokens per run of the program.
    """
    scored: list[dict[str, RoleScores]] = [{} for _ in dictionaries]
    for place, (role, rows) in enumerate(roles.rows.items()):
        reconstructions = reconstruct(dictionaries, read_rows(store, rows, sites, batch), mesh, batch)
        for by_role, score, loss in zip(scored, reconstructions, losses, strict=True):
            # Losses are of some documents, in which the last roles may not occur.
            of_role = loss.groups[place] if place < len(loss.groups) else None
            figures = of_role.figures() if of_role and of_role.tokens else {}
            by_role[role] = RoleScores(score.tokens, **score.figures(), **figures)
    return scored
