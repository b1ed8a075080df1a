"""Reading config.json: what is honoured, and what is refused by name."""

import dataclasses
import json
import math

import numpy as np
import pytest
from tiny_models import OTHER_FIELDS, TINY_FIELDS

from saejax.errors import UserError
from saejax.models.families import FAMILIES, read_config, unread_fields
from saejax.models.parameters import parameter_table

LLAMA = dict(model_type="llama", hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4)
LLAMA |= dict(vocab_size=384, hidden_act="silu")
GPT2 = dict(model_type="gpt2", n_embd=64, n_layer=2, n_head=4, vocab_size=384)
GPT_NEO = dict(model_type="gpt_neo", hidden_size=64, num_layers=2, num_heads=4, vocab_size=384)
GPT_NEO |= dict(attention_types=[[["global", "local"], 1]])
ROTARY = {name: value for name, value in LLAMA.items() if name != "hidden_act"} | dict(num_key_value_heads=2)
SLIDING, FULL = "sliding_attention", "full_attention"
WINDOWS = dict(use_sliding_window=True, sliding_window=8)
EQUAL_FACTORS = dict(rope_type="llama3", factor=8.0, low_freq_factor=4, high_freq_factor=4)
MIXED = [SLIDING, FULL, FULL, SLIDING]
LONGROPE = {FULL: dict(rope_type="longrope")}


def read(family="llama", **changes):
    """With the smallest config that the family can do with."""
    smallest = dict(gpt2=GPT2, gpt_neo=GPT_NEO, llama=LLAMA).get(family, ROTARY | dict(model_type=family))
    if family == "gpt_neox":
        smallest = {name: value for name, value in smallest.items() if name != "num_key_value_heads"}
    return read_config(smallest | changes, "config.json")


def plain_frequencies(theta, width):
    return [theta ** -(i / width) for i in range(0, width, 2)]


@pytest.mark.parametrize("family", [family for family in TINY_FIELDS if family not in OTHER_FIELDS])
def test_absent_fields_are_read_as_transformers_reads_them(family, tmp_path):
    """A config with only its sizes, and the whole one that transformers makes of it, of which no field is unknown."""
    from transformers import AutoConfig

    smallest = {name: value for name, value in TINY_FIELDS[family].items() if not name.endswith("token_id")}
    whole = AutoConfig.for_model(family, **smallest)
    whole.save_pretrained(tmp_path)
    ours = read_config(smallest | dict(model_type=family), "config.json")
    assert ours == read_config(json.loads((tmp_path / "config.json").read_text()), "config.json")
    assert (ours.context, ours.tied) == (whole.max_position_embeddings, whole.tie_word_embeddings)
    assert unread_fields(whole.to_dict(), "config.json") == []


def test_every_family_is_tested_and_every_weight_has_a_place():
    """Whatever a config can switch on, of what its family has."""
    assert {*TINY_FIELDS, "gemma3"} - {*OTHER_FIELDS} == {*FAMILIES}
    for name, family in FAMILIES.items():
        config = read("gemma3_text" if name == "gemma3" else name)
        assert {*parameter_table(dataclasses.replace(config, tied=False))} <= {*family.weights}, name
        assert {"embed_VxD", "unembed_DxV"} <= {*family.weights}, name


