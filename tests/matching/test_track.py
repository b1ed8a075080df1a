"""Planted chains are followed, planted steps told apart, and removing features costs what it should."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.errors import UserError
from saejax.interventions import controls
from saejax.matching.track import tested
from saejax.matching.track.firings import LayerFirings, activations, follow, step_features
from saejax.matching.track.links import find_links, strongest_chains
from saejax.matching.track.measured import CONTROLS, _all, _exceeds_controls, measure_chains
from saejax.matching.track.settings import TrackConfig
from saejax.matching.track.stack import LayerDictionary
from saejax.matching.track.tested import StepTester, judge_steps
from saejax.matching.track.texts import Problem, encode, read_problems, sentences, write_solution
from saejax.models.tokens import pad

D, F = 64, 48
CHAINS = [{0: 3, 1: 10, 2: 7, 3: 1}, {1: 20, 2: 30}, {2: 5, 3: 6}]  # layer -> feature, of one direction each


def sae(lm, layer, W_dec_FxD, threshold=0.05, k=0):
    """An SAE whose encoder is its decoder's transpose."""
    config = DictionaryConfig(
        kind="topk" if k else "standard", site=f"resid_post.{layer}", d_in=D, n_features=len(W_dec_FxD), k=k,
        centred=False, model=lm.source.name, fingerprint=lm.source.fingerprint, max_norm=1e9,
    )  # fmt: skip
    arrays = dict(W_enc_DxF=W_dec_FxD.T, b_enc_F=np.full(len(W_dec_FxD), -threshold), W_dec_FxD=W_dec_FxD)
    arrays["b_dec_D"] = np.zeros(D)
    return Dictionary(config, **{name: np.asarray(array, np.float32) for name, array in arrays.items()})


def stack_of(*dictionaries):
    return tuple(LayerDictionary(each.site, each.config, lambda each=each: each, None, {}) for each in dictionaries)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_only_what_counts_as_firing_is_followed(identity_llama):
    """Of a linear dictionary nearly all activations differ from 0, and those near it are no firings."""
    config = DictionaryConfig(kind="linear", site="resid_post.0", d_in=D, n_features=F, centred=False, fires_above=0.3)
    arrays = dict(W_enc_DxF=unit(np.random.default_rng(0).standard_normal((F, D))).T, b_enc_F=np.zeros(F))
    arrays |= dict(W_dec_FxD=arrays["W_enc_DxF"].T, b_dec_D=np.zeros(D))
    linear = Dictionary(config, **{name: np.asarray(array, np.float32) for name, array in arrays.items()})
    x_1xTxD = unit(np.random.default_rng(1).standard_normal((1, 5, D))).astype(np.float32)
    dense = x_1xTxD[0] @ arrays["W_enc_DxF"]
    assert 0 < (np.abs(dense) > 0.3).mean() < 0.1
    found = activations(identity_llama, linear, x_1xTxD, np.ones((1, 5), bool))
    np.testing.assert_allclose(found, np.where(np.abs(dense) > 0.3, dense, 0), atol=1e-5)


def test_nothing_is_followed_where_a_transcoders_target_is_a_sink(lm):
    """What it reads behind a norm is as long there as anywhere."""
    ids_T, sites = np.arange(5, 17), dict(site="mlp_in.0", target="mlp_out.0")
    made = sae(lm, 0, unit(np.random.default_rng(0).standard_normal((F, D))), threshold=0)
    norm_T = np.linalg.norm(lm(pad([ids_T.tolist()]), capture=["mlp_out.0"]).sites["mlp_out.0"][0], axis=1)
    limit = float(np.median(norm_T))
    (firings,) = follow(
        lm, stack_of(made.with_config(dataclasses.replace(made.config, target_max_norm=limit, **sites))), ids_T
    )
    assert set(firings.position_A) == set(np.flatnonzero(norm_T <= limit)) and (norm_T > limit).any()


