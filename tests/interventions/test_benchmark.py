"""Benchmarks under ablation: whole answers, attribution, placebo targets, and the stage, killed and resumed."""

import dataclasses
import json

import numpy as np
import pytest
import runs
import torch
from runs import write_members
from scipy import sparse

from saejax.dictionaries import save_dictionary
from saejax.errors import Interrupted, UserError
from saejax.interventions import benchmark, references
from saejax.interventions.answers import VerdictConfig
from saejax.interventions.edits import mask
from saejax.interventions.references import Reference, References, answer_pairs, attributions
from saejax.interventions.settings import StudyConfig
from saejax.interventions.split_model import SplitModel
from saejax.interventions.table import TESTED, EditDefinition, EffectsTable, PromptDefinition, load_effects
from saejax.interventions.verdict import verdict
from saejax.matching.importance import ItemFeatures
from saejax.page.blocks import Picture
from saejax.page.findings import Findings
from saejax.page.tables import Table
from saejax.results import from_json, to_json
from saejax.runner.results import Summary
from saejax.stages import inputs as run_inputs
from saejax.stages.ablate.report import headline
from saejax.stages.study import measure as benchmark_measure
from saejax.stages.study import report as benchmark_report
from saejax.stages.study import run as benchmark_run
from saejax.stages.study.results import StudyItems, StudyResults
from saejax.stages.study.stage import STUDY
from saejax.statistics.ranks import rank_p
from saejax.studies import associations
from saejax.studies.primitives import CHOSEN_ON
from saejax.tasks.answers import Verdict
from saejax.tasks.benchmark_definitions import LOGIC_TASKS
from saejax.tasks.benchmark_scores import score_items
from saejax.tasks.benchmarks import read_items
from saejax.tasks.likelihood import loglikelihoods
from saejax.tasks.scored_items import GeneratedItem
from saejax.tasks.settings import TaskConfig

SITE = "resid_post.1"
CONFIG = StudyConfig(
    benchmarks=("logic", "gsm8k"),
    items=12,
    top=3,
    random_sets=4,
    placebo_targets=4,
    scored_sets=2,
    untrained_dictionaries=0,
    baselines=("pca",),
    bootstrap=200,
    batch_tokens=4096,
)


@pytest.fixture(autouse=True)
def small_machine(one_device, monkeypatch):
    """Most of the time of these tests is compiling, for eight devices the more so."""
    monkeypatch.setattr(run_inputs, "make_mesh", lambda config: one_device)


def write_lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Questions that are short enough for the tiny model."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for number, name in enumerate(LOGIC_TASKS):
        rows = [dict(input=f"{number} Pick {letter}\n(A) x\n(B) y\n(C) z", target=f"({letter})") for letter in "BAC"]
        if name in ("boolean_expressions", "web_of_lies"):
            right = "True" if name == "boolean_expressions" else "No"
            rows = [dict(input=f"Is {n} so", target=right) for n in range(3)]
        write_lines(folder / "logic" / f"{name}.jsonl", rows)
    sums = [dict(question=f"{n} + 3?", answer=f"It is {n + 3}\n#### {n + 3}") for n in range(12)]
    write_lines(folder / "gsm8k.jsonl", sums)
    return TaskConfig(path=str(folder), examples=12, shots=0, max_new_tokens=6, batch=4)


@pytest.fixture(scope="module")
def dictionary(make_dictionary):
    return make_dictionary(SITE, dead=8)


@pytest.fixture
def make_run(tmp_path, stage_run, dictionary, task):
    def make(name, folder="run", score="auto", stopping=lambda: False, **changes):
        train = tmp_path / f"{folder}-topk"
        if not train.exists():
            save_dictionary(train, dictionary)
            write_members(train, "")
        settings = dataclasses.replace(task, score=score), dataclasses.replace(CONFIG, **changes)
        return stage_run("study", name, {"train/topk": train}, folder, *settings, stopping=stopping)

    return make


