"""What the results of several causal stages hold."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ControlMatch:
    """How well matched random features match: median over draws and features of control / feature; 1 is perfect.

    Attributes:
      firing_rate_ratio: of firing rates.
      activation_ratio: of mean activations.
      norm_ratio: of decoder norms. None, as in the others, without features, or where a feature's own value is 0.
    """

    firing_rate_ratio: float | None
    activation_ratio: float | None
    norm_ratio: float | None


@dataclasses.dataclass(frozen=True)
class RankedFeature:
    """A top feature.

    Attributes:
      feature: its number.
      attribution: by which it was chosen: the mean estimated effect, in logits or nats.
      firing_rate: share of the positions on which it fires, of prompts that judge it and those that lend replacements.
      mean_activation: where it fires there; 0 if it never does.
    """

    feature: int
    attribution: float
    firing_rate: float
    mean_activation: float