@pytest.mark.parametrize("source", [1, -1])
@pytest.mark.parametrize("target", [1, -1])
def test_negative_activations_are_linked_too(source, target):
    """What is written is against the row then, and what is made is against the column."""
    rng, nobody = np.random.default_rng(0), SimpleNamespace(source=SimpleNamespace(name="", fingerprint=""))
    low, high = (unit(rng.standard_normal((F, D))) for _ in range(2))
    f_2x1xF = np.zeros((2, 1, F))
    f_2x1xF[0, 0, 3], f_2x1xF[1, 0, 10] = 2 * source, target
    for sign, links in ((1, [((0, 0, 3), (1, 0, 10), pytest.approx(2 * target))]), (-1, [])):
        high[10] = sign * source * target * low[3]
        stack = stack_of(sae(nobody, 0, low), sae(nobody, 1, high))
        assert find_links(stack, [LayerFirings.of(f_1xF) for f_1xF in f_2x1xF]) == links


def test_planted_chains_are_followed_and_nothing_else(identity_llama):
    rng = np.random.default_rng(3)
    tables = [unit(rng.standard_normal((F, D))) for _ in range(4)]
    for places in CHAINS:
        direction = rng.standard_normal(D)
        for layer, feature in places.items():
            tables[layer][feature] = unit(unit(direction) + 0.03 * rng.standard_normal(D))
    made = stack_of(*(sae(identity_llama, layer, table, threshold=0) for layer, table in enumerate(tables)))
    ids_T = np.array(identity_llama.tokenizer("The cat near the dogs runs to Paris")["input_ids"])
    shown = [one.strongest(F) for one in follow(identity_llama, made, ids_T)]
    found = find_links(made, shown)
    active = [set(zip(one.position_A.tolist(), one.feature_A.tolist(), strict=True)) for one in shown]
    steps = [step for places in CHAINS for step in itertools.pairwise(places.items())]
    wanted = {
        ((low, t, source), (high, t, target))
        for (low, source), (high, target) in steps
        for t in range(len(ids_T))
        if (t, source) in active[low] and (t, target) in active[high]
    }
    assert len(wanted) > 10 and {(a, b) for a, b, _ in found} == wanted  # precision and recall are 1
    loaded = [each.load() for each in made]
    centred = [each.with_config(dataclasses.replace(each.config, input_norm="center")) for each in loaded]
    for links, mean in ((found, 0), (find_links(stack_of(*centred), shown), 1)):  # a token's mean is not read
        for source, target, weight in links[:5]:
            at = shown[source[0]].at(source[1])
            value = at.value_A[at.feature_A == source[2]][0]
            row, column = tables[source[0]][source[2]], tables[target[0]][target[2]]
            np.testing.assert_allclose(weight, value * (row @ (column - mean * column.mean())), rtol=1e-4)


def test_the_strongest_chains_are_those_of_a_search_over_all():
    rng = np.random.default_rng(0)
    for most in (1, 2, 3):
        links = [
            ((layer, 4, i), (layer + 1, 4, j), float(rng.uniform(0.1, 1)))
            for layer in range(4)
            for i in range(3)
            for j in range(3)
            if rng.uniform() < 0.5
        ]
        chains = [[link] for link in links]
        for _ in range(most - 1):  # every chain, one link longer each time
            chains += [[*chain, link] for chain in chains for link in links if chain[-1][1] == link[0]]
        chains = [chain for chain in chains if len(chain) <= most]
        chosen = strongest_chains(links, 2, most)
        best = max((len(chain), min(weight for *_, weight in chain)) for chain in chains)
        assert (len(chosen[0]), min(weight for *_, weight in chosen[0])) == best
        nodes = [{node for link in chain for node in link[:2]} for chain in chosen]
        assert not nodes[0] & nodes[1] and all(a[1] == b[0] for chain in chosen for a, b in itertools.pairwise(chain))
    assert strongest_chains([], 2, 3) == []


def test_a_written_solution_is_followed_to_its_last_number(lm, monkeypatch):
    written = SimpleNamespace(text=" 2 cats and 1,200 dogs run. That is 12 of them.")
    monkeypatch.setattr(type(lm), "generate", lambda self, tokens, most: [written])
    problem = write_solution(lm, Problem("x", "How many?"), 20)
    assert problem.steps == (" 2 cats and 1,200 dogs run. ", "That is 12 of them.") and problem.answer == " 12"
    assert problem.output == written.text.strip()
    # As the model wrote it: without a second space.
    assert "".join(encode(lm, problem).tokens) == f"How many?{written.text}"
    solved = write_solution(lm, Problem("x", "How many?", ("There are 7.",), " 7"), 20)
    assert (solved.steps, solved.answer, solved.output) == (("There are 7.",), " 7", written.text.strip())
    assert write_solution(lm, Problem("x", "How many?"), 0) == Problem("x", "How many?")
    written.text = " "  # a model that ends at once
    assert write_solution(lm, Problem("x", "How many?"), 20) == Problem("x", "How many?")


