"""Nodes of heads: exact patches in fp64, estimates by hand, GradDrop beside a frozen layer, and saturated attention."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.causal.patching import heads
from saejax.causal.patching.atp import estimate_nodes
from saejax.causal.patching.heads import NODES, NodePatch
from saejax.models import decoder
from saejax.models.attention import AttentionSpec, whole_prompt_tables
from saejax.models.decoder import run_layers
from saejax.tasks.behaviours import Prompt

TEXTS = ("The cat near the dogs", "The dogs that the year")  # as many tokens


@pytest.fixture(scope="module")
def ids(tiny):
    ids_2xT = tiny.tokenize(TEXTS).ids_BxT
    assert (tiny.tokenize(TEXTS).lengths_B == ids_2xT.shape[1]).all()
    return ids_2xT


def arguments(tiny, ids_BxT):
    answers = [tiny.token_id(" runs"), tiny.token_id(" far")]
    rows = len(ids_BxT)
    return ids_BxT, np.full(rows, ids_BxT.shape[1] - 1, np.int32), np.tile(np.array(answers, np.int32), (rows, 1))


def exact(model, ids, chosen):
    """By how much the logit difference falls with each node patched; nodes are (kind, layer, position, head)."""
    config, params = model.config, model.params
    other = heads.record_heads(config, params, ids[1:])
    rows = [(NODES.index(kind), layer, head, position) for kind, layer, position, head in chosen]
    vectors = [np.asarray(getattr(other, kind))[layer, 0, t, h] for kind, layer, t, h in chosen]
    clean = [(NODES.index("query"), -1, 0, 0)]  # nothing is in layer -1
    patch = NodePatch(*(jnp.array(part, jnp.int32) for part in zip(*clean, *rows, strict=True)),
                      jnp.array([0 * vectors[0], *vectors]))  # fmt: skip
    found_R = heads.patch_nodes(config, params, *arguments(model, np.tile(ids[:1], (len(rows) + 1, 1))), patch)
    return np.asarray(found_R)[0] - np.asarray(found_R)[1:]


def estimates(model, ids, dropped=-1):
    config, params = model.config, model.params
    clean, other = (heads.record_heads(config, params, ids[n : n + 1]) for n in (0, 1))
    slope = heads.slopes(config, params, *arguments(model, ids[:1]), jnp.int32(dropped))
    return heads.effects(config, clean, other, slope)


@pytest.mark.parametrize("kind", NODES)
def test_a_patched_node_equals_a_hook_in_fp64(tiny, tiny_torch, ids, kind):
    import torch

    layer, position, head, width = 2, 3, 1, tiny.config.d_head
    module = tiny_torch.model.layers[layer].self_attn
    name = dict(query="q_proj", key="k_proj", value="v_proj", output="o_proj")[kind]
    part, own, kept = getattr(module, name), slice(head * width, (head + 1) * width), []

    def run(ids_T, change):
        if kind == "output":  # what the output projection reads
            handle = part.register_forward_pre_hook(lambda m, args: (change(args[0]),))
        else:
            handle = part.register_forward_hook(lambda m, args, out: change(out))
        try:
            with torch.no_grad():
                logits_V = tiny_torch(torch.tensor(ids_T[None])).logits[0, -1]
        finally:
            handle.remove()
        return float(logits_V[tiny.token_id(" runs")] - logits_V[tiny.token_id(" far")])

    def put(x):
        x = x.clone()
        x[0, position, own] = kept[0][0, position, own]
        return x

    run(ids[1], lambda x: kept.append(x.clone()) or x)
    clean = run(ids[0], lambda x: x)
    wanted = clean - run(ids[0], put)
    assert abs(wanted) > 1e-3
    np.testing.assert_allclose(exact(tiny, ids, [(kind, layer, position, head)]), wanted, atol=2e-4)


def test_estimates_equal_exact_effects_of_small_changes(tiny, ids):
    """Both are first-order, so that a thousandth of the change gives a thousandth of the effect."""
    config, params = tiny.config, tiny.params
    clean, other = (heads.record_heads(config, params, ids[n : n + 1]) for n in (0, 1))
    slope = heads.slopes(config, params, *arguments(tiny, ids[:1]), jnp.int32(-1))
    near = jax.tree.map(lambda a, b: a + 1e-3 * (b - a), clean, other)
    one, few = heads.effects(config, clean, other, slope), heads.effects(config, clean, near, slope)
    for name in ("query", "key"):
        fixed, plain = getattr(few, f"{name}_fixed"), getattr(few, name)
        np.testing.assert_allclose(fixed, plain, atol=0.02 * float(jnp.abs(plain).max()))
        assert float(jnp.abs(getattr(one, f"{name}_fixed") - getattr(one, name)).max()) > 1e-3
    np.testing.assert_allclose(1e3 * few.output, one.output, atol=0.01 * float(jnp.abs(one.output).max()))


def test_the_fix_of_a_query_and_a_key_by_hand(tiny, ids):
    """Softmax over explicit scores, one row at a time, in fp64."""
    config, params, layer, position = tiny.config, tiny.params, 1, 2
    clean, other = (heads.record_heads(config, params, ids[n : n + 1]) for n in (0, 1))
    slope = heads.slopes(config, params, *arguments(tiny, ids[:1]), jnp.int32(-1))
    found = heads.effects(config, clean, other, slope)
    q, k, v, z, g = (
        np.asarray(a, np.float64)[layer, 0] for a in (clean.query, clean.key, clean.value, clean.output, slope.output)
    )
    q2, k2 = np.asarray(other.query, np.float64)[layer, 0], np.asarray(other.key, np.float64)[layer, 0]
    group, length = config.n_heads // config.n_kv_heads, len(q)

    def attended(t, head, query, keys):
        scores = np.array([query @ keys[s, head // group] * config.score_scale for s in range(t + 1)])
        weights = np.exp(scores - scores.max())
        return (weights / weights.sum()) @ v[: t + 1, head // group]

    for head in range(config.n_heads):
        moved = attended(position, head, q2[position, head], k) - z[position, head]
        np.testing.assert_allclose(found.query_fixed[layer, 0, position, head], -moved @ g[position, head], atol=1e-5)
    patched = k.copy()
    patched[position] = k2[position]
    for shared in range(config.n_kv_heads):
        own = range(shared * group, (shared + 1) * group)
        moved = [(attended(t, h, q[t, h], patched) - z[t, h]) @ g[t, h] for h in own for t in range(length)]
        np.testing.assert_allclose(found.key_fixed[layer, 0, position, shared], -np.sum(moved), atol=1e-5)


def test_a_dropped_layer_is_one_whose_output_is_constant(tiny, ids):
    config, params, dropped = tiny.config, tiny.params, 2
    x_BxTxD = decoder.embed(config, params, ids[:1])
    kinds = ("attn_out", "mlp_out")
    frozen = run_layers(config, params, x_BxTxD, 0, config.n_layers, collect=kinds).collected

    def difference(added_LxBxTxHxK):
        def shifted(plain, layer, qkv, carried):
            return plain(*qkv) + added_LxBxTxHxK[layer], carried

        def freeze(kind, layer, value):
            return frozen[kind][dropped] if kind in kinds else value

        attention = AttentionSpec(whole_prompt_tables(config, ids.shape[1]), shifted)
        out = run_layers(config, params, x_BxTxD, 0, config.n_layers, freeze, (dropped,), attention=attention).x
        logits_V = decoder.unembed(config, params, out[0, -1])
        return logits_V[tiny.token_id(" runs")] - logits_V[tiny.token_id(" far")]

    shape = heads.Heads.zeros(config, ids[:1].shape, jnp.float32).output
    wanted = jax.grad(difference)(shape)
    found = heads.slopes(config, params, *arguments(tiny, ids[:1]), jnp.int32(dropped)).output
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert float(jnp.abs(found[dropped]).max()) == 0 < float(jnp.abs(found[dropped - 1]).max())
    plain = heads.slopes(config, params, *arguments(tiny, ids[:1]), jnp.int32(-1)).output
    assert float(jnp.abs(plain - found).max()) > 1e-3


@pytest.mark.parametrize("kind", ["query", "key"])
@pytest.mark.parametrize("layer", [2, 3])
def test_saturated_attention_hides_nodes_from_atp_and_not_from_the_fix(tiny, ids, kind, layer):
    """Queries thirty times as long: each attends to one key, the gradient in queries and keys is next to nothing."""
    longer_L = np.where(np.arange(tiny.config.n_layers) == layer, 30.0, 1.0).astype(np.float32)
    sharp = copy.copy(tiny)
    sharp.params = dict(tiny.params) | {"layers.q_DxHxK": longer_L[:, None, None, None] * tiny.params["layers.q_DxHxK"]}
    count = tiny.config.n_heads if kind == "query" else tiny.config.n_kv_heads
    nodes = [(kind, layer, position, head) for position in range(1, ids.shape[1]) for head in range(count)]
    wanted_N, found = exact(sharp, ids, nodes), estimates(sharp, ids)
    every = getattr(found, kind), getattr(found, f"{kind}_fixed")
    plain_N, fixed_N = (np.array([float(one[layer, 0, *node[2:]]) for node in nodes]) for one in every)
    assert np.abs(plain_N).sum() < 0.1 * np.abs(wanted_N).sum()  # false negatives
    assert 0.7 < np.abs(fixed_N).sum() / np.abs(wanted_N).sum() < 1.3
    assert np.corrcoef(fixed_N, wanted_N)[0, 1] > 0.9
    strongest = int(np.argmax(np.abs(wanted_N)))
    assert abs(plain_N[strongest]) < 0.05 * abs(wanted_N[strongest]) < 0.1 * abs(fixed_N[strongest])


def test_means_over_pairs_are_aligned_at_the_end(tiny, ids):
    """Two pairs of other lengths; of the shorter one there is nothing at the first positions."""
    pairs = [(TEXTS[0], TEXTS[1]), tuple(text + " and so on" for text in TEXTS)]
    prompts = [Prompt("b", "train", a, " runs", " far", b) for a, b in pairs]
    said: list[tuple[int, int]] = []
    found = estimate_nodes(tiny, prompts, lambda done, total: said.append((done, total)))
    assert said[0][0] == 0 and said[-1][0] == said[-1][1]
    longer = tiny.tokenize(pairs[1]).ids_BxT
    layers, short, long = tiny.config.n_layers, ids.shape[1], longer.shape[1]
    for n, node in enumerate(heads.NODES):
        plain = [np.asarray(getattr(estimates(tiny, each), node), np.float64)[:, 0] for each in (ids, longer)]
        np.testing.assert_allclose(found.atp[node][:, : long - short], plain[1][:, : long - short], atol=1e-5)
        both = (plain[0] + plain[1][:, long - short :]) / 2
        np.testing.assert_allclose(found.atp[node][:, long - short :], both, atol=1e-5)
        sizes = [
            sum(np.abs(np.asarray(estimates(tiny, each, dropped).fixed[n]))[:, 0] for dropped in range(layers))
            for each in (ids, longer)
        ]
        both = (sizes[0] + sizes[1][:, long - short :]) / 2 / (layers - 1)
        np.testing.assert_allclose(found.atp_star[node][:, long - short :], both, atol=1e-5)
