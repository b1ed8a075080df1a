"""Cross-layer transcoders: what runs of them do, against hooks in PyTorch; heads; and their files."""

import shutil
import tracemalloc

import numpy as np
import pytest
import yaml
from dense_reference import EditedModel
from made_graphs import FEATURES, IDS, altered, make_cross_layer
from safetensors.numpy import save_file

from saejax.attribution.local.dictionaries import FeatureOutputs, open_transcoders
from saejax.attribution.local.edits import Change
from saejax.attribution.trace.prompt import trace_prompt
from saejax.dictionaries import Dictionary
from saejax.dictionaries.formats import circuit_tracer
from saejax.errors import UserError
from saejax.runner import command


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return tiny_model("llama")


@pytest.fixture(scope="module")
def made(tiny):
    return make_cross_layer(tiny.config, "jumprelu", True)


@pytest.fixture(scope="module")
def traced(tiny, made):
    return trace_prompt(tiny, made[0], IDS, targets=[7])


@pytest.fixture(scope="module")
def edited(tiny, made):
    return EditedModel(tiny, *made[1:])


def test_with_nothing_held_writes_are_added_to_what_mlps_compute_anew(edited, traced):
    row = [Change(0, 2, 3, 2.0), Change(0, 4, 5, 1.0), Change(1, 3, 4, 1.5)]
    ours_V, (wanted_V, _) = traced.local.run([row], readouts=traced.readouts).logits_RxV[0], edited.run(IDS, row)
    np.testing.assert_allclose(ours_V, wanted_V, atol=2e-5)
    assert np.abs(ours_V - traced.local.logits_V).max() > 1e-2
    np.testing.assert_allclose(traced.local.generate(row, 1).logits_NxV[0], wanted_V, atol=2e-5)


