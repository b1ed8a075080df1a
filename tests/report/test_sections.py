"""Sections of the report that a made-up workspace does not have: benchmarks, probes."""

import dataclasses
import types
from pathlib import Path

from saejax.causal.patching import report as patching
from saejax.causal.patching.results import FeaturePatchResults, HeadPatchResults
from saejax.causal.probes import report as probes
from saejax.causal.probes.results import ProbeResults
from saejax.files import write_json
from saejax.page.blocks import Picture
from saejax.page.findings import Findings
from saejax.results import Interval
from saejax.tasks import report as tasks
from saejax.tasks.results import BenchmarkResults

some = types.SimpleNamespace


def interval(mean):
    return Interval(mean, mean - 0.1, mean + 0.1)


def partly(cls, **fields):
    """Results of a class with some of its fields, those that a section reads."""
    made = object.__new__(cls)
    made.__dict__.update(fields)
    return made


def findings(settings=None, **units):
    """Findings with the results of units, by their names."""
    summaries = {f"stage/{name}": some(results=results, stage="stage", config={}) for name, results in units.items()}
    return Findings(summaries, {}, Path(), settings or {})


def draw(name, figure, caption, alt):
    return Picture(name, "", caption, alt)


def test_benchmarks_are_shown_by_their_kind_of_score():
    results = dict(
        gsm8k=BenchmarkResults(
            origin="",
            score="generate",
            n=20,
            accuracy=dict(strict=interval(0.25), flexible=interval(0.5)),
            unparsed=dict(strict=7, flexible=0),
        ),
        logic=BenchmarkResults(
            "choice", 30, "", chance=0.31, accuracy=dict(raw=interval(0.4), normalised=interval(0.5))
        ),
        math=BenchmarkResults(
            "likelihood", 40, "", log_likelihood_per_token=interval(-1.25), token_accuracy=interval(0.6)
        ),
    )
    (section,) = tasks.benchmark_sections(findings(**results))
    text = section.blocks[0].markdown()
    for row in [
        "| gsm8k | exact match, strict, % | 25.0 \\[15.0,\u00a035.0\\] | 7 | 20 |",
        "| gsm8k | exact match, flexible, % | 50.0 \\[40.0,\u00a060.0\\] | 0 | 20 |",
        "| logic | multiple choice, raw, % (chance 31\u00a0%) | 40.0 \\[30.0,\u00a050.0\\] | – | 30 |",
        "| math | log-likelihood of the solution, nats per token | −1.250 \\[−1.350,\u00a0−1.150\\] | – | 40 |",
        "| math | tokens of the solution predicted, % | 60.0 \\[50.0,\u00a070.0\\] | – | 40 |",
    ]:
        assert row in text, text
    assert len(section.blocks[0].rows) == 6


def test_without_benchmarks_there_is_no_section():
    assert tasks.benchmark_sections(findings()) == []


def test_features_that_carry_the_answer_and_behaviours_that_were_not_patched(tmp_path):
    share = some(features=20, accuracy=interval(0.5), random=interval(0.1), p_value=0.048)
    carried = some(prompts=12, top=[share], all=interval(0.7), error=interval(0.2), ceiling=interval(0.9))
    together = [some(features=20, denoising=some(normalised=interval(0.4))), some(features="all")]
    results = dict(dictionary="topk", site="resid_post.15", top=20, draws=20)
    results["unpatched"] = dict(addition="it has no train prompts")
    singles = [
        some(feature=i, denoising=some(effect=interval(i / 10)), noising=some(effect=interval(0.5))) for i in range(7)
    ]
    results["behaviours"] = dict(
        capital=some(interchange=carried, together=together, templates=0, features=singles, disentangled=[
            some(method="features", size=20, cause=interval(0.5), isolate=dict(agreement=interval(0.9))),
            some(method="whole site", size=64, cause=None, isolate={}),
        ])
    )  # fmt: skip
    unit = tmp_path / "interpret" / "topk"
    unit.mkdir(parents=True)
    write_json(unit / "labels.json", {"6": dict(label="a | city", by="Ada", note="", f1=None)})
    made = findings(topk=partly(FeaturePatchResults, **results))
    table, singly, beside, without = patching.sections(made, None)[0].blocks
    assert [row[1:3] for row in singly.rows] == [(str(i), "–") for i in (6, 5, 4, 3, 2)]  # it was not interpreted
    labelled = dataclasses.replace(made, folders={**made.folders, "interpret/topk": unit})
    _, singly, *_ = patching.sections(labelled, None)[0].blocks
    effects = ("0.60 [0.50,\u00a00.70]", "0.50 [0.40,\u00a00.60]")
    assert singly.rows[0] == ("Capital of a country", "6", "a | city", *effects) and singly.rows[1][2] == "–"
    shares = [f"{mean} [{mean - 10},\u00a0{mean + 10}]" for mean in (50, 10, 70, 20, 90)]
    shares[1] += ", p = 0.048"
    assert table.rows == (("Capital of a country", "12", *shares, "0.40 [0.30,\u00a00.50]"),)
    assert len(table.columns) == len(table.rows[0]) and table.columns[6] == "Whole site, %"
    assert [row[1:] for row in beside.rows] == [
        (
            "features", "20", "50 [40,\u00a060]",
            "Subject-verb agreement 90 [80,\u00a0100]", "70",
        ),
        ("whole site", "64", "–", "–", "–"),
    ]  # fmt: skip
    assert without.items == (("Two-digit addition", "not patched: it has no train prompts."),)


