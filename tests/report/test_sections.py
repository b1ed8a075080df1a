"""Sections of the report that a made-up workspace does not have: benchmarks, probes, followed texts."""

import types
from pathlib import Path

from saejax.interventions.patching import FeaturePatchResults
from saejax.interventions.probing import ProbeResults
from saejax.interventions.steering import SteerResults
from saejax.matching.track.results import LensLayers, TrackedText, TrackResults
from saejax.page.blocks import Picture
from saejax.page.findings import Findings
from saejax.page.words import WEAK
from saejax.results import Interval
from saejax.stages.baseline import report as tasks
from saejax.stages.patch import report as patching
from saejax.stages.probe import report as probes
from saejax.stages.steer import report as steering
from saejax.stages.track import report as tracks
from saejax.stages.train import report as dictionaries
from saejax.tasks.results import BaselineResults, BenchmarkResults
from saejax.training.results import TrainResults

some = types.SimpleNamespace


def interval(mean):
    return Interval(mean, mean - 0.1, mean + 0.1)


def partly(cls, **fields):
    """Results of a class with some of its fields, those that a section reads."""
    results = object.__new__(cls)
    results.__dict__.update(fields)
    return results


def findings(settings=None, **units):
    """Findings with the results of units, by their names."""
    summaries = {f"stage/{name}": some(results=results, stage="stage", config={}) for name, results in units.items()}
    return Findings(summaries, {}, Path(), settings or {})


def draw(name, figure, caption, alt):
    return Picture(name, "", caption, alt)