def random_references(sizes, seed=5):
    rng = np.random.default_rng(seed)
    return [Reference(rng.integers(1, 384, n).tolist(), rng.integers(1, 384, m).tolist()) for n, m in sizes]


@pytest.fixture
def run_reference(plain, dictionary, prompts):
    """run_reference(reference): its text as a run in PyTorch."""
    run = plain(dictionary, prompts[0])
    return lambda reference: dataclasses.replace(run, ids_T=reference.context + reference.answer)


def log_likelihood(run, reference, change):
    """The log-likelihood of a reference when the site's value x_1xTxD becomes change(x_1xTxD)."""
    logp_TxV = torch.log_softmax(run.run(change), dim=-1)
    places = torch.arange(len(reference.context) - 1, len(run.ids_T) - 1)
    return logp_TxV[places, torch.tensor(reference.answer)].sum()


@pytest.mark.parametrize("batch_tokens", [200, pytest.param(16, marks=pytest.mark.slow)])
def test_attribution_equals_torch_autograd(tiny, dictionary, run_reference, batch_tokens):
    references = random_references([(9, 3), (9, 2), (30, 11), (14, 1)])
    expected_F = 0.0
    for reference in references:
        run, kept = run_reference(reference), []

        def keep(x_1xTxD, kept=kept):
            kept.append(x_1xTxD.detach().requires_grad_())
            return kept[0]

        log_likelihood(run, reference, keep).backward()
        slope_TxF = kept[0].grad[0].numpy() @ run.W_dec_FxD.T
        f_TxF = run.features(kept[0].detach()[0].numpy())
        expected_F = expected_F + (f_TxF * slope_TxF).sum(axis=0) / len(references)
    (rows_NxF,) = attributions([SplitModel(tiny, dictionary)], references, batch_tokens)
    np.testing.assert_allclose(rows_NxF.mean(axis=0), expected_F, atol=1e-4 * np.abs(expected_F).max())


def test_dictionaries_measured_together_have_the_attributions_that_each_has_alone(tiny, dictionary, make_dictionary):
    """Those of one site share slopes, not attention sinks; another site has slopes of its own."""
    limit = dataclasses.replace(dictionary.config, max_norm=0.5 * dictionary.config.max_norm)
    more_sinks = dictionary.with_config(limit)
    splits = [SplitModel(tiny, each) for each in (dictionary, make_dictionary("resid_post.0"), more_sinks)]
    references = random_references([(9, 3), (30, 11), (14, 1)])
    together = attributions(splits, references, 200)
    for split, rows_NxF in zip(splits[1:], together[1:], strict=True):
        np.testing.assert_allclose(rows_NxF, attributions([split], references, 200)[0], atol=1e-6)
    assert np.abs(together[0] - together[2]).max() > 1e-3
    weight_MxN = np.array([[0.5, -0.5, 0.0], [1.0, 2.0, 3.0]])
    sums = attributions(splits, references, 200, weight_MxN=weight_MxN)
    for rows_NxF, sum_MxF in zip(together, sums, strict=True):
        np.testing.assert_allclose(sum_MxF, weight_MxN @ rows_NxF.astype(np.float64), atol=1e-9)


