"""Roles, features that return, proposed groups and their file; edges as a function of the measured arrays."""

import dataclasses
import sys
import types
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "attribution"))
from made_transcoders import made_set

from saejax.attribution.forms.features import FeatureDetails
from saejax.attribution.local.edits import Change
from saejax.attribution.local.model import LocalModel
from saejax.circuits import study as circuit_study
from saejax.circuits.edges import ANSWER, judge_edges
from saejax.circuits.groups import (
    Group,
    Key,
    as_json,
    find_returning,
    name_feature,
    position_roles,
    propose_groups,
    read_groups,
)  # fmt: skip
from saejax.circuits.measure import PromptEffects, activations, measure_prompt
from saejax.circuits.study import _draw_placebo_pairs
from saejax.errors import UserError
from saejax.models.language_model import LanguageModel
from saejax.tasks.behaviours import Prompt


def placebo_words(words, prompt):
    """Return the placebo target of a prompt after which these words come, the likeliest first."""
    logits_1x1xV = -np.arange(len(words), dtype=float)[None, None]
    output = types.SimpleNamespace(logits_BxTxV=logits_1x1xV, tokens=types.SimpleNamespace(last_B=np.zeros(1, int)))

    class Model:
        tokenizer = types.SimpleNamespace(decode=lambda ids: words[ids[0]], all_special_ids=[0])

        def tokenize(self, texts):
            return texts

        def __call__(self, tokens):
            return output

    (pair,) = _draw_placebo_pairs(Model(), [prompt], [], seed=0)
    return sorted(words[token] for token in pair)


def test_placebo_targets_are_no_answers_however_these_are_written():
    words = ["<s>", " Paris", "Paris", " paris", " Par", "\N{REPLACEMENT CHARACTER}", " ", " blue", " red"]
    assert placebo_words(words, Prompt("b", "train", "It is", " Paris", " Rome")) == [" blue", " red"]


def test_placebo_targets_are_no_other_answers_that_may_be_right(monkeypatch):
    """As in the verdict: no other number of a sum, or of a year, and no other form of the verb."""
    monkeypatch.setattr(circuit_study, "_LIKELY", 3)  # all of them numbers: less likely words are taken, too
    words = ["<s>", " 7", " 12", " blue", " red", " 9"]
    assert placebo_words(words, Prompt("addition", "train", "3 + 4 =", " 8", " 6")) == [" blue", " red"]
    words = ["<s>", " was", " has", " blue", " red"]
    assert placebo_words(words, Prompt("agreement", "train", "The cat", " is", " are")) == [" blue", " red"]


@pytest.mark.parametrize(
    ("ids", "counterpart", "roles"),
    [
        ([1, 2, 3, 4], [1, 9, 3, 4], ["context", "content", "context", "last"]),
        ([1, 2, 5, 3, 4], [1, 9, 3, 4], ["context", "content", "content", "context", "last"]),
        ([1, 2, 3, 4], [1, 3, 4], ["context", "content", "context", "last"]),
        ([1, 2], [1, 3], ["context", "last"]),
        ([7], None, ["last"]),
        ([1, 2, 3], None, ["context", "context", "last"]),
    ],
)
def test_roles(ids, counterpart, roles):
    counterpart_ids = None if counterpart is None else np.array(counterpart)
    assert position_roles(np.array(ids), counterpart_ids).tolist() == roles


def context(*tokens: str) -> dict:
    """A context in which the second token, or the only one, is the strongest."""
    return dict(tokens=list(tokens), activations=[float(n == (len(tokens) > 1)) for n in range(len(tokens))])


A, B, C, D = Key(0, 1, "content"), Key(5, 2, "last"), Key(5, 3, "last"), Key(11, 4, "last")


def test_features_return_that_are_influential_in_several_prompts():
    prompts = [{A: 3.0, B: 2.0, C: 1.0}, {A: 1.0, B: 5.0, D: 9.0}, {C: 4.0, D: 0.0, A: 2.0}]
    assert find_returning(prompts, top=2, share=0.2) == {B: 7 / 3, A: pytest.approx(5 / 3)}  # A counts in two
    assert find_returning(prompts, top=9, share=1.0) == {A: 2.0}
    assert find_returning([], top=9, share=0.2) == {}
    assert find_returning([{A: 1.0, B: 0.0}], top=9, share=0.2) == {A: 1.0}  # of one prompt, once


