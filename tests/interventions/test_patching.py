"""Activation patching: against a plain loop with PyTorch hooks, by construction, and the stage end to end."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

import saejax
from saejax.errors import UserError
from saejax.interventions import patching, published_heads, split_model
from saejax.interventions.ablation import BehaviourAblation
from saejax.interventions.edits import ActivationReplacement, swap
from saejax.interventions.engine import effects
from saejax.interventions.patching import PatchGrid, fitting_pairs
from saejax.interventions.published_heads import IOI_HEADS, compare_published_heads, is_gpt2_small
from saejax.interventions.rows import gather
from saejax.interventions.settings import PatchConfig
from saejax.interventions.split_model import PROMPTS, SplitModel
from saejax.interventions.table import TESTED, load_effects
from saejax.models.config import DecoderConfig
from saejax.results import from_json, to_json
from saejax.stages.patch import run as stage
from saejax.stages.patch.report import _published_table
from saejax.stages.patch.run import run_patch
from saejax.statistics.bootstrap import resampling_weights
from saejax.tasks.behaviours import read_prompts, write_prompts


@pytest.fixture(scope="module")
def pairs(pairs):
    return pairs[:4]


def swapped(pair):
    """The counterpart as a prompt, with the prompt's answers."""
    return dataclasses.replace(pair, text=pair.counterpart)


def test_one_long_pair_is_not_run_eight_times(tiny, pairs, monkeypatch):
    wanted = patching.patch_sites(tiny, "resid_post", pairs[:1], "all", layers=[1, 2])
    rows, record, patched_rows = [], patching.record, patching.patched_rows

    def count_recorded(point, params, ids_BxT, *more):
        rows.append(len(ids_BxT))
        return record(point, params, ids_BxT, *more)

    def count_patched(point, heads, start, params, stream, source, some, *more):
        rows.append(len(some.layer_R))
        return patched_rows(point, heads, start, params, stream, source, some, *more)

    monkeypatch.setattr(patching, "record", count_recorded)
    monkeypatch.setattr(patching, "patched_rows", count_patched)
    monkeypatch.setattr(split_model, "PROGRAM_TOKENS", 1)  # prompts of this model are short
    found = patching.patch_sites(tiny, "resid_post", pairs[:1], "all", layers=[1, 2])
    assert rows == [1, 1, 2, 2]
    np.testing.assert_allclose(found.diff_DxLxHxPxC, wanted.diff_DxLxHxPxC, atol=1e-4)


# Denoising, the counterpart with the prompt's values, and noising: which of the two is the base, and which the source.
DIRECTIONS = ((1, 0), (0, 1))
KINDS = [("resid_post", "each"), ("attn_v", "-4:")]
SLOW_KINDS = [("mlp_out", "each"), ("attn_q", "-4:"), ("attn_k", "-4:"), ("attn_z", "-4:")]


@pytest.mark.parametrize(
    ("kind", "positions"), [*KINDS, *(pytest.param(*kind, marks=pytest.mark.slow) for kind in SLOW_KINDS)]
)
def test_patches_equal_a_plain_loop_with_torch_hooks(tiny, plain, pairs, kind, positions):
    layers, heads, compared = (0, 3), patching.count_heads(tiny.config, kind), 0
    patched = patching.patch_sites(tiny, kind, pairs, positions, layers=layers)
    for (place, layer), (p, pair) in itertools.product(enumerate(layers), enumerate(pairs[:2])):
        site, runs = f"{kind}.{layer}", [plain(None, each) for each in (pair, swapped(pair))]
        values = [run.value(site) for run in runs]
        length, width = values[0].shape[0], values[0].shape[1] // heads
        columns = {0: slice(length - 4, length)}
        if positions == "each":
            columns = {t - length: slice(t, t + 1) for t in range(length)}
        for (base, source), head, column in itertools.product(DIRECTIONS, range(heads), columns):
            part = columns[column], slice(head * width, (head + 1) * width)

            def change(value_TxW, part=part, source_TxW=values[source]):
                value_TxW = value_TxW.copy()
                value_TxW[part] = source_TxW[part]
                return value_TxW

            diff = patched.diff_DxLxHxPxC[source, place, head, p, column]
            np.testing.assert_allclose(diff, runs[base].diff(change, site), atol=2e-5)
            compared += 1
    assert compared >= 8 * heads and np.nanmax(np.abs(patched.effect_DxLxHxPxC)) > 1e-3


