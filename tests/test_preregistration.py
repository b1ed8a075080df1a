"""When a rule was written: kept before there are data, never changed, and said by the report only where it is so."""

import json

import pytest

from saejax import pipeline, preregistration, workplan
from saejax.causal.ablate.run import rule as words
from saejax.parallel.teams import Team
from saejax.registry import GROUPS, STAGES, default_configs
from saejax.settings import AblateConfig, StudyConfig
from saejax.workspace import Workspace

BEFORE = "written before any data were seen"


def configs(**changes):
    return default_configs() | AblateConfig(**changes)


def said(root, **changes):
    return preregistration.said(root, "ablate", words(AblateConfig(**changes)))


def test_a_rule_is_written_before_the_baseline_and_one_that_changed_after_it(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        pipeline, "load", lambda target: lambda run: seen.append((run.stage, preregistration.read_rules(tmp_path)))
    )
    workspace = Workspace(tmp_path)

    def run(unit, mark, **changes):
        plan = workplan.Workplan(configs(**changes))
        plan._data = {each: dict(settings={}, needs={}, sources=dict(it=mark)) for each in (unit, *plan.needs(unit))}
        monkeypatch.setattr(pipeline, "_input_folder", lambda *args: tmp_path)
        work = pipeline._Work(workspace, plan, lambda line: None, lambda: False, {})
        pipeline._run_unit(work, unit, Team())

    assert "does not say when it was written" in said(tmp_path)
    run("baseline", "first")
    ((stage, written),) = seen
    assert stage == "baseline" and [(one.stage, one.seen) for one in written] == [("ablate", ())]
    assert BEFORE in said(tmp_path) and written[0].hash in said(tmp_path)
    run("ablate/topk", "one")
    assert BEFORE in said(tmp_path) and "superseded" not in said(tmp_path)
    # Another rule, after the data: it is said when, and how often was tried.
    run("ablate/topk", "two", min_accuracy_drop=0.01)
    assert BEFORE not in said(tmp_path, min_accuracy_drop=0.01)
    assert "after ablate/topk, baseline had been begun" in said(tmp_path, min_accuracy_drop=0.01)
    assert said(tmp_path, min_accuracy_drop=0.01).endswith("superseded in this workdir: 1 of ablate")
    # What was written first stays written first.
    run("ablate/topk", "one")
    assert BEFORE in said(tmp_path) and said(tmp_path).endswith("superseded in this workdir: 2 of ablate")
    assert len(preregistration.read_rules(tmp_path)) == 2
    run("baseline", "second")
    assert said(tmp_path).endswith("2 of ablate, 1 of baseline")


def test_stages_without_data_write_nothing_and_a_line_cut_off_is_left_out(tmp_path):
    shown = {stage for stage in STAGES if preregistration.shows_data(stage)}
    assert shown == {"baseline", "benchmark", "ablate", "study", "crosscode"}
    preregistration.write_rules(tmp_path, configs() | StudyConfig(benchmarks=("logic",)))
    assert [one.stage for one in preregistration.read_rules(tmp_path)] == ["ablate", "study"]
    whole = (tmp_path / preregistration.FILE).read_text()
    (tmp_path / preregistration.FILE).write_text(whole + whole[:40])
    assert len(preregistration.read_rules(tmp_path)) == 2
    preregistration.write_rules(tmp_path, configs())
    assert (tmp_path / preregistration.FILE).read_text() == whole + whole[:40]


@pytest.mark.parametrize("stage", ["ablate", "study"])
def test_a_rule_is_words(stage):
    text = pipeline.load(STAGES[stage].rule)(GROUPS[stage]())
    assert text.startswith(("T: ", "Yes if ", "Removing ")) and json.dumps(text)