def test_heads_are_shown_beside_the_length_of_the_change_and_random_nodes():
    estimate = some(correlation=interval(0.6), top=0.5, p_value=0.004)
    node = some(node="query", layer=5, head=3, position=-2, effect=interval(0.4), atp=-0.25, atp_star=0.3)
    senders = [
        some(layer=4, head=None, effect=interval(0.3), p_max_t=0.01),
        some(layer=2, head=1, effect=interval(0.2), p_max_t=0.5),
    ]
    told = [
        some(node="query", layer=5, head=3, position=-2, total=interval(0.4), senders=50, sure=1, strongest=senders),
        some(
            node="logits",
            layer=30,
            head=0,
            position=-1,
            total=interval(3.0),
            senders=300,
            sure=4,
            strongest=senders[:1],
        ),
    ]
    found = some(
        nodes=1234,
        random=interval(0.1),
        estimates=dict(atp_star=estimate, atp=estimate, change=some(correlation=None, top=0.2, p_value=0.2)),
        columns=[some(position=-2, token=" of"), some(position=-1, token=" is")],
        strongest=[node],
        paths=told,
    )
    results = dict(top=20, drawn=100, unpatched={}, behaviours=dict(capital=found))
    (section,) = patching.sections(findings(heads=partly(HeadPatchResults, **results)), draw)
    estimates, nodes, paths = section.blocks
    beside = ("0.50", "0.10 [0.00,\u00a00.20]", "0.004")
    assert estimates.rows[0] == ("Capital of a country", "1,234", "AtP*", "0.60 [0.50,\u00a00.70]", *beside)
    assert [row[2] for row in estimates.rows] == ["AtP*", "AtP", "length of the change"] and estimates.rows[2][3] == "–"
    assert nodes.rows[0][1:] == ("query 5.3", "−2 (of)", "0.40 [0.30,\u00a00.50]", "−0.25", "0.30")
    assert [row[1:3] for row in paths.rows] == [
        ("query 5.3 at −2", "MLP 4"), ("query 5.3 at −2", "head 2.1"), ("logits", "MLP 4")
    ]  # fmt: skip
    assert paths.rows[0][3:] == ("0.30 [0.20,\u00a00.40]", "0.010", "0.40 [0.30,\u00a00.50]", "1 of 50")
    found.paths = ()
    (section,) = patching.sections(findings(heads=partly(HeadPatchResults, **results)), draw)
    assert len(section.blocks) == 2


def test_probes_are_shown_and_labels_without_one_said():
    row = dict(
        input="features",
        k=2,
        inputs=[7, 8],
        accuracy=interval(0.5),
        balanced_accuracy=0.4,
        majority=0.3,
        shuffled=interval(0.2),
        random=interval(0.1),
        p_value=0.0123,
        auc=interval(0.8),
        auc_shuffled=interval(0.45),
        against_dense=interval(-0.2),
    )
    whole, raw = row | dict(k=None, inputs=None, random=None), dict(input="raw")
    labels = [
        some(
            label="answer",
            congruent=0,
            behaviour="addition",
            reason=None,
            probes=[some(**one) for one in (row, whole, row | raw, whole | raw)],
        ),
        some(label="correct", behaviour="capital", reason="fewer than two classes: right 80", probes=[], congruent=0),
    ]
    results = dict(dictionary="topk", site="resid_post.15", pool="last", labels=labels)
    settings = dict(probe=dict(shuffles=20, ranking="mean_difference"))
    (section,) = probes.sections(findings(settings, topk=partly(ProbeResults, **results)), draw)
    intro, picture, table, dense, without = section.blocks
    assert "the features of topk" in intro.text and "at a prompt's last position" in intro.text
    assert "Answer: Two-digit addition: features 50 [40,\u00a060] %, raw dimensions 50 [40,\u00a060] %." in picture.alt
    assert table.rows[0][:4] == ("Answer: Two-digit addition", "2 features", "50 [40,\u00a060]", "40\u00a0%")
    assert table.rows[0][6:] == ("10 [0,\u00a020]", "0.0123", "7, 8")
    assert table.rows[1][1] == "all features" and table.rows[1][6] == table.rows[1][8] == "–"
    assert "whose class means differ most" in intro.text
    assert dense.rows[0][1:] == (
        "2 features",
        "0.80 [0.70,\u00a00.90]",
        "0.45 [0.35,\u00a00.55]",
        "−20 [−30,\u00a0−10]",
    )
    assert [row[1] for row in dense.rows] == ["2 features", "all features", "all raw dimensions"]
    assert without.items == (
        ("Model right or wrong: Capital of a country", "no probe: fewer than two classes: right 80."),
    )
    results["labels"] = labels[1:]
    found = findings(settings, topk=partly(ProbeResults, **results))
    assert [block.kind for block in probes.sections(found, lambda *drawn: None)[0].blocks] == ["text", "terms"]
    assert probes.sections(findings(), lambda *drawn: None) == []
