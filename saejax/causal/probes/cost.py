"""What the stage ``probe`` takes."""

from jax.sharding import Mesh

from saejax.causal.cost import causal_cost, clean_bytes, kept_prompts, prompt_length
from saejax.causal.probes import inputs
from saejax.causal.programs import SplitShapes
from saejax.costs.cost import START, Cost, PlannedRun
from saejax.costs.passes import pass_flops
from saejax.costs.programs import Program, whole
from saejax.models.sites import Site
from saejax.settings import ProbeConfig, TaskConfig
from saejax.tasks.cost import PROMPT, count_all_behaviours

_FIT = 0.02  # seconds of a logistic regression on some hundred prompts, on one core


def probe_cost(plan: PlannedRun, name: str) -> Cost:
    """All prompts up to the site, and for every label probes of features and of raw activations."""
    task, probe, used = plan.configs[TaskConfig], plan.configs[ProbeConfig], plan.dictionary("probe")
    behaviours = count_all_behaviours(task)
    rows = behaviours * (task.train_prompts + task.test_prompts)
    labels = sum(1 if label == "behaviour" else behaviours for label in dict.fromkeys(probe.labels))
    chosen = probe.folds * len(probe.strengths) if len(probe.strengths) > 1 else 0
    full, sparse = chosen + 1 + probe.shuffles, chosen + 1 + 2 * probe.shuffles
    fits = 2 * labels * (full + len(set(probe.sparse)) * sparse)
    flops = pass_flops(plan.model, rows * PROMPT, PROMPT, Site.parse(used.site).layer + 1)
    streams = kept_prompts(plan) * prompt_length(plan) * 4 * 2 * used.d_in
    more = dict(host_seconds=START + _FIT * fits, counts=dict(rows=rows, tokens=rows * PROMPT, fits=fits))
    return causal_cost(plan, flops, streams + clean_bytes(plan, used), used, **more)


def probe_programs(plan: PlannedRun, mesh: Mesh) -> list[Program]:
    """The head, and what probes see of all prompts; they are fitted on the host."""
    probe = plan.configs[ProbeConfig]
    if not probe.labels or not plan.configs[TaskConfig].has_behaviours:
        return []
    shapes = SplitShapes(plan, mesh, "probe")
    rows = shapes.rows(whole, shapes.prompts)
    given = (shapes.point, probe.pool, shapes.dictionary, rows.read_BxTxD, rows.domain_BxT, rows.last_B)
    flops = shapes.encode_flops(shapes.prompts)
    size = f"{shapes.prompts} prompts of {shapes.length} tokens"
    return [shapes.head(), shapes.program("inputs", size, inputs.pool_prompts, given, flops)]
