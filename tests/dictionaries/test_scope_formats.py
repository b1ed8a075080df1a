"""Llama Scope's and Qwen-Scope's SAEs: the function that their authors' tools compute, and what is refused."""

import foreign_formats as foreign
import numpy as np
import pytest
import torch
from known_dictionaries import D, F, activations, largest, relative

from saejax.dictionaries import load_dictionary, save_dictionary, stacks
from saejax.dictionaries.formats import load_all, place
from saejax.errors import UserError


def llama_by_formula(x, settings, scaled=True, by_length=True):
    """Activations in units of the output, as if decoder rows had length 1, and the output; in float64."""
    made = {name: array.astype(np.float64) for name, array in foreign.arrays(D, F).items()}
    scale_in, scale_out = (np.sqrt(D) / foreign.LLAMA_NORMS[side] if scaled else 1.0 for side in ("in", "out"))
    pre = scale_in * x @ made["W_enc"] + made["b_enc"]
    length_F = np.linalg.norm(made["W_dec"], axis=1) if by_length else np.full(F, scale_out / scale_in)
    f = np.where(pre * length_F / scale_out > settings["jump_relu_threshold"], pre, 0)
    return f * length_F / scale_out, (f @ made["W_dec"] + made["b_dec"]) / scale_out


@pytest.mark.parametrize("scaled", [True, False])
def test_llama_scope_computes_what_its_formula_says(scaled, tmp_path):
    changes = {} if scaled else dict(norm_activation="inference")
    hooks = dict(hook="blocks.3.hook_resid_post", hook_point_out="blocks.3.hook_mlp_out")
    sae = load_dictionary(foreign.llama_scope(tmp_path / "L3", D, F, **hooks, **changes))
    x = activations()
    f, y = llama_by_formula(x, dict(jump_relu_threshold=0.25), scaled)
    assert 0 < (f > 0).mean() < 1
    assert relative(sae.encode(x), f) < 1e-5 and relative(sae(x), y) < 1e-5
    assert (sae.site, sae.config.target, sae.config.kind) == ("resid_post.3", "mlp_out.3", "jumprelu")


