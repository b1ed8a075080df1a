"""Hook names of other tools and the sites that they mean."""

import json

import pytest

from saejax.dictionaries.formats import hooks
from saejax.errors import UserError
from saejax.models.sites import KINDS


@pytest.mark.parametrize("kind", [*KINDS, "mlp_act"])
def test_every_site_has_a_hook_that_means_it(kind):
    hook = hooks.to_hook(f"{kind}.15")
    assert hook.startswith("blocks.15.") and hooks.to_site(hook) == f"{kind}.15"


@pytest.mark.parametrize(
    "hook,site",
    [
        ("blocks.15.hook_resid_post", "resid_post.15"),
        ("blocks.3.hook_mlp_out", "mlp_out.3"),
        ("blocks.3.mlp.hook_out", "mlp_out.3"),
        ("blocks.3.mlp.hook_in", "mlp_in.3"),
        ("model.layers.7", "resid_post.7"),
        ("transformer.h.7", "resid_post.7"),
        ("model.layers.7.mlp", "mlp_out.7"),
        ("model.layers.7.self_attn", "attn_out.7"),
        ("gpt_neox.layers.7.attention", "attn_out.7"),
        ("model.layers.7.mlp.act_fn", "module:model.layers.7.mlp.act_fn"),
        ("vision.embed", "module:vision.embed"),
        ("resid_post_layer_12", "resid_post.12"),
        ("attn_out_layer3", "attn_out.3"),
        ("mlp_3", "mlp_out.3"),
        ("blocks.3.ln2.hook_normalized", "mlp_normed.3"),
        ("blocks.3.attn.hook_z", "attn_z.3"),
        ("blocks.3.mlp.hook_post", "mlp_act.3"),
        ("blocks.3.mlp.out.hook_in", "mlp_act.3"),
        ("transformer.h.7.mlp.c_proj.input", "mlp_act.7"),
        ("blocks.3.hook_in", "resid_pre.3"),  # version 3 of TransformerLens
        ("blocks.3.hook_out", "resid_post.3"),
        ("blocks.3.ln2.hook_in", "resid_mid.3"),
        ("blocks.3.attn.hook_out", "attn_out.3"),
        ("blocks.3.attn.o.hook_in", "attn_z.3"),
        ("model.layers[7].output[0]", "resid_post.7"),  # nnsight
        ("transformer.h.7.mlp.output", "mlp_out.7"),
        ("model.layers.7.mlp.input", "mlp_in.7"),
        ("gpt_neox.layers[7].input", "resid_pre.7"),
        ("model.layers.7.self_attn.o_proj.input", "attn_z.7"),
        ("model.layers.7.mlp.act_fn.input", "module:model.layers.7.mlp.act_fn.input"),
        ("layers_7", "resid_post.7"),
        ("blocks.07.hook_mlp_out", "mlp_out.7"),  # a site has one name
        ("resid_post_layer_07", "resid_post.7"),
        ("model.layers.07", "resid_post.7"),
        (None, "unknown"),
    ],
)
def test_hooks_and_modules_mean_sites(hook, site):
    assert hooks.to_site(hook) == site


def test_models_of_transformer_lens_are_on_the_hub_under_other_names():
    names = {"gpt2-small": "gpt2", "pythia-70m-deduped": "EleutherAI/pythia-70m-deduped", "gemma-2b": "google/gemma-2b"}
    names |= {"Llama-2-7b": "meta-llama/Llama-2-7b-hf", "phi-2": "microsoft/phi-2", "Qwen2.5-7B": "Qwen/Qwen2.5-7B"}
    names |= {name: name for name in ("", "gpt2-medium", "some/gemma-2b", "/folder/of/gemma-2b")}
    assert {name: hooks.hub_name(name) for name in names} == names


GEMMA = {  # norms after the MLP make its module another place
    "blocks.3.hook_mlp_out": "mlp_out.3",
    "model.layers.3.mlp": "module:model.layers.3.mlp",
    "model.layers.3": "resid_post.3",
    "mlp_out_layer_3": "module:model.layers.3.mlp",
    "attn_layer_3": "module:model.layers.3.self_attn",
    "model.layers.3.mlp.output": "module:model.layers.3.mlp",
    "model.layers.3.pre_feedforward_layernorm.output": "mlp_in.3",
    "model.layers.3.post_feedforward_layernorm.output": "mlp_out.3",
    "model.layers.3.post_attention_layernorm": "attn_out.3",
    "blocks.3.ln2_post.hook_out": "mlp_out.3",
}


def test_hooks_of_a_model_with_norms_after_the_mlp():
    named = "google/gemma-2-2b google/gemma-3-1b gemma-2-9b-it google/gemma-3n-E2B google/medgemma-4b-it "
    named += "google/shieldgemma-2b allenai/OLMo-2-1124-7B allenai/OLMo2-7B-1124 allenai/Olmo-3.1-32B-Think "
    named += "google/functiongemma-270m-it google/translategemma-4b-it"
    for model in named.split():
        assert {hook: hooks.to_site(hook, model) for hook in GEMMA} == GEMMA