def test_a_model_that_also_reads_images_is_read_as_its_text_part():
    """The hub's files leave out what equals the defaults."""
    text = dict(model_type="gemma3_text", hidden_size=2560, intermediate_size=10240, num_hidden_layers=34)
    text |= dict(rope_scaling=dict(factor=8.0, rope_type="linear"), sliding_window=1024)
    vision = dict(hidden_size=1152, model_type="siglip_vision_model")
    data = dict(model_type="gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=256)
    config = read_config(data, "config.json")
    assert (config.n_heads, config.n_kv_heads, config.d_head, config.context) == (8, 4, 256, 131_072)
    assert (config.sliding_window, config.sliding_layers[:7]) == (1024, (True,) * 5 + (False, True))
    np.testing.assert_allclose(config.rope.frequencies, np.array(plain_frequencies(1e6, 256)) / 8)
    np.testing.assert_allclose(config.sliding_rope.frequencies, plain_frequencies(1e4, 256))
    assert unread_fields(data, "config.json") == []
    assert unread_fields(data | dict(text_config=text | dict(altup=4)), "config.json") == ["text_config.altup"]
    assert config.tied and not read_config(data | dict(tie_word_embeddings=False), "config.json").tied


WHOLE = [
    dict(rope_theta=5e5),
    dict(rope_theta=500_000, rope_scaling=None),
    dict(rope_parameters=dict(rope_theta=5e5, rope_type="default")),
    dict(rope_parameters=dict(rope_theta=5e5, partial_rotary_factor=1.0)),
    dict(rope_theta=5e5, rope_scaling=dict(type="default")),
    dict(rope_theta=5e5, rope_scaling=dict(type="dynamic", factor=4.0)),  # no prompt is beyond the context
    dict(rope_theta=1e4, rope_parameters=dict(rope_theta=5e5)),  # the object's value counts
]
HALF = [
    dict(rotary_pct=0.5, rotary_emb_base=5e5),
    dict(rotary_pct=0.5, partial_rotary_factor=0.5, rotary_emb_base=500_000, rope_theta=500_000, rope_scaling=None),
    dict(rope_parameters=dict(rope_type="default", rope_theta=5e5, partial_rotary_factor=0.5)),
    dict(rope_scaling=dict(type="linear", factor=1.0), rotary_pct=0.5, rotary_emb_base=500_000),
]


@pytest.mark.parametrize(
    ("family", "width", "fields"),
    [("llama", 16, fields) for fields in WHOLE] + [("gpt_neox", 8, fields) for fields in HALF],
)
def test_rotary_fields_of_old_and_new_files(family, width, fields):
    np.testing.assert_allclose(read(family, **fields).rope.frequencies, plain_frequencies(5e5, width))


def test_yarn_and_longrope_scale_attention():
    """By their formulas; the frequencies of scaled embeddings are held against transformers with whole models."""
    yarn = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=512)
    for changes, scaling in (
        ({}, 0.1 * math.log(4) + 1),
        (dict(attention_factor=0.7), 0.7),
        (dict(mscale=1.0, mscale_all_dim=0.5), (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)),
    ):
        assert read(rope_parameters=yarn | changes).rope.attention_scaling == pytest.approx(scaling)
    longrope = dict(type="longrope", short_factor=[1.0, 2.0] * 4, long_factor=[9.0] * 8)
    config = read("phi3", max_position_embeddings=131_072, rope_scaling=longrope)
    assert config.context == 4096  # the original one
    np.testing.assert_allclose(config.rope.frequencies, np.array(plain_frequencies(1e4, 16)) / ([1.0, 2.0] * 4))
    assert config.rope.attention_scaling == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        ("mistral", {}, dict(sliding_window=4096)),
        ("mistral", dict(sliding_window=None), dict(sliding_window=None)),
        ("gemma2", {}, dict(sliding_layers=(True, False, True, False))),
        ("gemma3_text", dict(sliding_window_pattern=2), dict(sliding_layers=(True, False, True, False))),
        ("gemma3_text", dict(layer_types=[FULL] * 4), dict(sliding_layers=())),
        ("qwen2", dict(sliding_window=8), dict(sliding_window=None)),
        ("qwen2", WINDOWS | dict(max_window_layers=1), dict(sliding_layers=(False, True, True, True))),
        ("qwen2", WINDOWS, dict(sliding_window=None)),  # only from layer 28 on
        ("qwen3", WINDOWS | dict(layer_types=MIXED), dict(sliding_layers=(True, False, False, True))),
        ("gemma2", {}, dict(attn_logit_softcap=50.0, final_logit_softcap=30.0)),
        ("gemma2", dict(attn_logit_softcapping=None), dict(attn_logit_softcap=None, final_logit_softcap=30.0)),
        ("gemma2", dict(final_logit_softcapping=20), dict(attn_logit_softcap=50.0, final_logit_softcap=20.0)),
    ],
)
def test_windows_and_caps(family, fields, expected):
    """Caps that are null are off, and absent ones are the defaults."""
    config = read(family, **fields)
    assert {name: getattr(config, name) for name in expected} == expected


def test_layers_without_a_rotary_embedding():
    config = read("smollm3")
    assert config.sliding_layers == (False, False, False, True) and config.sliding_window == config.context
    assert set(config.sliding_rope.frequencies) == {0.0} and 0.0 not in config.rope.frequencies


