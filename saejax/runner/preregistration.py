"""Records of when the rule of a verdict was written down in a workdir, so that a report can state it.

``rules.jsonl`` of a workdir has a line for each rule that a run was started with: its words, their hash, and what had
been measured in this workdir by then. A line is written before the units whose data the rule is about, and never
changed. Measurements in other workdirs are not known, and nothing is claimed about them.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from saejax.config import Configs
from saejax.files import fingerprint
from saejax.runner.registry import all_stages
from saejax.runner.workspace import STARTED, now

FILE = "rules.jsonl"
DATA = ("baseline", "benchmark")  # stages that show what rules are about, in addition to those with a rule


@dataclasses.dataclass(frozen=True)
class WrittenRule:
    """A line of the file."""

    stage: str  #: whose verdict it decides
    rule: str  #: in words
    hash: str  #: of the words, 16 hexadecimal digits
    written: str  #: UTC, ISO 8601
    seen: tuple[str, ...]  #: folders of units whose data had been begun in this workdir


def shows_data(stage: str) -> bool:
    """Return whether rules must have been written before a stage runs."""
    return stage in DATA or bool(all_stages()[stage].rule)


def write_rules(root: Path, configs: Configs, stages: Iterable[str] | None = None) -> None:
    """Write the rules of a configuration that are not in the workdir's file yet; a rule keeps its first line.

    Args:
      root: the workdir.
      configs: all settings.
      stages: the stages whose settings are known: a binary ignores flags of stages that it does not read. None: all.
    """
    for stage in map(all_stages().__getitem__, all_stages() if stages is None else stages):
        if stage.rule and stage.units(configs):
            write_rule(root, stage.name, stage.rule(configs.named(stage.name)), list_measured(root))


def write_rule(root: Path, stage: str, rule: str, seen: Sequence[str]) -> None:
    """Write a rule unless the file has it already.

    Args:
      root: the folder of the file.
      stage: the stage whose verdict the rule decides.
      rule: the rule in words.
      seen: folders of units whose measurement had begun; see ``list_measured``.
    """
    if (stage, fingerprint(rule)) in {(written.stage, written.hash) for written in read_rules(root)}:
        return
    line = WrittenRule(stage, rule, fingerprint(rule), now(), tuple(seen))
    with open(root / FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(line), ensure_ascii=False) + "\n")


def read_rules(root: Path) -> list[WrittenRule]:
    """Return the rules in a workdir's file, none if there is no file. A line that a kill cut off is left out."""
    rules = []
    lines = (root / FILE).read_text("utf-8").split("\n") if (root / FILE).exists() else []
    for line in lines:
        try:
            fields = json.loads(line)
            rules.append(WrittenRule(**fields | dict(seen=tuple(fields["seen"]))))
        except (ValueError, TypeError, KeyError):
            continue
    return rules


def describe_rule(root: Path, stage: str, rule: str) -> str:
    """Return when a stage's rule was written down, and how many settings were tried: for a report, as "The rule, ...".

    Args:
      root: the workdir.
      stage: the stage whose verdict the rule decides.
      rule: the rule in words.
    """
    mark = fingerprint(rule)
    line = next((written for written in read_rules(root) if (written.stage, written.hash) == (stage, mark)), None)
    if line is None:
        when = "The rule, of which this workdir does not say when it was written down"
    elif line.seen:
        units = ", ".join(dict.fromkeys(_without_hash(folder) for folder in line.seen))
        when = f"The rule, written down on {line.written[:10]} after {units} had been begun in this workdir"
    else:
        when = (
            f"The rule, written down on {line.written[:10]} before anything was measured in this workdir (hash {mark})"
        )
    attempts = Counter(map(_without_hash, list_measured(root)))
    several = ", ".join(f"{unit} {count} times" for unit, count in sorted(attempts.items()) if count > 1)
    return when + (f"; begun in this workdir with several settings: {several}" if several else "")


def list_measured(root: Path) -> list[str]:
    """Return the folders, in a workdir, of all units that show data and have been begun, whatever their settings."""
    stages = [stage for stage in all_stages() if shows_data(stage)]
    folders = {
        path.parent
        for stage in stages
        for pattern in ("-*", "/*-*")
        for path in root.glob(f"{stage}{pattern}/{STARTED}")
    }
    return sorted(str(folder.relative_to(root)) for folder in folders)


def _without_hash(folder: str) -> str:
    return folder.rpartition("-")[0]
