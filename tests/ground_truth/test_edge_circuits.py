"""Circuits of edges against a run of the model for each target, as a recursion over edits; and CPR and CMD."""

import jax
import numpy as np
import pytest

from saejax import load_model
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.ground_truth.algorithms import transformer
from saejax.ground_truth.algorithms.planted import Planted
from saejax.ground_truth.circuits.edges import Edges, possible
from saejax.ground_truth.edge_circuits import EdgeCircuits, edge_curves
from saejax.ground_truth.hub_folder import save_model
from saejax.models.edits import SiteEdit

LAST, LAYERS = 8, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory, one_device):
    """A transformer of the planted circuit's shape that has learned nothing."""
    algorithm, folder = Planted(), tmp_path_factory.mktemp("planted")
    fields = transformer.describe(len(algorithm.words), 64, layers=LAYERS, width=16)
    config = transformer.read(fields)
    save_model(folder, fields, transformer.tensors(config, transformer.initial(config, 1)), algorithm.words)
    return load_model(str(folder), mesh=one_device)


@pytest.fixture(scope="module")
def nodes():
    """Words 1 to 7, the MLPs but those at position 0, and the logit."""
    mlps = [(layer, position, -1) for layer in range(LAYERS) for position in range(1, LAST + 1)]
    sources, targets = [*((-1, position, -1) for position in range(1, LAST)), *mlps], [*mlps, (LAYERS, LAST, -1)]
    return Edges(tuple(sources), tuple(targets), np.zeros((len(sources), len(targets))))


@pytest.fixture(scope="module")
def transcoders():
    """Random ones."""
    config = DictionaryConfig(
        kind="topk", d_in=16, n_features=32, k=4, site="mlp_in.0", target="mlp_out.0", max_norm=1e9, target_max_norm=1e9
    )
    return [Dictionary.initial(config, jax.random.key(layer)) for layer in range(LAYERS)]


@pytest.fixture(scope="module")
def prompts():
    return Planted().prompts(2, np.random.default_rng(1))[::2]


class Plain:
    """What each target has on one prompt, by edits of the model, target by target."""

    def __init__(self, model, prompt, nodes, kept_SxR, transcoders=()):
        self.model, self.prompt, self.transcoders = model, prompt, transcoders
        self.sources, self.targets = ([node[:2] for node in side] for side in (nodes.sources, nodes.targets))
        self.kept_SxR = kept_SxR
        self.sites = [f"mlp_{part}.{layer}" for layer in range(LAYERS) for part in ("in", "out")]
        self.own, self.other = (
            model(model.tokenize([text]), capture=self.sites).sites for text in (prompt.text, prompt.counterpart)
        )

    def run(self, target):
        """The model with what the target's sources have in it."""
        pair = [text.split() for text in (self.prompt.text, self.prompt.counterpart)]
        words, put = list(pair[0]), [np.array(self.own[f"mlp_out.{layer}"]) for layer in range(target[0])]
        for source, kept in zip(self.sources, self.kept_SxR[:, self.targets.index(target)], strict=True):
            layer, position = source
            if layer < 0:
                words[position - 1] = pair[0 if kept else 1][position - 1]
            elif layer < target[0]:
                other_D = np.asarray(self.other[f"mlp_out.{layer}"])[0, position]
                put[layer][0, position] = self.value(source) if kept else other_D
        edits = [SiteEdit.patch(f"mlp_out.{layer}", values) for layer, values in enumerate(put)]
        return self.model(self.model.tokenize([" ".join(words)]), capture=self.sites, edits=edits)

    def value(self, target):
        """An MLP's output."""
        layer, position = target
        read, given = f"mlp_in.{layer}", f"mlp_out.{layer}"
        found = self.run(target).sites
        if not self.transcoders:
            return np.asarray(found[given])[0, position]
        predicted, before = (self.transcoders[layer](sites[read][0, position]) for sites in (found, self.other))
        return np.asarray(predicted - before + self.other[given][0, position])

    def difference(self):
        """Of the logits of the two answers."""
        found = self.run((LAYERS, LAST))
        return found.logit(self.prompt.correct) - found.logit(self.prompt.wrong)


