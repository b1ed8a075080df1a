"""The report stage: writes the results of the other stages as a page for a reader.

Written to the unit's folder: ``index.html`` (complete in itself), ``report.md`` (the same content), and
``figures/`` (each figure as PNG and SVG; of attribution graphs the SVG).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from saejax.activations.documents import Documents
from saejax.activations.joined import with_joined
from saejax.activations.progress import say_progress
from saejax.activations.store import Store
from saejax.config import to_json
from saejax.dictionaries.names import is_folder
from saejax.errors import Interrupted
from saejax.evaluation.results import EvaluateResults
from saejax.files import write_text
from saejax.interpret.contexts import top_contexts
from saejax.interpret.feature_record import FEATURES, FeatureContext, read_records
from saejax.interventions.answers import AblateResults
from saejax.interventions.settings import AblateConfig
from saejax.interventions.table import TESTED
from saejax.links import member_folder, resolve_links
from saejax.models.settings import ModelConfig
from saejax.models.source import load_tokenizer, resolve
from saejax.models.tokens import token_piece
from saejax.page import style
from saejax.page.blocks import Picture
from saejax.page.document import Section, to_html, to_markdown
from saejax.page.findings import Draw, Findings, read_findings
from saejax.page.strips import Example
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.runner import stacks
from saejax.runner.registry import all_stages
from saejax.runner.workspace import SUMMARY, Run
from saejax.stages.ablate import report as ablation
from saejax.stages.baseline import report as tasks
from saejax.stages.report import overview
from saejax.stages.report.results import ReportResults
from saejax.stages.report.settings import ReportConfig
from saejax.stages.train import report as training
from saejax.versions import package_versions
from saejax.wording import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EXAMPLES = 5  # contexts on a feature's card


def run_report(run: Run) -> ReportResults:
    """Write the report of ``run.inputs``.

    Raises:
      UserError: a file of an input is missing or damaged.
      Interrupted: asked to stop, while contexts are searched or between two figures or sections.
    """
    ask = functools.partial(_stop_if_asked, run)
    config = run.configs[ReportConfig]
    tested = run.configs[AblateConfig].dictionary
    trained, name = trained_in(tested) if is_folder(tested) else ({}, tested)
    findings = read_findings(trained | dict(run.inputs), run.folder, {"report": to_json(config)})
    ablate = next(iter(findings.select(AblateResults).values()), None)  # None in a run without behaviours
    if ablate and trained:  # the report then names the dictionary as its workdir does, not by its path
        ablate = dataclasses.replace(ablate, dictionary=name)
        renamed = {
            unit: dataclasses.replace(summary, results=ablate) if summary.stage == "ablate" else summary
            for unit, summary in findings.summaries.items()
        }
        findings = dataclasses.replace(findings, summaries=renamed)
    tops = ablate.top.values() if ablate else ()
    wanted = [item.feature for top in tops for item in top[: ablation.SHOWN] if not item.site]
    if ablate:
        run.say(f"looking for the strongest contexts of {counted(len(set(wanted)), 'feature')}")
        findings = dataclasses.replace(findings, examples=contexts(run, findings, wanted, _EXAMPLES))
    (run.folder / "figures").mkdir(exist_ok=True)

    def draw(name: str, figure: "Figure", caption: str, alt: str) -> Picture:
        ask()
        svg = style.save(figure, run.folder / "figures", name)
        return Picture(name, style.inline(svg, name, alt), caption, alt)

    parts = sections(findings, draw, ask)
    footer = f"Written by saejax {package_versions().get('saejax', '')}".strip() + "."
    lead = (*(overview.lead(findings) if ablate else ()), *(part.lead for part in parts if part.lead))
    title = config.title
    if not ablate and title == ReportConfig().title:  # which asks what such a run does not answer
        model = findings.select(EvaluateResults) and findings.settings()["model"]
        title = f"The dictionaries of {model['path']}" if model else "What this run found"
    page = to_html(title, lead, parts, footer)
    write_text(run.folder / "report.md", to_markdown(title, lead, parts, footer))
    write_text(run.folder / "index.html", page)
    run.say(f"open {run.folder / 'index.html'}")
    verdicts = ablate.verdict.dictionaries[TESTED] if ablate else {}
    return ReportResults(
        specific={name: result.placebo.answer for name, result in verdicts.items()},
        figures=tuple(block.name for part in parts for block in part.blocks if isinstance(block, Picture)),
        contexts={feature: len(findings.examples.get(feature, ())) for feature in wanted},
        html_bytes=len(page.encode()),
    )


def _stop_if_asked(run: Run) -> None:
    """Raise ``Interrupted`` if a run is asked to stop."""
    if run.stopping():
        raise Interrupted("report: stopped; run the same command to write it")


def trained_in(folder: str) -> tuple[dict[str, Path], str]:
    """Return the finished units of the workdir that trained the dictionary in a folder, and its name there.

    Args:
      folder: such as "runs/demo/train/topk" or "runs/demo/train/topk/k32".

    Returns:
      Folders of its units "capture", "train/topk" and "evaluate/topk", and "topk" or "topk/k32"; no units if it is not
      of a workdir where all of these are finished.
    """
    names = Path(folder).absolute().parts
    # The innermost folder "train" first: a workdir may itself lie below a folder named so.
    for at in (index for index in range(len(names) - 2, 0, -1) if names[index] == "train"):
        workdir, kind = Path(*names[:at]), names[at + 1]
        read = "capture", f"train/{kind}", f"evaluate/{kind}"
        units = {unit: resolve_links(workdir / unit) for unit in read}
        name, finished = "/".join(names[at + 1 :]), all((unit / SUMMARY).exists() for unit in units.values())
        current = stacks.results_folder(workdir, "evaluate", name)
        if finished and stacks.find_results(workdir, "evaluate", name) == current:
            return units, name
    return {}, folder


def sections(findings: Findings, draw: Draw, ask: Callable[[], None] = lambda: None) -> list[Section]:
    """Return all sections of the report; sections of optional stages stand before the features.

    Args:
      findings: the results to write about; without behaviours they have no tested dictionary.
      draw: saves a figure and returns its block.
      ask: called before each stage's sections; it may raise to stop.
    """
    tested = next((results.dictionary for results in findings.select(AblateResults).values()), "")
    is_evaluated = bool(findings.select(EvaluateResults))  # False for a dictionary that was trained elsewhere
    written: list[Section] = []
    if tested:
        written += [ablation.answer(findings, draw), *ablation.details(findings)]
        written.append(tasks.behaviours_section(findings, draw))
    written += tasks.benchmark_sections(findings)
    if is_evaluated:
        written.append(training.section(findings, draw, tested))
    for stage in all_stages().values():
        ask()
        written += stage.section(findings, draw) if stage.section else ()
    if tested:
        written += ablation.features(findings)
        written += [overview.left_out(findings)] if is_evaluated else []
        written.append(overview.limits(findings))
    return [*written, overview.reproduce(findings)]


def contexts(run: Run, findings: Findings, features: Sequence[int], count: int) -> dict[int, list[Example]]:
    """Return the strongest contexts of features of the tested dictionary; empty without captured text.

    They come from ``interpret`` if it ran on the dictionary; otherwise the training text is searched.
    """
    if not features or "capture" not in findings.folders:
        return {}
    tested, store = run.configs[AblateConfig].dictionary, Store.open(findings.folders["capture"])
    kind, _, member = tested.partition("/")
    unit = run.inputs.get(f"interpret/{kind}")
    interpreted = member_folder(unit, member) if unit else None
    if interpreted and (interpreted / FEATURES).is_dir():
        records = read_records(interpreted, set(features))
        searched = {feature: record.get("examples", [])[:count] for feature, record in records.items()}
    else:
        mesh = make_mesh(run.configs[MeshConfig])
        dictionary = stacks.load_trained(tested, run.inputs, "--ablate.dictionary", mesh)
        as_piece = token_piece(load_tokenizer(resolve(run.configs[ModelConfig])))
        pieces = list(map(as_piece, range(int(store.documents.ids_T.max()) + 1)))
        store = with_joined(store, [dictionary.site], {dictionary.site: dictionary.config.scales})
        on_progress = say_progress(run.say, "contexts", functools.partial(_stop_if_asked, run))
        searched = top_contexts(store, dictionary, features, count, pieces, mesh, on_progress)
    return {feature: [as_example(context, store.documents) for context in some] for feature, some in searched.items()}


def as_example(context: FeatureContext, documents: Documents) -> Example:
    """Return a context as the report shows it."""
    return Example(
        tokens=tuple(context["tokens"]),
        activations=tuple(math.nan if act is None else act for act in context["acts"]),
        peak=context["peak"],
        place=documents.place(context["document"], context["position"]),
    )
