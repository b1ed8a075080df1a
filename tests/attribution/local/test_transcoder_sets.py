"""Sets of transcoders of every format are the same set, read layer by layer; what does not fit is refused."""

import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import yaml
from made_graphs import FEATURES, altered, make_transcoders
from safetensors.numpy import load_file, save_file

from saejax import save_dictionary, save_transcoders, trace
from saejax.attribution.local import dictionaries
from saejax.attribution.local.contexts import ContextSearch
from saejax.attribution.local.dictionaries import LayerTranscoders, open_transcoders
from saejax.attribution.local.model import LocalModel
from saejax.attribution.trace.prompt import trace_prompt
from saejax.dictionaries import Dictionary
from saejax.dictionaries.formats import place, tensors
from saejax.dictionaries.formats.gemma_scope import choose_layers
from saejax.errors import Interrupted, UserError
from saejax.models.tokens import pad
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig

IDS = [0, 17, 230, 5, 42]


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return tiny_model("llama", num_hidden_layers=2)


def gemma_scope(folder, made, version, l0=None):
    for layer, transcoder in enumerate(made):
        arrays = {name.rpartition("_")[0]: np.array(array) for name, array in transcoder.arrays.items()}
        names = {1: f"layer_{layer}/width_16k/average_l0_{l0 or 9}", 2: f"layer_{layer}_width_16k_l0_{l0 or 'small'}"}
        place = folder / names[version]
        place.mkdir(parents=True)
        if version == 1:
            np.savez(place / "params.npz", **arrays)
        else:
            names = dict(W_enc="w_enc", W_dec="w_dec", W_skip="affine_skip_connection")
            save_file({names.get(name, name): array for name, array in arrays.items()}, place / "params.safetensors")
    return folder


def write(folder, made, form):
    if form.startswith("gemma"):
        gemma_scope(folder, made, int(form[-1]))
    elif form == "circuit_tracer":
        save_transcoders(folder, made)
    else:
        for layer, transcoder in enumerate(made):
            save_dictionary(folder / f"mlp_in.{layer}" / "dictionary", transcoder)
    return folder


@pytest.mark.parametrize("form", ["circuit_tracer", "own", "gemma_scope_1", "gemma_scope_2", "gemma_scope_2_listed"])
def test_every_format_gives_the_same_rows(form, tiny, tmp_path, monkeypatch):
    """Gemma Scope 2 has other names, and is affine; a folder of circuit-tracer may list such files on the hub."""
    made, asked = make_transcoders(tiny.config, "jumprelu", skip="gemma_scope_2" in form), []
    folder = write(tmp_path / "set", made, form.removesuffix("_listed"))
    if form.endswith("listed"):
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("params.*"))
        settings = dict(model_name="m", model_kind="transcoder_set", feature_input_hook="mlp.hook_in")
        listed = [f"hf://org/scope/{files[0]}", f"hf://org/scope/{files[1]}?revision=v2"]
        settings |= dict(feature_output_hook="hook_mlp_out", transcoders=listed)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))

        def fetch(repository, file, revision):
            asked.append((repository, file, revision))
            return folder / file

        monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
        opened = open_transcoders(tmp_path).check(tiny)
        assert asked == [("org/scope", files[0], "main"), ("org/scope", files[1], "v2")]
    else:
        opened = open_transcoders(folder).check(tiny)
    assert [config.skip for config in opened.configs] == ["gemma_scope_2" in form] * 2
    assert opened.reads == ("mlp_normed" if form == "gemma_scope_1" else "mlp_in")
    for layer, transcoder in enumerate(made):
        loaded = opened.load(layer)
        for name, array in transcoder.arrays.items():
            assert np.array_equal(loaded.arrays[name], array), name
    assert_same_rows(opened, made)


