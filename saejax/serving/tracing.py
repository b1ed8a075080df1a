"""A prompt that a reader types, traced as a unit of ``experiments.attribute``: its files, summary and names are those.

Its checks are left out, which take longer than the tracing: ``experiments.attribute`` with the same flags makes them.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saejax.attribution.requests import Request, unit_name
from saejax.attribution.run import run_attribute, trace_request
from saejax.runner.config import Configs
from saejax.runner.pipeline import run_stages
from saejax.runner.workplan import Workplan
from saejax.runner.workspace import STARTED, SUMMARY, Workspace
from saejax.serving.jobs import Job
from saejax.serving.session import ModelSession
from saejax.serving.store import GraphStore
from saejax.settings import GraphConfig

_UNCHECKED: dict[str, Any] = dict(doubled=0, circuits=False, heads=False, query_key=())
_OTHERWISE: dict[str, Any] = dict(prompts="", behaviours=(), supernodes="", slug="")  # the reader's prompt alone


def trace_typed(
    session: ModelSession, configs: Configs, store: GraphStore, settings: Mapping[str, Any], job: Job
) -> str:
    """Trace a prompt into its workdir's ``attribute/``, and keep it in memory.

    Args:
      session: the model and its cached graphs.
      configs: configuration of the model and the dictionaries.
      store: the graphs of the workdir.
      settings: fields of ``GraphConfig``, ``prompt`` among them.
      job: receives the progress.

    Returns:
      The graph's id; that of the existing graph if the same one was traced before.

    Raises:
      UserError: the prompt cannot be traced, or another process works in the workdir.
      Interrupted: it was stopped; its unfinished files are removed.
    """
    root = store.root
    configs |= dataclasses.replace(configs[GraphConfig], **_OTHERWISE, **_UNCHECKED, **settings)
    configs, slug, folder = _with_free_slug(configs, root)
    traced: list[Any] = []
    claimed: list[Any] = []  # runs of this request: only what they began may be discarded

    def trace(model: Any, dictionaries: Any, request: Request, config: GraphConfig) -> Any:
        job.say("Tracing")
        traced.append(trace_request(model, dictionaries, request, config, job.progress))
        job.say("Pruning and writing")
        return traced[-1]

    def substitute(run: Any) -> Any:
        claimed.append(run)
        return run_attribute(run, lambda of: session.opened(of, job), trace)

    try:
        run_stages(["attribute"], configs, str(root), job.say, job.stopping, substitutes=dict(attribute=substitute))
    finally:
        if claimed and (folder / STARTED).exists() and not (folder / SUMMARY).exists():
            workspace, unit = Workspace(root), f"attribute/{slug}"
            workspace.discard(unit, folder.name.rpartition("-")[2])
    graph = f"attribute/{slug}/graphs/{slug}"
    if traced:
        session.keep(store.find(graph), traced[0])
    return graph


def _with_free_slug(configs: Configs, root: Path) -> tuple[Configs, str, Path]:
    """Return settings with the first slug of NAME, NAME-2, ... that is free or has these settings, and its folder."""
    workspace, name, number = Workspace(root), unit_name(configs[GraphConfig]), 1
    while True:
        slug = name if number == 1 else f"{name}-{number}"
        slug_configs = configs | dataclasses.replace(configs[GraphConfig], slug=slug)
        folder = workspace.folder(f"attribute/{slug}", Workplan(slug_configs).fingerprint(f"attribute/{slug}"))
        if workspace.current(f"attribute/{slug}") in (None, folder):
            return slug_configs, slug, folder
        number += 1
