"""The table of a head: its scores and their pairs; heads that are read from a flag."""

import pytest
from made_transcoders import made_set

from saejax.attribution.heads.query_key import OWN_BIAS, split_scores
from saejax.attribution.settings import GraphConfig
from saejax.attribution.trace.prompt import trace_prompt
from saejax.errors import UserError
from saejax.stages.attribute.outputs import read_tables, score_table, write_tables
from saejax.stages.attribute.requests import read_heads

IDS = [5, 17, 33, 8, 41]


def test_the_table_of_a_head_has_its_scores_and_pairs(lm, tmp_path):
    traced = trace_prompt(lm, made_set(lm, 24), IDS, targets=[7, (9, 11)])
    pruned = traced.graph.prune(0.9, 0.98)
    split = split_scores(traced.local, 2, 1, -1)
    score = score_table(split, pruned)
    assert (split.layer, split.head, split.query) == (2, 1, len(IDS) - 1) and len(split.keys) == 3
    assert score.title.startswith(f"Head {split.layer}.{split.head} at ")
    # Every block of the table is a score, its pairs and the others; pairs and others add up.
    ids, starts = set(pruned.ids), [n for n, row in enumerate(score.rows) if row[1] == "score"]
    for key, start, stop in zip(split.keys, starts, [*starts[1:], len(score.rows)], strict=True):
        block = score.rows[start:stop]
        assert block[0][3] == key.score and block[-1][1:] == ["all other pairs", "", key.rest]
        assert sum(row[3] for row in block[1:]) == pytest.approx(key.score, abs=1e-5)
        for row, pair in zip(block[1:-1], key.pairs, strict=True):
            for name, cell in ((pair.query, row[1]), (pair.key, row[2])):
                kind = name.split("_")[0]
                expected = {"own": "biases of the head", "first": "MLP of layer", "bias": "biases of layer"}
                assert cell == name if name in ids else cell.startswith(expected.get(kind, ("feature", "error", "␣")))
    write_tables(tmp_path / "tables" / "one.json", [score])
    assert read_tables(tmp_path / "tables" / "one.json") == [score]
    assert any(pair.query == OWN_BIAS or "_" in pair.query for key in split.keys for pair in key.pairs)


def test_heads_are_read_from_a_flag():
    def read(*texts):
        return read_heads(GraphConfig(query_key=texts))

    assert read() == []
    assert read("12.3", " 0.0@5", "1.2@-3", "12.3") == [(12, 3, -1), (0, 0, 5), (1, 2, -3)]
    for wrong in (("12",), ("a.b",), ("1.2@",), ("1.2", "none"), ("-1.0",)):
        with pytest.raises(UserError, match="--graph.query_key=.*expected layer.head"):
            read(*wrong)
