"""When the rule of a verdict was written: kept in the workdir, so that a report can say it, or has to leave it out.

``rules.jsonl`` of a workdir has a line for each rule that a run was started with: its words, their hash, and what had
been measured in this workdir by then. A line is written before the units whose data the rule is about, and never
changed. A rule was *written before any data were seen* if nothing had been measured when its line was written.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from saejax.config import Configs
from saejax.registry import STAGES
from saejax.stage import load
from saejax.workspace import STARTED, fingerprint, now

FILE = "rules.jsonl"
DATA = ("baseline", "benchmark")  # stages that show what rules are about, beside those with a rule themselves


@dataclasses.dataclass(frozen=True)
class WrittenRule:
    """A line of the file."""

    stage: str  #: whose verdict it decides
    rule: str  #: in words
    hash: str  #: of the words, 16 hexadecimal digits
    written: str  #: UTC, ISO 8601
    seen: tuple[str, ...]  #: folders of units whose data had been begun in this workdir, superseded ones included


def shows_data(stage: str) -> bool:
    """Whether rules must have been written before a stage runs."""
    return stage in DATA or bool(STAGES[stage].rule)


def write_rules(root: Path, configs: Configs) -> None:
    """Writes the rules of a configuration that are not in the workdir's file yet; a rule keeps its first line."""
    for stage in STAGES.values():
        if stage.rule and stage.units(configs):
            write_rule(root, stage.name, load(stage.rule)(configs.named(stage.name)), measured(root))


def write_rule(root: Path, stage: str, rule: str, seen: Sequence[str]) -> None:
    """Writes a rule, unless it stands in the file already.

    Args:
      root: the folder of the file.
      stage: whose verdict it decides.
      rule: in words.
      seen: folders of units whose data had been begun; see ``measured``.
    """
    if (stage, fingerprint(rule)) in {(one.stage, one.hash) for one in read_rules(root)}:
        return
    line = WrittenRule(stage, rule, fingerprint(rule), now(), tuple(seen))
    with open(root / FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(line), ensure_ascii=False) + "\n")


def read_rules(root: Path) -> list[WrittenRule]:
    """The lines of a workdir's file; none without one. A line that a kill cut off is left out."""
    found = []
    lines = (root / FILE).read_text("utf-8").split("\n") if (root / FILE).exists() else []
    for line in lines:
        try:
            fields = json.loads(line)
            found.append(WrittenRule(**fields | dict(seen=tuple(fields["seen"]))))
        except (ValueError, TypeError, KeyError):
            continue
    return found


def said(root: Path, stage: str, rule: str) -> str:
    """When a stage's rule was written, and how many attempts have been superseded: for a report, as "The rule, ...".

    Args:
      root: the workdir.
      stage: whose verdict it decides.
      rule: in words.
    """
    mark = fingerprint(rule)
    line = next((one for one in read_rules(root) if (one.stage, one.hash) == (stage, mark)), None)
    if line is None:
        when = "The rule, of which this workdir does not say when it was written"
    elif line.seen:
        when = f"The rule, written on {line.written[:10]} after {', '.join(line.seen)} had been begun"
    else:
        when = f"The rule, written before any data were seen ({line.written[:10]}, hash {mark})"
    attempts = Counter(path.name.partition("-")[0] for path in _measured(root) if path.parent.name == "superseded")
    if attempts:
        counted = ", ".join(f"{count} of {name}" for name, count in sorted(attempts.items()))
        when += f"; attempts that were superseded in this workdir: {counted}"
    return when


def measured(root: Path) -> list[str]:
    """Folders, in a workdir, of the units that have been begun and show data, and of those that were superseded."""
    return sorted(str(path.relative_to(root)) for path in _measured(root))


def _measured(root: Path) -> list[Path]:
    """Folders of the units that have been begun and show data, and of those that were superseded."""
    stages = [stage for stage in STAGES if shows_data(stage)]
    patterns = [pattern for stage in stages for pattern in (stage, f"{stage}/*", f"superseded/{stage}-*")]
    return [path.parent for pattern in patterns for path in root.glob(f"{pattern}/{STARTED}")]