def test_groups_are_proposed_from_labels_and_positions():
    scores = {A: 4.0, B: 3.0, C: 2.0, D: 1.0}
    groups = propose_groups(scores, n_layers=12, size=10, most=9)
    assert groups == [
        Group("last position, middle layers", (B, C)),
        Group("differing words, early layers", (A,)),
        Group("last position, late layers", (D,)),
    ]
    labels = {(5, 2): "capitals", (11, 4): "capitals", (0, 1): "alone"}
    details = {feature: FeatureDetails(label=label) for feature, label in labels.items()}
    labelled = propose_groups(scores, 12, 10, 9, details)
    assert {group.name: group.members for group in labelled} == {
        "capitals (last position)": (B, D),
        "alone (differing words, early layers)": (A,),
        "last position, middle layers": (C,),
    }
    assert [group.members for group in propose_groups(scores, 12, size=1, most=2)] == [(A,), (B,)]

    # Without a common label they are named after their most influential feature.
    details = {(5, 2): FeatureDetails((context("is"),)), (5, 3): FeatureDetails((context("of"),))}
    details[0, 1] = FeatureDetails((context("in", " Dallas"), context("in", " Boston")))
    assert [group.name for group in propose_groups(scores, 12, 10, 9, details)] == [
        "“is” (last position, middle layers)",
        "“Dallas” “Boston” (differing words, early layers)",
        "last position, late layers",
    ]


@pytest.mark.parametrize(
    ("key", "details", "name"),
    [
        (B, FeatureDetails(), "layer 5, feature 2"),
        (B, FeatureDetails(label="capitals", top_logits=("x",)), "capitals"),
        (B, FeatureDetails((context("in", " Texas", "?"),) * 2 + (context(" of"),), (" Rome",)), "“Texas” “of”"),
        (D, FeatureDetails((context("is"),), (" Rome", "\n", "c")), "→“Rome” →“↵”"),  # the answer is read there
        (D, FeatureDetails((context("  "),)), "“␣”"),
    ],
)
def test_features_are_named(key, details, name):
    assert name_feature(key, details, 12) == name


BAD_FILES = [
    ("{", "holds no groups of features"),
    ("[]", "holds no groups"),
    ('{"two_hop": [["a"]]}', "holds no groups"),
    ('{"two_hop": [["a", "3_17"]]}', "holds no groups"),
    ('{"two_hop": [["a", "3_17_middle"]]}', "holds no groups"),
    ('{"two_hop": [["a", "3_17_last"], ["b", "3_17_last"]]}', "3_17_last is in the groups of two_hop twice"),
    (
        '{"two_hop": [["a", "3_17"], ["b", "1_2_last", "1_3_last"], 7], "sums": [["a", "1_2_end"]]}',
        r'in \["a", "3_17"\] of two_hop, 7 of two_hop, \["a", "1_2_end"\] of sums: expected',
    ),
    (
        '{"two_hop": [["a", "3_17_last"], ["a", "3_17_last"]]}',
        "2 groups of two_hop are named 'a'.*; the feature 3_17_last is in the groups of two_hop twice",
    ),
    ('{"four_hop": [["a", "3_17_last"]]}', "has groups for four_hop: expected some of two_hop"),
    (
        '{"two_hop": [["a", "3_17_last"], ["a", "4_17_last"]]}',
        "2 groups of two_hop are named 'a': expected a different",
    ),
    ('{"two_hop": [["answer", "3_17_last"]]}', "named 'answer': expected a different name for each, not 'answer'"),
    ('{"two_hop": [["", "3_17_last"]]}', "named ''"),
    (r'{"two_hop": [["\ud800", "3_17_last"]]}', "holds no groups"),
]


def test_a_file_of_groups_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "groups.json"
    groups = [Group("places, “here”", (A, B)), Group("late", (D,))]
    path.write_text(as_json("two_hop", groups))
    assert read_groups(str(path), ["two_hop"]) == {"two_hop": groups}
    assert read_groups("", ["two_hop"]) == {}
    assert len(path.read_text().splitlines()) == 6  # a group on a line, to be edited
    for content, message in BAD_FILES:
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            read_groups(str(path), ["two_hop"])
    with pytest.raises(UserError, match="--circuits.groups"):
        read_groups(str(tmp_path / "none.json"), ["two_hop"])