@pytest.mark.parametrize("batch_tokens", [200, pytest.param(16, marks=pytest.mark.slow)])
def test_log_likelihoods_and_changes_equal_torch_hooks(tiny, dictionary, run_reference, batch_tokens):
    references = random_references([(9, 3), (1, 1), (30, 11), (14, 1)])
    measured = References(SplitModel(tiny, dictionary), references, batch_tokens)
    often = np.argsort(-measured.statistics().prompts_F, kind="stable")[:6].tolist()
    sets, fractions = [often[:1], often[:4], often[2:6], [159]], np.array([1.0, 0.5, 1.0, 1.0])
    edits = mask(dictionary, sets, fractions)
    values_ExN = measured.log_likelihoods(edits)
    clean_N, edited_ExN = values_ExN[0], values_ExN[1:]
    norm_ExN = measured.change_norms(edits)
    for n, reference in enumerate(references):
        run = run_reference(reference)
        f_TxF = run.features(run.value())
        for e, (members, fraction) in enumerate([*zip(sets, fractions, strict=True), ([], 0.0)]):
            fall_TxD = fraction * f_TxF[:, members] @ run.W_dec_FxD[members]
            with torch.no_grad():
                total = float(log_likelihood(run, reference, lambda x, fall=fall_TxD: x - torch.from_numpy(fall)))
            assert [*edited_ExN[:, n], clean_N[n]][e] == pytest.approx(total, abs=2e-4)
            if len(members):
                assert norm_ExN[e, n] == pytest.approx(np.linalg.norm(fall_TxD), rel=1e-4, abs=1e-5)
    np.testing.assert_array_equal(edited_ExN[3], clean_N)  # a dead feature: nothing is run


def test_statistics_and_pools_are_those_of_the_text(tiny, dictionary, run_reference):
    references = random_references([(5, 4), (20, 4), (9, 4)], seed=6)
    positions, firing, in_texts = 0, [[] for _ in range(160)], np.zeros(160, int)
    for reference in references:
        run = run_reference(reference)
        x_TxD = run.value()
        positions += int(run.is_usable(x_TxD).sum())
        f_TxF = run.features(x_TxD)
        in_texts += (f_TxF > 0).any(axis=0)
        for values, f_T in zip(firing, f_TxF.T, strict=True):
            values += f_T[f_T > 0].tolist()
    made = References(SplitModel(tiny, dictionary), references, 100)
    statistics = made.statistics()
    assert statistics.positions == positions < sum(map(len, references))
    assert statistics.fires_F.tolist() == [len(values) for values in firing]
    assert statistics.prompts_F.tolist() == in_texts.tolist()
    np.testing.assert_allclose(statistics.sum_F, [sum(values) for values in firing], rtol=1e-3, atol=1e-3)
    often = int(np.argmax(statistics.fires_F))
    pools = made.pools([often, 159], 10_000, 1)
    np.testing.assert_allclose(sorted(pools[often]), sorted(firing[often]), rtol=1e-3, atol=1e-4)
    few = made.pools([often, 159], 2, 1)[often]
    assert pools[159] == [] and len(few) == 2
    assert few == np.random.default_rng([1, often]).choice(pools[often], 2, replace=False).tolist()


def test_placebo_targets_are_distinct_pairs_of_corrupted_answers():
    targets = answer_pairs([3, 2, 4], 30, seed=1)
    assert 5 < len(targets) <= 30
    for first_N, second_N in targets:
        for start, size, pair in zip((0, 3, 5), (3, 2, 4), zip(first_N, second_N, strict=True), strict=True):
            assert len({*pair}) == 2 and start <= min(pair) <= max(pair) < start + size
    unordered = {frozenset((tuple(first), tuple(second))) for first, second in targets}
    assert len(unordered) == len(targets)
    assert len(answer_pairs([2], 199, seed=1)) == 1, "one control is not 199"
    assert answer_pairs([], 9, seed=1) == []


def benchmark_table(seed, answer, answers=20, placebos=19):
    """T costs the text 3 nats, controls 1; T costs the margin of the final answer ``answer``, placebo sets 0 to 2."""
    rng = np.random.default_rng(seed)
    prompts = [PromptDefinition(f"b/{p:02d}", "b") for p in range(answers)]
    groups = [("clean", 1), ("top", 1), ("random", 19), ("placebo", placebos)]
    edits = [EditDefinition("b", group, i, (i + 100 * (group == "random"),)) for group, n in groups for i in range(n)]
    text = dict(clean=0.0, top=3.0)
    text_E = np.array([text.get(edit.group, 1.0) for edit in edits])
    margin_E = np.array([0.0, answer if answer is not None else rng.uniform(0, 2), *rng.uniform(0, 2, 19 + placebos)])
    noise_2xExP = rng.normal(size=(2, len(edits), answers)) * (np.arange(len(edits)) > 0)[:, None]
    margin_ExP = 4 - margin_E[:, None] - noise_2xExP[1]
    margin_ExP[2:21] = np.nan  # not measured under random lists
    values = dict(answer_log_prob=-5 - text_E[:, None] - noise_2xExP[0], answer_margin=margin_ExP)
    return EffectsTable.block(edits, prompts, values | dict(change_norm=np.ones_like(margin_ExP)))


