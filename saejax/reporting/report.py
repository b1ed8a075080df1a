"""The report stage: gathers what the other stages found and writes it for a reader.

Written to the unit's folder: ``index.html`` (complete in itself), ``report.md`` (the same content), and
``figures/`` (each figure as PNG and SVG; of attribution graphs the SVG).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from saejax.activations.store import Store
from saejax.analysis.examples import Example, top_examples
from saejax.config import to_json
from saejax.dictionaries import stacks
from saejax.models.source import load_tokenizer, resolve
from saejax.models.tokens import token_text
from saejax.reporting import (
    agreement,
    bases,
    circuits,
    details,
    dictionaries,
    graphs,
    patching,
    probes,
    sections,
    studies,
    style,
)
from saejax.reporting.document import Picture, to_html, to_markdown
from saejax.reporting.findings import read_findings
from saejax.workspace import Run, package_versions, write_text


def run_report(run: Run) -> dict[str, Any]:
    """Writes the report.

    Reads ``run.inputs``: "baseline", "benchmark/NAME" of every benchmark, "capture", "train/KIND" and "evaluate/KIND"
    of every kind, "ablate" (or "ablate/NAME"), and "probe/NAME", "patch/NAME", "study/NAME" and "attribute/NAME" if
    they were asked for.

    Returns:
      ``verdicts`` (behaviour -> bool), ``figures`` (names), ``contexts`` (feature, as text -> how many are
      shown) and ``html_bytes``.

    Raises:
      UserError: a file of an input is missing or damaged.
    """
    config = run.configs["report"]
    found = read_findings(run.inputs, {"report": to_json(config)})
    tested = found.ablate["behaviours"]
    wanted = [item["feature"] for result in tested.values() for item in result["top"][: config.features]]
    run.say(f"looking for the strongest contexts of {len(set(wanted))} features")
    found = dataclasses.replace(found, examples=contexts(run, found.ablate["dictionary"], wanted, config.examples))

    (run.folder / "figures").mkdir(exist_ok=True)

    def draw(name: str, figure: Figure, caption: str, alt: str) -> Picture:
        svg = style.save(figure, run.folder / "figures", name)
        return Picture(name, style.inline(svg, name, alt), caption, alt)

    parts = [
        sections.answer(found, draw),
        sections.behaviours(found, draw),
        *sections.benchmarks(found),
        dictionaries.section(found, draw),
        *bases.sections(found, draw),
        *agreement.sections(found),
        *circuits.feature_sets(found, draw),
        *patching.sections(found, draw),
        *probes.sections(found, draw),
        *studies.sections(found),
        *graphs.sections(found, draw, run.folder),
        *details.features(found, draw, config.features),
        details.left_out(found),
        details.limits(found),
        details.reproduce(found),
    ]
    footer = f"Written by saejax {package_versions().get('saejax', '')}".strip() + "."
    lead = (*sections.lead(found), *graphs.lead(found))
    page = to_html(config.title, lead, parts, footer)
    write_text(run.folder / "report.md", to_markdown(config.title, lead, parts, footer))
    write_text(run.folder / "index.html", page)
    run.say(f"read {run.folder / 'index.html'}")
    return dict(
        verdicts={name: result["verdict"] for name, result in tested.items()},
        figures=[block.name for part in parts for block in part.blocks if isinstance(block, Picture)],
        contexts={str(feature): len(found.examples.get(feature, ())) for feature in wanted},
        html_bytes=len(page.encode()),
    )


def contexts(run: Run, name: str, features: Sequence[int], count: int) -> dict[int, list[Example]]:
    """The strongest contexts of features of the dictionary ``name`` in the captured text."""
    if not features:
        return {}
    store = Store.open(run.inputs["capture"])
    kind, _ = stacks.kind_and_member(name)
    dictionary = stacks.load_member(run.inputs[f"train/{kind}"], name, "--ablate.dictionary")
    tokenizer = load_tokenizer(resolve(run.configs["model"]))
    return top_examples(store, dictionary, features, count, token_text(tokenizer))
