"""Dictionaries split over devices: the same figures, rows on all devices, and no device with a whole matrix."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from compared import live_bytes

from saejax import load_model
from saejax.attribution.local.dictionaries import LayerSaes
from saejax.attribution.local.edits import Change
from saejax.attribution.trace.gradient import SaeRun
from saejax.dictionaries import Dictionary, DictionaryConfig, load_dictionary, save_dictionary
from saejax.evaluation.loss_recovered import stand_in_losses
from saejax.evaluation.neighbours import neighbour_cosines
from saejax.evaluation.reconstruction import reconstruct
from saejax.interpret.firings import encode_tokens
from saejax.interpret.neighbours import nearest_rows, output_tokens
from saejax.interventions import edits, engine, slopes
from saejax.interventions.split_model import SplitModel
from saejax.matching.track import links
from saejax.matching.track.firings import follow
from saejax.matching.track.settings import TrackConfig
from saejax.matching.track.stack import LayerDictionary
from saejax.matching.track.tested import StepTester
from saejax.matching.track.texts import EncodedText
from saejax.parallel import mesh as meshes
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.tasks.behaviours import Prompt

WIDTH, FEATURES = 64, 2048
WHOLE = re.compile(rf"f32\[({WIDTH},{FEATURES}|{FEATURES},{WIDTH})\]")  # a matrix of the dictionary in a program
PROMPTS = [Prompt("b", "train", f"the {word} cat sat on {word}", " a", " b", "") for word in "abcdefgh"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dictionary of the tiny model, in a file."""
    config = DictionaryConfig("jumprelu", "resid_post.1", d_in=WIDTH, n_features=FEATURES, max_norm=1e9)
    rng = np.random.default_rng(0)
    arrays = Dictionary.initial(config, jax.random.key(0)).arrays
    arrays |= dict(threshold_F=rng.uniform(0.5, 1.5, FEATURES).astype(np.float32))
    path = tmp_path_factory.mktemp("dictionary")
    save_dictionary(path, Dictionary(config, **arrays))
    return path


def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(1, 300, size=length).astype(np.int32) for length in (30, 31, 32, 28, 30, 29, 32, 32)]


def measure(lm, dictionary):
    """What stages measure with a dictionary, in the order in which it is measured."""
    rng = np.random.default_rng(1)
    x_NxD = 3 * rng.normal(size=(64, WIDTH)).astype(np.float32)
    (scores,) = reconstruct([dictionary], [[x_NxD]], lm.mesh, 32)
    yield scores.explained_variance, scores.firing_rate_F, scores.mean_activation_F
    (losses,) = stand_in_losses(lm, [dictionary], documents(), np.zeros(WIDTH), 256)
    yield [*losses.ce.values(), *losses.kl.values()]
    yield (encode_tokens(dictionary, x_NxD, 32)[0].toarray(),)
    yield neighbour_cosines(dictionary.W_dec_FxD[...]), nearest_rows(dictionary.W_dec_FxD[...], 3)[1]
    yield (output_tokens(lm, dictionary.W_dec_FxD[...], 3).logits,)
    split = SplitModel(lm, dictionary)
    yield (slopes.attribution(split, split.run(PROMPTS)),)
    sets = [np.arange(5), np.arange(1000, 1040)]
    yield (engine.effects(lm, PROMPTS, edits.mask(dictionary, sets, [0.0, 0.5])),)


def measure_in_runs(lm, dictionary):
    """What graphs and chains measure, which run the model with a dictionary of their own."""
    yield trace(lm, dictionary, documents()[0])
    yield track(lm, dictionary, documents()[0])


def trace(lm, sae, ids_P):
    """What attribute measures with SAEs: active features, errors, and runs without features."""
    run = SaeRun.of(lm, LayerSaes([("sae", sae)]), ids_P)
    active = run.active
    changes = [[Change(1, int(active.position_A[n]), int(active.feature_A[n]), 0.0)] for n in (0, 40, 90)]
    edited = run.run(changes)
    return active.value_A, run.error_SxTxD, edited.logits_RxV


def track(lm, dictionary, ids_T):
    """What track measures: firings of two layers, links between them, and a feature without which others change.

    Firings of a position come by strength, and links by the strength of their targets, so that rounding orders those
    that are nearly as strong: here both come in the order of features.
    """
    configs = [dataclasses.replace(dictionary.config, site=f"resid_post.{layer}") for layer in range(2)]
    stack = [
        LayerDictionary(config.site, config, lambda config=config: dictionary.with_config(config), None, {})
        for config in configs
    ]
    firings = follow(lm, stack, ids_T)
    found = links.find_links(stack, firings)
    tester = StepTester(lm, stack[1], EncodedText(None, ids_T, (), (), 0, None, 20), TrackConfig(random_sets=2))
    by_feature_A = np.lexsort((firings[1].feature_A, firings[1].position_A))
    return firings[1].value_A[by_feature_A], np.array([weight for *_, weight in sorted(found)]), tester._f_TxF


@pytest.fixture(scope="module", autouse=True)
def small_samples():
    """Samples of decoder rows, which all devices have, are smaller than a dictionary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(links, "_SAMPLE", 256)
        yield


# What runs in stages of one prompt is in the slow suite.
@pytest.mark.parametrize("measure", [measure, pytest.param(measure_in_runs, marks=pytest.mark.slow)])
def test_split_features_and_rows_change_no_figure(measure, folder, lm, monkeypatch):
    alone = list(measure(lm, load_dictionary(folder, mesh=lm.mesh)))
    mesh = make_mesh(MeshConfig(member=2, model=4))
    on_mesh = load_model(str(lm.source.folder), mesh=mesh)
    placed, whole = [], []
    compile_program, row_sharding = jax._src.compiler.compile_or_get_cached, meshes.row_sharding

    def compile_and_look(*arguments, **options):
        program = compile_program(*arguments, **options)
        text = program.hlo_modules()[0].to_string()
        # A block of rows may be as many as there are features.
        if WHOLE.search(text) and "_largest" not in text.partition("\n")[0]:
            whole.append(text.partition(",")[0])
        return program

    def note(mesh, shape):
        placed.append((shape[0], row_sharding(mesh, shape).shard_shape(tuple(shape))[0]))
        return row_sharding(mesh, shape)

    monkeypatch.setattr(jax._src.compiler, "compile_or_get_cached", compile_and_look)
    monkeypatch.setattr(meshes, "row_sharding", note)
    before = live_bytes()
    dictionary = load_dictionary(folder, mesh=mesh)
    size = sum(array.nbytes for array in dictionary.arrays.values())
    for number, (expected, values) in enumerate(zip(alone, measure(on_mesh, dictionary), strict=True)):
        for one, other in zip(expected, values, strict=True):
            # Rounding moves the stream by 1e-5; of 200,000 activations one or two are that close to their threshold.
            differs = ~np.isclose(other, one, rtol=1e-4, atol=1e-4)
            assert np.shape(other) == np.shape(one) and differs.sum() <= (2 if differs.size > 1000 else 0)
        live = (live_bytes() - before).max()
        print(f"after measurement {number} the fullest device holds {live / (size / 4):.2f} of a fair share")
        # Values of the model on the prompts are about as large as a share of this small dictionary.
        assert live <= 1.3 * size / 4 + 50_000
    assert not whole
    assert placed and {share / rows for rows, share in placed} == {0.5}  # of the two devices that are not for features