def test_an_answer_is_followed_in_a_text_that_begins_with_bos(lm):
    problem = Problem("x", "How many?", ("That is 12",), " 12")
    plain, begun = (encode(model, problem) for model in (lm, lm.with_bos("always")))
    assert len(begun.ids_T) == len(plain.ids_T) + 1
    assert (begun.answer, begun.position) == (plain.answer, plain.position + 1)
    assert begun.answer == begun.ids_T[begun.position + 1]


def test_planted_steps_are_told_apart(identity_llama):
    """By a dictionary of which each feature is a token: its embedding."""
    embed_VxD, war = np.asarray(identity_llama.params["embed_VxD"]), identity_llama.token_id(" war")
    by_token = sae(identity_llama, 1, unit(embed_VxD), threshold=0, k=1)
    solution = ("The cat runs. ", "She said the cat was far. ", "The war lasted. ", "The cat was there.")
    text = encode(identity_llama, Problem("x", "One day:", solution))
    assert [part.name for part in text.segments] == ["prompt", "step 1", "step 2", "step 3", "step 4"]
    assert "".join(text.tokens[text.steps[2].start : text.steps[2].stop]).strip() == "The war lasted."
    (firings,) = follow(identity_llama, stack_of(by_token), text.ids_T)
    assert firings.feature_A.tolist() == text.ids_T.tolist()
    found = step_features(firings, text.segment_T, 100)
    for number, part in enumerate(text.segments):
        inside, outside = (set(text.ids_T[(text.segment_T == number) == here].tolist()) for here in (True, False))
        features = {each.feature for each in found[number]}
        # All that are nowhere else, and none that is not here.
        assert inside - outside <= features <= inside, part.name
    (of_war,) = (each for each in found[3] if each.feature == war)
    length = text.segments[3].stop - text.segments[3].start
    mean = float(firings.value_A[text.ids_T == war].sum()) / length
    assert of_war.mean == of_war.contrast == pytest.approx(mean, rel=1e-5)


def made_tester(lm, dictionary, text, **changes):
    return StepTester(lm, stack_of(dictionary)[0], text, TrackConfig(prompt="x", dictionaries=("made",), **changes))


def test_removing_features_in_a_step_costs_what_an_edit_does(lm, monkeypatch):
    lists = []
    make = tested.random_lists
    monkeypatch.setattr(tested, "random_lists", lambda *args: lists.append(make(*args)) or lists[-1])
    table = unit(np.random.default_rng(5).standard_normal((F, D)))
    dictionary = sae(lm, 2, table, threshold=0.3)
    text = encode(lm, Problem("x", "One day the cat", ("runs near the dogs. ", "She said that it was far.")))
    step = text.steps[0]
    made = made_tester(lm, dictionary, text)
    features = np.argsort(-np.abs(made._f_TxF[step.start : step.stop - 1]).sum(0))[:3].tolist()
    effects = made.test(step, features)
    tokens = pad([text.ids_T.tolist()])

    def scores(edits):
        logp = np.asarray(jax.nn.log_softmax(lm(tokens, edits=edits).logits_BxTxV[0]), np.float64)
        at = np.arange(step.start, step.stop - 1)
        return logp[at, text.ids_T[at + 1]]

    where = (step.start, step.stop - 1)
    clean_P = scores([])
    expected_P = clean_P - scores([dictionary.ablate(features, positions=where)])
    np.testing.assert_allclose(effects.drop_P, expected_P, atol=2e-4)
    assert np.abs(effects.drop_P).max() > 1e-2 and effects.control_NxP.shape == (79, len(clean_P))
    # Lists change the site as much as the features do, and cost what an edit of their fraction does.
    f_WxF = made._f_TxF[step.start : step.stop - 1].astype(np.float64)
    dose = np.linalg.norm(f_WxF[:, features] @ table[features])
    assert len(lists) == 1 and effects.list_size == np.median([len(members) for members, _ in lists[0]])
    for (members, fraction), drop_P in zip(lists[0][:3], effects.control_NxP, strict=False):
        members = list(members)
        assert not {*members} & {*features}
        assert fraction * np.linalg.norm(f_WxF[:, members] @ table[members]) == pytest.approx(dose, rel=1e-4)
        expected_P = clean_P - scores([dictionary.scale(members, 1 - fraction, positions=where)])
        np.testing.assert_allclose(drop_P, expected_P, atol=2e-4)
    # The inner products of a large pool would not fit in memory.
    monkeypatch.setattr(controls, "LARGEST_POOL", 5)
    assert effects.pool > 5 == made.test(step, features).pool


