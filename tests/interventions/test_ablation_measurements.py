"""What an ablation measures: sets, doses, the verdict that follows from the table; the stage, stopped and resumed."""

import dataclasses
import functools
import json
import types

import numpy as np
import pytest
from runs import write_members

import saejax
from saejax.dictionaries import Dictionary, save_dictionary
from saejax.errors import Interrupted, UserError
from saejax.interventions import ablation as ablation_module
from saejax.interventions import activity, behaviour_prompts, edits, engine, importance, in_memory
from saejax.interventions.ablation import begin_ablation, measure_behaviour, spread_over_templates, verdict_config
from saejax.interventions.answers import AblateResults, VerdictConfig, mean_interval
from saejax.interventions.controls import Changes, scaled_sets, token_pairs
from saejax.interventions.importance import Importance
from saejax.interventions.settings import AblateConfig
from saejax.interventions.slopes import attribution
from saejax.interventions.split_model import SplitModel
from saejax.interventions.sufficiency import keep_features
from saejax.interventions.table import RANKS, SPARING, TESTED, TEXT
from saejax.interventions.text import HeldOutText
from saejax.interventions.verdict import summarise, verdict
from saejax.results import from_json, to_json
from saejax.stages.ablate import run as stage
from saejax.stages.ablate.report import seed_table
from saejax.statistics.bootstrap import has_same_sign, resampling_weights, stratum_means
from saejax.tasks.behaviours import Prompt, read_prompts, write_prompts
from saejax.tasks.settings import CorpusConfig, TaskConfig

TOP = 4
BASES = ("neurons", "pca", "diff_means")