def test_heads_at_each_position_add_up_in_shape(tiny, pairs):
    patched = patching.patch_sites(tiny, "attn_z", pairs[:2], layers=[3])
    lengths = tiny.tokenize([pair.text for pair in pairs[:2]]).lengths_B
    assert patched.diff_DxLxHxPxC.shape == (2, 1, tiny.config.n_heads, 2, lengths.max())
    # What a head writes at an earlier position of the last layer reaches no other position.
    earlier = patched.effect_DxLxHxPxC[..., :-1]
    np.testing.assert_allclose(earlier[~np.isnan(earlier)], 0, atol=1e-5)


def test_all_heads_together_are_the_whole_site(tiny, pairs):
    """As a dictionary of heads is compared with in the stage; one head alone is less."""
    site, tokens = "attn_z.2", [tiny.tokenize([p.text for p in pairs]), tiny.tokenize([p.counterpart for p in pairs])]
    source = tiny(tokens[1], capture=[site]).sites[site]
    logits_PxV = np.asarray(tiny(tokens[0], edits=[saejax.SiteEdit.patch(site, source)]).logits_BxTxV)
    logits_PxV = logits_PxV[np.arange(len(pairs)), tokens[0].last_B]
    ids = [[tiny.token_id(answer) for answer in (pair.correct, pair.wrong)] for pair in pairs]
    expected = [logits_V[right] - logits_V[wrong] for logits_V, (right, wrong) in zip(logits_PxV, ids, strict=True)]
    patched = patching.patch_sites(tiny, "attn_z", pairs, "all", [2], by_head=False)
    assert patched.diff_DxLxHxPxC.shape == (2, 1, 1, len(pairs), 1)
    np.testing.assert_allclose(patched.diff_DxLxHxPxC[1, 0, 0, :, 0], expected, atol=2e-5)
    first = patching.patch_sites(tiny, "attn_z", pairs, "all", [2]).diff_DxLxHxPxC[1, 0, 0, :, 0]
    assert np.abs(first - expected).max() > 1e-3


def test_all_positions_together_equal_the_other_run(tiny, pairs):
    patched = patching.patch_sites(tiny, "resid_pre", pairs, "all", layers=[2])
    np.testing.assert_allclose(patched.diff_DxLxHxPxC[0, 0, 0, :, 0], patched.clean_P, atol=1e-5)
    np.testing.assert_allclose(patched.diff_DxLxHxPxC[1, 0, 0, :, 0], patched.corrupted_P, atol=1e-5)


def test_the_same_prompt_as_counterpart_changes_nothing_and_is_not_run(tiny, pairs):
    same = [dataclasses.replace(pair, counterpart=pair.text) for pair in pairs]
    progress = []
    patched = patching.patch_sites(tiny, "resid_post", same, on_progress=lambda *rows: progress.append(rows))
    effect = patched.effect_DxLxHxPxC
    assert (effect[~np.isnan(effect)] == 0).all() and [done for done, _ in progress] == [0]
    grid = PatchGrid.of(patched, weights(len(same)))
    assert np.isnan(grid.normalised).all() and (grid.effect == 0).all()


def test_only_places_that_differ_are_run(tiny, pairs):
    """Tokens before the first that differs are the same in both runs, in every layer."""
    progress = []
    patching.patch_sites(tiny, "resid_post", pairs, on_progress=lambda *rows: progress.append(rows))
    sides = [tiny.tokenize(texts).ids_BxT for texts in ([p.text for p in pairs], [p.counterpart for p in pairs])]
    lengths_P = tiny.tokenize([pair.text for pair in pairs]).lengths_B
    differing = sum(int(n - (a[:n] != b[:n]).argmax()) for a, b, n in zip(*sides, lengths_P, strict=True))
    rows, all_rows = progress[-1]
    assert 0 < rows <= 2 * tiny.config.n_layers * differing < all_rows


@pytest.mark.slow
def test_one_prompt_small_batches_and_a_mesh_of_eight(tiny, tiny_llama, pairs):
    wanted = patching.patch_sites(tiny, "attn_out", pairs)
    alone = patching.patch_sites(tiny, "attn_out", pairs[:1], batch_rows=3)
    length = alone.diff_DxLxHxPxC.shape[-1]
    np.testing.assert_allclose(alone.diff_DxLxHxPxC[..., 0, :], wanted.diff_DxLxHxPxC[..., 0, -length:], atol=1e-5)
    spread = patching.patch_sites(saejax.load_model(str(tiny_llama)), "attn_out", pairs)
    np.testing.assert_allclose(spread.diff_DxLxHxPxC, wanted.diff_DxLxHxPxC, atol=1e-5)