def test_features_that_mean_nothing_are_rarely_said_to_matter(lm):
    """Random directions, chosen blindly: p is at most 0.05 in about as many cases, or fewer."""
    rng, small = np.random.default_rng(7), []
    words = ["cat", "dogs", "year", "Paris", "water", "way", "went", "near", "said", "capital", "war", "France"]
    for trial in range(40):
        dictionary = sae(lm, 2, unit(rng.standard_normal((F, D))), threshold=0.2)
        body = " ".join(rng.choice(words, 8))
        text = encode(lm, Problem("x", "One day the", (f"{body}. ", "That was there.")))
        made = made_tester(lm, dictionary, text, seed=trial)
        step = text.steps[0]
        fires = np.flatnonzero((made._f_TxF[step.start : step.stop - 1] != 0).any(0))
        features = rng.choice(fires, 3, replace=False).tolist()
        effects = made.test(step, features)
        result = judge_steps({1: effects})[1]
        few = effects.pool < 10 * effects.list_size
        assert result.needed == 19 and (result.hurt == "not testable") == (few or result.sets < 19)
        small += [result.p_holm <= 0.05] if result.p_holm is not None else []
    print(f"a step is hurt by features that mean nothing: yes in {sum(small)} of {len(small)} testable worlds")
    assert len(small) >= 20 and np.mean(small) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / len(small))


def test_a_step_is_hurt_where_its_features_cost_more_and_not_where_they_do_not():
    """Four steps a text: 100 texts where one costs more than any list, and those where all are like lists."""
    rng, rates = np.random.default_rng(0), []
    for gain in (0.0, 4.0):
        hurt = []
        for _ in range(100):
            drops = [rng.normal(size=(80, 1)) + np.zeros(5) for _ in range(4)]
            drops[0][0] += gain
            effects = {key: tested.StepEffects((1, 2), some[0], some[1:], 200, 8.0) for key, some in enumerate(drops)}
            effects[9] = tested.StepEffects((1, 2), np.full(5, 99.0), drops[0][1:], 79, 8.0)  # too few features fire
            found = judge_steps(effects)
            assert found[9].hurt == "not testable" and found[9].p_holm is None and found[0].needed == 79
            hurt.append(any(found[key].hurt == "yes" for key in range(4)))
        rates.append(sum(hurt))
    print(f"a step is hurt: yes in {rates[0]} of 100 null and {rates[1]} of 100 true texts")
    assert rates[0] <= 8 and rates[1] >= 80


def test_what_makes_a_step_likelier_hurts_nothing_though_its_lists_make_it_likelier_still():
    drop_P, control_NxP = np.full(5, -0.1), np.full((79, 5), -0.5)
    found = judge_steps({0: tested.StepEffects((1, 2), drop_P, control_NxP, 200, 8.0)})[0]
    assert found.hurt == "no" and found.p_holm == 1 / 80
    assert _exceeds_controls([-0.1, *[-0.5] * CONTROLS]) is False and _exceeds_controls([0.1, *[-0.5] * CONTROLS])


