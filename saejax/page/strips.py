"""The contexts in which a feature fires, as strips of tokens."""

import dataclasses
import math

from saejax.page.tables import escape_markdown, significant
from saejax.unicode import visible_token


@dataclasses.dataclass(frozen=True)
class Piece:
    """One token of a strip."""

    text: str  #: on one line; of nothing but spaces, made visible
    share: float  #: its activation over the feature's largest one, 0 to 1
    peak: bool  #: whether it is the context's maximum
    label: str  #: its activation, in words


@dataclasses.dataclass(frozen=True)
class Example:
    """One context of a feature in the captured text."""

    tokens: tuple[str, ...]  #: the text of each token shown, in order
    #: the feature's activation on each; NaN where the store holds no row (an attention sink, or a position that was not
    #: captured).
    activations: tuple[float, ...]
    peak: int  #: index of the maximum in ``tokens``
    place: str  #: in words, where the maximum stands in the corpus or among the prompts

    @property
    def activation(self) -> float:
        """The activation at the maximum."""
        return self.activations[self.peak]


@dataclasses.dataclass(frozen=True)
class Strips:
    """The contexts of one feature."""

    heading: str  #: the feature's number
    note: str  #: figures about it, or why there are no contexts
    examples: tuple[Example, ...]  #: the contexts, strongest first
    kind = "strips"

    def rows(self) -> list[tuple[list[Piece], str]]:
        """For each context its pieces and where it stands."""
        largest = max((example.activation for example in self.examples), default=1.0)
        return [
            (
                [
                    Piece(
                        text=visible_token(token, in_line=True),
                        share=0.0 if math.isnan(value) or largest <= 0 else min(max(value / largest, 0.0), 1.0),
                        peak=i == example.peak,
                        label="not scored" if math.isnan(value) else significant(value),
                    )
                    for i, (token, value) in enumerate(zip(example.tokens, example.activations, strict=True))
                ],
                f"activation {significant(example.activation)}, {example.place}",
            )
            for example in self.examples
        ]

    def markdown(self) -> str:
        """Return the block in Markdown."""
        lines = []
        for pieces, where in self.rows():
            # Bold as HTML: ** next to spaces or punctuation is not always bold.
            text = "".join(
                f"<b>{escape_markdown(piece.text)}</b>" if piece.peak else escape_markdown(piece.text)
                for piece in pieces
            )
            lines.append(f"  - “{text}” ({escape_markdown(where)})")
        return "\n".join([f"- **{escape_markdown(self.heading)}**: {escape_markdown(self.note)}", *lines])