def test_specific_is_asked_of_the_final_answer_and_not_of_the_text():
    """In 100 worlds the text is hit three times as hard as by controls, its final answer no harder; in 100 it is."""
    rates = {}
    for answer in (None, 4.0):
        judged = [verdict(benchmark_table(seed, answer), VerdictConfig(resamples=50)) for seed in range(100)]
        found = [each.dictionaries[TESTED]["b"] for each in judged]
        assert all(each.random.answer == "yes" for each in found)
        rates[answer] = sum(each.placebo.answer == "yes" for each in found)
    print(f"specific to the final answer: yes in {rates[None]} of 100 null and {rates[4.0]} of 100 true worlds")
    assert rates[None] <= 8 and rates[4.0] >= 80
    assert "nats of the final answer's margin" in found[0].placebo.sentence
    (few,) = verdict(benchmark_table(0, 4.0, answers=5)).dictionaries[TESTED].values()
    assert few.placebo.answer == "not testable" and "5 prompts" in few.placebo.sentence
    # Items of two choices have one wrong answer each, and a placebo target takes two.
    (lacking,) = verdict(benchmark_table(0, 4.0, placebos=0)).dictionaries[TESTED].values()
    assert lacking.placebo.answer == "not tested" and "two wrong answers" in lacking.placebo.sentence
    # The page never compares the two quantities: the text's log-likelihood, and the final answer's margin.
    table = benchmark_table(0, 4.0)
    top, placebo = (
        table.drops(table.select_edits("b", group), table.prompts, "answer_margin").mean(axis=1)
        for group in ("top", "placebo")
    )
    of_text, of_answer = headline("b", found[0]).split("; of the final answer's log-probability beyond a corrupted")
    assert "nats of the log-likelihood of the reference answer" in of_text and "tokens" not in of_text
    expected = (
        f" one's the top features cost {top[0]:.2f} nats, sets chosen for corrupted answers {np.median(placebo):.2f}."
    )
    assert of_answer == expected


def check_associations(run, items, results, table, monkeypatch):
    """Features go with the labels of their own items, in whatever order these are."""
    monkeypatch.setattr(associations, "_LEAST", 1)
    train, test = (
        [dataclasses.replace(item, categories=("ab"[i % 2],)) for i, item in enumerate(half)]
        for half in (items.train, items.test)
    )
    items = dataclasses.replace(items, train=train, test=test)
    associated = benchmark_run._associate(run.folder, items, results, table, 0)
    read = ItemFeatures.load(run.folder / benchmark_run.FEATURES_ON_ITEMS)
    acts_NxF = read.activity.f_NxF.toarray()
    compared = 0
    for row in associated.top:
        is_question_N = [(read.text_N == read.ids.index(item.id)) & (read.end_N <= len(item.question)) for item in test]
        largest = [acts_NxF[is_N, row.feature].max() for is_N in is_question_N]
        if np.ptp(largest) and row.label in ("a", "b"):
            wanted = np.corrcoef(largest, [row.label in item.categories for item in test])[0, 1]
            assert row.correlation.mean == pytest.approx(wanted, abs=1e-5)
            compared += 1
    assert compared