def test_memory_does_not_grow_with_prompts_times_features(tiny, make_dictionary):
    """Activations of all features exist of ``PROMPTS`` prompts at a time, however many are patched."""
    split = SplitModel(tiny, make_dictionary("resid_post.1"))
    length, features, width = 16, split.dictionary.config.n_features, tiny.config.d_model
    source = ActivationReplacement("counterpart")

    def temporaries(prompts):
        read_BxTxD = jax.ShapeDtypeStruct((prompts, length, width), np.float32)
        domain_BxT = jax.ShapeDtypeStruct((prompts, length), bool)
        arrays, chosen = [read_BxTxD, domain_BxT] * 2, jax.ShapeDtypeStruct((1,), np.int32)
        program = gather.lower(split.point, split.dictionary, source, arrays, chosen, np.int32(prompts))
        return program.compile().memory_analysis().temp_size_in_bytes

    more = 32 * PROMPTS * length
    growth = temporaries(33 * PROMPTS) - temporaries(PROMPTS)
    assert growth < more * features  # a quarter of float32 [B, T, F], in bytes


def weights(prompts, resamples=300):
    return resampling_weights(np.zeros(prompts), resamples, 0)


def made_up(effect_LxC, prompts=30, seed=0) -> patching.PatchEffects:
    """Return effects of a whole site: denoising restores ``effect_LxC`` and, on each prompt, some noise."""
    noise_LxPxC = np.random.default_rng(seed).normal(0, 3.0, (len(effect_LxC), prompts, effect_LxC.shape[1]))
    denoised_LxPxC = effect_LxC[:, None, :] + noise_LxPxC - 1.0
    diff = np.stack([denoised_LxPxC, 1.0 - noise_LxPxC])[:, :, None]
    layers = tuple(range(len(effect_LxC)))
    return patching.PatchEffects("resid_post", layers, "each", np.ones(prompts), -np.ones(prompts), diff)


def test_a_grid_has_the_means_and_ratios_of_its_prompts(tmp_path):
    patched = made_up(np.arange(12.0).reshape(3, 4), prompts=50)
    patched.diff_DxLxHxPxC[:, :, :, :20, 0] = np.nan  # shorter prompts
    grid = PatchGrid.of(patched, weights(50))
    effect = patched.effect_DxLxHxPxC
    np.testing.assert_allclose(grid.matrix("effect", "denoising"), np.nanmean(effect[0, :, 0], axis=1))
    np.testing.assert_allclose(grid.matrix("normalised", "noising"), np.nanmean(effect[1, :, 0], axis=1) / 2)
    assert (grid.low < grid.effect).all() and (grid.effect < grid.high).all()
    assert grid.matrix("prompts", "noising")[0].tolist() == [30, 50, 50, 50]
    grid.save(tmp_path / "grid.parquet")
    loaded = PatchGrid.load(tmp_path / "grid.parquet")
    np.testing.assert_array_equal(loaded.effect, grid.effect)
    assert set(loaded.direction) == set(patching.DIRECTIONS) and np.isnan(loaded.head.astype(float)).all()


def test_one_prompt_is_not_normalised():
    patched = made_up(np.ones((2, 3)), prompts=1)
    grid = PatchGrid.of(patched, weights(1))
    assert np.isnan(grid.low).all() and np.isnan(grid.normalised).all() and np.isfinite(grid.effect).all()


