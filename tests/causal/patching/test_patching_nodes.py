"""Nodes of heads: exact effects beside torch hooks, what chooses and judges, and estimates that know nothing."""

import dataclasses

import numpy as np
import pytest
from scipy.stats import spearmanr

from saejax.causal.clustered import of_prompts
from saejax.causal.patching.heads import NODES
from saejax.causal.patching.node_patches import NodePlaces, patch_exactly
from saejax.causal.patching.nodes import ESTIMATES, HeadPatching, NodeTable, judge
from saejax.causal.patching.run import differences
from saejax.settings import PatchConfig
from saejax.tasks.behaviours import Prompt

CONFIG = PatchConfig(top=4, bootstrap=100, batch_rows=24)
TEXTS = [
    ("The cat near the dogs", "The dogs that the year"),
    ("The cat near the dogs and so on", "The dogs that the year and so on"),
]


def pairs_of(texts, split="test"):
    return [Prompt("b", split, a, " runs", " far", b) for a, b in texts]


def hooked(tiny, tiny_torch, prompt, node, layer, head, position):
    """By how much the logit difference falls, by hooks in the PyTorch model."""
    import torch

    own, width = (tiny.tokenize([text]).ids_BxT for text in (prompt.text, prompt.counterpart)), tiny.config.d_head
    module = getattr(
        tiny_torch.model.layers[layer].self_attn, dict(query="q", key="k", value="v", output="o")[node] + "_proj"
    )
    where, kept = slice(head * width, (head + 1) * width), []

    def run(ids_BxT, change):
        def into(module, args):
            return (change(args[0]),)

        def out(module, args, value):
            return change(value)

        handle = module.register_forward_pre_hook(into) if node == "output" else module.register_forward_hook(out)
        with torch.no_grad():
            logits_V = tiny_torch(torch.tensor(ids_BxT)).logits[0, -1]
        handle.remove()
        return float(logits_V[tiny.token_id(" runs")] - logits_V[tiny.token_id(" far")])

    def put(x):
        x = x.clone()
        x[0, position, where] = kept[0][0, position, where]
        return x

    ids_BxT, other_BxT = own
    corrupted = run(other_BxT, lambda x: kept.append(x.clone()) or x)
    clean = run(ids_BxT, lambda x: x)
    return clean, corrupted, clean - run(ids_BxT, put)


def test_exact_effects_equal_hooks(tiny, tiny_torch):
    """Of every kind, in pairs of two lengths; the shorter one has no position before its first."""
    prompts = pairs_of(TEXTS)
    short, long = (int(tiny.tokenize([prompt.text]).lengths_B[0]) for prompt in prompts)
    nodes = [(kind, layer, 1, position) for layer, kind in enumerate(NODES) for position in (-2, -long)]
    places = NodePlaces(*(np.array(part, object if n == 0 else int) for n, part in enumerate(zip(*nodes, strict=True))))
    said = []
    found = patch_exactly(tiny, prompts, places, 24, lambda done, total: said.append((done, total)))
    assert said[0] == (0, said[-1][0]) and said[-1][0] == said[-1][1] == 2 * 2 + 4 * 2 + 4
    for p, prompt in enumerate(prompts):
        for n, (kind, layer, head, position) in enumerate(nodes):
            if position < -(short, long)[p]:
                assert np.isnan(found.effect_NxP[n, p])
                continue
            clean, corrupted, effect = hooked(tiny, tiny_torch, prompt, kind, layer, head, position)
            np.testing.assert_allclose(found.effect_NxP[n, p], effect, atol=2e-4)
            np.testing.assert_allclose([found.clean_P[p], found.corrupted_P[p]], [clean, corrupted], atol=2e-4)
    assert np.nanmax(np.abs(found.effect_NxP)) > 1e-2


@pytest.fixture(scope="module")
def patching(tiny):
    return HeadPatching(tiny, "b", pairs_of(TEXTS[1:], "train"), pairs_of(TEXTS), CONFIG)


