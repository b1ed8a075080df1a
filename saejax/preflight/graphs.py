"""What tracing attribution graphs takes: which prompts, which transcoders, operations and memory."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saejax.attribution.checks.circuits import RUNS
from saejax.attribution.local.replacement import padded_length
from saejax.attribution.local.transcoders import open_transcoders
from saejax.attribution.requests import Request, read_requests, unit_name
from saejax.attribution.trace.costs import row_flops
from saejax.attribution.trace.memory import GraphSize, certain_active
from saejax.dictionaries import DictionaryConfig
from saejax.models.config import DecoderConfig
from saejax.preflight.costs import pass_flops
from saejax.settings import GraphConfig

PROMPT = 16  # tokens of a behaviour's prompt
_CHARACTERS_PER_TOKEN = 4.2  # English text under a vocabulary of about 50,000
_READ = 1e9  # bytes of transcoders that are read in a second


@dataclasses.dataclass(frozen=True)
class GraphWork:
    """The graphs that are asked for.

    Attributes:
      unit: their unit.
      lengths: about how many tokens each prompt has.
      size: what else decides what a graph takes.
      doubled: features that are doubled one by one.
    """

    unit: str
    lengths: tuple[int, ...]
    size: GraphSize
    doubled: int

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(self.lengths)

    @property
    def rows(self) -> int:
        """Features that get rows, of all graphs."""
        return sum(self.size.traced(tokens) for tokens in self.lengths)

    @property
    def flops(self) -> float:
        """Of all graphs."""
        return sum(map(self._flops, self.lengths))

    @property
    def read_seconds(self) -> float:
        """Seconds in which transcoders are read: once to trace, and once for each check."""
        transcoder = self.size.transcoder
        layer = 2 * 4 * transcoder.d_in * transcoder.n_features
        times = 1 + 3 * self.size.checked
        return len(self.lengths) * times * self.size.model.n_layers * layer / _READ

    def _flops(self, tokens: int) -> float:
        """A run with the transcoders; rows, which on average start in the middle, and what reads them off; checks."""
        model, size, length = self.size.model, self.size, padded_length(tokens)
        run = pass_flops(model, length, length, model.n_layers)
        explained = 4.0 * size.transcoder.d_in * size.transcoder.n_features * model.n_layers * length
        rows, active = size.traced(tokens), size.active_features(tokens)
        down = row_flops(model, rows * (model.n_layers + 1) / 2 + size.logits * model.n_layers, (tokens + 1) / 2)
        read_off = rows * active / 4 * 2.0 * model.d_model
        checks = (RUNS * (run + 1.5 * explained) + 2 * self.doubled * run) if size.checked else 0.0
        return run + explained + down + read_off + checks


def plan_graphs(
    model: DecoderConfig, configs: Mapping[str, Any], trained: Sequence[DictionaryConfig]
) -> GraphWork | str | None:
    """The graphs of a configuration on one model.

    Args:
      model: its decoder.
      configs: the groups of configuration.
      trained: what the run trains itself.

    Returns:
      None if none are asked for; a line on why they cannot be counted.

    Raises:
      UserError: prompts or transcoders are not what the stage takes.
    """
    config: GraphConfig = configs["graph"]
    unit = unit_name(config)
    if not unit:
        return None
    lengths = [PROMPT] * len(config.behaviours) or [_tokens(request) for request in read_requests(config)]
    transcoder = _transcoder(config, model, configs["model"].path, trained)
    if transcoder is None:
        return f"attribute/{unit} is not counted: {config.transcoders} is no folder here, so its sizes are not known"
    size = GraphSize(
        model,
        transcoder,
        certain_active(transcoder) or configs["preflight"].active_features,
        config.max_features or None,
        config.max_logits,
        checked=bool(config.circuits or config.doubled),
    )
    return GraphWork(unit, tuple(lengths), size, config.doubled)


def _tokens(request: Request) -> int:
    """About how many tokens a prompt has, one before it included."""
    if isinstance(request.prompt, str):
        return 2 + round(len(request.prompt) / _CHARACTERS_PER_TOKEN)
    return len(request.prompt)


def _transcoder(
    config: GraphConfig, model: DecoderConfig, name: str, trained: Sequence[DictionaryConfig]
) -> DictionaryConfig | None:
    """One of the set's transcoders: of a folder that is there, or of those that the run will train into it."""
    folder = Path(config.transcoders).expanduser() / config.subfolder
    if folder.is_dir():
        opened = open_transcoders(config.transcoders, config.revision, config.subfolder)
        return opened.check_shape(model, name).configs[0]
    return next((own for own in trained if own.target and own.kind == folder.name), None)
