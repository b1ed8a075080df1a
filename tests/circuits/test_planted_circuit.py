"""A transformer set by hand in which a city's state and the question meet in the answer: the circuit is found."""

import numpy as np
import pytest

from saejax import load_model
from saejax.attribution.local.dictionaries import LayerTranscoders
from saejax.circuits.edges import ANSWER
from saejax.circuits.groups import Group, Key
from saejax.circuits.study import find_circuit
from saejax.errors import UserError
from saejax.ground_truth.circuits.cases import FULL, MARGIN, Case
from saejax.ground_truth.circuits.dictionaries import EXACT, untrained_sets
from saejax.ground_truth.circuits.handset import START, HandSet, Head, Layer, Neuron, checkpoint, frame, neuron_arrays
from saejax.ground_truth.hub_folder import save_model
from saejax.tasks.behaviours import Prompt

PLACES, IDLE, SEED = 4, 6, 5
FILLERS = ("the", "of", "in", "so")


def planted(cut: bool = False) -> HandSet:
    """city -> state -> (with the question) capital -> answer, in three layers, beside neurons that nothing reads.

    Where the path is cut, the state is not carried to the last position.
    """

    def idle(layer: int, name: str, reads: str) -> list[Neuron]:
        return [
            Neuron(f"idle {name} {n}", {reads: 1.0}, {f"unread {layer} {name} {n}": 0.5 + 0.3 * n}) for n in range(IDLE)
        ]

    numbers = range(PLACES)

    def of_places(layer: int, reads: str) -> list[Neuron]:
        """Neurons that differ between places: what swaps are compared with."""
        return [neuron for k in numbers for neuron in idle(layer, f"place {k}", reads.format(k))]

    first = [Neuron(f"state {k}", {f"city {k}": 1.0}, {f"state {k}": 1.0}) for k in numbers]
    first += [Neuron("question", {"asks": 1.0}, {"question": 1.0})]
    second = [
        Neuron(f"say {k}", {f"state {k} here": 1.0, "question here": 1.0}, {f"say {k}": FULL}, -1 - MARGIN)
        for k in numbers
    ]
    third = [Neuron(f"write {k}", {f"say {k}": 1.0}, {f"capital {k}": 1.0}) for k in numbers]
    moved = () if cut else tuple((f"state {k}", f"state {k} here") for k in numbers)
    heads = (
        Head((("at 4", "at 3"),), (*moved, ("city", "seen a city"))),
        Head((("at 4", "at 1"),), (("question", "question here"),)),
    )
    words = {START: {START: 1.0}, "capital": {"asks": 1.0}, "is": {"end": 1.0}}
    words |= {word: {} for word in FILLERS}
    words |= {f"city{k}": {f"city {k}": 1.0, "city": 1.0} for k in numbers}
    words |= {f"capital{k}": {} for k in numbers}
    return HandSet(
        words,
        tuple({f"at {place}": 1.0} for place in range(5)),
        (
            Layer((), (*first, *idle(0, "city", "city"), *idle(0, "question", "asks"), *of_places(0, "city {}"))),
            Layer(heads, (*second, *idle(1, "end", "end"), *of_places(1, "state {} here"))),
            Layer((), (*third, *idle(2, "end", "end"), *of_places(2, "state {} here"))),
        ),
        {f"capital{k}": {f"capital {k}": 8.0} for k in numbers},
    )


def prompts(split: str, filler: str) -> list[Prompt]:
    return [
        Prompt(
            "planted", split, f"capital {filler} city{k} is", f" capital{k}", f" capital{place}",
            f"capital {filler} city{place} is", f" capital{place}", template=filler,
        )
        for k in range(PLACES)
        for place in range(PLACES)
        if k != place
    ]  # fmt: skip


BOTH = [*prompts("train", "of"), *prompts("test", "in")]


def load(folder, spec, one_device):
    save_model(folder, *checkpoint(spec, SEED), list(spec.words))
    model = load_model(str(folder), mesh=one_device)
    case = Case(spec, tuple(prompts("train", "of")), 0, {}, {}, lambda count, seed: [])
    sets = [untrained_sets(case, model, layer, SEED)[EXACT] for layer in range(len(spec.layers))]
    return model, LayerTranscoders.of(sets)


@pytest.fixture(scope="module")
def intact(tmp_path_factory, one_device):
    return load(tmp_path_factory.mktemp("intact"), planted(), one_device)


