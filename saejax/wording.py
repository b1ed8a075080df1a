"""Words that sentences, pages and messages share."""


def counted(number: int, noun: str) -> str:
    """Return "1 feature", "12 features" or "3 dictionaries": a number with its noun, which is given in the singular."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun.removesuffix('y')}ies" if noun.endswith("ry") else f"{number:,} {noun}s"
