"""The verdict on tables that are written by hand, so that every answer is known."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import pytest
from effect_worlds import attribution, planted_world, top_features, world_table

from saejax.errors import UserError
from saejax.interventions.answers import (
    BehaviourVerdict,
    CausalAnswer,
    VerdictConfig,
    ablation_sentence,
    among_sentence,
    basis_sentence,
    enough_sentence,
    selective_sentence,
    too_few_prompts,
)
from saejax.interventions.table import (
    BASIS,
    RANKS,
    READOUTS,
    TESTED,
    TEXT,
    EditDefinition,
    EffectsTable,
    PromptDefinition,
    load_effects,
    merge_tables,
    save_effects,
)
from saejax.interventions.verdict import verdict
from saejax.results import Interval
from saejax.stages.ablate.report import control_picture

CONFIG = VerdictConfig(resamples=500)
PROMPTS = 12


@dataclasses.dataclass
class Rows:
    """A table that is put together row by row."""

    clean: float = 5.0  # logit difference of every prompt
    edits: list[EditDefinition] = dataclasses.field(default_factory=list)
    prompts: list[PromptDefinition] = dataclasses.field(default_factory=list)
    blocks: list[EffectsTable] = dataclasses.field(default_factory=list)

    def add_prompts(self, behaviour: str) -> None:
        """Add prompts of the templates x, y and z in turn, of which z is held out."""
        self.prompts += [
            PromptDefinition(f"{behaviour}/{p:02d}", behaviour, name, name == "z", correct=" yes", wrong=" no")
            for p, name in enumerate("xyz" * (PROMPTS // 3))
        ]
        clean = dict(logit_diff=self.clean, log_prob=-0.5, two_way=1.0, top1=1.0, ce=3.0)
        self.add(EditDefinition(behaviour, "clean"), **clean)

    def add(self, edit: EditDefinition, on: str = "", **readouts: float | np.ndarray) -> None:
        """Add the readouts of an edit on the prompts of a behaviour, its own by default."""
        if edit not in self.edits:
            self.edits.append(edit)
        prompts = [prompt for prompt in self.prompts if prompt.behaviour == (on or edit.behaviour)]
        values = {name: np.broadcast_to(value, (1, PROMPTS)) for name, value in readouts.items()}
        self.blocks.append(EffectsTable.block([edit], prompts, values))

    def add_set(self, edit: EditDefinition, drop: float | np.ndarray, dose: float = 2.0) -> None:
        self.add(edit, logit_diff=self.clean - drop, change_norm=dose)

    def add_behaviour(
        self, name: str, drop: float | np.ndarray = 3.0, sets: int = 19, placebo: int = 19, first: int = 0, **accuracy
    ) -> None:
        """Add a behaviour whose top features lose ``drop`` logits at the dose 2, and random and placebo sets."""
        self.add_prompts(name)
        for fraction in (0.25, 0.5, 1.0):
            self.add_set(EditDefinition(name, "top", 0, (1, 2), fraction), (drop + varied(0)) * fraction, 2 * fraction)
        accuracy = dict(two_way=np.arange(PROMPTS) % 2, top1=0.0) | accuracy
        self.add(self.edits[-1], log_prob=-1.5 + varied(0, 0.1), **accuracy)
        for index in range(sets):
            features = (first + 10 + 2 * index, first + 11 + 2 * index)
            self.add_set(EditDefinition(name, "random", index, features), 0.1 * index, 2.0)
        for index in range(placebo):
            target = (f" t{index}", " u")
            self.add_set(EditDefinition(name, "placebo", index, (3, 4), target=target), varied(0.1 * index), 2.0)

    def add_seed(self, name: str, drop: float = 3.0, dose: float = 2.0) -> None:
        """Add the top features of a dictionary of another seed."""
        for fraction in (0.25, 0.5, 1.0):
            edit = EditDefinition("b", "top", 0, (1, 2), fraction, name)
            self.add_set(edit, varied(drop * fraction), dose * fraction)

    def add_untrained(self, drops: Sequence[float], dose: float = 2.0, site: str = "") -> None:
        """Add the list of the tested dictionary, which loses 3 logits, and those of untrained ones."""
        self.add_set(EditDefinition("b", "trained", 0, (1, 2, 3)), varied(3.0), dose)
        for index, drop in enumerate(drops):
            self.add_set(EditDefinition("b", "untrained", index, (5, 6, 7), site=site), varied(drop), dose)

    def add_ranks(self, share: float, spread: float = 0.0, step: float = 1.0) -> None:
        """Add likely tokens a ``step`` apart, between which T takes a share of the difference."""
        for edit in (EditDefinition("b", "clean"), EditDefinition("b", "top", 0, (1, 2))):
            left = 1.0 if edit.group == "clean" else 1.0 - share - varied(0, spread)
            self.add(edit, **{name: -step * rank * left for rank, name in enumerate(RANKS)})

    def judge(self, config: VerdictConfig = CONFIG) -> dict[str, dict[str, BehaviourVerdict]]:
        return verdict(merge_tables(self.blocks), config).dictionaries


def varied(mean: float, spread: float = 0.2) -> np.ndarray:
    """Return a number for each prompt, with this mean in every template."""
    return mean + spread * np.array([-1.0, -1.0, -1.0, 1.0, 1.0, 1.0] * (PROMPTS // 6))


def make_rows(**options) -> Rows:
    """Return a table of one behaviour."""
    rows = Rows()
    rows.add_behaviour("b", **options)
    return rows


def judge(rows: Rows, config: VerdictConfig = CONFIG) -> BehaviourVerdict:
    return rows.judge(config)[TESTED]["b"]


def test_what_features_take_from_other_answers_is_not_told_on_five_prompts():
    """Every bootstrap sample of so few prompts agrees, so that features were called specific."""
    rows = make_rows()
    rows.add_ranks(0.2)
    assert judge(rows).placebo.answer == "yes"
    few = without_prompts(merge_tables(rows.blocks), [f"b/{p:02d}" for p in range(5, PROMPTS)])
    result = verdict(few, CONFIG).dictionaries[TESTED]["b"]
    assert (result.random.answer, result.placebo.answer) == ("yes", "not testable")
    assert result.placebo.sentence == "Not testable with 5 prompts, 6 are needed."


def test_silent_features_are_not_testable():
    rows = Rows()
    rows.add_prompts("b")
    rows.add(EditDefinition("b", "top", 0, (1, 2)), logit_diff=5.0, change_norm=0.0, log_prob=-0.5, two_way=1, top1=1)
    result = judge(rows)
    assert {result.random.answer, result.placebo.answer, result.trained.answer} == {"not testable"}
    assert "silent on the test prompts" in result.random.sentence


def test_effects_by_hand():
    rows = make_rows()
    rows.add_ranks(0.2)
    result = judge(rows)
    assert (result.features, result.held_out) == ((1, 2), ("z",))
    assert result.dose == pytest.approx(2.0)
    effect = result.ablation["logit_diff"].effect
    assert effect.mean == pytest.approx(3.0)
    assert 2.7 < effect.low < 3.0 < effect.high < 3.3
    assert result.templates == pytest.approx(dict(x=3.0, y=3.0, z=3.0))
    assert {name: answer.answer for name, answer in result.ablation.items()} == dict(
        logit_diff="yes", log_prob="yes", two_way="yes", top1="yes"
    )
    assert result.ablation["two_way"].effect.mean == pytest.approx(0.5)
    assert "lowers the logit difference by 3.00 logits" in result.ablation["logit_diff"].sentence
    assert result.random.p_value == result.placebo.p_value == pytest.approx(1 / 20)
    assert (result.random.answer, result.placebo.answer) == ("yes", "yes")
    # The placebo set that loses 1.8 ties with the largest random set; no other loses as much.
    assert (result.fooled, result.placebo_sets) == (0, 19)
    assert result.random.sentence == (
        "The 2 top features cost 3.00 logits; 19 random lists of the same dose cost 0.90 in the median and 1.71 at the "
        "95th percentile (ratio 1.8), and 0 of them at least as much (p = 0.05): more than random features."
    )
    assert result.placebo.sentence.endswith("(p = 0.05): specific to this answer.")
    # Without another behaviour nothing is said of selectivity, without untrained dictionaries nothing of training.
    assert judge(with_basis(1.0)).selective.answer == result.trained.answer == "not tested"


def test_one_feature_is_told_in_the_singular():
    rows = make_rows()
    rows.add_ranks(0.2)
    result = judge(rows)
    assert among_sentence(result.random, "random", 1, 1).startswith("The 1 top feature costs 3.00 logits; 19 random")
    few = dataclasses.replace(result.random, answer="not testable", numbers=result.random.numbers | dict(pool=1.0))
    assert "the 1 other feature that lists are drawn from makes fewer" in among_sentence(few, "random", 1, 1)
    assert too_few_prompts(1, 5) == "not testable with 1 prompt, 5 are needed"


def test_small_effects_on_a_readout_have_two_digits():
    """Of a probability "0.00 [0.00, 0.00]" would stand beside a yes."""
    rows = make_rows()
    rows.add_ranks(0.2)
    random = judge(rows).random
    small = {
        name: value / 1000 if name in ("top", "median", "high") else value for name, value in random.numbers.items()
    }
    among = functools.partial(among_sentence, dataclasses.replace(random, numbers=small), "random", 2, 1)
    assert "cost 0.0030 units; 19 random lists of the same dose cost 0.0009 in" in among("readout")
    assert "cost 0.00 logits; " in among("logit_diff")
    effect, spared = (
        Interval(0.0042, 0.0038, 0.0047),
        dict(text=Interval(0.011, 0.004, 0.02), b=Interval(0.0004, 0, 0.001)),
    )
    said = ablation_sentence(2, "readout", effect, 0.0123, True, True, {})
    assert "by 0.0042 units [0.0038, 0.0047] from 0.0123" in said
    selective = CausalAnswer("yes", parts=spared, numbers=dict(text=0.05, b=0.0015))
    said = selective_sentence(selective, [], objective="readout")
    assert "text 0.01 [0.00, 0.02], margin 0.05; b 0.0004 [0.0000, 0.0010], margin 0.0015" in said
    basis = CausalAnswer("more", effect=effect, numbers=dict(top=0.0052, basis=0.001))
    assert "0.0052 units lost to 0.0010; difference +0.0042 [0.0038, 0.0047]" in basis_sentence(basis, "pca", "readout")


def test_random_sets_by_hand():
    random = judge(make_rows(drop=1.05)).random
    # Sets 11 to 18 lose 1.1 or more: (1 + 8) / (1 + 19).
    assert random.p_value == pytest.approx(9 / 20)
    assert random.numbers == pytest.approx(
        dict(sets=19, needed=19, mean=0.9, median=0.9, high=1.71, max=1.8, top=1.05, features=2, p_controls=9 / 20)
    )
    assert random.effect.mean == pytest.approx(1.05 - 0.9)
    assert random.answer == "no"
    assert "and 8 of them at least as much (p = 0.45): not significantly more" in random.sentence


def test_what_raises_the_difference_costs_nothing_though_its_controls_raise_it_more():
    rows = make_rows(drop=-1.0, sets=0, placebo=0)
    for index in range(19):
        rows.add_set(EditDefinition("b", "random", index, (10 + 2 * index, 11 + 2 * index)), varied(-2.0))
    result = judge(rows).random
    assert result.answer == "no" and result.p_holm == pytest.approx(0.05)
    assert "ratio" not in result.sentence, "what costs nothing is no multiple of anything"


@pytest.mark.parametrize(("high", "answer"), [(2.9, "yes"), (3.0, "no")])
def test_training_mattered_if_no_untrained_dictionary_does_as_much(high, answer):
    rows = make_rows()
    rows.add_untrained([*np.linspace(0, 1, 18), high])
    trained = judge(rows).trained
    assert (trained.answer, trained.p_value) == (answer, pytest.approx(0.05 if answer == "yes" else 0.1))
    # The list to the dose, not the features that were named or are first.
    assert trained.sentence.startswith("The 3 top features cost 3.00 logits; 19 untrained dictionaries of the same")
    assert trained.sentence.endswith("training mattered." if answer == "yes" else "training is not shown to matter.")
    for index, (drop, dose) in enumerate([(0.5, 2.0), (2.5, 2.0), (0.75, 2.0), (9.0, 1.0)]):  # the last below the dose
        rows.add_set(EditDefinition("b", "uncentred", index, (5, 6, 7)), varied(drop), dose)
    beside = judge(rows).trained
    assert "around zero in place of its centre they cost 0.75 in the median" in beside.sentence
    assert (beside.answer, beside.p_value) == (trained.answer, trained.p_value)
    rows = make_rows()
    rows.add_untrained(np.linspace(0, 1, 18))
    assert judge(rows).trained.sentence == ("Not testable: 18 untrained dictionaries of 19 needed; raise their number.")
    rows = make_rows()
    rows.add_untrained([*np.linspace(0, 1, 18), high], site="mlp_out.3")  # of a transcoder
    trained = judge(rows).trained
    assert (
        "19 untrained SAEs of the transcoder's output mlp_out.3, of random directions, of the same" in trained.sentence
    )


def test_the_picture_has_controls_of_the_dose_alone():
    """Of a narrow dictionary all directions together may change the site less than the top features do."""
    rows = make_rows()
    rows.add_untrained(np.linspace(0, 1, 19))
    for group in ("untrained", f"{BASIS}pca"):
        rows.add_set(EditDefinition("b", group, 19, (5,)), varied(2.0), dose=1.0)
    table, result = merge_tables(rows.blocks), judge(rows)
    figure = control_picture("b", "b", table, "b", result, lambda name, figure, *texts: figure)
    labels = [label.get_text().replace("\n", " ") for label in figure.axes[0].get_xticklabels()]
    assert labels == ["top features", "19 random lists", "19 placebo sets", "19 untrained"]


@pytest.mark.parametrize(("share", "answer"), [(0.2, "yes"), (0.55, "no"), (0.9, "no")])
def test_features_that_take_as_much_from_other_answers_are_not_specific(share, answer):
    """T takes 3 of 5 logits of this answer, 60 %: more than 20 % of others, not surely more than 55 %."""
    rows = make_rows(drop=varied(3.0, 0.8))
    rows.add_ranks(share, spread=0.05)
    placebo = judge(rows).placebo
    assert placebo.answer == answer
    assert placebo.parts["share"].mean == pytest.approx(0.6)
    assert placebo.numbers["share_median"] == pytest.approx(share)
    assert placebo.numbers["p_controls"] == pytest.approx(1 / 20), "other sets do less in any case"
    assert placebo.p_value == max(placebo.numbers["p_controls"], placebo.numbers["p_shares"])
    assert f"of other likely tokens' {100 * share:.0f} % in the median" in placebo.sentence


def test_pairs_of_tokens_that_are_nearly_equal_are_left_out():
    """Their shares are of any size: of 20 tokens a tenth apart, 190 pairs, those less than half of 1.5 apart."""
    rows = make_rows()
    rows.add_ranks(0.2, step=0.1)
    placebo = judge(rows).placebo
    apart = np.array([0.1 * (j - i) for i in range(20) for j in range(i + 1, 20)])
    assert placebo.numbers["pairs"] == (apart >= 0.5 * np.quantile(apart, 0.9) - 1e-9).sum()


def test_lists_from_a_small_pool_are_not_testable():
    """Fewer than ten lists' worth of features: the lists are nearly the same ones."""
    for count, answer in ((19, "not testable"), (20, "yes")):
        rows = make_rows()
        pool = EditDefinition("b", "pool", 0, tuple(range(10, 10 + count)))
        rows.blocks.append(EffectsTable((pool,), (), *np.zeros((4, 0), int)))
        assert judge(rows).random.answer == answer
        assert judge(rows).fooled == (None if answer == "not testable" else 0), "placebo sets are told from these lists"
    rows = make_rows(sets=0)
    rows.blocks.append(EffectsTable((pool,), (), *np.zeros((4, 0), int)))
    random = judge(rows).random
    assert random.answer == "not testable" and "change the site less than the 2 top features" in random.sentence


