"""Edits while text is generated and scored, and activations that are drawn, against hooks in transformers in fp64."""

import functools

import numpy as np
import pytest
from plain_edits import FEATURES, SITE, PlainDictionary

from saejax.errors import UserError
from saejax.tasks.likelihood import loglikelihoods


def next_ids(llama, b, edits_of, count):
    """Greedy ids after prompt b, each by a whole plain forward pass with edits_of(prompt length)."""
    ids, prompt = list(llama.prompts[b]), len(llama.prompts[b])
    for _ in range(count):
        ids.append(int(llama.plain.logits(ids, *edits_of(b, prompt))[-1].argmax()))
    new = ids[prompt:]
    return tuple(new[: new.index(0)] if 0 in new else new)


@pytest.mark.slow
def test_edits_in_generation_equal_plain_hooks(llama):
    """Every new token is edited, or those at some positions; what was given for prompts is for prompts alone."""
    plain_sae, given, steps = PlainDictionary(llama.sae), 2 * llama.given_BxTxK, (("last", 3.0), ((6, 11), -2.0))
    edits = [llama.sae.steer(FEATURES, amount, positions) for positions, amount in steps]

    def plain(b, prompt, given_to=0, last_from=0):
        def call(x_TxD):
            new = lambda k, t, f: given[b, min(t, 12), k] if t < max(prompt, given_to) else f  # noqa: E731
            x_TxD = plain_sae.edited(x_TxD, x_TxD, FEATURES, new)
            for positions, amount in steps:
                new = lambda k, t, f, a=amount: f + a  # noqa: E731
                x_TxD = plain_sae.edited(x_TxD, x_TxD, FEATURES, new, positions, prompt=max(prompt, last_from))
            return x_TxD

        return [(SITE, call)]

    def texts(**reading):
        return [next_ids(llama, b, functools.partial(plain, **reading), 8) for b in range(3)]

    found = llama.lm.generate(llama.tokens, 8, edits=[llama.sae.patch(FEATURES, given), *edits])
    assert [done.ids for done in found] == texts()
    for reading in (dict(given_to=99), dict(last_from=99)):  # other readings give other texts
        assert texts() != texts(**reading)


def test_edits_in_scoring_equal_plain_hooks(llama):
    """In several batches, in another order than given."""
    plain_sae = PlainDictionary(llama.sae)
    contexts, continuations = [ids[:-3] for ids in llama.prompts], [ids[-3:] for ids in llama.prompts]
    edits = [llama.sae.patch(FEATURES, llama.given_BxTxK, error="drop")]
    found = loglikelihoods(llama.lm, contexts, continuations, edits, batch_tokens=16)
    for b, ids in enumerate(llama.prompts):

        def call(x_TxD, b=b):
            return plain_sae.edited(x_TxD, x_TxD, FEATURES, lambda k, t, f: llama.given_BxTxK[b, t, k], error="drop")

        logits_TxV = llama.plain.logits(ids, (SITE, call))
        logp_TxV = logits_TxV - np.log(np.exp(logits_TxV).sum(axis=1, keepdims=True))
        expected = logp_TxV[np.arange(len(ids) - 4, len(ids) - 1), ids[-3:]].sum()
        assert found[b].total == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("new_tokens", [0, pytest.param(8, marks=pytest.mark.slow)])
def test_redrawn_activations_come_from_pools_in_prompts_and_new_tokens(llama, new_tokens):
    """The same in every text, or draws of its own for each."""
    plain_sae, pools = PlainDictionary(llama.sae), [[4.0, -3.0], [], [6.0]]

    def values(features, pools, **texts):
        edit = llama.sae.redraw(features, pools, 40, seed=3, **texts)
        return edit, np.asarray(edit.offset.values_BxTxN)

    edit, drawn_1xTxK = values(FEATURES, pools)
    own, drawn_BxTxK = values(FEATURES, pools, texts=[5, 2, 5])
    assert set(drawn_1xTxK[0, :, 0].tolist()) == {4.0, -3.0} and (drawn_1xTxK[0, :, 2] == 6).all()
    assert (drawn_BxTxK[0] != drawn_BxTxK[1]).any() and (drawn_BxTxK[0] == drawn_BxTxK[2]).all()
    reversed_1xTxK = values(FEATURES[::-1], pools[::-1])[1][..., ::-1]  # each feature has draws of its own
    np.testing.assert_array_equal(reversed_1xTxK, drawn_1xTxK)
    for redraw, drawn in ((edit, np.repeat(drawn_1xTxK, 3, axis=0)), (own, drawn_BxTxK)):

        def plain(b, prompt=None, drawn=drawn):
            def new(k, t, f):
                return drawn[b, t, k] if pools[k] else f

            return [(SITE, lambda x_TxD: plain_sae.edited(x_TxD, x_TxD, FEATURES, new, "fires"))]

        llama.check([redraw], plain)
    if new_tokens:
        found = llama.lm.generate(llama.tokens, new_tokens, edits=[own])
        assert [done.ids for done in found] == [next_ids(llama, b, plain, new_tokens) for b in range(3)]
    with pytest.raises(UserError, match="an edit is for 2 texts, but it is used on 3"):
        llama.lm(llama.tokens, edits=[llama.sae.redraw(FEATURES, pools, 40, texts=[0, 1])])
    with pytest.raises(UserError, match="the pool of feature 3 holds NaN"):
        llama.sae.redraw([3], [[np.nan]], 40)
