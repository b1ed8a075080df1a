"""Results of the stage ``track``."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class StepTest:
    """Effects of ablating a step's features on the step's tokens, beside random lists of the same dose."""

    features: tuple[int, ...]  #: that were ablated together, at the step's tokens
    drop: float  #: of the mean log-likelihood of the step's tokens but the first, nats
    sets: int  #: number of random lists of the same dose
    needed: int  #: number below which no answer is given
    random_drop: float | None  #: drop under these, mean; None without any
    p_holm: float | None  #: after Holm's correction over the steps of the text
    hurt: str  #: whether the step's features do more than random lists: yes, no or not testable


@dataclasses.dataclass(frozen=True)
class TrackedStep:
    """A part of a text: the prompt, or a step."""

    name: str  #: "prompt", or "step 1" and so on
    text: str  #: its text
    start: int  #: its first token
    stop: int  #: the token after its last
    test: StepTest | None = None  #: of its features at the tested site
    untested: str = ""  #: why they were not tested


@dataclasses.dataclass(frozen=True)
class MeasuredLink:
    """A link between features of two layers, with its effects, and those of random active features at equal dose."""

    lower: str  #: site of the lower dictionary
    source: int  #: its feature
    upper: str  #: site of the upper dictionary
    target: int  #: its feature
    position: int  #: of both
    token: str  #: there
    lost: float  #: share of the target's activation that is lost without the source
    random_lost: float  #: the same without as much along each of the controls, mean
    answer_drop: float  #: of the answer's log-probability without the target, nats
    random_drop: float  #: the same of the controls in the upper dictionary, mean
    holds: bool | None  #: whether it is lost, and more than with each of 19 controls; None: fewer
    reaches_answer: bool | None  #: the same of the answer


@dataclasses.dataclass(frozen=True)
class MeasuredChain:
    """Links from the features of one layer to features of higher ones, each measured, and on to the answer."""

    links: tuple[MeasuredLink, ...]  #: from the lowest layer up; the target of each is the source of the next
    answer_drop: float  #: of the answer's log-probability without the lowest feature, nats
    random_drop: float  #: the same of random active features there, mean
    reaches_answer: bool | None  #: whether it is lost, and more than with each of 19 controls; None: fewer
    #: whether all links hold, and the lowest and the highest feature reach the answer; None: not testable
    holds: bool | None


@dataclasses.dataclass(frozen=True)
class LensLayers:
    """The lens's predictions of the answer by layer, where it is the next token: the logit lens, or --model.lens."""

    answer: tuple[float, ...]  #: probability of the answer's first token, of each layer
    rank: tuple[int, ...]  #: how many tokens are likelier
    control: tuple[float, ...]  #: probability, on streams turned by a random rotation


@dataclasses.dataclass(frozen=True)
class TrackedText:
    """A prompt or a worked solution, followed through the layers; also in `<slug>.json`."""

    tokens: int  #: of the text
    answer: str  #: the token whose probability is followed
    position: int  #: where it is the next token
    sites: tuple[str, ...]  #: of the dictionaries, in the order of layers
    tested: str  #: the site whose features were ablated, the middle dictionary's
    steps: tuple[TrackedStep, ...]  #: the prompt, and the steps
    lens: LensLayers  #: what the logit lens, or the one of --model.lens, reads of the answer
    links: int  #: between shown features
    chains: tuple[MeasuredChain, ...] = ()  #: the strongest chains of links, measured
    #: others of the strongest, at positions where a dictionary has no other active feature: there are no controls
    chains_left_out: int = 0
    output: str = ""  #: what the model writes after the prompt; empty: it was not asked to


@dataclasses.dataclass(frozen=True)
class TrackResults:
    """The texts whose features were tracked."""

    texts: Mapping[str, TrackedText]  #: by slug