def test_placebo_sets_that_pass_are_counted():
    rows = make_rows(placebo=0)
    for index, drop in enumerate((1.7, 1.9, 2.5, 0.0)):
        rows.add_set(EditDefinition("b", "placebo", index, (3, 4)), drop, 2.0)
    assert judge(rows).fooled == 2
    assert judge(make_rows(sets=18)).fooled is None, "18 sets cannot give a p-value of 0.05"


def test_too_few_sets_are_not_testable_and_say_how_many_are_needed():
    rows = make_rows()
    rows.add_behaviour("c", first=100)
    result = judge(rows)
    assert result.random.answer == result.placebo.answer == "not testable"
    assert result.random.sentence == ("Not testable: 19 random lists of 39 needed; raise their number.")


def test_holm_is_applied_over_behaviours():
    rows = Rows()
    for place, name in enumerate("bcd"):
        rows.add_behaviour(name, drop=10.0 if name != "d" else 0.0, sets=59, placebo=59, first=200 * place)
    random = [rows.judge()[TESTED][name].random for name in "bcd"]
    assert [each.p_value for each in random] == pytest.approx([1 / 60, 1 / 60, 1.0])
    assert [each.p_holm for each in random] == pytest.approx([3 / 60, 3 / 60, 1.0])
    assert [each.answer for each in random] == ["yes", "yes", "no"]


