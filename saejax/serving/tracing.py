"""A prompt that a reader types, traced as a unit of ``experiments.attribute``: its files, summary and names are those.

Its checks are left out, which take longer than the tracing: ``experiments.attribute`` with the same flags makes them.
"""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saejax.attribution.requests import Request, unit_name
from saejax.attribution.run import run_attribute, trace_request
from saejax.config import Configs
from saejax.pipeline import run_stages
from saejax.serving.bench import Bench
from saejax.serving.jobs import Job
from saejax.settings import GraphConfig
from saejax.workplan import Workplan
from saejax.workspace import STARTED, SUMMARY, Workspace

_UNCHECKED: dict[str, Any] = dict(doubled=0, circuits=False, heads=False, query_key=("none",))
_OTHERWISE: dict[str, Any] = dict(
    prompts="", behaviours=(), token_ids=(), supernodes="", slug=""
)  # the reader's prompt alone


def trace_typed(bench: Bench, configs: Configs, root: Path, asked: Mapping[str, Any], job: Job) -> str:
    """Traces a prompt into ``root``/attribute/, and keeps it in memory.

    Args:
      configs: with the model and the dictionaries.
      root: the workdir.
      asked: fields of ``GraphConfig``, ``prompt`` among them.
      job: is told how far the work is.

    Returns:
      The graph's id: that of the graph that is there, if the same was traced before.

    Raises:
      UserError: the prompt cannot be traced, or another process works in the workdir.
      Interrupted: it was stopped; nothing is left of it.
    """
    configs |= dataclasses.replace(configs[GraphConfig], **_OTHERWISE, **_UNCHECKED, **asked)
    configs, slug = _with_free_slug(configs, root)
    folder, traced = root / "attribute" / slug, []

    def trace(model: Any, dictionaries: Any, request: Request, config: GraphConfig) -> Any:
        job.say("Tracing")
        traced.append(trace_request(model, dictionaries, request, config, job.progress))
        job.say("Pruning and writing")
        return traced[-1]

    def instead(run: Any) -> Any:
        return run_attribute(run, lambda of: bench.opened(of, job), trace)

    try:
        run_stages(["attribute"], configs, str(root), job.say, job.stopping, instead=dict(attribute=instead))
    finally:
        if (folder / STARTED).exists() and not (folder / SUMMARY).exists():
            shutil.rmtree(folder)
    graph = f"attribute/{slug}/graphs/{slug}"
    if traced:
        bench.keep(graph, traced[0])
    return graph


def _with_free_slug(configs: Configs, root: Path) -> tuple[Configs, str]:
    """The first of NAME, NAME-2, ... under which there is nothing, or just what is asked for."""
    workspace, name, number = Workspace(root), unit_name(configs[GraphConfig]), 1
    while True:
        slug = name if number == 1 else f"{name}-{number}"
        own = configs | dataclasses.replace(configs[GraphConfig], slug=slug)
        folder = workspace.folder("attribute", slug)
        if not folder.exists() or workspace.finished("attribute", slug, Workplan(own).mark(f"attribute/{slug}")):
            return own, slug
        number += 1