def test_llama_scope_without_lengths_in_its_threshold_keeps_its_rows(tmp_path):
    folder = foreign.llama_scope(tmp_path / "L3", D, F, sparsity_include_decoder_norm=False)
    sae, x = load_dictionary(folder), activations()
    f, y = llama_by_formula(x, dict(jump_relu_threshold=0.25), by_length=False)
    assert relative(sae.encode(x), f) < 1e-5 and relative(sae(x), y) < 1e-5
    ratio = foreign.LLAMA_NORMS["out"] / foreign.LLAMA_NORMS["in"]
    assert relative(sae.W_dec_FxD, foreign.arrays(D, F)["W_dec"] * ratio) < 1e-6 and sae.config.target == ""


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(act_fn="relu"), "act_fn is 'relu', which no dictionary here has: expected 'jumprelu'"),
        (dict(norm_activation="token-wise"), "norm_activation is 'token-wise'"),
        (dict(use_glu_encoder=True), "use_glu_encoder is True"),
        (dict(jump_relu_threshold=0), "jump_relu_threshold is 0: expected a number above 0"),
        (dict(dataset_average_activation_norm=...), "dataset_average_activation_norm is None"),
        (dict(d_sae=F + 1), "does not fit its description: encoder.weight has the shape"),
        (dict(d_model=..., d_sae=...), "d_model is None, d_sae is 0: expected whole numbers above 0"),
        (dict(hook_point_in="blocks.3.ln2.hook_normalized"), "the hook blocks.3.ln2.hook_normalized is none of"),
    ],
)
def test_llama_scope_settings_that_cannot_be_followed_are_refused_by_name(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_dictionary(foreign.llama_scope(tmp_path / "L3", D, F, **changes))


def test_qwen_scope_computes_what_its_formula_says(tmp_path):
    file = foreign.qwen_scope(tmp_path / "layer11.sae.pt", D, F)
    sae, x, made = load_dictionary(file), activations(), foreign.arrays(D, F)
    f = largest(x.astype(np.float64) @ made["W_enc"] + made["b_enc"], 4)
    assert relative(sae.encode(x), f) < 1e-5
    assert relative(sae(x), f @ made["W_dec"] + made["b_dec"]) < 1e-5
    assert (sae.site, sae.config.k) == ("resid_post.11", 4)


def test_qwen_scope_files_of_a_folder_are_its_layers(tmp_path):
    folder = tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_5"
    for layer in (0, 2, 10):
        foreign.qwen_scope(folder / f"layer{layer}.sae.pt", D, F, k=None)
    found = load_all(folder)
    assert [sae.site for sae in found.values()] == ["resid_post.0", "resid_post.2", "resid_post.10"]
    assert {sae.config.k for sae in found.values()} == {5}
    with pytest.raises(UserError, match=r"folders of such: name one, such as .*layer0.sae.pt"):
        load_dictionary(folder)
    one = str(folder / "layer2.sae.pt")
    before = stacks.identity(one)
    assert before != stacks.identity(str(folder)) and stacks.load_trained(one, {}, "--ablate.dictionary")
    (folder / "config.json").write_text('{"k": 3}')
    with_k = stacks.identity(one)
    assert with_k != before and load_dictionary(one).config.k == 3
    foreign.qwen_scope(folder / "layer2.sae.pt", D, F + 1, k=None)
    assert stacks.identity(one) not in (before, with_k)


def test_qwen_scope_files_that_are_damaged_or_hold_code_are_refused(tmp_path):
    file = foreign.qwen_scope(tmp_path / "layer0.sae.pt", D, F, k=F + 1)
    with pytest.raises(UserError, match=f"k is {F + 1}: expected a number up to {F}"):
        load_dictionary(file)
    with pytest.raises(UserError, match="which predicts what it reads: give no target"):
        load_dictionary(file, target="mlp_out.0")
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(UserError, match="is damaged, or holds more than tensors"):
        load_dictionary(file)
    torch.save(dict(W_enc=UserError), file)
    with pytest.raises(UserError, match="is damaged, or holds more than tensors"):
        load_dictionary(file)
    torch.save(dict(W_enc=torch.zeros(F, D)), file)
    with pytest.raises(UserError, match="is no dictionary of Qwen-Scope"):
        load_dictionary(file)
    with pytest.raises(UserError, match="is missing"):
        load_dictionary(tmp_path / "layer1.sae.pt")


def test_both_go_on_to_other_formats(tmp_path):
    x = activations()
    for name, where in (
        ("llama", foreign.llama_scope(tmp_path / "L0", D, F)),
        ("qwen", foreign.qwen_scope(tmp_path / "layer0.sae.pt", D, F)),
    ):
        sae = load_dictionary(where)
        for format in ("saejax", "saelens"):
            save_dictionary(tmp_path / name / format, sae, format)
            assert relative(load_dictionary(tmp_path / name / format)(x), np.asarray(sae(x))) < 1e-6


def test_on_the_hub_only_what_is_named_is_fetched(tmp_path, monkeypatch):
    asked = []

    def snapshot(name, revision, allow_patterns, ignore_patterns):
        asked.append(allow_patterns)
        return str(tmp_path / name.replace("/", "--"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    place._fetched.cache_clear()
    foreign.qwen_scope(tmp_path / "Qwen--SAE" / "layer7.sae.pt", D, F)
    assert load_dictionary("hf://Qwen/SAE/layer7.sae.pt").site == "resid_post.7"
    assert asked == [["layer7.sae.pt", "config.json"]]
    foreign.llama_scope(tmp_path / "fnlp--LXR-8x" / "L0R-8x", D, F)
    assert load_dictionary("hf://fnlp/LXR-8x/L0R-8x").site == "resid_post.0"
    assert asked[-1] == ["L0R-8x/checkpoints/final.safetensors"]
    place._fetched.cache_clear()
