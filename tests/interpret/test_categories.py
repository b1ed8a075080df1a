"""Prompt categories against planted features, scipy's exact test, and activations of the model."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from scipy.stats import false_discovery_control, fisher_exact

from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.interpret.categories import CategorisedPrompt, active_on_prompts, associate, make_tests, read_prompts
from saejax.interpret.results import CategoryCounts
from saejax.page.tables import MISSING
from saejax.stages.interpret.report import _categories


@pytest.fixture
def planted():
    """Feature 0 fires on capitals, 1 where plurals are answered rightly, 2 never, the others at random."""
    rng = np.random.default_rng(0)
    prompts = [CategorisedPrompt(str(i), "capital", None if i % 2 else True) for i in range(40)]
    prompts += [CategorisedPrompt(str(i), "plural", i < 20) for i in range(40)]
    active_PxF = rng.random((80, 60)) < 0.3
    active_PxF[:, 0] = np.arange(80) < 38
    active_PxF[:, 1] = (np.arange(80) >= 40) & (np.arange(80) < 59)
    active_PxF[:, 2] = False
    return prompts, active_PxF


def test_planted_features_are_found_and_few_others(planted):
    prompts, active_PxF = planted
    found = associate(active_PxF, make_tests(prompts))
    assert found[0][0]["category"] == "capital" and 2 not in found and len(found) <= 4
    assert (found[0][0]["active"], found[0][0]["prompts"]) == (38, 40) and found[0][0]["active_elsewhere"] == 0
    assert {one["category"] for one in found[1]} == {"plural", "plural: right answers"}
    # Of capitals no answer was wrong: there is nothing to compare the right ones with.
    assert list(make_tests(prompts)) == ["capital", "plural", "plural: right answers", "plural: wrong answers"]


def test_q_values_are_those_of_scipy(planted):
    prompts, active_PxF = planted
    tests = make_tests(prompts)
    live = np.flatnonzero(active_PxF.sum(0) >= 5)
    p = []
    for sides in tests.values():
        for feature in live:
            a, b = (active_PxF[side_P, feature] for side_P in sides)
            p.append(fisher_exact([[a.sum(), (~a).sum()], [b.sum(), (~b).sum()]], alternative="greater").pvalue)
    q_MxA = false_discovery_control(p).reshape(len(tests), len(live))
    for feature, rows in associate(active_PxF, tests).items():
        for row in rows:
            m = list(tests).index(row["category"])
            assert row["q"] == pytest.approx(q_MxA[m, live.tolist().index(feature)], rel=1e-3)


def test_of_permuted_categories_nothing_is_left(planted):
    prompts, active_PxF = planted
    shuffled = make_tests(prompts, np.random.default_rng(1))
    assert {len(inside_P) for inside_P, _ in shuffled.values()} == {80} and shuffled["capital"][0].sum() == 40
    assert len(associate(active_PxF, shuffled)) <= 1
    assert associate(np.zeros((80, 3), bool), shuffled) == {} == associate(active_PxF, {})
    # 100 worlds: of permuted categories, and those of the two planted features.
    null, true = 0, np.zeros(2)
    for seed in range(100):
        rng = np.random.default_rng(seed)
        active_PxF[:, 3:] = rng.random((80, 57)) < rng.uniform(0.05, 0.5, 57)
        null += bool(associate(active_PxF, make_tests(prompts, rng)))
        true += [feature in associate(active_PxF, make_tests(prompts)) for feature in (0, 1)]
    print(f"a feature has a category: {null} of 100 null worlds; planted ones in {true} of 100")
    assert null <= 8 and true.min() >= 80


def test_a_feature_is_active_where_it_fires(lm):
    config = DictionaryConfig(kind="topk", site="resid_post.1", d_in=64, n_features=48, k=3, max_norm=1e9)
    dictionary = Dictionary.initial(config, jax.random.key(0))
    texts = ["The cat near the dogs runs.", "a", "3 + 4 = 7, 5 + 2"]
    active_PxF = active_on_prompts(lm, dictionary, texts)
    for text, active_F in zip(texts, active_PxF, strict=True):
        x_1xTxD = lm(lm.tokenize([text]), capture=["resid_post.1"], logits=False).sites["resid_post.1"]
        f_TxF = np.asarray(dictionary.encode(x_1xTxD))[0]
        np.testing.assert_array_equal(active_F, (f_TxF != 0).any(axis=0))


def test_a_feature_is_not_active_where_a_transcoders_target_is_a_sink(lm):
    text, sites = "The cat near the dogs runs.", ["mlp_in.1", "mlp_out.1"]
    read_TxD, written_TxD = (value[0] for value in lm(lm.tokenize([text]), capture=sites, logits=False).sites.values())
    norm_T = np.linalg.norm(written_TxD, axis=1)
    limit = float(np.sort(norm_T)[len(norm_T) // 2 :][:2].mean())
    config = DictionaryConfig(
        kind="topk", site=sites[0], target=sites[1], d_in=64, n_features=48, k=3, max_norm=1e9, target_max_norm=limit
    )
    dictionary = Dictionary.initial(config, jax.random.key(0))
    (active_F,) = active_on_prompts(lm, dictionary, [text])
    fires_TxF = np.asarray(dictionary.encode(read_TxD)) != 0
    np.testing.assert_array_equal(active_F, fires_TxF[norm_T <= limit].any(axis=0))
    assert active_F.sum() < fires_TxF.any(axis=0).sum()


def test_prompts_come_from_the_baseline_and_benchmarks(tmp_path):
    lines = {
        "baseline/prompts.jsonl": [dict(text="a", behaviour="capital", logit_diff=-1.0)],
        "gsm8k/items.jsonl": [
            dict(question="b", prompt="a b", flexible=dict(correct=True, answer="3")),
            dict(question="d"),
        ],
        "logic/items.jsonl": [dict(question="c", prompt="a c", raw=dict(correct=False))],
    }
    for name, rows in lines.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    units = {"baseline": "baseline", "benchmark/gsm8k": "gsm8k", "benchmark/logic": "logic", "capture": "none"}
    found = read_prompts({unit: tmp_path / folder for unit, folder in units.items()})
    assert found == [
        CategorisedPrompt("a", "capital", False),
        CategorisedPrompt("b", "gsm8k", True),
        CategorisedPrompt("d", "gsm8k", None),
        CategorisedPrompt("c", "logic", False),
    ]


def test_without_a_test_no_feature_is_said_to_lack_a_category():
    """One behaviour, on all of whose prompts the model is right."""
    tested = [SimpleNamespace(categories=CategoryCounts(80, tests, 12, 0, 0)) for tests in (0, 3)]
    (table,) = _categories(list(zip("ab", tested)))
    assert [row[3:] for row in table.rows] == [(MISSING, MISSING), ("0 of 12", "0")]
