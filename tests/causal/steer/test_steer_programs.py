"""Changed values against a hook in the HF model in fp64, and directions by hand."""

import jax
import numpy as np
import pytest

from saejax.causal.claims import randomisation_p
from saejax.causal.steer.directions import AnswerTexts, Turn, unit
from saejax.causal.steer.methods import best
from saejax.causal.steer.programs import SteeredTexts, SteeringEdit, steer_prompts
from saejax.causal.steer.prompting import SHOTS, prefixed, prefixes
from saejax.interventions.split_model import SplitModel
from saejax.models.edits import Positions
from saejax.tasks.likelihood import loglikelihoods


@pytest.fixture(scope="module")
def dictionary(make_dictionary):
    return make_dictionary("resid_post.1")


@pytest.fixture(scope="module")
def split(tiny, dictionary):
    return SplitModel(tiny, dictionary)


def plain_change(run, change, row):
    """The change of a prompt's value by hand, fp64, not at sinks."""
    import torch

    W_dec_FxD = np.asarray(run.dictionary.W_dec_FxD[...], np.float64)

    def changed(x_1xTxD):
        x_TxD = x_1xTxD[0].numpy()
        moved_TxD = np.zeros_like(x_TxD) + change.added_RxD[row].astype(np.float64)
        f_TxF = run.features(x_TxD)
        for feature, level, used in zip(*(a[row] for a in jax.tree.leaves(change)[1:]), strict=True):
            moved_TxD += used * (level - f_TxF[:, feature])[:, None] * W_dec_FxD[feature]
        inside_T = np.linalg.norm(x_TxD, axis=1) <= run.dictionary.config.max_norm
        return x_1xTxD + torch.from_numpy(moved_TxD * inside_T[:, None])[None]

    return changed


def make_changes(rows, width):
    rng = np.random.default_rng(0)
    features = [rng.permutation(160)[: 1 + row % 3].tolist() for row in range(rows)]
    levels = [rng.uniform(0.5, 2.0, len(own)) for own in features]
    return [
        SteeredTexts.adding(rng.normal(size=(rows, width))),
        SteeredTexts.adding(np.zeros((rows, width))),
    ], [SteeredTexts.clamping(features, levels, width, 4)]


def test_steered_prompts_equal_a_hook_in_fp64(split, prompts, plain, dictionary):
    import torch

    own = prompts[:9]
    runs = split.run(own)
    for changes in make_changes(len(own), 64):
        found = steer_prompts(split, runs, changes, batch_rows=8)
        for s, change in enumerate(changes):
            for p, prompt in enumerate(own):
                run = plain(dictionary, prompt)
                with torch.no_grad():
                    wanted = float(run.run(plain_change(run, change, p)))
                assert found.diff_SxP[s, p] == pytest.approx(wanted, abs=2e-4), (s, p)
    assert found.length_SxP.min() > 0


def test_dose_and_first_token(split, prompts, tiny):
    own = prompts[:5]
    added, still = make_changes(len(own), 64)[0]
    found = steer_prompts(split, split.run(own), [added, still], batch_rows=64)
    np.testing.assert_allclose(found.length_SxP[0], np.linalg.norm(added.added_RxD, axis=1), rtol=1e-5)
    assert (found.length_SxP[1] == 0).all()
    tokens = tiny.tokenize([prompt.text for prompt in own])
    logits_PxV = np.asarray(tiny(tokens).logits_BxTxV)[np.arange(5), tokens.last_B]
    wanted = [logits_V.argmax() == tiny.token_id(p.wrong) for logits_V, p in zip(logits_PxV, own, strict=True)]
    assert found.first_SxP[1].tolist() == wanted


def test_the_edit_for_generation_makes_the_same_change(split, prompts, tiny):
    own = prompts[:4]
    for changes in make_changes(len(own), 64):
        edit = SteeringEdit(
            split.dictionary,
            jax.tree.map(jax.numpy.asarray, changes[0]),
            Positions.parse("all"),
            split.point.reads,
            split.point.site,
        )
        tokens = tiny.tokenize([prompt.text for prompt in own])
        logits_BxTxV = np.asarray(tiny(tokens, edits=[edit]).logits_BxTxV)
        last_PxV = logits_BxTxV[np.arange(4), tokens.last_B]
        pairs = [[tiny.token_id(p.correct), tiny.token_id(p.wrong)] for p in own]
        wanted_P = [row[a] - row[b] for row, (a, b) in zip(last_PxV, pairs, strict=True)]
        found = steer_prompts(split, split.run(own), changes[:1], batch_rows=8)
        np.testing.assert_allclose(found.diff_SxP[0], wanted_P, atol=2e-4)


def made_texts(answers, seed=0, features=6, width=8):
    rng = np.random.default_rng(seed)
    shapes = [(len(answers), width), (len(answers), width), (len(answers), features), (features, width)]
    return AnswerTexts(np.array(answers), *(rng.normal(size=shape) for shape in shapes), length=3.0)