def test_an_effect_must_have_the_same_sign_in_every_template():
    answer = judge(make_rows(drop=np.array([10.0, 10.0, -1.0] * 4))).ablation["logit_diff"]
    assert answer.answer == "no"
    assert "the templates disagree: 'x' 10.00, 'y' 10.00, 'z' -1.00" in answer.sentence


def test_intervals_are_over_prompts_within_templates():
    """Templates that differ by 4 logits do not widen the interval: they are not resampled."""
    effect = judge(make_rows(drop=np.array([1.0, 5.0, 9.0] * 4))).ablation["logit_diff"].effect
    assert effect.mean == pytest.approx(5.0)
    assert effect.high - effect.low < 0.5


def test_two_accuracies_are_separate_answers_and_may_fall_too_little_to_count():
    ablation = judge(make_rows(two_way=1.0, top1=np.arange(PROMPTS) % 2)).ablation
    assert (ablation["two_way"].answer, ablation["top1"].answer) == ("no", "yes")
    for name, words in dict(two_way="two-way accuracy", top1="top-1 accuracy").items():
        assert words in ablation[name].sentence
        assert ablation[name].sentence.count("accuracy") == 1
    answer = judge(make_rows(), dataclasses.replace(CONFIG, min_accuracy_drop=0.6)).ablation["two_way"]
    assert answer.answer == "no"
    assert answer.sentence.endswith("too little to count.")


