"""The stage ``report``."""

from saejax.config import Configs
from saejax.dictionaries.names import is_folder
from saejax.files import file_sha256, fingerprint
from saejax.interventions.settings import AblateConfig
from saejax.runner.registry import all_stages
from saejax.runner.stage import Input, Stage, inputs_of
from saejax.runner.workspace import SUMMARY
from saejax.stages.report.results import ReportResults
from saejax.stages.report.run import run_report, trained_in
from saejax.stages.report.settings import ReportConfig
from saejax.tasks.settings import TaskConfig
from saejax.versions import hash_code

_OF_DICTIONARY = ("capture", "train", "evaluate")
_READ = ("baseline", "benchmark", *_OF_DICTIONARY, "ablate")  # by the sections there always are


def _inputs(configs: Configs, name: str) -> dict[str, Input]:
    """Return the units of the stages in ``_READ``, and of every stage that writes a section.

    A dictionary that is named by its folder was trained elsewhere, and is described there.
    """
    elsewhere = _OF_DICTIONARY if is_folder(configs[AblateConfig].dictionary) else ()
    made_here = any(stage.units(configs) for stage in all_stages().values() if stage.makes_model)
    of_model = configs[TaskConfig].has_behaviours or not made_here  # not of what is made here alone
    always = set(_READ if of_model else ()) - {*elsewhere}
    read = [stage for stage in all_stages().values() if stage.name in always or stage.section]
    outside = dict(described=_identify_description) if elsewhere else {}
    # Sections, wordings and figures are all over the package, and a page says what its code says now.
    outside["saejax"] = _identify_code
    return inputs_of(configs, *(unit for stage in read for unit in stage.units(configs)), **outside)


def _identify_code(configs: Configs) -> str:
    """Fingerprint the code that writes the page."""
    return hash_code()


def _identify_description(configs: Configs) -> str:
    """Fingerprint what the workdir that trained a dictionary tells of it; it may be evaluated there later."""
    units, _ = trained_in(configs[AblateConfig].dictionary)
    return fingerprint([file_sha256(unit / SUMMARY) for unit in units.values()])


REPORT = Stage(
    name="report",
    summary="writes the report: index.html, report.md, figures",
    run=run_report,
    results=ReportResults,
    groups=(ReportConfig,),
    reads=("*",),
    inputs=_inputs,
)