def test_a_short_name_is_a_set_with_its_feature_files(tiny, tmp_path, monkeypatch):
    folder = write(tmp_path / "set", make_transcoders(tiny.config), "circuit_tracer")
    (folder / "features").mkdir()
    monkeypatch.setitem(place.SHORT_NAMES, "tiny-set", str(folder))
    assert open_transcoders("tiny-set").check(tiny).name == str(folder)
    monkeypatch.chdir(tmp_path)
    assert place.full_name("set") == "set"  # a folder here goes before a short name
    docs = (Path(__file__).parents[3] / "docs" / "graphs.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `([\w.-]+)` \| `([\w.-]+/[\w./-]+)` \|", docs, re.MULTILINE))
    monkeypatch.undo()
    assert rows == place.SHORT_NAMES


def test_contexts_leave_out_silent_texts_and_nothing_else(tiny):
    made = make_transcoders(tiny.config)
    silent = [altered_bias(each, -1e6) for each in made]
    texts = ["one two three", "four five"]
    assert ContextSearch(tiny, LayerTranscoders.of(silent), texts).firings([(0, 5)]) == {(0, 5): ((), (), ())}
    broken = [altered_bias(each, np.nan) for each in made]
    with pytest.raises(UserError, match="finite"):
        ContextSearch(tiny, LayerTranscoders.of(broken), texts).firings([(0, 5)])


def test_negative_activations_have_contexts_too(tiny):
    """A signed TopK of circuit-tracer may have nothing above 0; interpret has its absolute values."""
    made = [altered(each, signed=True, k=FEATURES) for each in make_transcoders(tiny.config, "topk")]
    made = [Dictionary(each.config, **each.arrays | dict(b_enc_F=each.b_enc_F[...] - 1e3)) for each in made]
    texts = ["one two three", "four five"]
    (found,) = ContextSearch(tiny, LayerTranscoders.of(made), texts).firings([(0, 5)]).values()
    ids = [tiny.encode(text) for text in texts]
    values = [tiny(pad([each]), capture=["mlp_in.0"], logits=False).sites["mlp_in.0"][0] for each in ids]
    size_A = np.concatenate([np.abs(np.asarray(made[0].encode(value)))[1:, 5] for value in values])
    assert len(found.contexts) == 2 and sum(count for _, count in found.histogram) == len(size_A)
    largest = max(max(context["activations"]) for context in found.contexts)
    assert largest == pytest.approx(size_A.max(), rel=1e-4)


def test_a_search_for_contexts_can_be_stopped(tiny):
    transcoders = LayerTranscoders.of(make_transcoders(tiny.config))
    texts, steps = ["one two", "three", "four five"], []

    def stop(done, total):
        steps.append((done, total))
        if done == 1:
            raise Interrupted("stopped")

    search, features = (
        ContextSearch(tiny, transcoders, texts),
        [(at, feature) for at in (0, 1) for feature in range(FEATURES)],
    )
    with pytest.raises(Interrupted):
        search.firings(features, stop)
    found = search.firings(features, lambda *step: steps.append(step))
    assert steps == [(0, 2), (1, 2), (0, 2), (1, 2)] and any(each.contexts for each in found.values())
    assert found == ContextSearch(tiny, transcoders, texts).firings(features)


def altered_bias(transcoder, value):
    return Dictionary(transcoder.config, **transcoder.arrays | dict(b_enc_F=jnp.full(FEATURES, value)))


def assert_same_rows(opened, made):
    """Of some features, the rows of a set are those of its transcoders."""
    chosen = np.array([5, 0, 41])
    for layer, transcoder in enumerate(made):
        assert np.array_equal(opened.rows(layer, "W_dec", chosen), np.asarray(transcoder.W_dec_FxD)[chosen])
        assert np.array_equal(opened.rows(layer, "W_enc", chosen), np.asarray(transcoder.W_enc_DxF)[:, chosen].T)