@pytest.mark.parametrize(
    ("name", "settings"),
    [("gsm8k", dict(score="likelihood", baselines=())), pytest.param("logic", {}, marks=pytest.mark.slow)],
)
def test_the_stage_by_hand_killed_and_resumed(make_run, tiny, dictionary, task, name, settings, monkeypatch):
    run, lines = make_run(name, falsify=8, **settings)
    path = run.folder / benchmark_run.FEATURES
    with pytest.raises(Interrupted, match="stopped"):
        benchmark_run.run_study(dataclasses.replace(run, stopping=path.exists))
    kept = path.read_text()
    results = benchmark_run.run_study(run)
    assert path.read_text() == kept
    assert benchmark_run.run_study(run) == results  # killed after it had removed what was measured
    assert from_json(StudyResults, json.loads(json.dumps(to_json(results), allow_nan=False)), "") == results
    assert results.items == StudyItems(train=6, test=6) and results.k == len(results.top) <= 3
    assert any("log-likelihood of the reference answer" in line for line in lines)

    table = load_effects(run.folder)
    assert verdict(table, VerdictConfig(resamples=CONFIG.bootstrap, seed=CONFIG.seed)) == results.verdict
    train, test = benchmark_measure.split_items(read_items(name, task), CONFIG, name)
    assert not {item.id for item in train} & {item.id for item in test}
    prompts = table.select_prompts(name)
    by_id = {f"{name}/{item.id}": item for item in test}
    assert {prompt.id for prompt in prompts} == set(by_id)
    ordered = [by_id[prompt.id] for prompt in prompts]
    likelihood = dataclasses.replace(task, score="likelihood")

    def assert_scored(measured_P, edits=()):
        """The log-likelihoods of all items are those of the benchmark's own scoring under this edit."""
        expected_P = [row.log_likelihood for row in score_items(tiny, name, ordered, likelihood, edits)]
        np.testing.assert_allclose(measured_P, expected_P, atol=1e-3)

    clean_P = table.clean_values(prompts, "answer_log_prob")
    assert_scored(clean_P)
    assert results.log_likelihood == pytest.approx(clean_P.mean())
    beside = {"gsm8k": "logic", "logic": "gsm8k"}[name]
    for group in ("top", "single", "random", "placebo", CHOSEN_ON + beside):
        edit = table.select_whole_edits(name, group)[-1]
        (measured_P,) = table.values([edit], prompts, "answer_log_prob")
        assert_scored(measured_P, [dictionary.scale(edit.features, 1 - edit.fraction)])
    # Question 3 is about the final answer, whose solution comes before it, and a corrupted one.
    items = benchmark_run.BenchmarkItems(tiny, name, task, train, ordered)
    right, corrupted = ([some[which] for some in items.final_answers(ordered, CONFIG.seed)] for which in (0, 1))
    for group in ("top", "placebo"):
        edit = table.select_whole_edits(name, group)[-1]
        edits = [dictionary.scale(edit.features, 1 - edit.fraction)]
        expected = [
            likelihood.total - other.total
            for likelihood, other in zip(
                *(
                    loglikelihoods(tiny, [r.context for r in some], [r.answer for r in some], edits)
                    for some in (right, corrupted)
                ),
                strict=True,
            )
        ]
        np.testing.assert_allclose(table.values([edit], prompts, "answer_margin")[0], expected, atol=1e-3)
    for item, reference, other in zip(ordered, right, corrupted, strict=True):
        assert tiny.tokenizer.decode(reference.answer).strip() == item.answer
        assert tiny.tokenizer.decode(other.answer).strip() != item.answer and reference.context == other.context
    chosen_there = table.select_edits(name, CHOSEN_ON + beside)
    lists = table.select_edits(name, benchmark.control_group("random", CHOSEN_ON + beside))
    assert len(lists) == results.domains[beside].random_sets == 4 or results.domains[beside].random_sets == 0
    np.testing.assert_allclose(table.doses(lists, prompts), table.doses(chosen_there, prompts)[0], rtol=1e-5)
    assert results.domains[beside].effect.mean == pytest.approx((clean_P - measured_P).mean())

    result = results.verdict.dictionaries[TESTED][name]
    top, random = table.select_edits(name, "top")[-1:], table.select_edits(name, "random")
    top_P, random_ExP = table.drops(top, prompts, "answer_log_prob")[0], table.drops(random, prompts, "answer_log_prob")
    assert result.ablation["answer_log_prob"].effect.mean == pytest.approx(top_P.mean())
    np.testing.assert_allclose(
        table.doses([*random, *table.select_edits(name, "placebo")], prompts), result.dose, rtol=1e-5
    )
    assert result.random.p_value == pytest.approx(rank_p(top_P.mean(), random_ExP.mean(axis=1)))
    assert result.random.answer == result.placebo.answer == "not testable"  # 4 of 19 sets
    assert "answer_log_prob_resampled" in result.ablation and result.selective.answer == "not tested"
    assert set(result.bases) == set(run.configs[StudyConfig].baselines)
    assert (results.at_chance is None) == (name == "gsm8k")
    assert name == "logic" or (results.scores == () and result.ablation["accuracy"].answer == "not tested")

    chosen = [effect.feature for effect in results.top]
    shares, rows = results.falsification.shares, results.falsification.features
    assert [share.group for share in shares] == ["tested", "random features", "random dictionary"]
    assert [row.feature for row in rows][: results.k] == chosen
    ranking = json.loads((run.folder / benchmark_measure.RANKING).read_text())
    ranked = [entry["attribution"] for entry in ranking]
    assert ranked == sorted(ranked, reverse=True) and len(ranking) > 3
    assert {row["feature"] for row in ranking if "drop" in row} == {e.feature for e in results.top if e.firing_rate}
    files = (benchmark_run.FEATURES_ON_ITEMS, benchmark_measure.ROTATED_ON_ITEMS)
    saved, turned = (ItemFeatures.load(run.folder / file) for file in files)
    assert set(saved.ids) == {item.id for item in (*train, *test)} and saved.placebo_RxF.shape[0] == 4
    assert ranked == pytest.approx([saved.importance_F[entry["feature"]] for entry in ranking], rel=1e-5)
    assert turned.ids == saved.ids and not np.allclose(turned.importance_F, saved.importance_F)
    by_item_PxF = sparse.load_npz(run.folder / benchmark_measure.ITEM_ATTRIBUTION).toarray()
    np.testing.assert_allclose(by_item_PxF[: len(train)].mean(axis=0), saved.importance_F, rtol=1e-4, atol=1e-5)
    items = benchmark_run.BenchmarkItems(tiny, name, task, train, test)
    (expected_PxF,) = attributions([SplitModel(tiny, dictionary)], items.references([*train, *test]), 4096)
    np.testing.assert_allclose(by_item_PxF, expected_PxF, rtol=1e-4, atol=1e-5)
    assert results.categories == {item.id: item.categories for item in (*train, *test)}
    check_associations(run, items, results, table, monkeypatch)


