"""Scores split over pairs: against the scores of transformers, and against an explicit Jacobian in float64."""

from unittest import mock

import numpy as np
import pytest
import torch
from dense_reference import Dense
from made_graphs import IDS, make_transcoders
from transformers import AutoModelForCausalLM
from transformers.models.qwen3 import modeling_qwen3

from saejax.attribution.graph.data import ERROR, FEATURE, TOKEN
from saejax.attribution.heads import query_key
from saejax.attribution.heads.query_key import split_scores
from saejax.attribution.local.dictionaries import LayerTranscoders
from saejax.attribution.local.model import LocalModel
from saejax.errors import UserError

CASES = [(0, 1, -1), (1, 2, 4), (2, 3, -1), (2, 0, 0)]  # layer, head, position of the query


@pytest.fixture(scope="module", params=["llama", "qwen3", "gpt2", "gemma2"])
def opened(request, tiny_model):
    """A model's folder, its transcoders and its replacement model."""
    lm = tiny_model(request.param)
    made = make_transcoders(lm.config, skip=request.param in ("qwen3", "gemma2"))
    return lm.source.folder, made, LocalModel(lm, LayerTranscoders.of(made), np.array(IDS))


def torch_scores(folder):
    """The scores of all layers in float64, before capping [L, H, T, T], and the weights."""
    seen, softmax = [], torch.nn.functional.softmax
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")

    def record(x, dim=None, dtype=None):
        seen.append((x[0], softmax(x, dim=dim)[0]))
        return softmax(x, dim=dim)

    with torch.no_grad(), mock.patch("torch.nn.functional.softmax", record):
        model(torch.tensor([IDS]), use_cache=False)
    score_LxHxTxT, weight_LxHxTxT = (torch.stack(parts).numpy() for parts in zip(*seen))
    if cap := getattr(model.config, "attn_logit_softcapping", None):
        score_LxHxTxT = cap * np.arctanh(np.clip(score_LxHxTxT / cap, -1 + 1e-9, 1 - 1e-9))
    return score_LxHxTxT, weight_LxHxTxT


def test_all_pairs_add_up_to_the_scores_of_transformers(opened):
    folder, _, local = opened
    score_LxHxTxT, weight_LxHxTxT = torch_scores(folder)
    for layer, head, position in CASES:
        wanted_T = score_LxHxTxT[layer, head, position][: position % len(IDS) + 1]
        weight_T, size = weight_LxHxTxT[layer, head, position], np.abs(wanted_T).max()
        split = split_scores(local, layer, head, position, keys=2)
        assert [score.key for score in split.keys] == np.argsort(-weight_T)[: min(2, len(wanted_T))].tolist()
        for score in split.keys:
            part_N = np.array([pair.part for pair in score.pairs])
            assert score.weight == pytest.approx(weight_T[score.key], rel=1e-5)
            assert abs(score.score - wanted_T[score.key]) < 1e-5 * size
            whole = part_N.sum() + score.rest
            assert abs(whole - wanted_T[score.key]) < 1e-5 * max(size, np.abs(part_N).max())
            assert (np.diff(np.abs(part_N)) <= 0).all() and (layer == 0 or split.query == 0 or score.rest != 0)


@pytest.mark.parametrize("opened", ["qwen3"], indirect=True)
def test_pairs_are_those_of_an_explicit_jacobian(opened):
    folder, made, local = opened
    seen, rotate = [], modeling_qwen3.apply_rotary_pos_emb

    def record(*args, **kwargs):
        seen.append(rotate(*args, **kwargs))
        return seen[-1]

    with mock.patch.object(modeling_qwen3, "apply_rotary_pos_emb", record):
        dense = Dense(folder, made, IDS, normed=False)
    layer, head, position = 2, 3, 5
    q_HxTxK, k_NxTxK = (part[0] for part in seen[layer])
    scale = dense.model.config.head_dim**-0.5
    query_KxS = np.stack([dense._row(x) for x in q_HxTxK[head, position]])
    nodes = local.sources.nodes
    count, told = len(nodes), np.isin(nodes.kind_N, (FEATURE, ERROR, TOKEN))
    index_of = {name: n for n, name in enumerate([*nodes.ids(local.model.config.n_layers), query_key.OWN_BIAS])}
    for score in split_scores(local, layer, head, position, keys=3, pairs=10**6).keys:
        key_KxS = np.stack([dense._row(x) for x in k_NxTxK[head // 2, score.key]])
        wanted_SxS = scale * query_KxS.T @ key_KxS
        pair_SxS = np.zeros((count + 1, count + 1))
        for pair in score.pairs:
            pair_SxS[index_of[pair.query], index_of[pair.key]] = pair.part
        ours_SxS = pair_SxS[:count, :count][np.ix_(told, told)]
        assert np.abs(ours_SxS - wanted_SxS).max() < 1e-5 * np.abs(wanted_SxS).max()
        assert (np.abs(wanted_SxS) > 1e-3 * np.abs(wanted_SxS).max()).sum() > 500
        assert abs(score.rest) < 1e-6 * max(abs(pair.part) for pair in score.pairs)


@pytest.mark.parametrize("count", [1, 7, 10_000])
def test_the_largest_pairs_in_blocks(monkeypatch, count):
    rng = np.random.default_rng(0)
    query_KxS, key_KxS = rng.normal(size=(2, 5, 40)).astype(np.float32) * rng.lognormal(0, 2, (2, 1, 40))
    query_KxS[:, ::3], key_KxS[:, 1::4] = 0, 0
    monkeypatch.setattr(query_key, "_BLOCK", 90)
    query_N, key_N, part_N = query_key._largest(query_KxS, key_KxS, count)
    wanted_SxS = query_KxS.T.astype(np.float64) @ key_KxS
    np.testing.assert_allclose(part_N, wanted_SxS[query_N, key_N], rtol=1e-12)
    wanted_X = -np.sort(-np.abs(wanted_SxS[wanted_SxS != 0]))[:count]
    np.testing.assert_allclose(np.abs(part_N), wanted_X, rtol=1e-12)
    assert len(query_key._largest(query_KxS, 0 * key_KxS, count)[2]) == 0


@pytest.mark.parametrize(
    "head,message",
    [
        ((4, 0, -1), "no head 4.0: expected a layer from 0 to 3 and a head from 0 to 3"),
        ((0, 4, -1), "no head 0.4"),
        ((-1, 0, -1), "no head -1.0"),
        ((0, 0, 3), "no position 3 for head 0.0: it has 3 tokens, expected -3 to 2"),
        ((0, 0, -4), "no position -4"),
    ],
)
def test_heads_and_positions_that_are_not_there(lm, head, message):
    with pytest.raises(UserError, match=message):
        query_key.check_head(lm.config, *head, tokens=3)
