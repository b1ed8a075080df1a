"""A study whose units do nothing, and whose report is a line: ``python fake_study.py`` takes a study's arguments."""

import sys
from pathlib import Path

import fake_child

from saejax.runner import pipeline, workplan
from saejax.studies import report, run, study, units

HERE = Path(__file__).parent


CHILD = f"import sys; sys.path.insert(0, {str(HERE)!r}); import fake_child; fake_child."


def install(set_attribute=setattr, child=CHILD + "main()") -> None:
    """Puts the stand-ins in place."""
    set_attribute(units, "_CHILD", child)
    stages = fake_child.fake_stages()
    for module in (pipeline, workplan):
        set_attribute(module, "all_stages", lambda: stages)
    set_attribute(study, "gather", lambda root, rows, states, mark: [vars(state) for state in states] + [mark])
    set_attribute(report, "write_report", write_states)


def write_states(root: Path, figures: list) -> None:
    from saejax.files import write_json

    *states, mark = figures
    write_json(root / report.FILE, dict(fingerprint=mark, states=states))


if __name__ == "__main__":
    install()
    sys.exit(run.run(sys.argv))
