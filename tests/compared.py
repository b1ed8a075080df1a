"""Two workdirs compared: what one process found, and what several did."""

import json

import runs

from saejax.runner.workspace import current_units


def results(workdir):
    """The results of all units but those that time something, by their folders."""
    found = {}
    for unit, folder in current_units(workdir).items():
        if unit.partition("/")[0] not in ("preflight", "report", "train"):
            found[unit] = json.loads((folder / "done.json").read_text())
    return found


def assert_same(one, two, tolerance, place=""):
    """Two results with the same figures, within a tolerance of those that are as large as 1."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), place
        for name in one.keys() - {"tokens_per_second"}:
            assert_same(one[name], two[name], tolerance, f"{place}.{name}")
    elif isinstance(one, list):
        assert len(one) == len(two), place
        for number, pair in enumerate(zip(one, two, strict=True)):
            assert_same(*pair, tolerance, f"{place}.{number}")
    elif isinstance(one, float) and isinstance(two, float):
        assert abs(one - two) <= tolerance * max(1.0, abs(one)), (place, one, two)
    else:
        assert one == two, place


def assert_as_one(one, two):
    """Two workdirs with the same units, files and figures; the store is the same bits.

    What devices of several processes do together is rounded otherwise, and ablation's doses divide such figures by
    small differences; what is dealt out is the same to 1e-6.
    """
    first, second = results(one), results(two)
    assert first.keys() == second.keys()
    for unit in first:
        assert first[unit]["files"].keys() == second[unit]["files"].keys(), unit
        tolerance = 1e-4 if unit.startswith("ablate") else 1e-6
        assert_same(first[unit]["results"], second[unit]["results"], tolerance, unit)
    assert runs.checksums(one) == runs.checksums(two)
