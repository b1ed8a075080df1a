"""Activation patching: against a plain loop with PyTorch hooks, and what it is by construction."""

import dataclasses
import itertools

import numpy as np
import pytest
from scipy.stats import binomtest

from saejax import load_model
from saejax.causal.clustered import Resampling
from saejax.causal.patching.grid import PatchingGrid, make_grid
from saejax.causal.patching.sites import Patched, patch_sites
from saejax.models.edits import SiteEdit
from saejax.models.sites import KINDS
from saejax.settings import PATCHABLE


@pytest.fixture(scope="module")
def pairs(tiny, prompts):
    """Prompts whose counterpart is another prompt of as many tokens, or, where there is none, themselves."""
    lengths = tiny.tokenize([prompt.text for prompt in prompts]).lengths_B.tolist()
    others = {length: prompts[p] for p, length in enumerate(lengths)}
    paired = [
        dataclasses.replace(prompt, counterpart=others[length].text)
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    different = [pair for pair in paired if pair.counterpart != pair.text]
    assert len(different) >= 3
    return different[:4]


def module_of(model, kind, layer):
    block = model.model.layers[layer]
    return dict(resid_post=(block, "out"), mlp_out=(block.mlp, "out"), attn_out=(block.self_attn, "out"))[kind]


def hooked(model, ids, answers, place=None, change=None):
    """The logit difference in fp64, and the value of a module's output, changed if asked for."""
    import torch

    seen = []

    def hook(module, inputs, output):
        value = output[0] if isinstance(output, tuple) else output
        seen.append(value.detach().clone())
        if change is not None:
            value = change(value)
        return (value, *output[1:]) if isinstance(output, tuple) else value

    handle = place.register_forward_hook(hook)
    with torch.no_grad():
        logits_V = model(torch.tensor([ids])).logits[0, -1]
    handle.remove()
    return float(logits_V[answers[0]] - logits_V[answers[1]]), seen[0]


@pytest.mark.parametrize("kind", ["resid_post", pytest.param("mlp_out", marks=pytest.mark.slow)])
def test_equals_a_plain_loop_with_torch_hooks(tiny, tiny_torch, pairs, kind):
    patched = patch_sites(tiny, kind, pairs)
    compared = 0
    for p, pair in enumerate(pairs[:2]):
        sides = [tiny.tokenize([text]).ids_BxT[0].tolist() for text in (pair.text, pair.counterpart)]
        answers = tiny.token_id(pair.correct), tiny.token_id(pair.wrong)
        for layer in (0, 2, 3):
            place, _ = module_of(tiny_torch, kind, layer)
            plain = [hooked(tiny_torch, ids, answers, place) for ids in sides]
            np.testing.assert_allclose([patched.clean_P[p], patched.corrupted_P[p]], [d for d, _ in plain], atol=1e-4)
            for direction, (base, source) in enumerate(((1, 0), (0, 1))):
                for back in range(1, len(sides[0]) + 1):

                    def change(value, back=back, other=plain[source][1]):
                        value = value.clone()
                        value[0, -back] = other[0, -back]
                        return value

                    wanted, _ = hooked(tiny_torch, sides[base], answers, place, change)
                    np.testing.assert_allclose(patched.diff_DxLxPxC[direction, layer, p, -back], wanted, atol=1e-4)
                    compared += 1
    assert compared > 60 and np.nanmax(np.abs(patched.effect_DxLxPxC)) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["resid_post", "resid_pre", "attn_out"])