def slope_of(texts, own_N, target_N):
    return texts.slope_NxD[target_N].mean(axis=0) - texts.slope_NxD[own_N].mean(axis=0)


def test_directions_by_hand():
    answers = [5, 5, 7, 7, 7, 9, 5, 9]
    texts = made_texts(answers)
    turn, is5, is7 = Turn(5, 7), np.array(answers) == 5, np.array(answers) == 7
    assert texts.known(turn) and not texts.known(Turn(5, 9))
    apart_D = texts.value_NxD[is7].mean(axis=0) - texts.value_NxD[is5].mean(axis=0)
    np.testing.assert_allclose(texts.between("difference", [turn])[0], apart_D / np.linalg.norm(apart_D))
    np.testing.assert_allclose(texts.between("gradient", [turn])[0] @ unit([slope_of(texts, is5, is7)])[0], 1.0)
    f_F = texts.f_NxF[is7].mean(axis=0) - texts.f_NxF[is5].mean(axis=0)
    slope_D = (texts.slope_NxD[is7].mean(axis=0) - texts.slope_NxD[is5].mean(axis=0)) / 2
    score_F = np.array([f_F[i] * sum(texts.W_dec_FxD[i, d] * slope_D[d] for d in range(8)) for i in range(6)])
    top = texts.top(turn, 3)
    assert top == [i for i in np.argsort(-score_F)[:3].tolist() if score_F[i] > 0] and top
    sum_D = sum(f_F[i] * texts.W_dec_FxD[i] for i in top)
    np.testing.assert_allclose(texts.of_features([turn], [top])[0], sum_D / np.linalg.norm(sum_D))
    np.testing.assert_allclose(texts.level(turn, top), texts.f_NxF[is7][:, top].mean(axis=0))
    assert (unit([np.zeros(3)]) == 0).all()  # of no features there is no direction


def test_shuffled_directions_are_exchangeable_where_answers_mean_nothing():
    """The direction of the true answers is then one more draw: p is at most a in a share a of worlds."""
    turn, p_values = Turn(0, 1), []
    for seed in range(300):
        texts = made_texts([0, 1] * 6, seed)
        rng = np.random.default_rng([seed, 1])
        dealt = [texts, *(texts.shuffled(rng) for _ in range(39))]
        effect_C = np.array([one.between("difference", [turn])[0][0] for one in dealt])  # what a coordinate of it does
        p_values.append(randomisation_p(effect_C)[0])
    for level in (0.05, 0.1, 0.25):
        assert np.mean(np.array(p_values) <= level) <= level + 3 * np.sqrt(level * (1 - level) / 300)


def test_the_strength_that_turns_most_is_chosen_among_those_that_fit():
    diff_SxP = np.array([[1.0, 1.0, 1.0], [-1.0, -1.0, 1.0], [-1.0, -2.0, 1.0], [-1.0, -1.0, -1.0]])
    assert best(diff_SxP, np.array([True, True, True, True])) == 3
    assert best(diff_SxP, np.array([True, True, True, False])) == 2  # of equal ones the one that moves most
    assert best(diff_SxP, np.zeros(4, bool)) == 0


def test_examples_have_the_target_where_it_is_wrong(prompts, tiny):
    train = [p for p in prompts if p.split == "train"]
    wrong_N = np.array([tiny.token_id(p.wrong) for p in train])
    target = tiny.token_id(" far")
    shown = prefixes(train, wrong_N, "wrong", seed=0)[target]
    right = prefixes(train, wrong_N, "correct", seed=0)[target]
    lines = shown.splitlines()
    assert len(lines) == SHOTS and all(line.endswith(" far") for line in lines)
    assert {line.removesuffix(" far") for line in lines} <= {p.text for p in train if p.wrong == " far"}
    assert [line.rsplit(" ", 1)[0] for line in right.splitlines()] == [line.rsplit(" ", 1)[0] for line in lines]
    (behind,) = prefixed(tiny, train[:1], [target], {target: shown})
    assert behind.text == shown + train[0].text and behind.correct == train[0].correct
    assert prefixed(tiny, train[:1], [target], {}) is None
    assert prefixed(tiny, train[:1], [target], {target: shown * 100}) is None  # longer than the context


def test_text_behind_examples_costs_what_likelihoods_say(tiny):
    from saejax.causal.steer.prompting import text_rise
    from saejax.interventions.text import HeldOutText

    documents = [tiny.tokenizer(text)["input_ids"] for text in ("The cat near the dogs", "A year of war and water")]
    rise_N, tokens_N = text_rise(tiny, HeldOutText(documents), ["The way\n", ""])
    assert tokens_N.tolist() == [len(document) - 1 for document in documents]
    before = tiny.tokenizer("The way\n")["input_ids"]
    one, two = loglikelihoods(tiny, [before + documents[0][:1], documents[0][:1]], [documents[0][1:]] * 2)
    assert rise_N[0] == pytest.approx(two.total - one.total) and abs(rise_N[0]) > 1e-4
    assert rise_N[1] == pytest.approx(0.0, abs=1e-5)
