"""The stage ``report``."""

from collections.abc import Sequence
from typing import Any

from saejax.runner.config import Configs
from saejax.runner.stage import Stage, is_folder
from saejax.runner.workspace import Run
from saejax.settings import AblateConfig, MeshConfig, ReportConfig, TaskConfig

_OF_DICTIONARY = ("capture", "train", "evaluate")
_READ = ("baseline", "benchmark", *_OF_DICTIONARY, "ablate")  # by the sections there always are


def _needs(configs: Configs, name: str) -> Sequence[str]:
    """Return the units of the stages in ``_READ``, and of every stage that writes a section.

    A dictionary that is named by its folder was trained elsewhere, and is described there.
    """
    from saejax.runner.registry import STAGES

    elsewhere = _OF_DICTIONARY if is_folder(configs[AblateConfig].dictionary) else ()
    made_here = any(stage.units(configs) for stage in STAGES.values() if stage.makes_model)
    of_model = configs[TaskConfig].has_behaviours or not made_here  # not of what is made here alone
    always = set(_READ if of_model else ()) - {*elsewhere}
    read = [stage for stage in STAGES.values() if stage.name in always or stage.section]
    return [unit for stage in read for unit in stage.units(configs)]


def _run(run: Run) -> Any:
    from saejax.report.run import run_report

    return run_report(run)


def _results() -> Any:
    from saejax.report.results import ReportResults

    return ReportResults


REPORT = Stage(
    name="report",
    summary="writes the report: index.html, report.md, figures",
    run=_run,
    results=_results,
    groups=(ReportConfig,),
    placement=(MeshConfig,),
    reads=("*",),
    needs=_needs,
)
