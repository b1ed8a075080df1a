"""Shortest paths: "A-B C-D B-C A> >D next" asks for the node after A on a shortest path to D, "far" for its length.

Edges come in random order. The variables of a question are the nodes at one and at two steps from the start: the
frontiers of a breadth-first search.
"""

import itertools
from typing import ClassVar

import numpy as np

from saejax.ground_truth.algorithms.questions import START, Algorithm, Questions, is_fresh
from saejax.tasks.behaviours import Prompt

_FAR = 99  # distance between nodes without a path


class Paths(Algorithm):
    """Questions on random graphs.

    Args:
      nodes: number of nodes.
      edges: largest number of edges; the smallest is nodes - 1.
    """

    required: ClassVar = dict(next=0.95, far=0.95)
    behaviours = ("next", "far")

    def __init__(self, nodes: int, edges: int):
        self._pair_Ex2 = np.array(list(itertools.combinations(range(nodes), 2)))
        self._nodes, self._most = nodes, edges
        self._names = [chr(ord("A") + node) for node in range(nodes)]
        pairs = (f"{self._names[first]}-{self._names[second]}" for first, second in self._pair_Ex2)
        lengths = map(str, range(1, nodes))
        starts, goals = ([f"{name}>" for name in self._names], [f">{name}" for name in self._names])
        self.words = (START, *pairs, *starts, *goals, "next", "far", *self._names, *lengths)

    def draw(self, kind: str, count: int, rng: np.random.Generator) -> Questions:
        """Return random questions; see ``Algorithm.draw``."""
        edge_BxM, size_B, far_BxNxN = self._graphs(count, rng)
        start_B = rng.integers(self._nodes, size=count)
        goal_B = (start_B + rng.integers(1, self._nodes, size=count)) % self._nodes
        rows = np.arange(count)
        ids_BxT = np.zeros((count, 1 + self._most + 3), np.int32)
        ids_BxT[:, 1 : 1 + self._most] = np.where(np.arange(self._most)[None] < size_B[:, None], 1 + edge_BxM, 0)
        query = (self._word("start", start_B), self._word("goal", goal_B), self.number([kind])[0])
        for offset, word in enumerate(query):
            ids_BxT[rows, 1 + size_B + offset] = word
        right_BxV = np.zeros((count, len(self.words)), bool)
        if kind == "far":
            right_BxV[rows, self._word("length", far_BxNxN[rows, start_B, goal_B] - 1)] = True
        else:
            right_BxV[:, self._word("node", np.arange(self._nodes))] = _steps(far_BxNxN, start_B, goal_B)
        return Questions(
            ids_BxT, (3 + size_B)[:, None].astype(np.int32), right_BxV[:, None], self._fresh(edge_BxM, size_B)
        )

    def _word(self, kind: str, index: np.ndarray) -> np.ndarray:
        """Return the token ids of words of a kind (start, goal, node, length)."""
        first = {"start": "A>", "goal": ">A", "node": "A", "length": "1"}[kind]
        return self.words.index(first) + index

    def _graphs(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return connected graphs: edges in random order [B, M], their number [B] and distances [B, N, N]."""
        kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        # Rejected, not repaired: all connected graphs of a size stay equally likely.
        while sum(len(part[1]) for part in kept) < count:
            size_B = rng.integers(self._nodes - 1, self._most + 1, size=2 * count)
            # A random order of all pairs, of which the first ones are the edges.
            edge_BxM = np.argsort(rng.random((len(size_B), len(self._pair_Ex2))), axis=1)[:, : self._most]
            far_BxNxN = self._distances(edge_BxM, size_B)
            whole_B = (far_BxNxN < _FAR).all((1, 2))
            kept.append((edge_BxM[whole_B], size_B[whole_B], far_BxNxN[whole_B]))
        edge_BxM, size_B, far_BxNxN = (np.concatenate(part)[:count] for part in zip(*kept, strict=True))
        return edge_BxM, size_B, far_BxNxN

    def _distances(self, edge_BxM: np.ndarray, size_B: np.ndarray) -> np.ndarray:
        """Return the distances between all nodes, by breadth-first search, [B, N, N]."""
        there_BxM = np.arange(self._most)[None] < size_B[:, None]
        near_BxNxN = np.zeros((len(size_B), self._nodes, self._nodes), bool)
        row_K, column_K = np.nonzero(there_BxM)
        first_K, second_K = self._pair_Ex2[edge_BxM[row_K, column_K]].T
        near_BxNxN[row_K, first_K, second_K] = near_BxNxN[row_K, second_K, first_K] = True
        reached_BxNxN = np.broadcast_to(np.eye(self._nodes, dtype=bool), near_BxNxN.shape).copy()
        far_BxNxN = np.where(reached_BxNxN, 0, _FAR)
        for step in range(1, self._nodes):
            reached_BxNxN |= reached_BxNxN @ near_BxNxN
            far_BxNxN = np.where(reached_BxNxN & (far_BxNxN == _FAR), step, far_BxNxN)
        return far_BxNxN

    def _fresh(self, edge_BxM: np.ndarray, size_B: np.ndarray) -> np.ndarray:
        """Return which graphs are kept from training, by their set of edges."""
        there_BxM = np.arange(self._most)[None] < size_B[:, None]
        # A bit for each edge: the same graph in another order of edges is the same question.
        return is_fresh((there_BxM << edge_BxM).sum(1))

    def prompt(self, behaviour: str, split: str, rng: np.random.Generator) -> Prompt | None:
        """Return a prompt; see ``Algorithm.prompt``."""
        edges, size_1, far_1xNxN = self._graphs(1, rng)
        if not self._fresh(edges, size_1)[0]:
            return None
        edge_M, far_NxN = edges[0, : size_1[0]], far_1xNxN[0]
        start, goal = rng.permutation(self._nodes)[:2].tolist()
        ask = self._next if behaviour == "next" else self._length
        question = ask(edge_M, far_NxN, start, goal, rng)
        if not question:
            return None
        right, wrong, counterpart_M = question
        labels = [("distance", str(far_NxN[start, goal]))]
        for name, far in zip(self._names, far_NxN[start], strict=True):
            labels += [(f"near_{name}", "yes" if far == 1 else "no"), (f"two_{name}", "yes" if far == 2 else "no")]
        texts = [self._text(edges_M, start, goal, behaviour) for edges_M in (edge_M, counterpart_M)]
        return Prompt(behaviour, split, texts[0], f" {right}", f" {wrong}", texts[1], f" {wrong}", labels=tuple(labels))

    def _next(
        self, edge_M: np.ndarray, far_NxN: np.ndarray, start: int, goal: int, rng: np.random.Generator
    ) -> tuple[str, str, np.ndarray] | None:
        """Return the next node, another neighbour, and the graph with these two swapped; None without such a pair."""
        (steps,) = np.nonzero(_steps(far_NxN[None], np.array([start]), np.array([goal]))[0])
        detours = [int(node) for node in np.flatnonzero(far_NxN[start] == 1) if node not in steps]
        # One shortest way only, so that one answer is right; at distance 1 the question itself names it.
        if len(steps) != 1 or far_NxN[start, goal] < 2 or not detours:
            return None
        right, wrong = int(steps[0]), detours[rng.integers(len(detours))]
        place_N = np.arange(self._nodes)
        place_N[[right, wrong]] = wrong, right
        swapped_Mx2 = np.sort(place_N[self._pair_Ex2[edge_M]], axis=1)
        counterpart_M = (swapped_Mx2[:, None] == self._pair_Ex2[None]).all(2).argmax(1)
        return self._names[right], self._names[wrong], counterpart_M

    def _length(
        self, edge_M: np.ndarray, far_NxN: np.ndarray, start: int, goal: int, rng: np.random.Generator
    ) -> tuple[str, str, np.ndarray] | None:
        """Return the distance, another distance, and a graph with as many edges that has it; None without one."""
        candidates, size_B, far_BxNxN = self._graphs(20, rng)
        # With as many edges, so that the prompts differ in nothing but the graph.
        length, length_B = far_NxN[start, goal], far_BxNxN[:, start, goal]
        for place in np.flatnonzero((size_B == len(edge_M)) & (length_B != length)):
            return str(length), str(length_B[place]), candidates[place, : size_B[place]]
        return None

    def _text(self, edge_M: np.ndarray, start: int, goal: int, sort: str) -> str:
        edges = (self.words[1 + edge] for edge in edge_M)
        return " ".join([*edges, f"{self._names[start]}>", f">{self._names[goal]}", sort])


def _steps(far_BxNxN: np.ndarray, start_B: np.ndarray, goal_B: np.ndarray) -> np.ndarray:
    """Return which nodes come next on a shortest path, bool [B, N]."""
    rows = np.arange(len(start_B))
    left_BxN = far_BxNxN[rows, :, goal_B]
    return (far_BxNxN[rows, start_B] == 1) & (left_BxN == left_BxN[rows, start_B][:, None] - 1)
