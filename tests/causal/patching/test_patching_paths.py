"""Direct paths beside torch hooks that freeze everything else, and planted senders among ones that send nothing."""

import dataclasses

import numpy as np
import pytest
from test_patching_nodes import TEXTS, pairs_of

from saejax.causal.clustered import of_prompts
from saejax.causal.patching import path_table
from saejax.causal.patching.nodes import HeadPatching
from saejax.causal.patching.path_table import PathTable, judge_paths
from saejax.causal.patching.paths import LOGITS, MLP, Receiver, path_effects, senders_of
from saejax.results import Interval
from saejax.settings import PatchConfig

_MODULES = dict(query="q_proj", key="k_proj", value="v_proj")


def module(model, name, layer):
    block = model.model.layers[layer]
    return block.mlp if name == "mlp" else getattr(block.self_attn, name)


def difference(tiny, model, ids_BxT, changes):
    """Of the answers' logits; ``changes`` are (module, whether of what it reads, function)."""
    import torch

    handles = []
    for one, reads, change in changes:
        if reads:
            handles.append(one.register_forward_pre_hook(lambda m, args, change=change: (change(args[0]),)))
        else:
            handles.append(one.register_forward_hook(lambda m, args, out, change=change: change(out)))
    with torch.no_grad():
        logits_V = model(torch.tensor(ids_BxT)).logits[0, -1]
    for handle in handles:
        handle.remove()
    return float(logits_V[tiny.token_id(" runs")] - logits_V[tiny.token_id(" far")])


def recorded(tiny, model, ids_BxT):
    """What o_proj reads and puts out, and MLPs put out, in every layer; and the logit difference."""
    kept = {}

    def keep(name, layer):
        return lambda x: kept.setdefault((name, layer), x.clone())

    changes = []
    for layer in range(tiny.config.n_layers):
        changes += [(module(model, name, layer), False, keep(name, layer)) for name in ("o_proj", "mlp")]
        changes.append((module(model, "o_proj", layer), True, keep("heads", layer)))
    return kept, difference(tiny, model, ids_BxT, changes)


def put(x, position, where, value):
    out = x.clone()
    out[0, position, where] = value[0, position, where]
    return out


def by_hooks(tiny, model, prompt, receiver, layer, head):
    """By how much the logit difference falls along one path: all outputs frozen, then the receiver alone changed."""
    ids, other_ids = (tiny.tokenize([text]).ids_BxT for text in (prompt.text, prompt.counterpart))
    (kept, clean), (other, _) = (recorded(tiny, model, each) for each in (ids, other_ids))
    width, at, everything = tiny.config.d_head, receiver.position, slice(None)
    changes = []
    for each in range(tiny.config.n_layers):
        for name in ("o_proj", "mlp"):
            own = kept[name, each]
            if (name, each, head) == ("mlp", layer, MLP):
                own = put(own, at, everything, other[name, each])
            if (name, each) != ("o_proj", layer) or head == MLP:
                changes.append((module(model, name, each), False, lambda x, own=own: own))
    if head != MLP:
        where = slice(head * width, (head + 1) * width)
        changes.append((module(model, "o_proj", layer), True, lambda x: put(x, at, where, other["heads", layer])))
    if receiver.node == LOGITS:
        return clean - difference(tiny, model, ids, changes)
    part, heard = module(model, _MODULES[receiver.node], receiver.layer), []
    difference(tiny, model, ids, [*changes, (part, False, lambda x: heard.append(x.clone()))])
    own = slice(receiver.head * width, (receiver.head + 1) * width)
    return clean - difference(tiny, model, ids, [(part, False, lambda x: put(x, at, own, heard[0]))])


@pytest.mark.parametrize(
    "receiver",
    [
        Receiver("query", 2, 1, -1),
        Receiver("key", 3, 1, -2),
        Receiver("value", 2, 0, -2),
        Receiver(LOGITS, 4, 0, -1),
    ],
)
def test_paths_equal_hooks(tiny, tiny_torch, receiver):
    prompts, senders = pairs_of(TEXTS), senders_of(tiny.config, receiver)
    assert tiny.config.n_layers == 4 and len(senders) == receiver.layer * (tiny.config.n_heads + 1)
    effect_NxP = path_effects(tiny, prompts, receiver, batch_rows=24)
    for n, (layer, head) in list(enumerate(senders.tolist()))[::2]:
        wanted = [by_hooks(tiny, tiny_torch, prompt, receiver, layer, head) for prompt in prompts]
        np.testing.assert_allclose(effect_NxP[n], wanted, atol=3e-4)
    assert np.abs(effect_NxP).max() > 5e-3


def test_pairs_without_a_difference_send_nothing(tiny):
    same = [dataclasses.replace(prompt, counterpart=prompt.text) for prompt in pairs_of(TEXTS)]
    first = -int(tiny.tokenize([TEXTS[1][0]]).lengths_B[0])
    effect_NxP = path_effects(tiny, same, Receiver("value", 2, 0, first))
    assert np.isnan(effect_NxP[:, 0]).all()  # the shorter one has no such position
    assert (np.abs(effect_NxP[:, 1]) < 1e-5).all()


def test_a_sender_is_found_among_many_that_send_nothing(tiny, monkeypatch):
    """Of worlds without a sender at most 5 % + 3 standard errors have one that is called sure."""
    rng, prompts, worlds = np.random.default_rng(0), pairs_of(TEXTS * 10), 60
    receiver, whole = Receiver(LOGITS, tiny.config.n_layers, 0, -1), Interval(1.0, 1.0, 1.0)
    count, resampling = len(senders_of(tiny.config, receiver)), of_prompts(prompts, 200, 0)
    monkeypatch.setattr(path_table, "_FLIPS", 500)

    def judged(effect_NxP):
        monkeypatch.setattr(path_table, "path_effects", lambda *args: effect_NxP)
        (found,), table = judge_paths(tiny, prompts, [(receiver, whole)], resampling, 8, print)
        return found, table

    noise = [rng.normal(size=(count, 20)) * rng.exponential(size=(count, 1)) for _ in range(worlds)]
    assert np.mean([judged(one)[0].sure > 0 for one in noise]) <= 0.05 + 3 * (0.05 * 0.95 / worlds) ** 0.5
    planted = noise[0].copy()
    planted[7] += 4 * planted[7].std()
    found, table = judged(planted)
    assert found.sure == 1 and np.flatnonzero(table.p_max_t <= 0.05).tolist() == [7]
    np.testing.assert_allclose(table.effect, planted.mean(axis=1))
    sizes = [abs(sender.effect.mean) for sender in found.strongest]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == path_table.STRONGEST


def test_paths_on_request(tiny, tmp_path):
    config = PatchConfig(top=8, paths=1, bootstrap=100, batch_rows=24)
    patching = HeadPatching(tiny, "b", pairs_of(TEXTS[1:], "train"), pairs_of(TEXTS), config)
    logits, node = patching.paths
    assert (logits.node, logits.layer) == (LOGITS, tiny.config.n_layers) and node.node in ("query", "key", "value")
    assert logits.total.mean == pytest.approx(np.mean(patching.clean_P - patching.corrupted_P))
    patching.path_table.save(tmp_path / "paths.parquet")
    again = PathTable.load(tmp_path / "paths.parquet")
    assert len(again.effect) == logits.senders + node.senders