def test_what_cannot_be_patched_is_refused_in_a_line(tiny, tiny_llama, pairs):
    longer = dataclasses.replace(pairs[0], counterpart=pairs[0].text + " and so on")
    without = [dataclasses.replace(longer, counterpart=text) for text in ("", longer.text)]
    fitting, left_out = patching.fitting_pairs(tiny, [longer, *without], longer.split)
    assert not fitting and left_out == {"no counterpart": 2, "other length": 1}
    in_torch = saejax.load_model(str(tiny_llama), backend="torch", mesh=tiny.mesh)
    alike = [dataclasses.replace(pair, split="test") for pair in pairs[:2]]
    alike[1] = dataclasses.replace(alike[1], wrong=alike[1].correct + " far")
    for message, call in (
        ("heads", lambda: patching.patch_sites(in_torch, "attn_z", pairs)),
        ("another number of tokens", lambda: patching.patch_sites(tiny, "resid_post", [longer])),
        ("kind of site", lambda: patching.patch_sites(tiny, "resid", pairs)),
        ("both answers begin with the same token in prompt 1, counted", lambda: saejax.patch(tiny, alike)),
        ("both answers begin with the same token", lambda: saejax.slopes(tiny, alike, "logit_diff", "resid_post.1")),
        ("there is no site", lambda: patching.patch_sites(tiny, "resid_post", pairs, layers=[99])),
        ("positions", lambda: patching.patch_sites(tiny, "resid_post", pairs, "first")),
        ("no test prompt has a counterpart", lambda: saejax.patch(tiny, [dataclasses.replace(longer, split="test")])),
    ):
        with pytest.raises(UserError, match=message):
            call()


@pytest.fixture
def make_run(tmp_path, save_inputs, stage_run, make_prompt, single_device):
    prompts = []
    for behaviour, templates in (("first", 1), ("second", 2)):
        some = [make_prompt(i, "train" if i < 8 else "test", behaviour, False) for i in range(16)]
        some = [dataclasses.replace(p, template=str(i % templates)) for i, p in enumerate(some)]
        prompts += [dataclasses.replace(p, counterpart=p.text.replace(" near ", " that ")) for p in some[:-1]]
        prompts.append(dataclasses.replace(some[-1], counterpart=""))
    inputs = save_inputs(tmp_path, prompts)
    config = PatchConfig(
        kinds=("resid_post", "attn_z"), dictionary="topk", top=3, placebo_targets=3, bootstrap=200, batch_rows=16
    )

    def make(unit, folder, **fields):
        return stage_run("patch", unit, inputs, folder, config, **fields)[0]

    return make


def assert_is_json(results):
    assert from_json(patching.PatchResults, json.loads(json.dumps(to_json(results), allow_nan=False)), "") == results


def test_sites(make_run):
    whole = make_run("resid_post", "whole")
    results = run_patch(whole)
    assert any("first (1 of 2) (weak: one answer is right" in line for line in whole.say.__self__)
    assert_is_json(results)
    first = results.behaviours["first"]
    assert first.prompts + sum(first.left_out.values()) == 8 and first.left_out["no counterpart"] == 1
    grid = patching.PatchGrid.load(patching.PatchGrid.file(whole.folder, "first"))
    assert [column.position for column in first.columns] == sorted(set(grid.position.tolist()))


def test_heads_are_patched_at_all_positions_together(make_run, monkeypatch):
    """With the published heads of a behaviour of the model, on random weights, beside their effects."""
    monkeypatch.setattr(published_heads, "BEHAVIOUR", "second")
    monkeypatch.setattr(stage, "is_gpt2_small", lambda config: True)
    heads = {"name mover": ((2, 1), (3, 0)), "negative name mover": ((3, 3),), "previous token": ((0, 2),)}
    monkeypatch.setattr(published_heads, "IOI_HEADS", heads)
    run = make_run("attn_z", "heads")
    results = run_patch(run)
    assert_is_json(results)
    assert results.positions == "all"
    grid = patching.PatchGrid.load(patching.PatchGrid.file(run.folder, "second"))
    assert set(grid.head.tolist()) == {0, 1, 2, 3} and np.isnan(grid.position.astype(float)).all()
    noised_LxH = grid.matrix("effect", "noising")
    assert results.behaviours["first"].published is None
    for known in results.behaviours["second"].published:
        assert known.effect == pytest.approx(noised_LxH[known.layer, known.head], abs=1e-9)
        assert known.rank == 1 + (np.abs(noised_LxH) > abs(known.effect)).sum()
    table = _published_table(results.behaviours["second"].published)
    assert [row[:2] for row in table.rows] == [
        ("name mover", "2.1"), ("name mover", "3.0"), ("negative name mover", "3.3"), ("previous token", "0.2"),
    ] and table.rows[-1][-1] == "not seen here"  # fmt: skip