def with_basis(lost: float, spread: float = 0.0, dose: float = 2.0) -> Rows:
    """Return a behaviour with a basis that loses ``lost`` logits; ``spread`` makes its effects differ."""
    rows = make_rows()
    rows.add_prompts(TEXT)
    rows.add(EditDefinition("b", "top", 0, (1, 2)), on=TEXT, kl=1.0, ce=3.01)
    rows.add_set(EditDefinition("b", "basis:pca", 0, (0, 1, 2), 0.7), varied(lost, 0.1) - varied(0, spread), dose)
    return rows


@pytest.mark.parametrize(
    ("lost", "spread", "answer"),
    [(1.0, 0.0, "more"), (5.0, 0.0, "less"), (3.01, 0.0, "equivalent"), (3.0, 4.0, "no significant difference")],
)
def test_bases_of_the_same_dose(lost, spread, answer):
    result = judge(with_basis(lost, spread)).bases["pca"]
    assert result.answer == answer
    assert result.effect.mean == pytest.approx(3.0 - lost)
    assert ("which is not equality" in result.sentence) == (answer == "no significant difference")


def test_a_basis_that_cannot_reach_the_dose_is_not_compared():
    answer = judge(with_basis(1.0, dose=1.0)).bases["pca"]
    assert answer.answer == "not testable"
    assert answer.sentence.endswith("not testable, because its 3 directions change the site by 50 % of the dose.")


