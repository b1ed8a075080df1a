"""The stage ``report``."""

from collections.abc import Sequence

from saejax.errors import UserError
from saejax.settings import ReportConfig
from saejax.stage import Configs, Stage, is_folder

_READ = ("baseline", "benchmark", "capture", "train", "evaluate", "ablate")  # by the sections there always are


def _needs(configs: Configs, name: str) -> Sequence[str]:
    """The units of these, and of every stage that writes a section of its own."""
    from saejax.registry import STAGES

    tested = configs["ablate"].dictionary
    if is_folder(tested):
        raise UserError(
            f"the report shows dictionaries that its workdir trained, and --ablate.dictionary={tested} is a folder: "
            "run the report there, or read the results of ablate"
        )
    always = _READ if configs["task"].has_behaviours else ()
    read = [stage for stage in STAGES.values() if stage.name in always or stage.section]
    return [unit for stage in read for unit in stage.units(configs)]


REPORT = Stage(
    name="report",
    summary="writes the report: index.html, report.md, figures",
    run="saejax.report.run:run_report",
    results="saejax.report.results:ReportResults",
    groups=(ReportConfig,),
    after=("*",),
    needs=_needs,
    names=lambda configs: ("",) if configs["task"].has_behaviours or configs["truth"].features else (),
)
