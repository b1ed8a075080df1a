"""The graphs that the stage ``attribute`` will trace: the length of each prompt, and the size of their transcoders."""

import dataclasses
from pathlib import Path

from saejax.attribution.checks.kept import RUNS as KEPT_RUNS
from saejax.attribution.graph.pruning import RUNS
from saejax.attribution.local.transcoders import open_transcoders
from saejax.attribution.requests import Request, read_requests
from saejax.attribution.trace.memory import GraphSize, certain_active
from saejax.costs.plan import CHARACTERS_PER_TOKEN, PlannedRun
from saejax.dictionaries import DictionaryConfig
from saejax.models.config import DecoderConfig
from saejax.settings import GraphConfig, ModelConfig, PreflightConfig

_PROMPT = 16  # tokens: the behaviours' prompts have 7 to 32


@dataclasses.dataclass(frozen=True)
class PlannedGraphs:
    """The graphs that are asked for.

    Attributes:
      lengths: about how many tokens each prompt has.
      size: what else decides what a graph takes.
    """

    lengths: tuple[int, ...]
    size: GraphSize

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(self.lengths)

    @property
    def rows(self) -> int:
        """Features that get rows, of all graphs."""
        return sum(self.size.traced(tokens) for tokens in self.lengths)


def planned_graphs(plan: PlannedRun) -> PlannedGraphs | None:
    """The graphs of a configuration on one model; None if they are of SAEs, or nothing is known of their transcoders.

    Raises:
      UserError: prompts or transcoders are not what the stage takes.
    """
    config = plan.configs[GraphConfig]
    lengths = [_PROMPT] * len(config.behaviours) or [_tokens(request) for request in read_requests(config)]
    found = _transcoder(plan, config) if config.transcoders else None
    if found is None:
        return None
    transcoder, cross_layer = found
    active = certain_active(transcoder) or plan.configs[PreflightConfig].active_features
    size = graph_size(config, plan.model, transcoder, active, cross_layer)
    return PlannedGraphs(tuple(lengths), size)


def graph_size(
    config: GraphConfig, model: DecoderConfig, transcoder: DictionaryConfig, active: float, cross_layer: bool
) -> GraphSize:
    """What decides how much memory a graph takes.

    Args:
      config: the stage's settings.
      model, transcoder, active, cross_layer: see ``GraphSize``.
    """
    return GraphSize(
        model,
        transcoder,
        active,
        config.max_features or None,
        config.max_logits,
        checked=bool(config.circuits or config.doubled or config.kept_prompts),
        heads=config.heads,
        cross_layer=cross_layer,
        together=KEPT_RUNS if config.kept_prompts else RUNS,
    )


def _tokens(request: Request) -> int:
    """About how many tokens a prompt has, one before it included."""
    if isinstance(request.prompt, str):
        return 2 + round(len(request.prompt) / CHARACTERS_PER_TOKEN)
    return len(request.prompt)


def _transcoder(plan: PlannedRun, config: GraphConfig) -> tuple[DictionaryConfig, bool] | None:
    """One of the set's transcoders: of a folder that is there, or of those that the run will train into it.

    Returns:
      What it is, and whether the set is a cross-layer one; None: nothing is known of it.
    """
    folder = Path(config.transcoders).expanduser() / config.subfolder
    if folder.is_dir():
        opened = open_transcoders(config.transcoders, config.revision, config.subfolder, config.l0)
        return opened.check_shape(plan.model, plan.configs[ModelConfig].path).configs[0], opened.cross_layer
    trained = (stack.dictionary for stack in plan.stacks.values())
    return next(((own, False) for own in trained if own.target and own.kind == folder.name), None)