def test_published_heads_are_found_by_sign_and_size():
    effect_LxH = np.full((12, 12), 0.01)
    for heads in IOI_HEADS.values():
        for layer, head in heads:
            effect_LxH[layer, head] = 1.0
    effect_LxH[10, 7] = -1.0
    effect_LxH[9, 6] = 0.001
    known = {(head.layer, head.head): head for head in compare_published_heads(effect_LxH)}
    assert sum(map(len, IOI_HEADS.values())) == len(known) == 15
    assert known[9, 6].rank == 144 and known[9, 6].is_found is False
    assert known[11, 10].is_found is False and known[10, 7].is_found is True  # a negative head with a positive effect
    assert known[2, 2].is_found is None and sum(head.is_found is True for head in known.values()) == 11
    config = DecoderConfig(**dict.fromkeys(("d_head", "d_mlp", "context", "tied", "norm", "norm_eps", "activation"), 1),
                           family="gpt2", n_layers=12, n_heads=12, n_kv_heads=12, d_model=768, vocab=50257, gated=False,
                           score_scale=1.0)  # fmt: skip
    assert is_gpt2_small(config) and not is_gpt2_small(dataclasses.replace(config, n_layers=24))


def test_published_heads_are_found_in_models_that_have_them_and_by_chance_in_few_others():
    """100 models whose heads have effects of chance, and 100 in which the published ones have four deviations more."""
    found = []
    for is_true in (False, True):
        known = []
        for seed in range(100):
            effect_LxH = 0.25 * np.random.default_rng(seed).normal(size=(12, 12))
            for role, heads in IOI_HEADS.items():
                for layer, head in heads:
                    effect_LxH[layer, head] += is_true * (-1 if role == "negative name mover" else 1)
            known += [head.is_found for head in compare_published_heads(effect_LxH) if head.is_found is not None]
        found.append(float(np.mean(known)))
    print(f"published heads found: {found[0]:.3f} of those of 100 null and {found[1]:.3f} of those of 100 true models")
    assert found[0] <= 0.08 and found[1] >= 0.8


def test_features(make_run, tiny, make_dictionary):
    run = make_run("topk", "features")
    prompts = read_prompts(run.inputs["baseline"] / "prompts.jsonl")
    results = run_patch(run)
    assert_is_json(results)
    assert (results.dictionary, results.site, results.k) == ("topk", "resid_post.1", 3)
    for name, entry in results.behaviours.items():
        verdict, table = results.verdict.dictionaries[TESTED][name], load_effects(run.folder / f"{name}-effects")
        (top,) = table.select_whole_edits(name, "top")
        assert verdict.features == top.features
        # Denoising is noising with prompts and counterparts exchanged, here by the engine.
        tests, _ = fitting_pairs(tiny, [prompt for prompt in prompts if prompt.behaviour == name])
        exchanged = [dataclasses.replace(p, text=p.counterpart, counterpart=p.text) for p in tests]
        edits = swap(make_dictionary("resid_post.1"), [[], top.features])
        corrupted_P, restored_P = effects(tiny, exchanged, edits)[..., 0]
        assert entry.restored.mean == pytest.approx((restored_P - corrupted_P).mean(), abs=1e-5)
        numbers = verdict.random.numbers
        assert numbers["needed"] == 39, "two behaviours"
        assert (verdict.random.answer == "not testable") == (numbers["sets"] < 39)
        assert verdict.selective.answer == "not tested"


def test_a_behaviour_without_features_to_patch_is_named_and_the_others_go_on(make_run, monkeypatch):
    top = BehaviourAblation.top
    monkeypatch.setattr(BehaviourAblation, "top", lambda self: [] if self.behaviour == "first" else top(self))
    results = run_patch(make_run("topk", "some"))
    assert list(results.behaviours) == list(results.verdict.dictionaries[TESTED]) == ["second"]
    assert results.unpatched["first"].startswith("no feature of the dictionary has an attribution above zero")


def test_a_behaviour_that_cannot_be_patched_is_named_and_the_others_go_on(make_run):
    run = make_run("topk", "some")
    path = run.inputs["baseline"] / "prompts.jsonl"
    prompts = read_prompts(path)
    write_prompts(path, [p for p in prompts if (p.behaviour, p.split) != ("first", "train")])
    results = run_patch(run)
    assert list(results.behaviours) == ["second"] and "no train prompts" in results.unpatched["first"]
    # Sites need no train prompts.
    results = run_patch(make_run("resid_post", "sites"))
    assert list(results.behaviours) == ["first", "second"] and results.unpatched == {}

    write_prompts(path, [dataclasses.replace(p, counterpart="") for p in prompts])
    with pytest.raises(UserError, match=r"no behaviour can be patched .first: of 8 test prompts 8 have no counterpart"):
        run_patch(make_run("resid_post", "none"))
