"""Features chosen on one benchmark and ablated on another: effects of the formula, beside random sets without them."""

import dataclasses

import numpy as np
import pytest

from saejax.interventions.ablation import FRACTIONS
from saejax.interventions.table import EditDefinition, EffectsTable, PromptDefinition
from saejax.studies.primitives import CHOSEN_ON, judge_domains

ITEMS, SETS = 40, 30


def make_table(strength, features=(50, 51)):
    """Every set loses its strength per feature and unit of dose; random set i holds features 100 + 2 i and the next."""
    rng = np.random.default_rng(0)
    prompts = [PromptDefinition(f"logic/{i:02d}", "logic") for i in range(ITEMS)]
    sets = [EditDefinition("logic", "random", i, (100 + 2 * i, 101 + 2 * i)) for i in range(SETS)]
    edits = [EditDefinition("logic", "clean"), *sets]
    for group, members in (("top", (50, 2)), (CHOSEN_ON + "gsm8k", features)):
        edits += [EditDefinition("logic", group, 0, members, fraction) for fraction in FRACTIONS]
    size_P = rng.uniform(0.5, 1.5, ITEMS)
    values = []
    for edit in edits:
        per_dose = dict(clean=0.0, top=2.0, random=rng.normal() * 0.1).get(edit.group, strength)
        norm_P = edit.fraction * size_P * (edit.group != "clean")
        values.append([-10 - per_dose * norm_P, norm_P])
    value_2xExP = np.array(values).swapaxes(0, 1)
    return EffectsTable.block(edits, prompts, dict(answer_log_prob=value_2xExP[0], change_norm=value_2xExP[1])), size_P


def test_an_effect_beyond_random_sets():
    table, size_P = make_table(1.0)
    (found,) = judge_domains(table, "logic", 500, 0).values()
    assert found.effect.mean == pytest.approx(size_P.mean()) and found.effect.low > 0.8
    assert found.p_value == pytest.approx(1 / (1 + SETS)) and abs(found.random) < 0.1
    assert (found.random_sets, found.common) == (SETS, 1)


def test_no_effect_and_random_sets_that_hold_the_features():
    table, _ = make_table(0.0, features=(100, 103))
    found = judge_domains(table, "logic", 500, 0)["gsm8k"]
    assert found.p_value > 0.05 and found.random_sets == SETS - 2
    shuffled = np.random.default_rng(1).permutation(len(table.value_N))
    rows = {name: getattr(table, name)[shuffled] for name in ("edit_N", "prompt_N", "readout_N", "value_N")}
    assert judge_domains(dataclasses.replace(table, **rows), "logic", 500, 0)["gsm8k"] == found