def test_of_several_transcoders_of_a_layer_words_choose(tiny, tmp_path, monkeypatch):
    sets = {}
    for seed, l0 in enumerate(("big", "small", "small_affine")):
        sets[l0] = make_transcoders(tiny.config, "jumprelu", seed=seed, skip=l0.endswith("affine"))
        gemma_scope(tmp_path / "hub", sets[l0], 2, l0)
    told = "holds 3 transcoders of layer 0 .width_16k_l0_big, width_16k_l0_small, width_16k_l0_small_affine.: words"
    with pytest.raises(UserError, match=told + ".* such as --graph.l0=16k,big$"):
        open_transcoders(tmp_path / "hub")
    with pytest.raises(UserError, match="none of them is medium"):
        open_transcoders(tmp_path / "hub", choice=("medium",))
    for choice, l0 in ((("big",), "big"), (("16k", "small"), "small"), (("small", "affine"), "small_affine")):
        opened = open_transcoders(tmp_path / "hub", choice=choice)
        assert np.array_equal(opened.load(1).arrays["W_enc_DxF"], sets[l0][1].arrays["W_enc_DxF"])
    # From the hub nothing but these is fetched.
    there, fetched = [path.relative_to(tmp_path).as_posix() for path in (tmp_path / "hub").rglob("*.safetensors")], []

    def snapshot(name, allow_patterns, **rest):
        fetched.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda name, revision: [*there, "README.md"])
    open_transcoders("org/scope", subfolder="hub", choice=("big",))
    assert fetched[1] == [f"hub/layer_{layer}_width_16k_l0_big/params.safetensors" for layer in range(2)]
    with pytest.raises(UserError, match="org/scope/hub holds 3 transcoders of layer 0"):
        open_transcoders("org/scope", subfolder="hub")
    assert len(fetched) == 3


def test_a_number_chooses_the_nearest_l0_of_each_layer():
    def files(*l0s):
        return [f"layer_{layer}/width_16k/average_l0_{l0}/params.npz" for layer, some in enumerate(l0s) for l0 in some]

    def chosen(number, some):
        return [int(re.search(r"l0_(\d+)", file)[1]) for file in choose_layers(some, (number,), "here")]

    assert chosen("100", files((5, 76, 310), (90, 12, 200))) == [76, 90]
    assert chosen("12", files((5, 76), (90, 12))) == [5, 12]
    wide = [*files((5, 76)), "layer_0/width_65k/average_l0_9/params.npz"]
    with pytest.raises(UserError, match="holds 3 transcoders of layer 0"):
        chosen("10", wide)
    assert choose_layers(wide, ("16k", "10"), "here") == wide[:1]


def test_a_choice_that_cannot_be_met_is_refused(tiny, tmp_path):
    """Not ignored, where there is one transcoder of each layer."""
    made = make_transcoders(tiny.config, "jumprelu")
    save_transcoders(tmp_path / "set", made)
    gemma_scope(tmp_path / "scope", made, 2)
    assert len(open_transcoders(tmp_path / "scope", choice=("16k", "small")).configs) == len(made)
    with pytest.raises(UserError, match="has one transcoder of each layer: leave --graph.l0=16k out"):
        open_transcoders(tmp_path / "set", choice=("16k",))
    with pytest.raises(UserError, match=r"1 transcoders? of layer 0 \(.*16k.*\): none of them is 64k"):
        open_transcoders(tmp_path / "scope", choice=("64k",))


@pytest.mark.parametrize(
    ("address", "options"),
    [
        ("org/plts", dict(revision="v1", subfolder="small")), ("org/plts/small", {}), ("hf://org/plts/small@v1", {}),
        ("org/plts@v1", {}),
    ],
)  # fmt: skip
def test_references_name_a_subfolder_and_a_revision(address, options, tiny, tmp_path, monkeypatch):
    is_inside, asked = "small" in address or "subfolder" in options, {}
    save_transcoders(tmp_path / "abc" / ("small" if is_inside else ""), make_transcoders(tiny.config))

    def snapshot(name, **settings):
        asked.update(settings, name=name)
        return str(tmp_path / "abc")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    opened = open_transcoders(address, **options)
    revision = "v1" if "@" in address or options else "main"
    assert (opened.check(tiny).revision, asked["name"], asked["revision"]) == ("abc", "org/plts", revision)
    assert ("small/config.yaml" if is_inside else "config.yaml") in asked["allow_patterns"]