@pytest.mark.parametrize(
    ("beside", "text", "answer"),
    [(0.1, 0.01, "yes"), (0.6, 0.01, "no"), (0.1, 0.06, "no"), (-0.6, 0.01, "no"), (0.1, -0.06, "no")],
)
def test_selective_in_either_direction(beside, text, answer):
    rows = Rows()
    rows.add_behaviour("b")
    rows.add_behaviour("c", first=100)
    rows.add_prompts(TEXT)
    top = EditDefinition("b", "top", 0, (1, 2))
    rows.add(top, on="c", logit_diff=5.0 - varied(beside, 0.05))
    rows.add(top, on=TEXT, ce=3.0 + varied(text, 0.005), kl=0.1)
    result = judge(rows).selective
    assert result.answer == answer
    assert result.parts["c"].mean == pytest.approx(abs(beside))
    assert result.parts[TEXT].mean == pytest.approx(abs(text))
    assert result.numbers == pytest.approx({"c": 0.5, TEXT: 0.05})


def test_what_controls_change_stands_beside_and_decides_nothing():
    rows = with_basis(1.0)
    rows.add_behaviour("c", first=100)
    rows.add(EditDefinition("b", "top", 0, (1, 2)), on="c", logit_diff=5.0)
    alone = judge(rows).selective
    for index, change in enumerate((0.5, -2.0, 3.0)):
        edit = EditDefinition("b", "random", index, (10 + 2 * index, 11 + 2 * index))
        rows.add(edit, on="c", logit_diff=5.0 - varied(change, 0.05))
    placebo = EditDefinition("b", "placebo", 0, (3, 4), target=(" t0", " u"))
    ce_P = np.where(np.arange(PROMPTS) % 8, np.nan, 3.25)  # of some documents
    rows.add(placebo, on=TEXT, ce=ce_P)
    beside = judge(rows).selective
    assert beside.numbers == pytest.approx(alone.numbers | {"c:random": 2.0, f"{TEXT}:placebo": 0.25})
    for part in ("of the same dose random lists 2.00)", "of the same dose placebo sets 0.25)"):
        assert part in beside.sentence and part not in alone.sentence
    assert (beside.answer, beside.p_value, beside.parts) == (alone.answer, alone.p_value, alone.parts)


def test_changes_of_different_signs_do_not_cancel():
    rows = with_basis(1.0)
    rows.add_behaviour("c", first=100)
    rows.add(EditDefinition("b", "top", 0, (1, 2)), on="c", logit_diff=varied(5.0, 3.0))
    selective = judge(rows).selective
    assert selective.answer == "no" and selective.parts["c"].mean == pytest.approx(3.0)


def test_a_behaviour_at_chance_is_left_out_and_named():
    rows = with_basis(1.0)
    for name, first in (("c", 100), ("d", 200)):
        rows.add_behaviour(name, first=first)
        rows.add(EditDefinition("b", "top", 0, (1, 2)), on=name, logit_diff=5.0)
    table = merge_tables(rows.blocks)
    clean = table.positions([EditDefinition("d", "clean")], [])[0][0]
    is_clean_N = (table.edit_N == clean) & (table.readout_N == 0)
    noise_N = np.where(np.arange(len(table.value_N)) % 2, 0.1, -0.1)
    noisy = dataclasses.replace(table, value_N=np.where(is_clean_N, noise_N, table.value_N))
    selective = verdict(noisy, CONFIG).dictionaries[TESTED]["b"].selective
    assert selective.answer == "yes" and selective.parts.keys() == {"c", TEXT}
    assert "left out, not shown to be above chance: d" in selective.sentence


def test_what_is_left_is_a_share_of_the_clean_difference():
    rows = make_rows()
    for size, left in ((2, 1.0), (4, 4.0)):
        shares = dict(top=(1.0, 0.5), placebo=(0.2, 0.15), untrained=(0.1, 0.05))
        for group, factor in {
            name + ending: factor
            for name, pair in shares.items()
            for ending, factor in zip(("", ":no_error"), pair, strict=True)
        }.items():
            for number in range(1 if "top" in group else 3):
                edit = EditDefinition("b", f"kept:{group}", 4 * number + size, tuple(range(size)))
                rows.add(edit, logit_diff=varied(factor * left * (1 + (number == 2)), 0.1 * factor))
    first, second = judge(rows).enough
    assert (first.features, second.features) == (2, 4)
    assert (first.left.mean, second.left.mean) == pytest.approx((0.2, 0.8))
    assert first.left.low < 0.2 < first.left.high < 0.25
    assert second.left_without_error.mean == pytest.approx(0.4)
    assert second.controls == dict(placebo=pytest.approx((0.16, 0.12)), untrained=pytest.approx((0.08, 0.04)))
    sentence = enough_sentence((first, second))
    assert "4 top features leave 80 % [" in sentence
    single = enough_sentence([dataclasses.replace(first, features=1)])
    assert single.startswith("Kept alone, all other features at their means: 1 top feature leaves 20 % [")
    assert "40 % without the error term." in sentence
    for edit in [edit for edit in rows.edits if edit.group.endswith("no_error")]:  # as with error=drop
        rows.blocks = [block for block in rows.blocks if edit not in block.edits]
    (first, _) = judge(rows).enough
    assert first.left_without_error is None and first.controls["placebo"][1] is None
    assert "without the error term" not in enough_sentence((first,))
    assert judge(make_rows()).enough == () and enough_sentence(()).startswith("Not measured")