def measured(effect, control, dose=1.0, prompts=20, placebo=None, seed=0) -> list[PromptEffects]:
    """Effects on the answer of one group: its own, that of random and of placebo sets, with noise of 0.1."""
    rng = np.random.default_rng(seed)
    effects = []
    for _ in range(prompts):
        means = np.array([effect, control, control, *[control if placebo is None else placebo] * 2])
        effect_ExGxSxH = np.full((3, 1, 5, 2), np.nan)
        effect_ExGxSxH[0, 0, :, 1] = means + 0.1 * rng.normal(size=5)
        effect_ExGxSxH[1, 0, :, 1] = 0.0
        dose_ExGxS = np.full((3, 1, 5), 2.0)
        dose_ExGxS[..., 1:] *= dose
        effects.append(PromptEffects(effect_ExGxSxH, dose_ExGxS))
    return effects


@pytest.mark.parametrize(
    ("effect", "control", "options", "drawn"),
    [
        (1.0, 0.2, {}, True),
        (-1.0, -0.2, {}, True),
        (0.0, 0.0, {}, False),  # nothing
        (1.0, 1.0, {}, False),  # what any features of this dose do
        (1.0, 0.2, dict(placebo=1.0), False),  # what features for other tokens do
        (1.0, 0.2, dict(dose=0.5), False),  # compared with too little
        (-0.2, -1.0, {}, False),  # less than the controls
    ],
)
def test_an_edge_takes_an_interval_and_both_controls(effect, control, options, drawn):
    edges = judge_edges(["group"], measured(effect, control, **options), ["a", "b"] * 10, resamples=2000)
    assert [edge.edit for edge in edges] == ["total"]  # of the others nothing is known, or all is 0
    assert edges[0].drawn == drawn and edges[0].target == ANSWER and edges[0].prompts == 20
    assert edges[0].effect.mean == pytest.approx(effect, abs=0.1)
    assert (edges[0].random_spread, edges[0].placebo_spread) == pytest.approx((0.1, 0.1), abs=0.05)
    assert edges[0].dose == pytest.approx(options.get("dose", 1.0))
    assert edges[0].is_testable == ("dose" not in options)
    (few,) = judge_edges(["group"], measured(0.0, 0.0, prompts=5), ["a"] * 5, resamples=2000)
    assert not few.drawn and not few.is_testable


# Few prompts agree by chance most often; groups of arbitrary features are judged on 40 prompts below.
@pytest.mark.parametrize("count", [2, 5, pytest.param(20, marks=pytest.mark.slow)])
def test_noise_draws_no_edge(count):
    """Forty-eight edges between six groups, where nothing is true: two prompts agree on half of them."""
    rng, drawn = np.random.default_rng(0), 0
    for seed in range(100):
        noise = rng.normal(size=(count, 3, 6, 5, 7))
        noise[:, :, range(6), :, range(6)] = np.nan
        effects = [PromptEffects(effect_ExGxSxH, np.ones((3, 6, 5))) for effect_ExGxSxH in noise]
        edges = judge_edges("abcdef", effects, ["a"] * count, resamples=1000, seed=seed)
        assert len(edges) == 48
        drawn += any(edge.drawn for edge in edges)
    print(f"noise on {count} prompts: an edge in {drawn} of 100 worlds")
    assert drawn <= 8


@pytest.mark.parametrize(("count", "worlds"), [(4, 100), (40, 25), pytest.param(40, 100, marks=pytest.mark.slow)])
def test_groups_of_arbitrary_features_have_no_edge(count, worlds):
    """Each set has an effect of its own, the same in every prompt, and groups are sets like any other."""
    rng, drawn, groups = np.random.default_rng(0), 0, 6
    for seed in range(worlds):
        # The group's effects stay; control sets are drawn anew for each prompt.
        effect_PxExGxSxH = rng.normal(size=(count, 3, groups, 5, groups + 1))
        effect_PxExGxSxH[:, :, :, 0] = rng.normal(size=(3, groups, groups + 1))
        effect_PxExGxSxH[:, :, :, 0] += 0.1 * rng.normal(size=(count, 3, groups, groups + 1))
        effect_PxExGxSxH[:, :, range(groups), :, range(groups)] = np.nan
        effects = [PromptEffects(effect_ExGxSxH, np.ones((3, groups, 5))) for effect_ExGxSxH in effect_PxExGxSxH]
        edges = judge_edges("abcdef", effects, ["a"] * count, resamples=1000, seed=seed)
        drawn += any(edge.drawn for edge in edges)
    print(f"arbitrary groups on {count} prompts: an edge in {drawn} of {worlds} worlds")
    assert drawn <= 0.08 * worlds