def test_circuits_are_runs_with_sources_of_their_own(model, nodes, prompts, transcoders):
    rng, there_SxR = np.random.default_rng(0), possible(nodes)
    kept_CxSxR = np.stack([there_SxR & (rng.random(there_SxR.shape) < share) for share in (0, 0.3, 0.7, 1)])
    kept_CxSxR[1, -9:-1, -1], kept_CxSxR[1, -1, -1] = False, True  # the logit hears one MLP, which hears some others
    for own in ((), transcoders):
        found_CxP = EdgeCircuits(model, prompts, nodes, own).differences(kept_CxSxR)
        for number in (1,) if own else (1, 2):
            expected = Plain(model, prompts[number], nodes, kept_CxSxR[number], own).difference()
            np.testing.assert_allclose(found_CxP[number, number], expected, atol=1e-4)
        ends = (found_CxP[0], "counterpart"), (found_CxP[-1], "text")
        for found_P, side in ends[: 1 if own else 2]:  # without errors of their own all edges are not the model
            output = model(model.tokenize([getattr(prompt, side) for prompt in prompts]))
            logits_PxV, every = np.asarray(output.logits_BxTxV)[:, LAST], np.arange(len(prompts))
            right, wrong = (
                logits_PxV[every, [model.token_id(getattr(prompt, answer)) for prompt in prompts]]
                for answer in ("correct", "wrong")
            )
            np.testing.assert_allclose(found_P, right - wrong, atol=1e-4)


def test_areas_under_what_growing_circuits_carry(model, nodes, prompts, transcoders):
    """Two orders and the areas written out, and what features carry alone."""
    edges_N = np.argwhere(possible(nodes))
    first, last = np.zeros((2, *nodes.weight_SxR.shape))
    first[tuple(edges_N.T)] = np.arange(len(edges_N), 0, -1)
    last[tuple(edges_N.T)] = np.arange(len(edges_N))
    orders = {name: Edges(nodes.sources, nodes.targets, own) for name, own in (("first", first), ("last", last))}
    found = edge_curves(model, prompts, orders, dict(some=transcoders), seed=0)
    assert found.edges == len(edges_N) == 129 and found.prompts == len(prompts)
    assert found.sizes == (1, 3, 6, 13, 26, 64, 129)
    circuits = EdgeCircuits(model, prompts, nodes)
    for order, places in (("first", edges_N), ("last", edges_N[::-1])):
        kept = np.zeros((1 + len(found.sizes), *nodes.weight_SxR.shape), bool)
        for number, size in enumerate((0, *found.sizes)):
            kept[number][tuple(places[:size].T)] = True
        mean_C = circuits.differences(kept).mean(axis=1)
        f_S = (mean_C[1:] - mean_C[0]) / (mean_C[-1] - mean_C[0])
        own = found.curves[order]
        np.testing.assert_allclose(own.faithfulness, f_S, atol=1e-4)
        width_S = np.diff(found.sizes) / found.edges
        assert own.cpr.mean == pytest.approx(np.sum(width_S * (f_S[1:] + f_S[:-1]) / 2), abs=1e-4)
        assert own.cmd.mean == pytest.approx(np.sum(width_S * (abs(1 - f_S[1:]) + abs(1 - f_S[:-1])) / 2), abs=1e-4)
        assert own.cpr.low <= own.cpr.mean <= own.cpr.high and own.faithfulness[-1] == 1
    assert set(found.curves) == {"first", "last", "random edges"}
    carried = EdgeCircuits(model, prompts, nodes, transcoders).differences(kept[-1:]).mean()
    assert found.alone["some"].mean == pytest.approx((carried - mean_C[0]) / (mean_C[-1] - mean_C[0]), abs=1e-4)