def test_replication_counts_dictionaries_of_other_seeds():
    rows = make_rows()
    tested = [edit for edit in rows.edits if edit.group in ("top", "random", "placebo")]
    for name, drop in dict(seed43=3.0, seed44=0.0).items():
        for edit in tested:
            lost = drop * edit.fraction if edit.group == "top" else 0.1 * edit.index
            rows.add_set(dataclasses.replace(edit, dictionary=name), varied(lost), 2 * edit.fraction)
    judged = rows.judge()
    assert list(judged) == [TESTED, "seed43", "seed44"]
    replication = judged[TESTED]["b"].replication
    assert replication.answer == "no"
    # Ranks of other dictionaries are not in this table, so their question 3 is not testable.
    asked = {"effect": 1, "more than random": 1, "specific": 0, "training mattered": 0, "selective": 0}
    assert replication.numbers == asked | dict(dictionaries=2)
    assert "more than random" in replication.sentence.split("than the tested one's: ")[1]


def test_what_cannot_be_told_of_another_seed_does_not_replicate():
    rows = make_rows()
    rows.add_seed("seed43")
    tested = rows.judge()[TESTED]["b"]
    assert tested.random.answer == "yes"
    assert tested.replication.answer == "not testable", "the other seed was compared with no sets"
    assert tested.replication.sentence.startswith("Of 1 dictionary of other seeds so many answer yes: ")


def test_dictionaries_of_other_seeds_are_compared_with_the_same_untrained_ones():
    rows = make_rows()
    for name, drop in dict(seed43=3.0, seed44=0.5).items():
        rows.add_seed(name, drop, dose=2.2)
        # At the dose of the tested dictionary's top features, not at its own.
        rows.add_set(EditDefinition("b", "trained", 0, (1,), 1.0, name), varied(drop), 2.0)
    rows.add_set(EditDefinition("b", "trained", 0, (1,)), varied(3.0), 2.0)
    for index in range(19):
        rows.add_set(EditDefinition("b", "untrained", index, (index,)), varied(1.0 + 0.01 * index), 2.0)
    judged = rows.judge()
    answers = {name: judged[name]["b"].trained for name in judged}
    assert {name: each.answer for name, each in answers.items()} == {TESTED: "yes", "seed43": "yes", "seed44": "no"}
    assert answers["seed44"].p_value == 1.0 and answers["seed43"].numbers["sets"] == 19


def test_replication_needs_dictionaries_with_answers():
    rows = make_rows()
    rows.add_behaviour("c", first=100)
    rows.add_seed("seed43")
    judged = rows.judge()[TESTED]
    assert judged["b"].random.answer == "not testable" and judged["b"].replication.answer == "yes", "effects agree"
    assert judged["c"].replication.answer == "not tested", "the other seed was tested on b alone"


def test_sets_that_are_needed_are_those_of_the_behaviours_that_have_some():
    rows = make_rows()
    rows.add_behaviour("c", sets=0, first=100)
    judged = rows.judge()[TESTED]
    assert (judged["b"].random.answer, judged["b"].random.numbers["needed"]) == ("yes", 19)
    assert judged["c"].random.answer == "not tested"
    assert judged["b"].placebo.answer == judged["c"].placebo.answer == "not testable"


def add_lists(rows: Rows, name: str, dose: float) -> None:
    """Add the list of the tested dictionary and those of 19 untrained ones on a behaviour."""
    rows.add_set(EditDefinition(name, "trained", 0, (1, 2, 3)), varied(3.0), dose)
    for index in range(19):
        rows.add_set(EditDefinition(name, "untrained", index, (5, 6, 7)), varied(0.05 * index), dose)


def test_behaviours_that_are_not_testable_are_not_corrected_for():
    """Too small a pool, or lists below the dose: such a behaviour is none of the family, and needs no further sets."""
    rows = make_rows()
    rows.add_behaviour("c", first=100)
    pool = EditDefinition("c", "pool", 0, tuple(range(100, 119)))  # fewer than ten lists of two
    rows.blocks.append(EffectsTable((pool,), (), *np.zeros((4, 0), int)))
    add_lists(rows, "b", 2.0)
    add_lists(rows, "c", 1.0)
    judged = rows.judge()[TESTED]
    for question in ("random", "trained"):
        of_b, of_c = (getattr(judged[name], question) for name in "bc")
        assert (of_b.answer, of_b.p_holm, of_b.numbers["needed"]) == ("yes", pytest.approx(0.05), 19)
        assert "after correction" not in of_b.sentence and of_c.answer == "not testable"
    assert "which are nearly the same" in judged["c"].random.sentence
    assert judged["c"].random.p_value == pytest.approx(0.05) and judged["c"].random.p_holm is None