@pytest.mark.parametrize(
    "pieces",
    [
        ("Ann has 3.5 apples. ", "“Two?” ", "she asks!  ", "1. Buy one.\n", "Done"),
        ("我有三个苹果。", "她吃了一个。"),
        ("एक सेब है। ", "दो हैं।"),
        ("no end",),
        ("Dr. Smith met Mr. J. Doe at 3 p.m. in St. Louis, e.g. twice. ", "5 vs. 4 apples etc. remained."),
        ("So it is Dr.\n", "Next"),
    ],
)
def test_sentences(pieces):
    """An abbreviation ends none: "Dr." once was a step."""
    assert sentences("".join(pieces)) == pieces


def test_prompts_of_other_scripts_and_of_one_token(lm):
    for prompt in ("我有三个苹果。她吃了一个。还剩几个？", "مرحبا. كيف حالك؟ 👍🏽 نعم.", "a"):
        text = encode(lm, Problem("x", prompt))
        assert text.segments[0].start == 0 and text.segments[-1].stop == len(text.ids_T) == len(text.segment_T)
        assert text.position == len(text.ids_T) - 1 and text.answer is None
    firings = LayerFirings.of(np.zeros((4, 5)))
    assert step_features(firings, np.zeros(4, int), 3) == [[]]


@pytest.mark.parametrize(
    ("steps", "answer", "before"),
    [
        (("The year was 1732. ", "So it is the year 1741."), " 1741", "the year"),
        (("He has 12 coins. ", "They cost 1200 cents."), " 12", "He has"),
        (("She ate 12. ", "Now 12.5 and 3,012 and 112 are left."), " 12", "She ate"),
        (("The cat sat. ", "It concatenates."), " cat", "The"),
        (("她有三个苹果。", "所以她有42个苹果。"), "42", ""),  # without spaces between words
    ],
)
def test_the_answer_is_followed_where_it_stands_last_by_itself(lm, steps, answer, before):
    text = encode(lm, Problem("x", "How many?", steps, answer))
    assert "".join(text.tokens[: text.position + 1]).rstrip().endswith(before)
    assert text.ids_T[text.position + 1] == text.answer
    assert encode(lm, Problem("x", "The capital of France is", (), " Paris")).answer == lm.token_id(" Paris")


def test_an_answer_that_the_prompt_alone_has_is_followed_at_the_end(lm):
    text = encode(lm, Problem("x", "Ann has 12 cats. How many?", ("She keeps all.",), " 12"))
    assert text.position == len(text.ids_T) - 1


def test_rows_of_gsm8k_are_followed(tmp_path):
    path = tmp_path / "test.jsonl"
    answer = "Ann sells 48/2 = <<48/2=24>>24 clips.\nShe sells 48+24 = <<48+24=72>>72.\n#### 72"
    path.write_text(json.dumps(dict(question="Ann sold 48 clips. How many?", answer=answer)))
    (problem,) = read_problems(TrackConfig(prompts=str(path)))
    assert problem.prompt == "Ann sold 48 clips. How many?" and problem.answer == " 72"
    assert problem.steps == ("Ann sells 48/2 = 24 clips.\n", "She sells 48+24 = 72.\n", "The answer is 72.")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds 0 prompts"),
        ([dict(slug=f"a{i}", prompt="One.") for i in range(5)], "holds 5 prompts: expected 1 to 4"),
        ([dict(prompt="One.", solution=["Two.", " "])], "line 1: step 2 of the solution is empty"),
        ([dict(prompt=" ")], "the prompt is empty"),
        ([dict(prompt="One.", other=1)], "is no prompt to follow"),
        ([dict(prompt="One.", solution=3)], "neither a text nor a list"),
        ([dict(question="One?", answer="It is one.")], "line 1: 'answer' does not end in '#### ' and a number"),
        ([dict(question="One?", answer=1)], "line 1: 'answer' does not end in '#### ' and a number"),
        ([dict(prompt="One."), dict(prompt="One.")], r"line 2 has the slug 'One-\w+' of an earlier line"),
    ],
)
def test_prompts_that_are_refused(tmp_path, lines, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=message):
        read_problems(TrackConfig(prompts=str(path)))