@pytest.mark.parametrize(
    "family, fields, message",
    [
        ("llama", dict(model_type="mamba"), "does not have the family 'mamba', .*; expected one of llama"),
        ("llama", dict(quantization_config=dict(bits=4)), "quantised"),
        ("llama", dict(rope_scaling=dict(rope_type="longrope", factor=8.0)), "rope_type 'longrope' is not supported"),
        ("llama", dict(rope_scaling=dict(type="linear")), "no field 'rope_scaling.factor'"),
        ("llama", dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "no field 'rope_scaling.low_freq_factor'"),
        ("llama", dict(rope_scaling=EQUAL_FACTORS), "'low_freq_factor' .4. and 'high_freq_factor' .4. contradict"),
        ("llama", dict(rope_interleaved=True), "rope_interleaved True is not supported"),
        ("llama", dict(hidden_act="relu2"), "hidden_act 'relu2' is not supported, expected one of gelu"),
        ("llama", dict(hidden_size=None), "no field 'hidden_size'"),
        ("llama", dict(hidden_size="64"), "'hidden_size' is '64', expected int"),
        ("llama", dict(vocab_size=True), "'vocab_size' is True, expected int"),
        ("llama", dict(num_hidden_layers=0), "'num_hidden_layers' is 0, expected at least 1"),
        ("llama", dict(rms_norm_eps=float("nan")), "'rms_norm_eps' is nan, expected above 0"),
        ("llama", dict(attention_bias=1), "'attention_bias' is 1, expected bool"),
        ("llama", dict(num_key_value_heads=3), "4 attention heads are not a multiple of 3"),
        ("llama", dict(num_attention_heads=5), "'num_attention_heads' .5. does not divide 'hidden_size' .64."),
        ("llama", dict(head_dim=7), "even width"),
        ("llama", dict(add_cross_attention=True), "add_cross_attention True is not supported"),
        ("llama", dict(pruned_heads={"0": [1]}), "pruned_heads .* is not supported"),
        ("gpt_neox", dict(num_key_value_heads=2), "num_key_value_heads 2 is not supported, expected 4"),
        ("gpt_neox", dict(rotary_pct=0.3125), "heads are 16 wide and a share of 0.3125 of that turns"),
        ("phi", dict(partial_rotary_factor=1.5), "a share of 1.5 of that turns"),
        ("gemma", dict(hidden_act="gelu", hidden_activation="relu"), "'hidden_act' and 'hidden_activation' contradict"),
        ("gemma", dict(use_bidirectional_attention=True), "use_bidirectional_attention True is not supported"),
        ("gemma2", dict(hidden_act="relu"), "'hidden_act' and 'hidden_activation' contradict"),
        ("gemma2", dict(sliding_window=None), "'sliding_window' .null or switched off. contradict"),
        ("gemma2", dict(layer_types=[SLIDING]), "'layer_types' .1 of them. and 'num_hidden_layers' .4. contradict"),
        ("gemma2", dict(layer_types=[SLIDING, "linear_attention"] * 2), "layer_types 'linear_attention' is not"),
        ("gemma3_text", dict(rope_parameters=LONGROPE), "rope_parameters.full_attention.rope_type 'longrope' is not"),
        ("gpt_neo", dict(attention_types=[[["global"], 3]]), "'attention_types' .for 3 layers. and 'num_layers' .2."),
        ("gpt_neo", dict(attention_layers=["local"] * 2), "'attention_types' and 'attention_layers' contradict"),
        ("gpt_neo", dict(attention_types=[[["global", "dilated"], 1]]), "attention_types 'dilated' is not supported"),
        ("phi3", dict(rope_scaling=dict(type="yarn", factor=2.0)), "rope_scaling.rope_type 'yarn' is not supported"),
        ("phi3", dict(rope_scaling=dict(type="longrope", short_factor=[1.0])), "short_factor 'with 1 numbers' is not"),
        ("smollm3", dict(no_rope_layers=[1]), "'no_rope_layers' .1 of them. and 'num_hidden_layers' .4. contradict"),
        ("smollm3", WINDOWS | dict(layer_types=[SLIDING] * 4), "layer_types 'with other sliding layers' is not supp"),
        ("qwen3_moe", dict(mlp_only_layers=[0]), "mlp_only_layers .0. is not supported"),
        ("qwen3_moe", dict(decoder_sparse_step=2), "decoder_sparse_step 2 is not supported"),
        ("qwen3_moe", dict(num_experts=4), "'num_experts_per_tok' .8. and the number of experts .4. contradict"),
        ("qwen2", dict(use_mrope=True), "use_mrope True is not supported"),
        ("qwen2", dict(layer_types=[SLIDING] * 4), "'layer_types' .with 'sliding_attention'. and 'sliding_window'"),
    ],
)
def test_refused(family, fields, message):
    with pytest.raises(UserError, match=message):
        read(family, **fields)


def test_fields_that_nothing_reads():
    """Bookkeeping is known to be without effect; of anything else a comparison with transformers has to tell."""
    plain = dict(attention_dropout=0.1, use_cache=False, sliding_window=None, eos_token_id=[1, 2], head_dim=None)
    plain |= dict(_num_labels=2, id2label={}, early_stopping=False, diversity_penalty=0.0, pruned_heads={})
    assert read(**plain) == read() and unread_fields(LLAMA | plain, "config.json") == []
    rope = dict(rope_parameters=dict(rope_theta=1e4, base=1))
    unknown = dict(sliding_window=128, logit_scale=2.0, partial_rotary_factor=0.5)
    assert read(**unknown, **rope) == read()
    names = ["logit_scale", "partial_rotary_factor", "rope_parameters.base", "sliding_window"]
    assert unread_fields(LLAMA | unknown | rope, "config.json") == names
    # The share that GPT-NeoX rotates has two names in new files; alone, transformers does not read the second.
    neox = TINY_FIELDS["gpt_neox"] | dict(model_type="gpt_neox", rotary_pct=None)
    share = dict(partial_rotary_factor=0.4)
    assert unread_fields(neox | share, "config.json") == ["partial_rotary_factor"]
    assert unread_fields(neox | share | dict(rotary_pct=0.4), "config.json") == []
