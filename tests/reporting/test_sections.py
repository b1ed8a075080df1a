"""Sections of the report that a made-up workspace does not have: benchmarks."""

import types

from saejax.reporting import sections


def interval(mean):
    return dict(mean=mean, low=mean - 0.1, high=mean + 0.1)


def test_benchmarks_are_shown_by_their_kind_of_score():
    results = dict(
        gsm8k=dict(
            score="generate",
            n=20,
            accuracy=dict(strict=interval(0.25), flexible=interval(0.5)),
            unparsed=dict(strict=7, flexible=0),
        ),
        logic=dict(score="choice", n=30, chance=0.31, accuracy=dict(raw=interval(0.4), normalised=interval(0.5))),
        math=dict(score="likelihood", n=40, log_likelihood_per_token=interval(-1.25), token_accuracy=interval(0.6)),
    )
    (section,) = sections.benchmarks(types.SimpleNamespace(benchmarks=results))
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
    assert sections.benchmarks(types.SimpleNamespace(benchmarks={})) == []
