"""Results of the stage ``train``."""

import dataclasses
from collections.abc import Mapping

from saejax.dictionaries.results import TrainedMember
from saejax.results import MeshShape


@dataclasses.dataclass(frozen=True)
class TrainResults:
    """A stack that was trained."""

    kind: str  #: kind of the dictionaries
    steps: int  #: training steps of each member
    tokens: int  #: training tokens of each member, repeats counted
    tokens_per_second: float  #: of all members at once, without compilation; of one member: in its share of the time
    seconds: float  #: of all steps; of one member of a stack: its share
    members: tuple[TrainedMember, ...]  #: the members of the stack
    mesh: MeshShape  #: mesh of the training

    def of_member(self, index: int) -> "TrainResults":
        """Return the results of one of the members as of a unit of it alone."""
        count = len(self.members)
        return dataclasses.replace(
            self,
            tokens_per_second=self.tokens_per_second * count,
            seconds=self.seconds / count,
            members=(dataclasses.replace(self.members[index], name=""),),
        )

    @classmethod
    def of_stack(cls, members: Mapping[str, "TrainResults"]) -> "TrainResults":
        """Return the results of a stack, given each member's own by name."""
        widths = [*members.values()]
        # What adds up over members is the time per token, not the speed.
        seconds_per_token = sum(1 / results.tokens_per_second for results in widths if results.tokens_per_second)
        return dataclasses.replace(
            widths[0],
            tokens_per_second=1 / seconds_per_token if seconds_per_token else 0.0,
            seconds=sum(results.seconds for results in widths),
            members=tuple(dataclasses.replace(results.members[0], name=name) for name, results in members.items()),
        )