def test_sums_that_wait_for_later_layers_have_the_positions_that_are_written_at(made):
    """Of a block of sources, each with its own position, not those of all positions."""
    transcoders, _, writes = made
    rng, rows, length, width = np.random.default_rng(4), 64, 256, writes[0].shape[2]
    places = np.arange(rows) * length + rng.integers(length - 1, size=rows)
    above = places[::2] + np.arange(rows // 2) % 2  # some at other positions than those below
    features, values = rng.integers(FEATURES, size=rows), rng.normal(size=rows).astype(np.float32)
    outputs = FeatureOutputs(transcoders, rows, length)
    tracemalloc.start()
    outputs.add(0, places, features, values)
    outputs.add(1, above, features[::2], values[::2])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * rows * length * width / 2
    for layer in range(len(writes)):
        wanted_NxD = np.zeros((rows * length, width))
        wanted_NxD[places] += values[:, None] * writes[0][features, layer]
        if layer:
            wanted_NxD[above] += values[::2, None] * writes[1][features[::2], layer - 1]
        assert layer in outputs
        np.testing.assert_allclose(outputs.pop(layer).reshape(wanted_NxD.shape), wanted_NxD, atol=1e-6)
        assert layer not in outputs and not outputs.pop(layer).any()


def write_set(folder, made, form, back=0):
    """The files of a set, in one of two formats; of Gemma Scope, features write ``back`` layers too low."""
    _, dictionaries, writes = made
    folder.mkdir()
    for layer, (one, write) in enumerate(zip(dictionaries, writes, strict=True)):
        arrays = {name.rpartition("_")[0]: np.asarray(array) for name, array in one.arrays.items()}
        named = {name: arrays[name] for name in ("b_enc", "b_dec", "threshold")}
        if form == "gemma_scope":
            every = np.pad(write, ((0, 0), (max(layer - back, 0), min(layer, back)), (0, 0)))
            named |= dict(w_enc=arrays["W_enc"], w_dec=every, affine_skip_connection=arrays["W_skip"])
            save_file(named, folder / f"params_layer_{layer}.safetensors")
        else:
            named |= dict(W_enc=np.ascontiguousarray(arrays["W_enc"].T))
            named = {f"{name}_{layer}": array for name, array in named.items()}
            save_file(named, folder / f"W_enc_{layer}.safetensors")
            save_file({f"W_dec_{layer}": write}, folder / f"W_dec_{layer}.safetensors")
    if form != "gemma_scope":
        settings = dict(model_name="m", model_kind="cross_layer_transcoder", feature_output_hook="hook_mlp_out")
        settings |= dict(feature_input_hook=form)
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.mark.parametrize(
    "form,reads",
    [
        ("gemma_scope", "mlp_in"),
        ("mlp.hook_in", "mlp_in"),
        ("hook_resid_mid", "resid_mid"),
        ("ln2.hook_normalized", "mlp_normed"),
    ],
)
def test_sets_on_disk_are_those_in_memory(form, reads, tiny, tmp_path):
    made = make_cross_layer(tiny.config, "jumprelu", form == "gemma_scope", reads)
    opened = open_transcoders(write_set(tmp_path / "set", made, form)).check(tiny)
    assert opened.reads == reads and opened.cross_layer
    chosen = np.array([5, 0, 41])
    for layer, write in enumerate(made[2]):
        for name, array in made[1][layer].arrays.items():
            assert np.array_equal(opened.load(layer).arrays[name], array), name
        for name in ("W_enc", "W_dec"):
            assert np.array_equal(opened.rows(layer, name, chosen), made[0].rows(layer, name, chosen))
        assert np.array_equal(opened.writes(layer, chosen), write[chosen])
    if reads == "mlp_normed":  # graphs of the others are compared with Jacobians
        assert len(trace_prompt(tiny, opened, IDS, max_features=5).graph.nodes) > 5


def test_damaged_sets_are_refused(tiny, tmp_path):
    made = make_cross_layer(tiny.config, "jumprelu", True)
    folder = write_set(tmp_path / "a", made, "mlp.hook_in")
    description = (folder / "config.yaml").read_text()
    for written in ("hook_resid_post", "hook_attn_out"):
        (folder / "config.yaml").write_text(description.replace("hook_mlp_out", written))
        with pytest.raises(UserError, match=f"feature_output_hook is '{written}', .*: expected hook_mlp_out$"):
            open_transcoders(folder)
    (folder / "config.yaml").write_text(description)
    (folder / "W_dec_1.safetensors").rename(tmp_path / "kept")
    with pytest.raises(UserError, match="W_dec_1.safetensors is missing"):
        open_transcoders(folder)
    (tmp_path / "kept").rename(folder / "W_dec_1.safetensors")
    (folder / "W_enc_1.safetensors").unlink()
    with pytest.raises(UserError, match="lacks W_enc_1.safetensors: a set has every layer from 0"):
        open_transcoders(folder)
    save_file({"W_enc_1": np.zeros((3, 3), np.float32)}, folder / "W_enc_1.safetensors")
    with pytest.raises(UserError, match="does not fit its description"):
        open_transcoders(folder)
    last = tiny.config.n_layers - 1
    with pytest.raises(UserError, match="features of the last layer write to layer 0: expected the last alone"):
        open_transcoders(write_set(tmp_path / "b", made, "gemma_scope", back=last))


def test_what_does_not_belong_together_is_one_line(tiny, tmp_path, capsys):
    """Layers of two sets of one shape, and a set of another model, through the binary."""
    for name, fingerprint in (("own", tiny.source.fingerprint), ("other", "another"), ("again", "another")):
        _, made, writes = make_cross_layer(tiny.config, "jumprelu")
        told = [altered(one, fingerprint=fingerprint, model="m") for one in made]
        if name == "again":  # of the same model, trained otherwise
            told[0] = Dictionary(told[0].config, **told[0].arrays | dict(b_enc_F=told[0].arrays["b_enc_F"] + 1))
        circuit_tracer.save_cross_layer(tmp_path / name, len(told), lambda layer: (told[layer], writes[layer]))  # noqa: B023

    def refused(name):
        flags = [f"--model.path={tiny.source.folder}", f"--graph.transcoders={tmp_path / name}", "--mesh.data=8"]
        flags += [f"--workdir={tmp_path / 'run'}", "--graph.prompt=The war"]
        assert command.run(["attribute"], "", ["attribute", *flags]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and not list((tmp_path / "run").rglob("*.html"))
        return error

    assert open_transcoders(tmp_path / "own").check(tiny).cross_layer
    assert "was trained on m (fingerprint another), but the model is" in refused("other")
    file = "W_dec_2.safetensors"
    for other in ("own", "again"):
        shutil.copyfile(tmp_path / other / file, tmp_path / "other" / file)
        assert f"{file} is not of the set that" in refused("other")