def test_benchmarks_are_shown_by_their_kind_of_score():
    exact = dict(accuracy=dict(strict=interval(0.25), flexible=interval(0.5)), unparsed=dict(strict=7, flexible=0))
    choice = dict(accuracy=dict(raw=interval(0.4), normalised=interval(0.5)), chance=0.31)
    likelihood = dict(log_likelihood_per_token=interval(-1.25), token_accuracy=interval(0.6))
    results = dict(
        gsm8k=BenchmarkResults("generate", 20, "", **exact),
        logic=BenchmarkResults("choice", 30, "", **choice),
        math=BenchmarkResults("likelihood", 40, "", **likelihood),
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
    assert tasks.benchmark_sections(findings()) == []


def test_features_that_carry_the_answer_and_behaviours_that_were_not_patched():
    carried = some(prompts=12, top=interval(0.5), random=0.1, site=interval(0.9))
    sentence = "Ablating the 7 top features lowers the logit difference by 2 logits."
    answers = {"logit_diff": some(sentence=sentence, effect=interval(2.0))}
    verdict = some(ablation=answers, random=some(sentence="Not testable."), placebo=some(sentence="Not tested."),
                   fooled=None, placebo_sets=0)  # fmt: skip
    results = dict(dictionary="topk", site="resid_post.15", k=7, unpatched=dict(addition="it has no train prompts"))
    carrying, not_carrying = (some(interchange=each, restored=interval(0.4)) for each in (carried, None))
    results["behaviours"] = dict(capital=carrying, agreement=not_carrying)
    results["verdict"] = some(dictionaries=dict(tested=dict(capital=verdict, agreement=verdict)))
    section = patching.sections(findings(topk=partly(FeaturePatchResults, **results)), None)[0]
    table, terms, without = section.blocks
    shares = ("50 [40,\u00a060]", "10\u00a0%", "90 [80,\u00a0100]")
    effects = ("2.00 [1.90,\u00a02.10]", "0.40 [0.30,\u00a00.50]")
    assert table.rows[0] == ("Capital of a country", "12", *shares, *effects)
    assert table.rows[1] == ("Subject-verb agreement", "0", *["–"] * 3, *effects)
    (name, text), _ = terms.items
    assert name == "Capital of a country" and text.startswith("Patching the 7 top features") and "Not tested." in text
    assert without.items == (("Two-digit addition", "not patched: it has no train prompts."),)


def test_probes_are_shown_and_labels_without_one_named():
    row = dict(input="features", k=2, inputs=[7, 8], f1=0.4, majority=0.3, p_holm=0.0123)
    row |= dict(accuracy=interval(0.5), shuffled=interval(0.2), control=interval(0.1), against_dense=interval(-0.2))
    whole, raw = row | dict(k=None, inputs=None, control=None), dict(input="raw")
    effects = [some(feature=7 + n, drop=interval(0.5), p_holm=0.01, controls=[0.1, -0.6][n:]) for n in (0, 2)]
    selected = some(features=effects)
    rows = [some(**each) for each in (row, whole, row | raw, whole | raw)]
    reason = "fewer than two classes: right 80"
    labels = [
        some(label="answer", behaviour="addition", congruent=0, reason=None, probes=rows, selected=selected),
        some(label="correct", behaviour="capital", congruent=0, reason=reason, probes=[], selected=None),
    ]
    results = dict(dictionary="topk", site="resid_post.15", pool="last", labels=labels)
    settings = dict(probe=dict(shuffles=20))
    (section,) = probes.sections(findings(settings, topk=partly(ProbeResults, **results)), draw)
    intro, picture, table, ablated, without = section.blocks
    assert "the features of topk" in intro.text and "at a prompt's last position" in intro.text
    assert "Answer: Two-digit addition, raw dimensions: 50 [40,\u00a060] %." in picture.alt
    assert table.rows[0][:4] == ("Answer: Two-digit addition", "features: 2", "50 [40,\u00a060]", "0.40")
    assert table.rows[0][6:] == ("10 [0,\u00a020]", "−20 [−30,\u00a0−10]", "0.0123", "7, 8")
    assert table.rows[1][1] == "features: all" and table.rows[1][6] == table.rows[1][9] == "–"
    shown = "0.50 [0.40,\u00a00.60]", "0.0100"
    assert [row[1:] for row in ablated.rows] == [("7", *shown, "1 of 2"), ("9", *shown, "not testable")]
    assert without.items == (("Model right or wrong: Capital of a country", f"no probe: {reason}."),)
    without = findings(settings, topk=partly(ProbeResults, **results | dict(labels=labels[1:])))
    assert [block.kind for block in probes.sections(without, lambda *drawn: None)[0].blocks] == ["text", "terms"]
    assert probes.sections(findings(), lambda *drawn: None) == []


def test_weak_behaviours_are_marked_where_they_stand():
    flags = ("one answer is right in every prompt",)
    baseline = partly(BaselineResults, behaviours=dict(capital=some(flags=flags), agreement=some(flags=())))
    effect = {"logit_diff": some(sentence="Ablating.", effect=interval(2.0))}
    verdict = some(ablation=effect, random=some(sentence="."), placebo=some(sentence="."), fooled=None, placebo_sets=0)
    behaviours = {name: some(interchange=None, restored=interval(0.4)) for name in ("capital", "agreement")}
    fields = dict(dictionary="topk", site="resid_post.15", k=7, unpatched={}, behaviours=behaviours)
    patched = partly(
        FeaturePatchResults, **fields, verdict=some(dictionaries=dict(tested=dict.fromkeys(behaviours, verdict)))
    )
    table, terms, note = patching.sections(findings(baseline=baseline, topk=patched), draw)[0].blocks
    assert [row[0] for row in table.rows] == ["Capital of a country (weak)", "Subject-verb agreement"]
    assert terms.items[0][0] == "Capital of a country (weak)" and note.text == WEAK

    point = some(strength=1.0, dose=1.0, drop=interval(0.5))
    method = some(points=[point], chosen=0, controls=(0.1, 0.2), answer=some(sentence="Yes."))
    steered = {name: some(reason=None, methods=dict(add=method)) for name in ("capital", "agreement")}
    results = partly(SteerResults, dictionary="topk", site="resid_post.15", behaviours=steered)
    _, picture, terms, note = steering.sections(findings(baseline=baseline, topk=results), draw)[0].blocks
    assert "Capital of a country (weak): features added" in picture.alt and note.text == WEAK
    assert [name for name, _ in terms.items] == [
        "Capital of a country (weak), features added", "Subject-verb agreement, features added"
    ]  # fmt: skip
    assert steering.sections(findings(topk=results), draw)[0].blocks[-1].kind == "terms"  # nothing is known to be weak

    label = some(label="answer", behaviour="capital", congruent=0, reason="right 80", probes=[], selected=None)
    probed = partly(ProbeResults, dictionary="topk", site="resid_post.15", labels=[label])
    _, without = probes.sections(findings(baseline=baseline, topk=probed), draw)[0].blocks
    assert without.items[0][0] == "Answer: Capital of a country (weak)"


def test_a_table_of_more_dictionaries_than_are_shown_says_so():
    scored = some(kl=0.5, ce_recovered=0.9)
    for count, note in ((100, "in nats per token."), (101, "in nats per token. The first 100 of 101 rows.")):
        trained = [some(name=f"k{k}", finetuned=(scored, scored)) for k in range(count)]
        (table,) = dictionaries.finetuning_tables(findings(topk=partly(TrainResults, members=trained)))
        assert len(table.rows) == 100 and table.note.endswith(note)
    assert dictionaries.finetuning_tables(findings()) == []


def test_texts_that_were_followed_are_a_row_each():
    site, lens = "resid_post.0", LensLayers((0.25, 0.75), (2, 0), (0.1, 0.1))
    results = TrackResults(dict(sum=TrackedText(9, " 4", 8, (site,), site, (), lens, 7)))
    summaries = {"track/sum": some(results=results)}
    (section,) = tracks.sections(Findings(summaries, {"track/sum": Path("track/sum")}, Path("report"), {}), draw)
    _, table, pages = section.blocks
    assert table.rows == (("sum", "9", "1", "7", "4 0.75", "\u2013", "0", "0", "0"),)
    assert pages.items == (("sum: layers by positions", "../track/sum/index.html"),)