def test_nothing_is_attributed_or_placed_twice(tiny, dictionary, make_dictionary, task, monkeypatch):
    """Each answer to an item is attributed once for each dictionary, and a dictionary is placed once."""
    seen, placed = [], []

    def record(compute):
        def recorded(splits, references, *rest, **options):
            seen.extend(
                (id(split), *map(tuple, (each.context, each.answer))) for split in splits for each in references
            )
            return compute(splits, references, *rest, **options)

        return recorded

    split = SplitModel.__init__

    def place(self, lm, basis, *rest):
        placed.append(id(basis))
        split(self, lm, basis, *rest)

    for module in (benchmark, references):
        monkeypatch.setattr(module, "attributions", record(attributions))
    monkeypatch.setattr(SplitModel, "__init__", place)
    halves = benchmark_measure.split_items(read_items("gsm8k", task), CONFIG, "gsm8k")
    items = benchmark.BenchmarkItems(tiny, "gsm8k", task, *halves)
    config = dataclasses.replace(CONFIG, attribution_items=4, baselines=(), placebo_targets=1, repeats=("again",))
    repeat = make_dictionary(SITE, dead=8, seed=9)
    benchmark.measure_benchmark(items, dictionary, config, dict(again=repeat)).item_attributions()
    # Four train items choose, with eight corrupted answers each; the eight others follow.
    assert len(set(seen)) == len(seen) == 2 * (4 + 4 * 8 + 8) and placed == [id(dictionary), id(repeat)]