def test_a_models_config_decides_and_else_its_exact_name_with_a_line(tmp_path, monkeypatch):
    """gemma-2b is a Gemma 1, and a model derived from Gemma 2 may have any name."""
    lines = []
    monkeypatch.setattr(hooks.logging, "info", lambda text, line: lines.append(line))
    norm = "model.layers.3.post_attention_layernorm"  # in other models the norm before the MLP
    for model in ("google/gemma-2b", "gemma-2b-it", "google/codegemma-2b", "google/recurrentgemma-2b"):
        assert hooks.to_site(norm, model).startswith("module:") and hooks.to_site("mlp_3", model) == "mlp_out.3"
    assert len(lines) == 4 and "adds to its stream what its attention and MLP give" in lines[0]
    inside = dict(model_type="paligemma", text_config=dict(model_type="gemma2"))  # of text and images
    for fields, site in ((dict(model_type="gemma2"), "attn_out.3"), (dict(model_type="gemma"), f"module:{norm}"),
                         (inside, "attn_out.3")):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(fields | dict(rms_norm_eps=1e-6)))
        assert hooks.to_site(norm, str(tmp_path)) == site and hooks.has_layer_norms(str(tmp_path)) is False
    assert len(lines) == 4


LAYER_NORMS = "gpt2 gpt2-small openai-community/gpt2-xl distilgpt2 EleutherAI/pythia-70m-deduped gpt-neo-125M "
LAYER_NORMS += "EleutherAI/gpt-j-6B microsoft/phi-2 phi-1_5 facebook/opt-125m bigscience/bloom-560m allenai/OLMo-1B-hf "
LAYER_NORMS += "roneneldan/TinyStories-33M tiny-stories-1L-21M gelu-1l stabilityai/stablelm-base-alpha-3b"
RMS_NORMS = "google/gemma-2-2b gemma-2b-it meta-llama/Llama-3.1-8B Llama-2-7b mistral-7b Qwen/Qwen2.5-7B qwen3-8b "
RMS_NORMS += "HuggingFaceTB/SmolLM2-135M allenai/OLMo-2-1124-7B microsoft/phi-4 01-ai/Yi-6B openai/gpt-oss-20b "
RMS_NORMS += "deepseek-ai/DeepSeek-R1-Distill-Llama-8B TinyLlama/TinyLlama-1.1B-Chat-v1.0 meta-llama/Meta-Llama-3-8B"
NAMELESS = "adopt-1b some/llama-like lab/my-gpt2 proto-opt-9 redwood-forest agemma-2b yi microsoft/phi-20b attn-only"


def test_the_norms_of_a_model_are_told_by_its_config_and_else_by_its_exact_name_with_a_line(tmp_path, monkeypatch):
    """A defect: names were searched for anywhere, so that an "adopt-1b" had LayerNorms, and nothing was said."""
    lines = []
    monkeypatch.setattr(hooks.logging, "info", lambda text, line: lines.append(line))
    monkeypatch.setattr(hooks, "try_to_load_from_cache", lambda *names: None)
    hooks._say_once.cache_clear()
    for names, wanted in ((LAYER_NORMS, True), (RMS_NORMS, False), (NAMELESS, None)):
        assert {name: hooks.has_layer_norms(name) for name in names.split()} == dict.fromkeys(names.split(), wanted)
    assert len(lines) == len([*LAYER_NORMS.split(), *RMS_NORMS.split()])
    assert lines[0] == "the config.json of gpt2 is not here: by its name it is taken for a model with LayerNorms"
    folder = tmp_path / "llama-7b"
    folder.mkdir()
    for fields, wanted in (
        (dict(model_type="opt"), True), (dict(model_type="t5", layer_norm_epsilon=1e-6), False),
        (dict(model_type="gpt2", layer_norm_epsilon=1e-5), True), (dict(model_type="mine"), False),
        (dict(model_type="both", text_config=dict(model_type="gpt_neox", layer_norm_eps=1e-5)), True),
    ):  # fmt: skip
        (folder / "config.json").write_text(json.dumps(fields))
        assert hooks.has_layer_norms(str(folder)) is wanted, fields
    assert lines[-1].startswith(f"the config.json of {folder} does not tell its norms: by its name")


@pytest.mark.parametrize(
    ("hook", "model"),
    [
        ("blocks.3.ln1.hook_normalized", ""),
        ("blocks.3.hook_mlp_in", ""),
        ("blocks.0.attn.hook_q", ""),
        ("hook_embed", ""),
        ("blocks.3.mlp.hook_out", "google/gemma-3-4b"),
        ("blocks.3.attn.hook_out", "google/gemma-3-4b"),
    ],
)
def test_hooks_that_are_no_site_are_refused_by_name(hook, model):
    with pytest.raises(UserError, match=f"the hook {hook} is none of the sites"):
        hooks.require_sites(hooks.to_site(hook, model))


def test_sites_that_have_no_name_elsewhere():
    assert hooks.to_hook("module:model.layers.3.mlp.act_fn") == "model.layers.3.mlp.act_fn"
    assert hooks.to_hook("unknown") is None
    with pytest.raises(UserError, match="no name for the site module_in:"):
        hooks.to_hook("module_in:model.layers.3.mlp")