def test_models_in_turn_have_sinks_of_their_own(tiny):
    """A set that says nothing of sinks may be used with a model before and after tuning."""
    opened = LayerTranscoders.of(make_transcoders(tiny.config))
    first, second = (SimpleNamespace(sink_norm=lambda site, limit=limit: limit) for limit in (1.0, 2.0))
    limits = []
    for model in (first, second, first):
        opened.resolve_sinks(model)
        limits.append([float(each.arrays["max_norm"]) for each in (opened.encoder(0), opened.load(0))])
    assert limits == [[1, 1], [2, 2], [1, 1]]
    local = LocalModel(tiny, opened, IDS)
    opened.resolve_sinks(first)
    assert float(local.encoder(0).arrays["max_norm"]) == pytest.approx(tiny.sink_norm("mlp_in.0"))


@pytest.mark.parametrize("room,read_again", [(2, []), (1, [0, 1]), (0, [0, 1])])
def test_as_many_layers_are_kept_as_fit(room, read_again, tiny, monkeypatch):
    made, loaded = make_transcoders(tiny.config), []
    size = 8 + sum(array.nbytes for array in made[0].arrays.values())  # the rule of sinks has a number more
    opened = LayerTranscoders("made", [t.config for t in made], lambda layer: loaded.append(layer) or made[layer])
    monkeypatch.setattr(dictionaries, "free_bytes", lambda mesh: dictionaries.KEPT_SHARE * room * size)
    monkeypatch.setattr(dictionaries, "free_host_bytes", lambda: dictionaries.KEPT_SHARE * room * size)
    for _ in range(2):
        LocalModel(tiny, opened, IDS)
    assert loaded == [0, 1, *read_again]


def test_each_device_has_its_part_in_the_dtype_of_the_file(tiny, tmp_path):
    """Of 48 features eight devices have six each; in bfloat16, as the file has them, which loses nothing."""
    made = [narrow(transcoder) for transcoder in make_transcoders(tiny.config, "jumprelu")]
    save_transcoders(tmp_path / "set", made)
    for file in (tmp_path / "set").glob("layer_*"):
        save_file({name: array.astype(ml_dtypes.bfloat16) for name, array in load_file(file).items()}, file)
    opened, mesh = open_transcoders(tmp_path / "set"), make_mesh(MeshConfig(model=8))
    for layer, transcoder in enumerate(made):
        loaded, encoder = opened.load(layer, mesh), opened.encoder(layer, mesh)
        kept = opened._kept[layer, mesh].arrays
        assert {name for name, array in kept.items() if array.dtype.name == "bfloat16"} == {"W_enc_DxF"}
        assert "W_dec_FxD" not in encoder.arrays and encoder.arrays["W_enc_DxF"].dtype == np.float32
        for name, array in transcoder.arrays.items():
            assert loaded.arrays[name].dtype == np.float32 and np.array_equal(loaded.arrays[name], array), name
            share = 1 if name == "b_dec_D" else 8
            placed = [one[name].addressable_shards for one in (kept, loaded.arrays) if name in one]
            assert all(part.data.size == array.size // share for parts in placed for part in parts), name
    opened._files = None
    assert_same_rows(opened, made)


def narrow(transcoder):
    """One whose arrays bfloat16 can hold."""
    arrays = {name: np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32) for name, a in transcoder.arrays.items()}
    return type(transcoder)(transcoder.config, **arrays)


@pytest.mark.parametrize(
    "change,message",
    [
        (
            lambda made: made[:1],
            "has transcoders of layer 0: a graph needs one for each layer .* 0 to 1, such as of .*0-1",
        ),
        (lambda made: made[::-1], "transcoders of layers 1, 0: a graph needs"),
        (lambda made: [altered(t, fingerprint="other", model="x") for t in made], "trained on x .fingerprint other"),
        (lambda made: [altered(t, site=t.config.target) for t in made], "reads mlp_out.0 and predicts mlp_out.0"),
        (lambda made: [altered(t, kind="linear") for t in made], "no active features"),
        (lambda made: make_transcoders(SimpleNamespace(n_layers=2, d_model=24)), "reads 24 dimensions, but .* has 40"),
    ],
)
def test_sets_that_do_not_fit_the_model_are_refused(change, message, tiny):
    with pytest.raises(UserError, match=message) as error:
        trace(tiny, change(make_transcoders(tiny.config)), IDS)
    assert "\n" not in str(error.value)