def test_an_effect_beyond_its_controls_is_an_edge():
    """100 worlds on 20 prompts: a group costs eight of its controls' deviations more, or what they cost."""
    drawn = [
        sum(
            judge_edges(["g"], measured(effect, 0.2, seed=seed), ["a", "b"] * 10, resamples=1000)[0].drawn
            for seed in range(100)
        )
        for effect in (0.2, 1.0)
    ]
    print(f"an edge to the answer: drawn in {drawn[0]} of 100 null and {drawn[1]} of 100 true worlds")
    assert drawn[0] <= 8 and drawn[1] >= 80


def test_the_level_is_divided_by_the_number_of_edges():
    single = measured(1.0, 0.0)
    both = []
    for effect_ExGxSxH, dose_ExGxS in single:
        twice_ExGxSxH = np.full((3, 2, 5, 3), np.nan)
        twice_ExGxSxH[..., 2] = effect_ExGxSxH[..., 1]
        both.append(PromptEffects(twice_ExGxSxH, np.tile(dose_ExGxS, (1, 2, 1))))
    first, second = (judge_edges(*groups, ["a"] * 20, resamples=500) for groups in (("g", single), ("gh", both)))
    assert first[0].level == pytest.approx(0.95) and second[0].level == pytest.approx(0.975)
    assert [edge.drawn for edge in second] == [True, True]


@pytest.mark.parametrize("kind", ["standard", "jumprelu"])
def test_activations_in_edited_runs_are_those_of_the_encoder(lm, kind):
    """A JumpReLU feature below its threshold is silent, although it is above 0."""
    transcoders = made_set(lm, kind=kind)
    local = LocalModel(lm, transcoders, np.arange(5, 13))
    member_J = np.flatnonzero(local.active.layer_A == 1)
    read_RxD = np.random.default_rng(0).normal(size=(400, lm.config.d_model)).astype(np.float32)
    arrays = transcoders[1].arrays
    pre_RxF = read_RxD @ np.asarray(arrays["W_enc_DxF"]) + np.asarray(arrays["b_enc_F"])
    feature_J = local.active.feature_A[member_J]
    expected_RxJ = np.asarray(transcoders[1].encode(read_RxD))[:, feature_J]
    assert kind == "standard" or ((expected_RxJ == 0) & (pre_RxF[:, feature_J] > 0)).any()
    np.testing.assert_allclose(activations(local, member_J, pre_RxF[:, feature_J]), expected_RxJ, rtol=1e-4, atol=1e-5)


def test_effects_on_the_answer_are_of_capped_logits(lm):
    """A defect: of Gemma 2 the logit difference was that before the last soft cap."""
    transcoders, cap, answers = made_set(lm), 0.7, (30, 40)
    config = dataclasses.replace(lm.config, final_logit_softcap=cap)
    capped = LanguageModel(config, lm.params, lm.tokenizer, lm.source, lm.mesh)
    local, plain = (LocalModel(model, transcoders, np.arange(5, 13)) for model in (capped, lm))
    active, last = local.active, len(local.ids_P) - 1
    features = active.feature_A[(active.layer_A == 1) & (active.position_A == last)].tolist()
    group = Group("group", tuple(Key(1, feature, "last") for feature in features))
    roles = position_roles(local.ids_P, None)
    total = measure_prompt(local, roles, [group], answers).effect_ExGxSxH[0, 0, 0, 1]
    logits_2xV = plain.run([[], [Change(1, last, feature, 0.0) for feature in features]]).logits_RxV
    clean, edited = (cap * np.tanh(logits_2xV[:, answers] / cap) @ (1, -1)).tolist()
    assert total == pytest.approx(clean - edited, abs=1e-5)
    assert abs(total - logits_2xV[:, answers] @ (1, -1) @ (1, -1)) > 1e-2