def test_means_that_are_not_testable_are_not_corrected_for():
    """Of too few prompts, or of a basis below the dose: of two tests of a question the other was corrected for both."""
    rows = with_basis(1.0)
    rows.add_set(EditDefinition("b", "basis:neurons", 0, (0,)), varied(1.0), 1.0)
    rows.add_behaviour("c", first=100)
    for name, on, readout in (("b", "c", "logit_diff"), ("c", "b", "logit_diff"), ("c", TEXT, "ce")):
        rows.add(EditDefinition(name, "top", 0, (1, 2)), on=on, **{readout: 5.0 if on != TEXT else 3.0})
    few = without_prompts(merge_tables(rows.blocks), [f"c/{p:02d}" for p in range(4, PROMPTS)])
    judged = verdict(few, CONFIG).dictionaries[TESTED]
    b, c = judged["b"], judged["c"]
    for tested in (b.ablation["logit_diff"], b.bases["pca"], c.selective):
        assert tested.answer in ("yes", "more") and tested.p_holm == tested.p_value == pytest.approx(2 / 501)
    for untested in (c.ablation["logit_diff"], b.bases["neurons"], b.selective):
        assert untested.answer == "not testable" and untested.p_holm is None


def test_so_few_resamples_that_no_share_can_be_significant_are_not_testable():
    """Of two behaviours the least p-value of shares, 1 / 31, is doubled: "no" would say too much."""
    rows = Rows()
    for place, name in enumerate("bc"):
        rows.add_behaviour(name, drop=10.0, placebo=39, first=100 * place)
        for edit in (EditDefinition(name, "clean"), EditDefinition(name, "top", 0, (1, 2))):
            left = 1.0 if edit.group == "clean" else 0.8
            rows.add(edit, **{rank: -1.0 * place * left for place, rank in enumerate(RANKS)})
    few = rows.judge(VerdictConfig(resamples=30))[TESTED]["b"].placebo
    assert few.answer == "not testable" and few.sentence == "Not testable with 30 bootstrap resamples, 39 are needed."
    assert rows.judge(VerdictConfig(resamples=39))[TESTED]["b"].placebo.answer == "yes"


def test_selective_does_not_speak_for_behaviours_on_which_nothing_was_measured():
    rows = with_basis(1.0)
    rows.add_behaviour("c", first=100)
    rows.add_behaviour("d", first=200)
    rows.add(EditDefinition("b", "top", 0, (1, 2)), on="c", logit_diff=5.0)
    selective = judge(rows).selective
    assert selective.answer == "not tested"
    assert selective.sentence == "Not tested: the top features were not ablated on all of d."


def test_a_behaviour_without_top_features_is_spared_or_not():
    """It has no answers of its own; the features of others are still ablated on it."""
    rows = with_basis(1.0)
    rows.add_prompts("d")
    rows.add(EditDefinition("b", "top", 0, (1, 2)), on="d", logit_diff=2.0)
    answers = verdict(merge_tables(rows.blocks), CONFIG)
    selective = answers.dictionaries[TESTED]["b"].selective
    assert selective.answer == "no" and selective.parts["d"].mean == pytest.approx(3.0)
    assert list(answers.dictionaries[TESTED]) == ["b"] and list(answers.untested) == ["d"]
    assert verdict(merge_tables(make_rows().blocks), CONFIG).untested is None


def test_an_accuracy_that_cannot_fall_is_not_testable():
    """Of a model whose likeliest token is never the right one."""
    table = merge_tables(make_rows().blocks)
    values = np.where(table.readout_N == READOUTS.index("top1"), 0.0, table.value_N)
    ablation = verdict(dataclasses.replace(table, value_N=values), CONFIG).dictionaries[TESTED]["b"].ablation
    assert {name: answer.answer for name, answer in ablation.items()} == dict(
        logit_diff="yes", log_prob="yes", two_way="yes", top1="not testable"
    )
    wanted = "from 0.0: not testable, it is not above the 5 points by which it would have to fall."
    assert ablation["top1"].sentence.endswith(wanted)


def test_means_of_few_prompts_are_not_testable():
    """Of four prompts all have one sign by chance in an eighth of cases."""
    rows = with_basis(1.0)
    rows.add_behaviour("c", first=100)
    rows.add(EditDefinition("b", "top", 0, (1, 2)), on="c", logit_diff=5.0)
    table = merge_tables(rows.blocks)
    few = without_prompts(table, [f"b/{p:02d}" for p in range(4, PROMPTS)])
    result = verdict(few, CONFIG).dictionaries[TESTED]["b"]
    assert {answer.answer for answer in result.ablation.values()} == {"not testable"}
    effect = result.ablation["logit_diff"]
    assert effect.sentence.endswith("from 5.00: not testable with 4 prompts, 6 are needed.")
    assert effect.effect.mean == pytest.approx(3.0, abs=0.2)
    assert result.bases["pca"].answer == "not testable"
    assert result.bases["pca"].sentence.endswith("not testable with 4 prompts, 6 are needed.")
    assert result.random.answer == judge(rows).random.answer, "ranks need sets, not prompts"
    fewer = without_prompts(table, [f"c/{p:02d}" for p in range(4, PROMPTS)])
    selective = verdict(fewer, CONFIG).dictionaries[TESTED]["b"].selective
    assert selective.sentence == "C: not testable with 4 prompts, 6 are needed."
    assert judge(rows).selective.answer == "yes"
    six = without_prompts(table, [f"b/{p:02d}" for p in range(6, PROMPTS)])
    assert verdict(six, CONFIG).dictionaries[TESTED]["b"].ablation["logit_diff"].answer == "yes"