def test_train_pairs_choose_and_test_pairs_judge(tiny, patching):
    table = patching.table
    results = patching.results(
        differences(patching.clean_P, patching.corrupted_P, {}, of_prompts(pairs_of(TEXTS), 100, 0))
    )
    # Before the first token that differs nothing changes; all other nodes are there, once.
    assert (table.change > 0).all() and results.nodes == len(table.node)
    assert len({*zip(*(getattr(table, name) for name in NodePlaces._fields), strict=True)}) == len(table.node)
    measured = ~np.isnan(table.effect)
    chosen = np.unique([*np.flatnonzero(table.drawn), *(n for name in ESTIMATES for n in table.first(name, 4))])
    assert np.flatnonzero(measured).tolist() == chosen.tolist() and results.measured == len(chosen)
    order = np.argsort(-table.atp_star, kind="stable")[:4]
    assert [node.atp_star for node in results.strongest] == table.atp_star[order].tolist()
    places = NodePlaces(*(getattr(table, name)[order] for name in NodePlaces._fields))
    effect_NxP = patch_exactly(tiny, pairs_of(TEXTS), places).effect_NxP
    own = [node.effect.mean for node in results.strongest]
    np.testing.assert_allclose(own, np.nanmean(effect_NxP, axis=1), atol=1e-5)
    drawn = np.flatnonzero(table.drawn)
    for name, judged in results.estimates.items():
        guess, size = np.abs(getattr(table, name)[drawn]), np.abs(table.effect[drawn])
        assert judged.correlation.mean == pytest.approx(spearmanr(guess, size).statistic)
        assert judged.correlation.low <= judged.correlation.mean <= judged.correlation.high
        assert judged.top == pytest.approx(np.abs(table.effect[table.first(name, 4)]).mean())
    assert results.random.mean == pytest.approx(np.abs(table.effect[drawn]).mean())
    assert results.estimates["atp_star"].correlation.mean > 0.5  # a small model, nearly linear


def test_pairs_without_a_difference_have_no_nodes(tiny):
    same = [dataclasses.replace(prompt, counterpart=prompt.text) for prompt in pairs_of(TEXTS)]
    patching = HeadPatching(tiny, "b", same, same, CONFIG)
    results = patching.results(differences(patching.clean_P, patching.corrupted_P, {}, of_prompts(same, 100, 0)))
    assert (results.nodes, results.measured, results.random, results.estimates) == (0, 0, None, {})
    assert results.difference.mean == 0 and results.strongest == ()


def made_up(rng, guess_N):
    """Effects of groups of ten nodes that hang together, a few of them strong."""
    count, word = len(guess_N), np.full(len(guess_N), "key", object)
    effect_N = np.repeat(rng.standard_t(2, size=count // 10), 10) * rng.normal(1.0, 0.2, size=count)
    drawn_N = np.isin(np.arange(count), rng.permutation(count)[:60])
    zero_N = np.zeros(count, int)
    guesses = dict.fromkeys(ESTIMATES, guess_N)
    return NodeTable(
        word, zero_N, zero_N, zero_N, **guesses, effect=effect_N, low=effect_N, high=effect_N, drawn=drawn_N
    )


def test_an_estimate_that_knows_nothing_is_called_better_no_more_often_than_its_level():
    rng, runs = np.random.default_rng(4), 400
    found = [judge(made_up(rng, rng.random(300)), "atp", 20, [0]) for _ in range(runs)]
    for level in (0.05, 0.2):
        assert np.mean([one.p_value <= level for one in found]) <= level + 3 * (level * (1 - level) / runs) ** 0.5
    assert abs(np.mean([one.correlation.mean for one in found])) < 0.03


def test_an_estimate_that_is_the_effect_is_found():
    rng = np.random.default_rng(5)
    table = made_up(rng, rng.random(300))
    table = dataclasses.replace(table, atp=-table.effect)  # the sign does not count
    judged = judge(table, "atp", 20, [0])
    assert judged.correlation.mean == pytest.approx(1.0) and judged.p_value < 1e-6
    assert judged.top == pytest.approx(np.sort(np.abs(table.effect))[-20:].mean())