def test_the_power_in_the_text_is_that_of_simulations():
    rng, items = np.random.default_rng(0), 100
    # Of 100 answers 7.5 become wrong and 2.5 right on average.
    change_RxN = rng.choice([1, -1, 0], (4000, items), p=[0.075, 0.025, 0.9])
    error_R = change_RxN.std(axis=1, ddof=1) / items**0.5
    power = np.mean(change_RxN.mean(axis=1) > 1.96 * error_R)
    text = benchmark_run.describe_power(items, 0.05)
    start = "if ablation truly lowers accuracy by 5 points and changes 10 % of the answers, 100 test items"
    assert text.startswith(start) and text.endswith("and 307 in 80 %")
    assert float(text.split(" above zero in ")[1].split(" %")[0]) == pytest.approx(100 * power, abs=6)
    assert benchmark_run.describe_power(items, 1.0).endswith("above zero in 100 % of cases, and 1 in 80 %")


def test_generated_answers_are_scored_under_every_condition(make_run, dictionary, monkeypatch):
    """The model is replaced by one that is right without an edit, and wrong, unformatted or cut off under it."""
    real = benchmark_run.BenchmarkItems.score

    def score(self, edits, scored, check_stop):
        if scored == "likelihood":
            return real(self, edits, scored, check_stop)
        edited = bool(edits([0] * 4))
        rows = []
        for number, item in enumerate(self.test):
            right = not edited or number == 0
            strict = Verdict(item.answer if right and number < 3 else None, right and number < 3)
            scores = "length" if edited and number < 2 else "eos", strict, Verdict(item.answer, right)
            rows.append(GeneratedItem(item.id, "", "", "", item.answer, "text", *scores))
        return rows

    monkeypatch.setattr(benchmark_run.BenchmarkItems, "score", score)
    edited = []
    bases, edits_of = benchmark_run.bases, benchmark_run.edits_of

    def make_edits(basis, edit, *rest):
        edited.append((edit.group if edit else "clean", edit.index if edit else 0, basis))
        return edits_of(basis, edit, *rest)

    monkeypatch.setattr(benchmark_run, "edits_of", make_edits)
    run, _ = make_run("gsm8k", untrained_dictionaries=2)
    results = benchmark_run.run_study(run)
    assert results.at_chance is False
    # Lists of an untrained dictionary are scored as edits of that dictionary: the one of their effects on the text.
    active = round(results.activations.l0)
    for group, index, basis in edited:
        if group == "untrained":
            again = bases.untrained(dictionary, active, CONFIG.seed + index)
            np.testing.assert_array_equal(basis.W_dec_FxD[...], again.W_dec_FxD[...])
        else:
            np.testing.assert_array_equal(basis.W_dec_FxD[...], dictionary.W_dec_FxD[...])
    by_group = {score.group: score for score in results.scores}
    assert list(by_group) == ["clean", "top", "resample", "random", "placebo", "untrained"]
    assert by_group["clean"].accuracy == 1.0 and by_group["clean"].drop == 0.0
    assert by_group["clean"].unformatted == pytest.approx(0.5) and by_group["clean"].cut == 0.0
    assert by_group["clean"].strict == pytest.approx(0.5), "the flexible rule judges, the strict one stands beside it"
    assert by_group["top"].accuracy == pytest.approx(1 / 6) and by_group["top"].cut == pytest.approx(2 / 6)
    assert by_group["random"].sets == by_group["placebo"].sets == by_group["untrained"].sets == 2
    assert by_group["random"].p_value == 1.0  # random sets do as much
    result = results.verdict.dictionaries[TESTED]["gsm8k"]
    assert result.ablation["accuracy"].answer == "yes"
    assert result.ablation["accuracy"].effect.mean == pytest.approx(5 / 6)
    assert set(result.bases) == {"pca"}
    # An accuracy that falls from 100 to 17 % is never answered with no for want of control sets.
    assert result.random.answer == "not testable" and "4 random lists of 19 needed" in result.random.sentence
    assert len(list((run.folder / benchmark_run.ANSWERS).glob("*.jsonl"))) == 1 + 3 + 6

    drawn = []

    def draw(name, figure, caption, alt):
        drawn.append(name)
        return Picture(name, "", caption, alt)

    rest = dict(config={}, inputs={}, packages={}, devices=None, seeds={}, start="", seconds=1.0, files={})
    summary = Summary(1, "study", "gsm8k", "", results=results, **rest)
    settings = {"study": dataclasses.asdict(run.configs[StudyConfig]), "model": {"path": "tiny"}}
    findings = Findings({"study/gsm8k": summary}, {"study/gsm8k": run.folder}, run.folder / "report", {})
    monkeypatch.setattr(Findings, "settings", lambda self: settings)
    (section,) = benchmark_report.sections(findings, draw)
    assert drawn == ["ablation_benchmark_gsm8k"]
    assert isinstance(section.blocks[0], Picture), "the section opens with the picture"
    answers, conditions = (block.rows for block in section.blocks if isinstance(block, Table))
    assert answers[0][0] == "gsm8k" and "not testable (4 of 19 sets)" in answers[0]
    rows = ["unedited model", "top features set to zero", "top features resampled"]
    assert [row[0] for row in conditions][:3] == rows


