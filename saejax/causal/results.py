"""What the results of several causal stages hold."""

import dataclasses

from saejax.results import Interval


@dataclasses.dataclass(frozen=True)
class ControlMatch:
    """How well matched random features match: median over draws and features of control / feature; 1 is perfect."""

    firing_rate_ratio: float | None  #: of firing rates
    activation_ratio: float | None  #: of mean activations
    #: of decoder norms. None, as in the others, without features, or where a feature's own value is 0.
    norm_ratio: float | None
    place_ratio: float | None = None  #: of the mean token, counted from the prompt's end, at which they fire
    size_ratio: float | None = None  #: of how much whole sets change the site; median over draws


@dataclasses.dataclass(frozen=True)
class RankedFeature:
    """A top feature."""

    feature: int  #: its number
    attribution: float  #: by which it was chosen: the mean estimated effect, in logits or nats
    #: share of the positions on which it fires, of prompts that judge it and those that lend replacements
    firing_rate: float
    mean_activation: float  #: where it fires there; 0 if it never does


@dataclasses.dataclass(frozen=True)
class EqualDose:
    """The features and another basis over a range of doses that both reach."""

    reach: float  #: the range's upper end; its lower end is 0
    features: float  #: mean drop of the logit difference over the range: the area under the curve by its width
    basis: float  #: likewise
    difference: Interval  #: features - basis, paired by prompt