def test_every_place_equals_a_whole_run_with_an_edit(tiny, pairs, kind):
    """What is left out changes nothing: layers below, tokens before, rows in which both runs agree."""
    found, pairs = patch_sites(tiny, kind, pairs, batch_rows=8), pairs[:2]
    assert found.rows < found.all_rows and found.work < found.all_work
    for (p, pair), layer in itertools.product(enumerate(pairs), range(tiny.config.n_layers)):
        site, answers = f"{kind}.{layer}", [tiny.token_id(pair.correct), tiny.token_id(pair.wrong)]
        sides = [tiny.tokenize([text]) for text in (pair.text, pair.counterpart)]
        values = [tiny(tokens, capture=[site]).sites[site] for tokens in sides]
        count = int(sides[0].lengths_B[0])
        for (direction, (base, source)), t in itertools.product(enumerate(((1, 0), (0, 1))), range(count)):
            edit = SiteEdit.patch(site, values[source], positions=(t, t + 1))
            own, other = np.asarray(tiny(sides[base], edits=[edit]).logits_BxTxV)[0, count - 1, answers]
            np.testing.assert_allclose(found.diff_DxLxPxC[direction, layer, p, t - count], own - other, atol=1e-4)


def test_the_same_prompt_as_counterpart_changes_nothing_and_is_not_run(tiny, pairs):
    own = [dataclasses.replace(pair, counterpart=pair.text) for pair in pairs]
    patched = patch_sites(tiny, "resid_post", own)
    effect_DxLxPxC = patched.effect_DxLxPxC
    assert (effect_DxLxPxC[~np.isnan(effect_DxLxPxC)] == 0).all() and patched.rows == 0
    grid = make_grid(patched, one_by_one(patched, 100))
    assert np.isnan(grid.normalised).all() and (grid.effect == 0).all()


def test_the_last_token_at_the_end_is_all_there_is(tiny, pairs):
    patched = patch_sites(tiny, "resid_post", pairs)
    np.testing.assert_allclose(patched.diff_DxLxPxC[0, -1, :, -1], patched.clean_P, atol=1e-5)
    np.testing.assert_allclose(patched.diff_DxLxPxC[1, -1, :, -1], patched.corrupted_P, atol=1e-5)
    before = patched.effect_DxLxPxC[:, -1, :, :-1]
    np.testing.assert_allclose(before[~np.isnan(before)], 0, atol=1e-5)


@pytest.mark.slow
def test_one_prompt_and_a_mesh_of_eight(tiny, tiny_llama, pairs):
    wanted = patch_sites(tiny, "resid_post", pairs)
    alone = patch_sites(tiny, "resid_post", pairs[:1])
    length = alone.diff_DxLxPxC.shape[-1]
    np.testing.assert_allclose(alone.diff_DxLxPxC[:, :, 0], wanted.diff_DxLxPxC[:, :, 0, -length:], atol=1e-5)
    spread = patch_sites(load_model(str(tiny_llama)), "resid_post", pairs)
    np.testing.assert_allclose(spread.diff_DxLxPxC, wanted.diff_DxLxPxC, atol=1e-5)


def one_by_one(patched, resamples):
    return Resampling.of(np.zeros(len(patched.clean_P)), resamples, 0)


def made_up(effect_LxC, prompts=30, seed=0) -> Patched:
    """Denoising brings back these effects, and on each prompt something of its own."""
    noise_LxPxC = np.random.default_rng(seed).normal(0, 3.0, (len(effect_LxC), prompts, effect_LxC.shape[1]))
    denoised_LxPxC = effect_LxC[:, None, :] + noise_LxPxC - 1.0
    diff_DxLxPxC = np.stack([denoised_LxPxC, 1.0 - noise_LxPxC])
    return Patched(np.ones(prompts), -np.ones(prompts), diff_DxLxPxC, 1, 1, 1, 1)


def test_the_strongest_place_is_chosen_on_train_prompts():
    """Of many places without effect the largest seems to have one, on the prompts that chose it."""
    nothing = np.zeros((20, 12))
    train, test = made_up(nothing, seed=1), made_up(nothing, seed=2)
    grid = make_grid(test, one_by_one(test, 300))
    best = grid.strongest(train)["denoising"]
    mean_LxC = train.effect_DxLxPxC[0].mean(axis=1)
    assert best.train_effect == mean_LxC.max() == mean_LxC[best.layer, best.position]
    place = (grid.direction == "denoising") & (grid.layer == best.layer) & (grid.position == best.position)
    assert (best.effect.mean, best.effect.low, best.effect.high) == (
        grid.effect[place][0],
        grid.effect_low[place][0],
        grid.effect_high[place][0],
    )
    assert best.train_effect > 1.0 and best.effect.low < 0 < best.effect.high
    # Train prompts may be shorter or longer: only places that both have are chosen from.
    short = dataclasses.replace(train, diff_DxLxPxC=train.diff_DxLxPxC[..., -3:])
    assert grid.strongest(short)["noising"].position >= -3
    assert make_grid(short, one_by_one(short, 100)).strongest(train)["denoising"].position >= -3