def test_so_few_resamples_that_nothing_can_be_significant_are_not_testable():
    """Two p-values, of two bases, of at least 2 / 61 are above 5 % after correction; one is not."""
    few = VerdictConfig(resamples=60)

    def with_two(lost: float, spread: float = 0.0) -> Rows:
        rows = with_basis(lost, spread)
        rows.add_set(EditDefinition("b", "basis:neurons", 0, (0, 1)), varied(lost, 0.1) - varied(0, spread))
        return rows

    result = judge(with_two(1.0), few)
    assert result.ablation["logit_diff"].answer == "yes"
    assert result.bases["pca"].answer == "not testable" and "resamples" in result.bases["pca"].sentence
    assert judge(with_two(1.0), VerdictConfig(resamples=79)).bases["pca"].answer == "more"
    assert judge(with_two(3.0, 4.0), few).bases["pca"].answer == "no significant difference"
    rows = with_two(1.0)
    rows.add_behaviour("c", first=100)
    answers = rows.judge(few)[TESTED]
    assert answers["b"].ablation["logit_diff"].sentence == "Not testable with 60 bootstrap resamples, 79 are needed."
    assert answers["b"].random.answer == judge(rows).random.answer, "ranks need no resamples"


def world() -> EffectsTable:
    made = planted_world(0, 5)
    return world_table(made, top_features(attribution(made, made.answers_Px2), 5))


# Statement 9 of WORKSPACE.md, what must hold.
def test_the_verdict_is_a_pure_function_of_the_saved_table(tmp_path):
    table = world()
    expected = verdict(table, CONFIG)
    save_effects(tmp_path, table)
    assert verdict(load_effects(tmp_path), CONFIG) == expected
    order_N = np.random.default_rng(0).permutation(len(table.value_N))
    shuffled = EffectsTable(
        table.edits[::-1],
        table.prompts[::-1],
        len(table.edits) - 1 - table.edit_N[order_N],
        len(table.prompts) - 1 - table.prompt_N[order_N],
        table.readout_N[order_N],
        table.value_N[order_N],
    )
    assert verdict(shuffled, CONFIG) == expected
    every_N = np.r_[np.arange(len(table.value_N)), 0]  # the first row again
    twice = (column_N[every_N] for column_N in (table.edit_N, table.prompt_N, table.readout_N, table.value_N))
    save_effects(tmp_path, EffectsTable(table.edits, table.prompts, *twice))
    with pytest.raises(UserError, match="stands in it twice"):
        load_effects(tmp_path)
    (tmp_path / "effects.parquet").write_bytes((tmp_path / "effects.parquet").read_bytes()[:100])
    with pytest.raises(UserError, match="effects table in .* is missing or damaged"):
        load_effects(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_effects(tmp_path / "nowhere")


def without_prompts(table: EffectsTable, ids: Sequence[str]) -> EffectsTable:
    """Return the table without the rows of some prompts."""
    kept_P = np.array([prompt.id not in ids for prompt in table.prompts])
    kept_N = kept_P[table.prompt_N]
    place_N = (np.cumsum(kept_P) - 1)[table.prompt_N]
    prompts = tuple(prompt for prompt in table.prompts if prompt.id not in ids)
    rows = (column_N[kept_N] for column_N in (table.edit_N, place_N, table.readout_N, table.value_N))
    return EffectsTable(table.edits, prompts, *rows)


def test_one_prompt_is_refused():
    table = merge_tables(make_rows().blocks)
    columns = (column[table.prompt_N == 0] for column in (table.edit_N, table.prompt_N, table.readout_N, table.value_N))
    with pytest.raises(UserError, match="b has 1 test prompt: expected at least 2"):
        verdict(EffectsTable(table.edits, table.prompts[:1], *columns), CONFIG)


@pytest.mark.parametrize(
    ("edit", "drop", "message"),
    [
        (EditDefinition("b", "random", 19, (2, 99)), 0.0, "random list 19 of b holds the top feature 2"),
        (EditDefinition("b", "placebo", 19, (3, 4), target=(" t", " yes")), 0.0, "placebo target 19 of b is an answer"),
        # As tokenizers of SentencePiece decode a word, and another case of it.
        (EditDefinition("b", "placebo", 19, (3, 4), target=("N", " t")), 0.0, "placebo target 19 of b is an answer"),
        (
            EditDefinition("b", "random", 19, (98, 99)),
            np.array([np.nan] + [0.0] * (PROMPTS - 1)),
            "random/19@1.0 of b was not measured on all its test prompts",
        ),
    ],
)
def test_tables_that_break_a_rule_are_refused(edit, drop, message):
    rows = make_rows()
    rows.add_set(edit, drop)
    with pytest.raises(UserError, match=message):
        judge(rows)


def test_controls_of_another_dose_are_refused():
    rows = make_rows()
    rows.add_set(EditDefinition("b", "random", 19, (98, 99)), 0.1, 1.5)
    with pytest.raises(UserError, match="random control 19 of b has the dose 1.5, not that of the top features, 2"):
        judge(rows)
