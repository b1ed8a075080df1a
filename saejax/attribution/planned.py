"""The graphs that the stage ``attribute`` will trace: the length of each prompt, and the size of their transcoders."""

import dataclasses
from pathlib import Path

from saejax.attribution.local.transcoders import open_transcoders
from saejax.attribution.requests import Request, read_requests
from saejax.attribution.trace.memory import GraphSize, certain_active
from saejax.costs.plan import CHARACTERS_PER_TOKEN, PlannedRun
from saejax.dictionaries import DictionaryConfig
from saejax.settings import GraphConfig, ModelConfig

_ACTIVE = 64  # features per layer and token, where the kind of dictionary does not say how many
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


def planned_graphs(plan: PlannedRun, behaviour_prompts: int = 0) -> PlannedGraphs | None:
    """Return the planned graphs on one model; None if they are of SAEs, or their transcoders are unknown.

    Args:
      plan: the planned run.
      behaviour_prompts: number of traced prompts of behaviours; 0: the prompts that ``GraphConfig`` names.

    Raises:
      UserError: the stage cannot trace the prompts or use the transcoders.
    """
    config = plan.configs[GraphConfig]
    lengths = [_PROMPT] * (behaviour_prompts or len(config.behaviours)) or [
        _tokens(request) for request in read_requests(config)
    ]
    replacement = _transcoder(plan, config) if config.transcoders else None
    if replacement is None:
        return None
    transcoder, cross_layer = replacement
    active = certain_active(transcoder) or _ACTIVE
    most = config.max_features or None
    size = GraphSize(plan.model, transcoder, active, most, config.max_logits, cross_layer)
    return PlannedGraphs(tuple(lengths), size)


def _tokens(request: Request) -> int:
    """Return about how many tokens a prompt has, one before it included."""
    if isinstance(request.prompt, str):
        return 2 + round(len(request.prompt) / CHARACTERS_PER_TOKEN)
    return len(request.prompt)


def _transcoder(plan: PlannedRun, config: GraphConfig) -> tuple[DictionaryConfig, bool] | None:
    """Return one of the set's transcoders: of a folder, of a set on the hub, or of those that the run will train.

    Returns:
      What it is, and whether the set is a cross-layer one; None: nothing is known of it.
    """
    folder = Path(config.transcoders).expanduser()
    if folder.is_dir():
        opened = open_transcoders(config.transcoders, choice=config.l0)
        return opened.check_shape(plan.model, plan.configs[ModelConfig].path).configs[0], opened.cross_layer
    if assumed := plan.assumed_transcoder():
        return assumed, False
    trained = (stack.dictionary for stack in plan.stacks.values())
    return next(((config, False) for config in trained if config.target and config.kind == folder.name), None)
