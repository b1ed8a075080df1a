"""The report on circuits of growing sizes."""

from collections.abc import Mapping

from saejax.causal.circuits.results import CircuitResult
from saejax.page.blocks import Block, Terms
from saejax.page.tables import MISSING, Table, interval, number, percent


def size_blocks(tested: Mapping[str, CircuitResult]) -> list[Block]:
    """CPR and CMD of behaviours, by title, and why some have none."""
    measured = {name: circuit.sizes for name, circuit in tested.items() if circuit.sizes}
    rows = tuple(
        (
            name,
            kind.upper(),
            interval(score.own),
            interval(score.random),
            interval(score.activity),
            number(score.p_value, 3),
            _at(sizes.faithfulness["signed" if kind == "cpr" else "size"], sizes.sizes, 0.02),
            _at(sizes.faithfulness["signed" if kind == "cpr" else "size"], sizes.sizes, 0.2),
        )
        for name, sizes in measured.items()
        for kind, score in sizes.scores.items()
    )
    blocks: list[Block] = []
    if rows:
        note = (
            "The scores of MIB (Mueller et al., 2025), for features: of those that fire the first 0.1 to 100 % are "
            "kept, all others removed. Faithfulness is the share of the logit difference, above that without any of "
            "them, which the kept ones have. CPR: the area under it over the share of features that is kept, in order "
            "of attribution; higher is better, and more than 1 is possible. CMD: the area between it and 1, in order "
            "of the size of attribution; 0 is best. 95 % intervals resample prompts. Random orders: mean and middle "
            "95 % of the draws; p: how often one does as well. By activity: the most active features first. Last "
            "columns: faithfulness of 2 % and of 20 % of the features."
        )
        columns = ("Behaviour", "Score", "By attribution", "Random orders", "By activity", "p", "f at 2 %", "f at 20 %")
        blocks.append(Table("Circuits of growing sizes", columns, rows, frozenset({1}), stack=False, note=note))
    if without := [(name, f"no circuits of growing sizes: {s.reason}.") for name, s in measured.items() if s.reason]:
        blocks.append(Terms(tuple(without)))
    return blocks


def _at(faithfulness: tuple[float, ...], sizes: tuple[int, ...], share: float) -> str:
    """Faithfulness of the largest circuit of at most such a share of the features."""
    fitting = [f for f, size in zip(faithfulness, sizes, strict=True) if size <= max(share * sizes[-1], 1)]
    return percent(fitting[-1]) if fitting else MISSING