def test_a_truncated_file_a_missing_layer_and_wrong_widths_are_named(tiny, tmp_path):
    made = make_transcoders(tiny.config)
    folder = tmp_path / "set"
    save_transcoders(folder, made)
    assert repr(open_transcoders(folder)) == f"<LayerTranscoders of {folder}: 2 layers of 48 features>"
    file = folder / "layer_1.safetensors"
    whole = file.read_bytes()
    for size in (0, 5, 60, len(whole) - 8):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"layer_1\.safetensors") as error:
            trace(tiny, folder, IDS)
        assert "\n" not in str(error.value) and ("truncated" in str(error.value) or "damaged" in str(error.value)), size
    for read, predicted, message in ((41, 40, "reads width 41 and writes width 40"), (41, 41, "of different sizes")):
        shapes = dict(W_enc=(48, read), W_dec=(48, predicted), b_enc=48, b_dec=predicted)
        save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, file)
        with pytest.raises(UserError, match=message):
            open_transcoders(folder)
    file.unlink()
    with pytest.raises(UserError, match="has transcoders of layer 0: a graph needs one for each layer"):
        trace(tiny, folder, IDS)


def test_damaged_files_are_refused(tiny, tmp_path):
    folder = gemma_scope(tmp_path / "a", make_transcoders(tiny.config, "jumprelu"), 1)
    file = next(folder.rglob("layer_1/**/params.npz"))
    np.savez(file, W_enc=np.zeros((3, FEATURES)))
    with pytest.raises(UserError, match="lacks W_dec: it has W_enc"):
        open_transcoders(folder)
    file.rename(file.with_suffix(".txt"))
    next(folder.rglob("layer_0/**/params.npz")).rename(folder / "layer_2.npz")
    with pytest.raises(UserError, match="no transcoder of layer 0"):
        open_transcoders(folder)


def test_of_decoders_only_rows_of_active_features_are_read(tiny, tmp_path, monkeypatch):
    """And of encoders, each is read once for a trace."""
    save_transcoders(tmp_path / "set", make_transcoders(tiny.config, "jumprelu"))
    opened, numbers = open_transcoders(tmp_path / "set"), Counter()

    def counted(name, real):
        def read(tensor, *index):
            array = real(tensor, *index)
            numbers[name] += array.size
            return array

        monkeypatch.setattr(tensors.Tensor, name, read)

    counted("read", tensors.Tensor.read)
    counted("rows", tensors.Tensor.rows)
    active = trace_prompt(tiny, opened, IDS, max_logits=2).local.active
    width, features = tiny.config.d_model, FEATURES
    encoders = 2 * (width * features + 2 * features + width)  # of two layers, with vectors
    assert encoders <= numbers["read"] < encoders + width * features
    used = len(set(zip(active.layer_A.tolist(), active.feature_A.tolist(), strict=True)))
    assert 0 < numbers["rows"] <= 4 * used * width  # once to decode, once as directions, and encoders' rows


def test_topk_transcoders_keep_negative_values_as_circuit_tracer_does(tiny):
    """The k largest pre-activations whatever their sign: of few positive ones, some are negative."""
    made = [altered(transcoder, signed=True) for transcoder in make_transcoders(tiny.config, "topk")]
    made = [type(t)(t.config, **t.arrays | dict(b_enc_F=t.arrays["b_enc_F"] - 3.0)) for t in made]
    local = LocalModel(tiny, made, IDS)
    assert (local.active.value_A < 0).sum() > 5
    per_position = Counter(zip(local.active.layer_A.tolist(), local.active.position_A.tolist(), strict=True))
    assert set(per_position.values()) == {made[0].config.k}
    graph = trace(tiny, made, IDS, max_logits=2)
    assert np.abs(graph.unexplained_R).max() < 1e-5 * np.abs(graph.value_R).max()
