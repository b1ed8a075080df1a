"""What the stage ``track`` takes."""

from collections.abc import Sequence

from saejax.costs.cost import CHARACTERS_PER_TOKEN, START, WIDTH, Cost, DeviceBytes, PlannedRun
from saejax.costs.passes import dictionary_bytes, head_flops, layer_bytes, logit_bytes, pass_flops, weight_bytes
from saejax.matching.track.tested import ROWS, draws_for
from saejax.matching.track.texts import read_problems, sentences
from saejax.models.sites import Site
from saejax.runner.stage import is_folder
from saejax.stages.track import TrackConfig

_LENSES = 2  # the lens and its control
_LAYER = 1.0  # seconds on the host for each layer: its dictionary read, its features compared with the next one's
_TEST = 2.0  # seconds on the host for each step that is tested: matched sets, and a program for each length


def track_cost(plan: PlannedRun, name: str) -> Cost:
    """Each text runs once, is read by the lenses at every layer, and its steps run without each drawn set.

    The tokens of steps are counted from their characters. A folder is taken for a dictionary of each layer.
    """
    config, model = plan.configs[TrackConfig], plan.model
    texts = planned_texts(config)
    tokens = [counted(prompt, *steps) for prompt, steps in texts]
    layers = planned_layers(plan)
    tested = config.test_layers or (layers[len(layers) // 2],)
    flops, tests = 0.0, 0
    for (_, steps), length in zip(texts, tokens, strict=True):
        flops += pass_flops(model, length, length, model.n_layers) + _LENSES * len(layers) * head_flops(model, length)
        draws = draws_for(config, len(steps) * len(tested))
        run = draws * sum(len(step) for step in steps) / CHARACTERS_PER_TOKEN
        for layer in tested:
            flops += pass_flops(model, round(run), length, model.n_layers - 1 - layer) + head_flops(model, round(run))
        tests += len(steps) * len(tested)
    longest = max(tokens)
    used = max((stack.dictionary for stack in plan.stacks.values()), key=lambda one: one.n_features)
    logits = max(logit_bytes(plan, 1, longest), logit_bytes(plan, ROWS["cpu"], longest // max(len(texts[0][1]), 1)))
    return Cost(
        DeviceBytes(
            weight_bytes(model, plan.axes, plan.dtype),
            dictionary_bytes(used, "float32"),
            activations=layer_bytes(plan, ROWS["cpu"], longest, plan.dtype) + logits,
        ),
        flops,
        dtype=plan.dtype,
        overhead=0.5,
        host_seconds=START + len(texts) * _LAYER * len(layers) + _TEST * tests,
        disk=WIDTH["float32"] * 4 * sum(tokens) * len(layers) * config.top,
        counts=dict(texts=len(texts), tests=tests),
    )


def planned_texts(config: TrackConfig) -> list[tuple[str, Sequence[str]]]:
    """Each text's steps, and what stands before them."""
    return [(one.prompt, one.steps) if one.steps else ("", sentences(one.prompt)) for one in read_problems(config)]


def counted(*parts: str) -> int:
    """About how many tokens a text of these parts has."""
    return round(sum(map(len, parts)) / CHARACTERS_PER_TOKEN) + 1


def planned_layers(plan: PlannedRun) -> list[int]:
    """Layers of the dictionaries."""
    found: set[int] = set()
    for name in plan.configs[TrackConfig].dictionaries:
        kind, _, member = name.partition("/")
        if is_folder(name) or kind not in plan.stacks:
            return list(range(plan.model.n_layers))
        members = [one for one in plan.stacks[kind].members if member in ("", one.name)]
        found |= {Site.parse(one.site).layer for one in members}
    return sorted(found) or [plan.model.n_layers - 1]
