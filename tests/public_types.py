"""What type checkers know of the library's names, as an editor completes them: mypy reads this, and nothing runs it.

By the package's own stub a name has its type and is not Any. A fault that mypy no longer finds is an ignore too many,
which is an error.
"""

from typing import assert_type

import saejax


def call_the_library(acts: saejax.Activations) -> None:
    """Call functions rightly and, where an error is ignored, wrongly."""
    lm = saejax.load_model("smollm2")
    assert_type(lm, saejax.LanguageModel)
    assert_type(saejax.train(acts, kind="topk"), saejax.Dictionary)
    assert_type(saejax.trace(lm, "folder", "a prompt"), saejax.Graph)
    saejax.no_such_name  # type: ignore[attr-defined]  # noqa: B018
    saejax.load_model(path=3)  # type: ignore[arg-type]
    saejax.train(acts, kind=3)  # type: ignore[arg-type]