@pytest.mark.slow
def test_where_nothing_is_answered_rightly_only_likelihoods_are_measured(make_run):
    run, lines = make_run("gsm8k")
    results = benchmark_run.run_study(run)
    assert results.at_chance is True and any("not shown to be above chance (" in line for line in lines)
    assert results.verdict.dictionaries[TESTED]["gsm8k"].ablation["accuracy"].answer == "not tested"
    assert [score.group for score in results.scores] == ["clean"]


def test_what_is_refused(make_run):
    member, _ = make_run("gsm8k", "member", dictionary="topk/k9")
    for message, call in (
        ("benchmarks is 'mmlu': expected one of gsm8k, math, logic", lambda: StudyConfig(benchmarks=("mmlu",))),
        ("--study.dictionary=topk/k9, but topk is one dictionary", lambda: benchmark_run.run_study(member)),
        (
            "gsm8k has 1 items for --study: expected at least 4",
            lambda: benchmark_measure.split_items([None], CONFIG, "gsm8k"),
        ),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_ordinary_text_is_the_users_own(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps(dict(text=text)) for text in ("Eins.", "Zwei.", "Drei.")))
    ordinary = [document.text for document in benchmark_measure._ordinary_documents(str(path))]
    assert ordinary == ["Eins.", "Zwei.", "Drei."]
    assert len(benchmark_measure._ordinary_documents("")) > 3  # of the embedded corpus

    def mark(**settings):
        configs = runs.make_configs(
            study__benchmarks=("logic",), **{f"study__{key}": settings[key] for key in settings}
        )
        return STUDY.inputs(configs, "logic")["ordinary_text"](configs)

    before = mark(falsify=3, falsify_text=str(path))
    assert mark(falsify=0, falsify_text=str(path)) == mark(falsify=3) == ""
    path.write_text(json.dumps(dict(text="Vier.")))
    assert before and mark(falsify=3, falsify_text=str(path)) != before