@pytest.mark.slow
def test_links_between_features_that_mean_nothing_rarely_hold(lm):
    """Links between random features of random dictionaries; a defect: with five controls one in six held."""
    lower, upper = (
        sae(lm, layer, unit(np.random.default_rng(layer).standard_normal((128, D))), k=32) for layer in (0, 1)
    )
    stack, ids_T = stack_of(lower, upper), np.random.default_rng(2).integers(5, 200, 40)
    firings, rng = follow(lm, stack, ids_T), np.random.default_rng(3)
    links = []
    for position in rng.integers(8, 40, 200).tolist():
        source, target = (rng.choice(each.at(position).feature_A) for each in firings)
        links.append(((0, position, int(source)), (1, position, int(target)), 1.0))
    measured = [
        link
        for first in range(0, len(links), 3)  # as many chains as are measured
        for chain in measure_chains(lm, stack, ids_T, 3, links[first : first + 3], firings, str, first)[0]
        for link in chain.links
    ]
    measured = [link for link in measured if link.holds is not None]  # some positions have fewer active features
    held = np.mean([link.holds for link in measured])
    print(f"of {len(measured)} links between features that mean nothing {100 * held:.1f} % hold")
    assert len(measured) > 100 and held <= 0.08


def test_chains_without_any_control_are_counted(lm):
    """Of a dictionary with k = 1 no other feature is active anywhere; of one with k = 2 there is a single control."""
    ids_T, chains = np.arange(5, 17), {}
    for k in (1, 2):
        rows_of = [unit(np.random.default_rng(layer).standard_normal((128, D))) for layer in (0, 1)]
        stack = stack_of(*(sae(lm, layer, rows_FxD, k=k) for layer, rows_FxD in enumerate(rows_of)))
        firings = follow(lm, stack, ids_T)
        links = [
            ((0, position, low), (1, position, high), 1.0)
            for position in (8, 9)
            for low, high in [[int(each.at(position).feature_A[0]) for each in firings]]
        ]
        chains[k] = measure_chains(lm, stack, ids_T, 3, links, firings, str, 0)
    assert chains[1] == ((), 2)
    measured, left_out = chains[2]
    assert left_out == 0 and [chain.holds for chain in measured] == [None, None]


def test_a_change_that_makes_a_position_long_loses_no_feature_there(identity_llama):
    """A defect: a position that became an attention sink by the change had lost all of its features."""
    ids_T = np.arange(5, 17)
    norm = np.linalg.norm(identity_llama(pad([ids_T.tolist()]), capture=["resid_post.0"]).sites["resid_post.0"], axis=2)
    table = unit(np.random.default_rng(0).standard_normal((128, D)))
    upper = sae(identity_llama, 1, table)
    upper = upper.with_config(dataclasses.replace(upper.config, max_norm=1.001 * float(norm.max())))
    lower = sae(identity_llama, 0, table)  # what is taken away points the other way, so the value grows
    lower = Dictionary(lower.config, **lower.arrays | dict(W_dec_FxD=-lower.arrays["W_dec_FxD"]))
    stack = stack_of(lower, upper)
    firings, position = follow(identity_llama, stack, ids_T), int(norm[0].argmax())
    feature = int(firings[0].at(position).feature_A[0])
    link = ((0, position, feature), (1, position, feature), 1.0)
    ((chain,), _) = measure_chains(identity_llama, stack, ids_T, 3, [link], firings, str, 0)
    assert -1.1 < chain.links[0].lost < -0.9  # it is twice as active


def test_a_chain_whose_effects_are_those_of_its_controls_rarely_holds():
    """1,000 chains of one link whose effects are drawn like those of the controls, and 1,000 with larger ones."""
    rates = {}
    for shift in (0.0, 5.0):
        rng, links, chains = np.random.default_rng(int(shift)), [], []
        for _ in range(1000):
            # Of the link, and of the answer without the lowest and the highest feature.
            drawn = rng.normal(size=(3, 1 + CONTROLS)) + shift * (np.arange(1 + CONTROLS) == 0)
            answers = [_exceeds_controls(effects.tolist()) for effects in drawn]
            links.append(answers[0])
            chains.append(_all(answers))
        rates[shift] = np.mean(links), np.mean(chains)
    print(f"links and chains that hold: {rates[0.0]} of null and {rates[5.0]} of true worlds")
    assert max(rates[0.0]) <= 0.08 and min(rates[5.0]) >= 0.8