def make_prompts(make_prompt, *behaviours):
    """Return 10 train and 8 test prompts of each behaviour, in two templates."""
    return [
        dataclasses.replace(make_prompt(i + 4, "train" if i < 10 else "test", name, False), template="ab"[i // 2 % 2])
        for name in behaviours
        for i in range(18)
    ]


def begin(lm, dictionary, prompts, config):
    """Return the ablation of a dictionary on the prompts of one behaviour."""
    (name,) = {prompt.behaviour for prompt in prompts}
    return begin_ablation(lm, {TESTED: dictionary}, name, {name: prompts}, config)[TESTED]


@pytest.fixture(scope="module")
def dictionary(make_dictionary):
    return make_dictionary("resid_post.1")


@pytest.fixture(scope="module")
def ablation(tiny, dictionary, make_prompt):
    prompts = make_prompts(make_prompt, "first", "second")
    documents = ["The river follows the old road to the sea."] * 3
    settings = dict(top=TOP, random_sets=12, placebo_targets=12, untrained_dictionaries=3, bootstrap=500, effects="all")
    return saejax.ablate(tiny, dictionary, prompts, documents=documents, **settings)


def random_features(table, behaviour):
    """Return the features of all random lists."""
    return {feature for edit in table.select_edits(behaviour, "random") for feature in edit.features}


def test_features_of_random_lists_fire_on_five_percent_of_test_prompts(tiny, ablation, dictionary, make_prompt):
    test = make_prompts(make_prompt, "first")[10:]
    pool = sorted(random_features(ablation.table, "first"))
    assert len(pool) > 4 * TOP
    norm_FxP = engine.effects(tiny, test, edits.mask(dictionary, [[f] for f in pool]), ("change_norm",))[:, :, 0]
    assert ((norm_FxP > 0).mean(axis=1) >= 0.05).all()


def test_likely_tokens_that_are_answers_are_no_placebo_targets(tiny, dictionary, make_prompt, monkeypatch):
    """The likely tokens are made to be the answers and ten others; only these are drawn."""
    prompts = make_prompts(make_prompt, "only")
    ids = {word: tiny.token_id(word) for prompt in prompts for word in (prompt.correct, prompt.wrong)}
    others = [token for token in range(100, 383) if tiny.tokenizer.decode([token]).strip().isalpha()]
    others = [token for token in others if token not in ids.values()][:30]
    monkeypatch.setattr(behaviour_prompts, "likely_tokens", lambda *_: np.unique([*ids.values(), *others]))
    config = AblateConfig(top=TOP, placebo_targets=500)
    targets = begin(tiny, dictionary, prompts, config).train.placebo_targets()
    drawn = {text.strip() for pair in targets.names for text in pair}
    assert len(drawn) > 10
    assert drawn and not any(answer.strip().startswith(text) for text in drawn for answer in ids)


def test_features_are_ranked_by_the_chosen_estimate(tiny, dictionary, make_prompt):
    config, prompts = AblateConfig(top=TOP, attribution="integrated"), make_prompts(make_prompt, "only")
    ranked = begin(tiny, dictionary, prompts, config)
    again, runs = ranked.with_basis(dictionary).attribution_F, ranked.train.runs
    expected_F = attribution(ranked.split, runs, steps=10)
    np.testing.assert_array_equal(ranked.attribution_F, expected_F)
    np.testing.assert_array_equal(again, expected_F)
    assert np.abs(expected_F - attribution(ranked.split, runs)).max() > 1e-4


def test_draws_of_another_behaviour_do_not_depend_on_a_third(tiny, dictionary, make_prompt):
    names, settings = (
        ("first", "second", "third"),
        dict(top=TOP, random_sets=1, placebo_targets=1, untrained_dictionaries=0),
    )
    prompts = {name: [make_prompt(i, "train" if i < 6 else "test", name, False) for i in range(10)] for name in names}
    config = AblateConfig(**settings, baselines=(), replacement="random")
    values = []
    for others in (("second", "third"), ("third",)):
        some = {name: prompts[name] for name in ("first", *others)}
        table = measure_behaviour(begin_ablation(tiny, {TESTED: dictionary}, "first", some, config), some)
        edit = table.select_edits("first", "top")[-1]
        values += [table.values([edit], table.select_prompts(name), "logit_diff")[0] for name in others]
    np.testing.assert_allclose(values[1], values[2], atol=1e-5)
    assert np.isfinite(values).all()


def doses(table, edits):
    return table.doses(edits, table.select_prompts("first"))


# Statement 8 of WORKSPACE.md, what must hold.
def test_every_control_was_measured_once_at_the_dose_of_the_top_features(ablation):
    table = ablation.table
    (dose,) = doses(table, table.select_edits("first", "top")[-1:])
    counts = dict(random=12, placebo=12, untrained=3, trained=1, uncentred=3)
    for group in (*counts, *(f"basis:{basis}" for basis in BASES)):
        edits = table.select_edits("first", group)
        assert len({edit.index for edit in edits}) == len(edits)
        if group in counts:
            assert len(edits) <= counts[group] and (len(edits) == counts[group] or group == "placebo")
            np.testing.assert_allclose(doses(table, edits), dose, rtol=1e-5)
        else:
            assert doses(table, edits)[0] <= dose * (1 + 1e-5), "all directions together may change less"
        if group != "placebo":
            assert all(0 < edit.fraction <= 1 for edit in edits)
    assert len(table.select_edits("first", "placebo")) > 6
    assert all(0.5 <= edit.fraction <= 2 for edit in table.select_edits("first", "placebo"))


def test_a_list_is_the_shortest_beginning_that_reaches_the_dose(tiny, ablation, dictionary, make_prompt):
    """By the engine: one feature less stays below the dose."""
    table, test = ablation.table, make_prompts(make_prompt, "first")[10:]
    (dose,) = doses(table, table.select_edits("first", "top")[-1:])
    for edit in table.select_edits("first", "random")[:6]:
        sets = [edit.features[:size] for size in range(1, len(edit.features) + 1)]
        norm_ExP = engine.effects(tiny, test, edits.mask(dictionary, sets), ("change_norm",))[:, :, 0]
        dose_E = np.sqrt(np.mean(norm_ExP**2, axis=1))
        assert (dose_E[:-1] < dose * (1 + 1e-5)).all() and dose_E[-1] >= dose * (1 - 1e-5)


@pytest.mark.parametrize("size", [1, 32, 33, 64, 100])
def test_a_list_of_any_length_has_the_dose_of_its_sum(size):
    rng = np.random.default_rng(size)
    change_KxD, order = rng.normal(size=(120, 40)), rng.permutation(120)
    dose = np.linalg.norm(change_KxD[order[:size]].sum(axis=0))
    norms_N = [np.linalg.norm(change_KxD[order[:count]].sum(axis=0)) for count in range(1, 121)]
    expected = next(count for count, norm in enumerate(norms_N, 1) if norm >= dose * (1 - 1e-6))
    members, fraction = Changes(np.arange(120), change_KxD @ change_KxD.T).beginning(order, dose)
    assert members == tuple(order[:expected]) and fraction == pytest.approx(dose / norms_N[expected - 1])


def test_a_placebo_that_is_silent_is_replaced_by_the_next():
    changes = Changes(np.arange(4), np.diag([0.0, 1.0, 4.0, 100.0]))
    sets = [[0], [1], [], [3], [2], [1, 2]]  # doses 0, 1, 0, 10, 2 and 2.2
    assert scaled_sets(changes, sets, 2.0, 2) == [(1, 2.0), (4, 1.0)]
    assert [index for index, _ in scaled_sets(changes, sets, 2.0, 9)] == [1, 4, 5]


def test_no_token_is_in_more_than_four_placebo_pairs():
    pairs_Rx2 = token_pairs(np.arange(81), seed=3)
    assert len(pairs_Rx2) > 150 and (pairs_Rx2[:, 0] != pairs_Rx2[:, 1]).all()
    assert np.bincount(pairs_Rx2.ravel()).max() <= 4
    assert len({frozenset(pair) for pair in pairs_Rx2.tolist()}) == len(pairs_Rx2)


def test_other_answers_are_the_likeliest_tokens_that_are_no_answers(tiny, ablation, dictionary, make_prompt):
    table, prompts = ablation.table, make_prompts(make_prompt, "first")
    top, definitions = table.select_edits("first", "top")[-1], table.select_prompts("first")
    clean_RxP = np.stack([table.clean_values(definitions, name) for name in RANKS])
    edited_RxP = np.stack([table.values([top], definitions, name)[0] for name in RANKS])
    assert np.isfinite(clean_RxP).all() and np.isfinite(edited_RxP).all() and (np.diff(clean_RxP, axis=0) <= 0).all()
    answers = {text.strip() for prompt in prompts for text in (prompt.correct, prompt.wrong)}
    for place, prompt in enumerate(prompts[10:]):
        tokens = tiny.tokenize([prompt.text])
        clean_V = np.asarray(tiny(tokens).logits_BxTxV[0, tokens.last_B[0]], np.float64)
        edited_V = np.asarray(tiny(tokens, edits=[dictionary.ablate(top.features)]).logits_BxTxV[0, tokens.last_B[0]])
        ranked = []
        for token in np.argsort(-clean_V).tolist():
            text = tiny.tokenizer.decode([token])
            word = text.strip().casefold()
            is_word = word and "\N{REPLACEMENT CHARACTER}" not in text
            is_answer = any(answer.startswith(word) for answer in answers)
            if is_word and not is_answer and token not in tiny.tokenizer.all_special_ids:
                ranked.append(token)
        np.testing.assert_allclose(clean_RxP[:, place], clean_V[ranked[: len(RANKS)]], atol=1e-4)
        np.testing.assert_allclose(np.sort(edited_RxP[:, place]), np.sort(edited_V[ranked[: len(RANKS)]]), atol=1e-4)


def test_what_kept_features_leave_is_what_ablating_all_others_to_their_means_leaves(
    tiny, ablation, dictionary, make_prompt
):
    table, prompts = ablation.table, make_prompts(make_prompt, "first")
    train, test = prompts[:10], prompts[10:]
    split = SplitModel(tiny, dictionary)
    runs, mean_F = split.run(test), activity.statistics(split, split.run(train)).mean_F.astype(np.float32)
    kept = table.select_edits("first", "kept:top")
    assert [len(edit.features) for edit in kept] == [TOP, 2 * TOP, 4 * TOP, 8 * TOP]
    assert kept[-1].features[:TOP] == table.select_edits("first", "top")[0].features
    every = range(dictionary.config.n_features)
    others = [np.setdiff1d(every, edit.features) for edit in kept]
    replacement = edits.ActivationReplacement("mean", mean_F=mean_F)
    expected = engine.run_edits(split, runs, edits.mask(dictionary, others, replacement=replacement))["logit_diff"][1:]
    measured = table.values(kept, table.select_prompts("first"), "logit_diff")
    np.testing.assert_allclose(measured, expected, atol=2e-5)
    # Of all features kept nothing is changed but the error term, as in a clean run without it.
    whole_2xP = keep_features(split, runs, mean_F, [every])[:, 0]
    without = SplitModel(tiny, dictionary, error="drop")
    dropped_P = engine.run_edits(without, without.run(test), edits.mask(dictionary, [[0]], 0.0))["logit_diff"][0]
    np.testing.assert_allclose(
        whole_2xP, [table.clean_values(table.select_prompts("first"), "logit_diff"), dropped_P], atol=2e-5
    )
    assert np.abs(whole_2xP[0] - whole_2xP[1]).max() > 1e-3
    six_2xExP = keep_features(split, runs, mean_F, [*(edit.features for edit in kept), every, kept[0].features])
    np.testing.assert_allclose(six_2xExP[0], [*expected, *whole_2xP[:1], expected[0]], atol=2e-5)
    counts = {group: len(table.select_edits("first", f"kept:{group}")) for group in ("placebo", "untrained")}
    assert counts == dict(placebo=12, untrained=12), "three of each, with four sizes"


def test_doses_and_effects_are_those_of_the_engine(tiny, ablation, dictionary, make_prompt):
    test = make_prompts(make_prompt, "first")[10:]
    table, readouts = ablation.table, ("logit_diff", "change_norm")
    chosen = [*table.select_edits("first", "top")[::2], *table.select_edits("first", "placebo")[:4]]
    batch = edits.mask(dictionary, [edit.features for edit in chosen], [edit.fraction for edit in chosen])
    want = engine.effects(tiny, test, batch, readouts)
    for r, readout in enumerate(readouts):
        value_ExP = table.values(chosen, table.select_prompts("first"), readout)
        np.testing.assert_allclose(value_ExP, want[:, :, r], atol=2e-5)


def test_the_first_controls_are_run_on_other_behaviours_and_some_text(tiny, ablation, dictionary, make_prompt):
    table, others = ablation.table, make_prompts(make_prompt, "second")[10:]
    for group in SPARING:
        chosen = table.select_edits("first", group)
        value_ExP = table.values(chosen, table.select_prompts("second"), "logit_diff")
        batch = edits.mask(dictionary, [edit.features for edit in chosen[:3]], [edit.fraction for edit in chosen[:3]])
        np.testing.assert_allclose(
            value_ExP[:3], engine.effects(tiny, others, batch, ["logit_diff"])[..., 0], atol=2e-5
        )
        assert np.isnan(value_ExP[3:]).all()
        # Of three documents the first alone.
        is_run_ExP = np.isfinite(table.values(chosen, table.select_prompts(TEXT), "ce"))
        assert is_run_ExP[:3, 0].all() and is_run_ExP.sum() == 3


def test_the_verdict_is_that_of_the_table(ablation):
    assert verdict(ablation.table, VerdictConfig(resamples=500)) == ablation.verdict
    assert set(ablation.verdict.dictionaries) == {TESTED}
    answers = ablation.verdict.dictionaries[TESTED]
    assert set(answers) == {"first", "second"}
    for result in answers.values():
        assert result.trained.answer == "not testable" and result.trained.numbers["sets"] == 3
        assert set(result.bases) == set(BASES)


def test_dictionaries_of_other_seeds_answer_all_questions(tiny, dictionary, make_dictionary, make_prompt):
    config = AblateConfig(
        top=TOP, bootstrap=200, random_sets=3, placebo_targets=3, untrained_dictionaries=2, baselines=()
    )
    prompts = {"only": make_prompts(make_prompt, "only")}
    # The tested dictionary itself, under another name, one that reads another site, and one that writes nothing.
    silent = Dictionary(dictionary.config, **dictionary.arrays | dict(W_dec_FxD=0 * dictionary.W_dec_FxD[...]))
    repeats = {"same": dictionary, "elsewhere": make_dictionary("resid_post.0"), "silent": silent}
    table = measure_behaviour(begin_ablation(tiny, {TESTED: dictionary, **repeats}, "only", prompts, config), prompts)
    answers = verdict(table, VerdictConfig(resamples=200)).dictionaries
    assert list(answers) == [TESTED, "same", "elsewhere"]
    first, same, elsewhere = (answers[name]["only"] for name in (TESTED, "same", "elsewhere"))
    assert same.trained == first.trained and same.trained.numbers["sets"] == 2
    assert elsewhere.trained.answer == "not tested", "a dose there is another change"
    kept = [table.select_edits("only", "kept:top", name) for name in (TESTED, "same", "elsewhere")]
    assert [len(each) for each in kept] == [4, 4, 4]
    values = [table.values(each, table.select_prompts("only"), "logit_diff") for each in kept]
    np.testing.assert_array_equal(values[0], values[1])
    assert np.abs(values[0] - values[2]).max() > 1e-3
    (seeds,) = seed_table("Behaviour", answers, "topk/seed1")
    shown = [dict(zip(seeds.columns, row, strict=True)) for row in seeds.rows]
    assert [row["Dictionary"] for row in shown] == ["topk/seed1", "same", "elsewhere"]
    assert {row["Behaviour"] for row in shown} == {"Only"} and "unsure" not in seeds.note
    (marked,) = seed_table("Behaviour", answers, "topk/seed1", {"only": "accuracy 0.70"})
    assert {row[0] for row in marked.rows} == {"Only (weak)"} and "the model itself is unsure" in marked.note
    assert shown[0]["4. Training mattered"] == shown[1]["4. Training mattered"]
    assert shown[2]["4. Training mattered"] == "not tested"
    assert summarise(verdict(table), "only", "same") == summarise(verdict(table), "only")


def exchange_answers(prompts, behaviour):
    """Return the prompts as a behaviour with right and wrong exchanged: every attribution has the other sign."""
    return [dataclasses.replace(p, behaviour=behaviour, correct=p.wrong, wrong=p.correct) for p in prompts]


def keep_leaders(lm, dictionary, prompts):
    """Return the dictionary without features that raise the difference: with exchanged answers none lowers it."""
    tested = begin(lm, dictionary, prompts, AblateConfig(top=TOP))
    is_leader_F = tested.attribution_F > 0
    assert is_leader_F.sum() > 20
    arrays = dictionary.arrays | dict(W_dec_FxD=dictionary.W_dec_FxD[...] * is_leader_F[:, None])
    return Dictionary(dictionary.config, **arrays)


SMALL = dict(random_sets=3, placebo_targets=3, untrained_dictionaries=0, baselines=(), bootstrap=200)


def test_a_behaviour_without_top_features_is_named_and_the_others_go_on(tiny, dictionary, make_prompt):
    first = make_prompts(make_prompt, "first")
    second, dictionary = exchange_answers(first, "second"), keep_leaders(tiny, dictionary, first)
    ablation = saejax.ablate(tiny, dictionary, [*second, *first], top=TOP, effects="all", **SMALL)
    assert list(ablation.verdict.dictionaries[TESTED]) == list(ablation.top) == list(ablation.importance) == ["first"]
    assert list(ablation.verdict.untested) == ["second"]
    reason = "no feature of the dictionary has an attribution above zero on the train prompts of second: check that"
    assert ablation.verdict.untested["second"].startswith(reason)
    assert f"second\n  not testable: {reason}" in ablation.summary()
    assert "second: not testable" in repr(ablation.verdict)
    assert summarise(ablation.verdict, "second").startswith(f"not testable: {reason}")
    # The features of the other behaviour must still spare it.
    table = ablation.table
    drop_1xP = table.drops(table.select_edits("first", "top")[-1:], table.select_prompts("second"), "logit_diff")
    assert np.isfinite(drop_1xP).all() and np.abs(drop_1xP).max() > 0
    with pytest.raises(UserError, match="on the train prompts of second, third: check that it belongs to this model"):
        saejax.ablate(tiny, dictionary, [*second, *exchange_answers(first, "third")], top=TOP, **SMALL)


@pytest.mark.parametrize(
    "changes",
    [
        # Integrated gradients of untrained dictionaries take longest. diff_means is left out: by this estimate none of
        # its features lowers these answers.
        pytest.param(dict(attribution="integrated", baselines=("neurons", "pca")), marks=pytest.mark.slow),
        dict(replacement="mean", placebo_targets=2, untrained_dictionaries=2, baselines=()),
        pytest.param(dict(attribution="integrated", error="drop", repeats=()), marks=pytest.mark.slow),
    ],
)
def test_the_forecast_of_rows_is_what_is_run(tiny, dictionary, make_prompt, changes):
    options = dict(top=TOP, random_sets=3, placebo_targets=5, untrained_dictionaries=4, repeats=("again",))
    config, seen = AblateConfig(**options | changes), []
    prompts = {name: make_prompts(make_prompt, name) for name in ("first", "second")}
    prompts["second"] = prompts["second"][:15]  # fewer test prompts
    text = HeldOutText([tiny.encode("The river follows the old road to the sea.")] * 3)
    dictionaries = {name: dictionary for name in (TESTED, *config.repeats)}
    ablations = begin_ablation(tiny, dictionaries, "first", prompts, config, lambda *rows: seen.append(rows), 3)
    measure_behaviour(ablations, prompts, text)
    (forecast,) = {expected for _, expected in seen}
    assert seen[-1] == (forecast, forecast)


def test_every_live_feature_is_ranked_beside_estimates(ablation, tmp_path):
    table = ablation.table
    ablation.importance["first"].save(tmp_path / "importance.parquet")
    importance = Importance.load(tmp_path / "importance.parquet")
    singles = table.select_edits("first", "every")
    assert importance.feature.tolist() == [edit.index for edit in singles] and len(singles) > 50
    prompts = table.select_prompts("first")
    drop_NxP, templates = table.drops(singles, prompts, "logit_diff"), [prompt.template for prompt in prompts]
    means = [list(stratum_means(drop_P, templates).values()) for drop_P in drop_NxP]
    assert importance.same_sign.tolist() == [has_same_sign(each) for each in means]
    np.testing.assert_allclose(importance.drop, drop_NxP.mean(axis=1))
    effect = ablation.top["first"][0]
    assert importance.drop[importance.feature == effect.feature] == pytest.approx(effect.drop.mean, abs=1e-4)
    assert (importance.drop_low <= importance.drop + 1e-9).all() and (importance.p_fwer > 0).all()
    assert importance.summary.attribution_correlation > 0.5 and importance.summary.significant is not None


def test_no_feature_is_without_a_significant_effect_on_five_prompts(tiny, dictionary, make_prompt):
    """The smallest p-value of so few prompts is a sixteenth, so that "0 features" would say too much."""
    options = dict(random_sets=1, placebo_targets=0, untrained_dictionaries=0, baselines=(), bootstrap=100)
    prompts = make_prompts(make_prompt, "only")[:15]
    few = saejax.ablate(tiny, dictionary, prompts, top=TOP, effects="all", **options).importance["only"]
    assert np.isnan(few.p_fwer).all() and few.summary.significant is None and few.summary.features > 0


def test_bootstrap_samples_of_many_features_are_not_in_memory_at_once(tiny, dictionary, make_prompt, monkeypatch):
    options = dict(random_sets=1, placebo_targets=0, untrained_dictionaries=0, baselines=(), bootstrap=100)
    rank = functools.partial(saejax.ablate, tiny, dictionary, make_prompts(make_prompt, "only"), top=TOP, **options)
    whole, sizes, quantile = rank(effects="all").importance["only"], [], np.quantile

    def watched(samples, *more, **options):
        sizes.append(np.size(samples))
        return quantile(samples, *more, **options)

    monkeypatch.setattr(importance, "_BLOCK", 16)
    monkeypatch.setattr(np, "quantile", watched)
    blocks = rank(effects="all").importance["only"]
    assert len(whole.feature) > 50 and max(sizes) <= 16 * 100
    for name in ("drop_low", "drop_high"):
        np.testing.assert_allclose(getattr(blocks, name), getattr(whole, name), atol=1e-6)


def test_effects_of_top_features_have_intervals_within_templates(ablation):
    table, prompts = ablation.table, ablation.table.select_prompts("first")
    weights_SxP = resampling_weights([prompt.template for prompt in prompts], 500, AblateConfig().seed)
    drop_KxP = table.drops(table.select_edits("first", "single", TESTED), prompts, "logit_diff")
    assert [effect.drop for effect in ablation.top["first"]] == [mean_interval(d, weights_SxP) for d in drop_KxP]


def test_named_features_are_those_that_are_ablated(tiny, dictionary, make_prompt):
    prompts = make_prompts(make_prompt, "only")
    options = dict(random_sets=3, placebo_targets=0, baselines=(), untrained_dictionaries=0, bootstrap=200)
    with pytest.raises(UserError, match="features were named, and top is 3: leave top out"):
        saejax.ablate(tiny, dictionary, prompts, features=[5, 60], top=3, **options)
    ablation = saejax.ablate(tiny, dictionary, prompts, features=[5, 60], **options)
    answers = ablation.verdict.dictionaries[TESTED]["only"]
    assert answers.features == (5, 60) and answers.selective.answer == "not tested"  # there is no other behaviour
    assert answers.trained.answer == "not tested" and not any("trained" in edit.group for edit in ablation.table.edits)
    assert not {5, 60} & random_features(ablation.table, "only")
    # The ranking's attribution is that of the model, in logits, whoever chose the features.
    assert all(abs(effect.attribution) < 1.0 for effect in ablation.top["only"])
    with pytest.raises(UserError, match="train"):
        saejax.ablate(tiny, dictionary, prompts[10:], **options)


def test_too_few_prompts_are_refused_before_any_behaviour_is_measured(tiny, dictionary, make_prompt, monkeypatch):
    monkeypatch.setattr(in_memory, "begin_ablation", lambda *_, **options: pytest.fail("a behaviour was begun"))
    prompts = make_prompts(make_prompt, "first", "second")
    for kept, message in (
        (prompts[:-7], "behaviour second has 10 train and 1 test prompts: expected at least 1 and 2"),
        (prompts[:18] + prompts[28:], "behaviour second has 0 train and 8 test prompts"),
    ):
        with pytest.raises(UserError, match=message):
            saejax.ablate(tiny, dictionary, kept, **SMALL)


def test_names_that_tables_of_effects_have_are_refused(tiny, dictionary, make_prompt):
    """Effects on held-out text and on a behaviour of this name were taken for each other's."""
    with pytest.raises(UserError, match="a behaviour is called 'text', as held-out text is"):
        saejax.ablate(tiny, dictionary, make_prompts(make_prompt, "first", TEXT), documents=["A river."] * 6, **SMALL)
    with pytest.raises(UserError, match="a repeat is called 'tested', as the tested dictionary is"):
        prompts = make_prompts(make_prompt, "first")
        saejax.ablate(tiny, dictionary, prompts, repeats={TESTED: dictionary}, **SMALL)


def test_prompts_for_attribution_are_spread_over_templates():
    prompts = [Prompt("b", "train", str(i), "", "", template="a" if i < 8 else "c") for i in range(10)]
    assert [prompt.text for prompt in spread_over_templates(prompts, 4)] == ["0", "1", "8", "9"]
    assert len(spread_over_templates(prompts, 0)) == 10


SETTINGS = dict(
    top=4, random_sets=12, placebo_targets=8, bootstrap=500, batch_rows=32, baselines=("pca",), untrained_dictionaries=0
)
CONFIG = AblateConfig(**SETTINGS, text_documents=2)


@pytest.fixture
def make_run(tmp_path, save_inputs, stage_run, make_prompt, single_device):
    """Runs on one device, whose programs the library's calls here have compiled."""
    behaviours = ("first", "second")
    prompts = [make_prompt(i, "train" if i < 10 else "test", name, False) for name in behaviours for i in range(18)]
    inputs = save_inputs(tmp_path, prompts)

    def make(name, config=CONFIG, **fields):
        return stage_run("ablate", "topk", inputs, name, CorpusConfig(), TaskConfig(), config, **fields)

    return make


def test_the_stage_end_to_end_stopped_and_resumed(make_run, tiny, make_dictionary):
    whole, lines = make_run("whole")
    results = stage.run_ablate(whole)
    assert from_json(AblateResults, json.loads(json.dumps(to_json(results), allow_nan=False)), "") == results
    assert (results.dictionary, results.site, results.k) == ("topk", "resid_post.1", 4)
    assert list(results.verdict.dictionaries[TESTED]) == ["first", "second"]
    assert any(line.startswith("second (2 of 2): ") for line in lines)
    assert sorted(path.name for path in whole.folder.iterdir()) == [
        "edits.json", "effects.parquet", "first-effects", "first.json", "prompts.json", "second-effects", "second.json",
    ]  # fmt: skip

    # The verdict is a function of the saved table, and the library gives the same one without a workdir.
    table = saejax.load_effects(whole.folder)
    assert saejax.verdict(table, verdict_config(CONFIG)) == results.verdict
    prompts = read_prompts(whole.inputs["baseline"] / "prompts.jsonl")
    called = saejax.ablate(tiny, make_dictionary("resid_post.1"), prompts, **SETTINGS)
    assert called.top["first"][0].feature == results.top["first"][0].feature
    for name in ("first", "second"):
        of_call, of_stage = (each.dictionaries[TESTED][name] for each in (called.verdict, results.verdict))
        assert of_call.features == of_stage.features and of_call.random.answer == of_stage.random.answer
        means = [each.ablation["logit_diff"].effect.mean for each in (of_call, of_stage)]
        assert means[0] == pytest.approx(means[1], abs=1e-4)

    # Asked to stop once the first behaviour is there: it is kept, and what comes then is the same to the bit.
    folder = whole.folder.parent / "stopped"
    stopped, _ = make_run("stopped", stopping=lambda: (folder / "first.json").exists())
    with pytest.raises(Interrupted, match="second .2 of 2.: stopped"):
        stage.run_ablate(stopped)
    written = (folder / "first.json").stat().st_mtime_ns
    resumed, lines = make_run("stopped")
    assert stage.run_ablate(resumed) == results
    assert (folder / "first.json").stat().st_mtime_ns == written
    assert lines[0] == "kept from an earlier run: first"
    # Killed before it was done, when all behaviours were: nothing is measured again.
    assert stage.run_ablate(make_run("stopped")[0]) == results
    again = saejax.load_effects(folder)
    for group in ("top", "random", "placebo"):
        edits, prompts_P = again.select_edits("second", group), again.select_prompts("second")
        resumed_ExP, whole_ExP = (each.values(edits, prompts_P, "logit_diff") for each in (again, table))
        np.testing.assert_array_equal(resumed_ExP, whole_ExP)


def test_the_stage_names_a_behaviour_without_top_features(make_run, tiny, make_dictionary, tmp_path):
    run, lines = make_run("some")
    path = run.inputs["baseline"] / "prompts.jsonl"
    first = [prompt for prompt in read_prompts(path) if prompt.behaviour == "first"]
    leaders = keep_leaders(tiny, make_dictionary("resid_post.1"), first)
    save_dictionary(tmp_path / "train" / "leaders", leaders)
    write_members(tmp_path / "train" / "leaders", "")
    run = dataclasses.replace(run, inputs={**run.inputs, "train/topk": tmp_path / "train" / "leaders"})
    write_prompts(path, [*exchange_answers(first, "second"), *first])
    results = stage.run_ablate(run)
    assert list(results.verdict.dictionaries[TESTED]) == list(results.top) == ["first"]
    said = [line for line in lines if "not testable: no feature of the dictionary has an attribution above" in line]
    assert len(said) == 2 and all("second" in line for line in said), "when it is measured, and at the end"
    assert from_json(AblateResults, json.loads(json.dumps(to_json(results), allow_nan=False)), "") == results
    # All behaviours are so: one line.
    run = dataclasses.replace(run, folder=tmp_path / "none")
    write_prompts(path, exchange_answers(first, "second"))
    with pytest.raises(UserError, match="attribution above zero on the train prompts of second: check that"):
        stage.run_ablate(run)


@pytest.mark.slow  # in memory it is judged in test_readouts_and_sites.py
def test_the_stage_tests_one_set_of_several_sites(make_run, tiny, make_dictionary, tmp_path):
    """As the library does; a feature of a joined SAE is named by its site and its index there."""
    second = make_dictionary("resid_post.2", seed=3)
    save_dictionary(tmp_path / "train" / "second", second)
    write_members(tmp_path / "train" / "second", "")
    config = dataclasses.replace(CONFIG, top=8, joined=("standard",), text_documents=0)
    run, _ = make_run("joined", config)
    run = dataclasses.replace(run, inputs={**run.inputs, "train/standard": tmp_path / "train" / "second"})
    results = stage.run_ablate(run)
    first = make_dictionary("resid_post.1")
    called = saejax.ablate(
        tiny, [first, second], read_prompts(run.inputs["baseline"] / "prompts.jsonl"), **SETTINGS | dict(top=8)
    )
    assert results.site == "resid_post.1, resid_post.2" and not results.verdict.dictionaries[TESTED]["first"].bases
    for name, top in results.top.items():
        features = [item.feature + first.config.n_features * bool(item.site) for item in top]
        assert tuple(features) == called.verdict.dictionaries[TESTED][name].features
        assert {item.site for item in top} == {"", "resid_post.2"}


def test_neurons_of_several_experts_or_beside_other_widths_are_no_basis(tiny, dictionary, make_dictionary):
    lm = types.SimpleNamespace(config=dataclasses.replace(tiny.config, n_experts=4, experts_per_token=2))
    tested = types.SimpleNamespace(split=types.SimpleNamespace(lm=lm), basis=dictionary)
    assert ablation_module._on_basis(tested, "neurons") is None
    # Their dose, in units of mlp_out, would not be that of a change of heads or of hidden activations.
    for site in ("attn_z.1", "mlp_act.1"):
        tested = types.SimpleNamespace(split=types.SimpleNamespace(lm=tiny), basis=make_dictionary(site))
        assert ablation_module._on_basis(tested, "neurons") is None


def test_what_cannot_be_run_is_said(make_run):
    few, _ = make_run("few")
    path = few.inputs["baseline"] / "prompts.jsonl"
    every = read_prompts(path)
    write_prompts(path, every[:-7])
    with pytest.raises(UserError, match="behaviour second has 10 train and 1 test prompts"):
        stage.run_ablate(few)
    assert not list(few.folder.iterdir()), "no behaviour was measured"
    write_prompts(path, every)
    run, _ = make_run("refused", dataclasses.replace(CONFIG, replacement="counterpart"))
    path = run.inputs["baseline"] / "prompts.jsonl"
    write_prompts(path, [dataclasses.replace(prompt, counterpart="") for prompt in read_prompts(path)])
    with pytest.raises(UserError, match=r"first, prompt 'The .*', has no counterpart: give it one"):
        stage.run_ablate(run)