@pytest.fixture(scope="module")
def circuit(intact):
    results, _ = find_circuit(*intact, BOTH)
    return results


def neuron_names(spec, transcoders, group) -> set[str]:
    """The neurons that a group's features are, by the direction that they read."""
    names = set()
    for key in group.members:
        arrays = transcoders.load(key.layer).arrays
        neurons = neuron_arrays(spec, key.layer, frame(spec, SEED))
        apart_F = np.abs(neurons["W_enc_DxF"] - np.asarray(arrays["W_enc_DxF"], np.float64)[:, [key.feature]]).max(0)
        apart_F += np.abs(neurons["W_dec_FxD"] - np.asarray(arrays["W_dec_FxD"], np.float64)[key.feature]).max(1)
        names.add(spec.layers[key.layer].neurons[int(apart_F.argmin())].name)
    return names


def test_the_groups_are_the_planted_ones(intact, circuit):
    named = {group.name: neuron_names(planted(), intact[1], group) for group in circuit.groups}
    assert named == {
        "differing words, early layers": {f"state {k}" for k in range(PLACES)},
        "other words, early layers": {"question"},
        "last position, middle layers": {f"say {k}" for k in range(PLACES)},
        "last position, late layers": {f"write {k}" for k in range(PLACES)},
    }


def test_the_edges_are_the_planted_ones(circuit):
    words, asks, middle, late = (
        "differing words, early layers", "other words, early layers", "last position, middle layers",
        "last position, late layers",
    )  # fmt: skip
    drawn = {edit: set() for edit in ("direct", "total", "swap")}
    for edge in circuit.edges:
        if edge.drawn:
            drawn[edge.edit].add((edge.source, edge.target))
    assert drawn["direct"] == {(words, middle), (asks, middle), (middle, late), (late, ANSWER)}
    # Each group is needed for the answer, and each but the question carries which answer it is.
    assert {source for source, _ in drawn["total"]} == {words, asks, middle, late}
    assert {source for source, _ in drawn["swap"]} == {words, middle, late}
    (last,) = [edge for edge in circuit.edges if (edge.source, edge.edit) == (late, "swap")]
    assert last.effect.mean == pytest.approx(2 * 8 * FULL * (1 - MARGIN), rel=1e-4)  # from one answer to the other


@pytest.mark.parametrize("are_given", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_no_edge_where_the_path_is_cut(intact, circuit, tmp_path, one_device, are_given):
    """Neither between the intact model's groups, nor between those that are proposed anew."""
    model, transcoders = load(tmp_path / "cut", planted(cut=True), one_device)
    # Features are numbered by their layer's seed, so those of the intact model are the same neurons here.
    asked = dict(groups=circuit.groups) if are_given else {}
    cut, _ = find_circuit(model, transcoders, prompts("test", "in") if are_given else BOTH, **asked)
    assert not [edge for edge in cut.edges if edge.drawn]


def test_groups_of_neurons_that_nothing_reads_have_no_edge(intact):
    spec, transcoders = planted(), intact[1]
    keys = [Key(0, feature, "content") for feature in range(spec.width)]
    idle = [key for key in keys if "idle city" in next(iter(neuron_names(spec, transcoders, Group("", (key,)))))]
    result, _ = find_circuit(*intact, prompts("test", "in"), groups=[Group("idle", tuple(idle[:3]))])
    assert idle and not [edge for edge in result.edges if edge.drawn]
    assert max((abs(edge.effect.mean) for edge in result.edges), default=0.0) < 1e-4  # rounding


def test_an_edge_needs_controls_of_its_dose(intact, circuit):
    """Where nothing else is active nearby, an effect is not compared with anything and no edge is drawn."""
    spec = planted()
    members = tuple(Key(2, feature, "last") for feature in range(spec.width))
    everything = Group("all of the layer", members)
    result, _ = find_circuit(*intact, prompts("test", "in"), groups=[everything])
    (edge,) = [edge for edge in result.edges if edge.edit == "total"]
    assert edge.effect.low > 0 and edge.dose == 0 and not edge.drawn


def test_too_few_prompts(intact):
    with pytest.raises(UserError, match="measured on 1 prompts: expected 2 or more"):
        find_circuit(*intact, prompts("test", "in")[:1])
