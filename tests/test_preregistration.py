"""When a rule was written: kept before there are data, never changed, and said by the report only where it is so."""

import json

import pytest

from saejax.interventions.ablation import verdict_config
from saejax.interventions.settings import AblateConfig, StudyConfig
from saejax.runner import preregistration
from saejax.runner.registry import all_groups, all_stages, default_configs
from saejax.runner.workspace import Workspace

BEFORE = "before anything was measured in this workdir"


def configs(**changes):
    return default_configs() | AblateConfig(**changes)


def describe(root, **changes):
    return preregistration.describe_rule(root, "ablate", verdict_config(AblateConfig(**changes)).rule)


def test_a_rule_is_written_before_the_baseline_and_one_that_changed_after_it(tmp_path):
    def begin(unit, mark, **changes):
        preregistration.write_rules(tmp_path, configs(**changes))
        space = Workspace(tmp_path)
        with space.claim(unit, mark):
            space.begin(unit, mark)

    assert "does not say when it was written" in describe(tmp_path)
    begin("baseline", "first")
    (written,) = preregistration.read_rules(tmp_path)
    assert (written.stage, written.seen) == ("ablate", ())
    assert BEFORE in describe(tmp_path) and written.hash in describe(tmp_path)
    begin("ablate/topk", "one")
    assert BEFORE in describe(tmp_path) and "several settings" not in describe(tmp_path)
    # Another rule, after the data: the report says when, and how often was tried.
    begin("ablate/topk", "two", min_accuracy_drop=0.01)
    assert BEFORE not in describe(tmp_path, min_accuracy_drop=0.01)
    assert "after ablate/topk, baseline had been begun" in describe(tmp_path, min_accuracy_drop=0.01)
    assert describe(tmp_path, min_accuracy_drop=0.01).endswith("several settings: ablate/topk 2 times")
    # What was written first stays written first.
    begin("ablate/topk", "one")
    assert BEFORE in describe(tmp_path) and len(preregistration.read_rules(tmp_path)) == 2
    begin("baseline", "second")
    assert describe(tmp_path).endswith("ablate/topk 2 times, baseline 2 times")


def test_stages_without_data_write_nothing_and_a_line_cut_off_is_left_out(tmp_path):
    shown = {stage for stage in all_stages() if preregistration.shows_data(stage)}
    assert shown == {"baseline", "benchmark", "ablate", "study"}
    preregistration.write_rules(tmp_path, configs() | StudyConfig(benchmarks=("logic",)))
    assert [rule.stage for rule in preregistration.read_rules(tmp_path)] == ["ablate", "study"]
    whole = (tmp_path / preregistration.FILE).read_text()
    (tmp_path / preregistration.FILE).write_text(whole + whole[:40])
    assert len(preregistration.read_rules(tmp_path)) == 2
    preregistration.write_rules(tmp_path, configs())
    assert (tmp_path / preregistration.FILE).read_text() == whole + whole[:40]


@pytest.mark.parametrize("stage", ["ablate", "study"])
def test_a_rule_is_words(stage):
    text = all_stages()[stage].rule(all_groups()[stage]())
    assert text.startswith(("T: ", "Yes if ", "Removing ")) and json.dumps(text)