def test_intervals_resample_templates():
    """Three templates, each with an effect of its own: other templates would give another mean."""
    patched = made_up(np.zeros((1, 1)), prompts=30)
    template_P = np.repeat(["a", "b", "c"], 10)
    effect_P = np.repeat([0.0, 1.0, 2.0], 10)
    patched = dataclasses.replace(patched, diff_DxLxPxC=np.stack([effect_P - 1.0, 1.0 - effect_P])[:, None, :, None])
    by_template, by_prompt = (
        make_grid(patched, Resampling.of(labels, 4000, 0)) for labels in (template_P, np.full(30, ""))
    )
    assert by_template.effect_high[0] - by_template.effect_low[0] > 1.9
    assert by_prompt.effect_high[0] - by_prompt.effect_low[0] < 0.7
    np.testing.assert_allclose(by_template.normalised, by_template.effect / 2)
    np.testing.assert_allclose(by_template.high, by_template.effect_high / 2)


def test_shares_of_pairs():
    alike, apart = Resampling.of(np.full(20, ""), 500, 0), Resampling.of(np.repeat(["a", "b", "c", "d"], 5), 4000, 0)
    assert (alike.templates, apart.templates) == (0, 4)
    everybody = alike.share(np.ones(20))
    assert everybody.high == 1.0 and everybody.low == pytest.approx(0.839, abs=1e-3)
    uneven = Resampling.of(
        np.repeat(["a", "b", "c"], [7, 6, 6]), 500, 0
    )  # what does not vary says nothing of templates
    assert uneven.share(np.ones(19)).low == pytest.approx(binomtest(19, 19).proportion_ci(method="wilson").low)
    right_P = np.repeat([1.0, 1.0, 0.0, 0.0], 5)
    own = binomtest(10, 20).proportion_ci(method="wilson")
    assert (alike.share(right_P).low, alike.share(right_P).high) == pytest.approx((own.low, own.high))
    four = binomtest(2, 4).proportion_ci(method="wilson")  # templates decide: they are worth one prompt each
    assert (apart.share(right_P).low, apart.share(right_P).high) == pytest.approx((four.low, four.high), abs=0.01)


def test_cells_are_ratios_of_means(tiny, pairs, tmp_path):
    found = patch_sites(tiny, "resid_post", pairs)
    order = np.sign(found.clean_P - found.corrupted_P)  # so that there is something to divide by
    clean_P = found.corrupted_P + np.abs(found.clean_P - found.corrupted_P) * np.abs(order) + 0.1
    patched = dataclasses.replace(found, clean_P=clean_P)
    grid = make_grid(patched, one_by_one(patched, 200))
    grid.save(tmp_path / "cells.parquet")
    again = PatchingGrid.load(tmp_path / "cells.parquet")
    for field in dataclasses.fields(PatchingGrid):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(grid, field.name))
    last = patched.effect_DxLxPxC[..., -1]
    np.testing.assert_allclose(grid.grid("effect")[..., -1], last.mean(axis=2))
    share = last.mean(axis=2) / (patched.clean_P - patched.corrupted_P).mean()
    np.testing.assert_allclose(grid.grid("normalised")[..., -1], share)
    assert (grid.low <= grid.high)[~np.isnan(grid.low)].all()


def test_every_kind_of_site_can_be_patched():
    assert set(PATCHABLE) == set(KINDS)
