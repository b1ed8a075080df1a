"""Results of the stage ``steer``."""

import dataclasses
from collections.abc import Mapping

from saejax.causal.claims import Claim
from saejax.causal.results import EqualDose
from saejax.results import Interval


@dataclasses.dataclass(frozen=True)
class SteeringPoint:
    """A strength of a method, on the test prompts."""

    strength: float  #: asked for: the dose of what is added, the factor of what is clamped, the number of examples
    #: measured: the change's mean length where it acts over the values' mean length there
    dose: float
    flipped: Interval  #: share of the prompts whose target has the higher logit then, with its 95 % Wilson interval
    #: by how much logit(own answer) - logit(target) falls; its interval resamples templates and prompts
    drop: Interval
    first: float  #: share of the prompts of which the target is the likeliest of all tokens
    #: of cross-entropy on held-out text, nats per token; None where there is no text
    ce_rise: Interval | None
    kl: float | None  #: divergence from the clean predictions there, nats per token; None where there is no text


@dataclasses.dataclass(frozen=True)
class RandomDirections:
    """Directions between means of texts whose answers were shuffled, at a dose, on some of the test prompts."""

    dose: float  #: as that of the method they are compared with
    draws: int  #: how many
    prompts: int  #: of the test prompts
    flipped: Interval  #: share of the prompts: mean over the draws, and their 2.5th and 97.5th percentile
    drop: Interval  #: of the logit difference, likewise


@dataclasses.dataclass(frozen=True)
class SteeringMethod:
    """A way to change the activations: `features`, `clamp`, `difference` or `gradient`."""

    points: tuple[SteeringPoint, ...]  #: rising
    #: which of them is judged: of those that cost held-out text little, the one that flips most train prompts
    chosen: int
    random: RandomDirections  #: beside the chosen one
    #: cross-entropy under the clean model of what the steered one, at that strength, goes on with, nats per token; None
    #: where every such text ends at once
    continuation_ce: float | None
    continuation: str  #: the first of these texts
    #: whether the chosen one beats random directions, corrected for all methods and behaviours of the run; see `ablate`
    claim: Claim | None = None


@dataclasses.dataclass(frozen=True)
class PromptingEffect:
    """Examples in front of a prompt, to compare with."""

    target: SteeringPoint  #: examples that end in the target, where it is wrong
    correct: SteeringPoint  #: the same examples with their right answers


@dataclasses.dataclass(frozen=True)
class BehaviourSteering:
    """A behaviour steered from each test prompt's answer to that of its counterpart; also in `<behaviour>.json`."""

    reason: str | None  #: why it is not steered; None where it is
    prompts: int  #: of the test prompts
    #: other test prompts: those answered wrongly, and those whose answers too few train texts have
    left_out: Mapping[str, int]
    templates: int  #: that the prompts were made from, which intervals resample first; 0: prompts one by one
    clean: Interval | None  #: logit difference; None without prompts
    clean_ce: float | None  #: cross-entropy of what the model itself goes on with, nats per token
    methods: Mapping[str, SteeringMethod]  #: by name; one that has no direction is left out
    #: of shuffled answers, at every dose that is added
    random: tuple[RandomDirections, ...]
    #: other method -> `norm` and `kl`: areas under the curves of drop against dose, and against divergence
    equal_dose: Mapping[str, Mapping[str, EqualDose]]
    prompting: PromptingEffect | None  #: None where no train prompt can be an example, or they are too long
    features: Mapping[str, tuple[int, ...]]  #: "own answer → target" -> the features, best first


@dataclasses.dataclass(frozen=True)
class SteerResults:
    """What steering does to the behaviours."""

    dictionary: str  #: its name
    site: str  #: that is changed
    positions: str  #: of a prompt that are changed: all or last
    behaviours: Mapping[str, BehaviourSteering]  #: by name
