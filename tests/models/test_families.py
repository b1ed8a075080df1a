"""Reading config.json: what is honoured, and what is refused by name."""

import json

import pytest

from saejax.errors import UserError
from saejax.models.families import read_config

LLAMA = dict(
    model_type="llama",
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    vocab_size=384,
    hidden_act="silu",
)


def read(**changes):
    return read_config(LLAMA | changes, "config.json")


def test_defaults_are_those_of_transformers():
    from transformers import LlamaConfig

    ours, theirs = read(), LlamaConfig(**{key: value for key, value in LLAMA.items() if key != "model_type"})
    assert (ours.n_kv_heads, ours.d_head) == (theirs.num_key_value_heads, theirs.head_dim)
    assert (ours.context, ours.norm_eps) == (theirs.max_position_embeddings, theirs.rms_norm_eps)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (ours.tied, ours.attention_bias, ours.mlp_bias) == (
        theirs.tie_word_embeddings,
        theirs.attention_bias,
        theirs.mlp_bias,
    )


def test_what_transformers_writes_is_read(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=96, num_attention_heads=6, head_dim=20, tie_word_embeddings=True).save_pretrained(tmp_path)
    config = read_config(json.loads((tmp_path / "config.json").read_text()), "config.json")
    assert (config.d_model, config.n_heads, config.d_head, config.tied) == (96, 6, 20, True)


@pytest.mark.parametrize(
    "fields",
    [
        dict(rope_theta=5e5),
        dict(rope_theta=500_000, rope_scaling=None),
        dict(rope_parameters=dict(rope_theta=5e5, rope_type="default")),
        dict(rope_theta=5e5, rope_scaling=dict(type="default")),
    ],
)
def test_rope_theta_of_old_and_new_files(fields):
    assert read(**fields).rope_theta == 5e5


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(model_type="mamba"), "'mamba' are not supported, expected one of llama"),
        (dict(model_type=None), "family None"),
        (dict(sliding_window=128, logit_scale=2.0), "could change the result: logit_scale, sliding_window"),
        (dict(quantization_config=dict(bits=4)), "quantised"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "rope_type 'llama3' is not supported"),
        (dict(rope_scaling=dict(type="linear", factor=2.0)), "rope_type 'linear' is not supported"),
        (dict(rope_parameters=dict(rope_theta=1e4, partial_rotary_factor=0.5)), "partial_rotary_factor"),
        (dict(rope_theta=1e4, rope_parameters=dict(rope_theta=5e5)), "contradict"),
        (dict(rope_scaling=dict(rope_theta=1e4), rope_parameters=dict(rope_theta=5e5)), "contradict"),
        (dict(rope_interleaved=True), "rope_interleaved True is not supported"),
        (dict(hidden_act="relu2"), "hidden_act 'relu2' is not supported, expected one of gelu"),
        (dict(hidden_size=None), "no field 'hidden_size'"),
        (dict(hidden_size="64"), "'hidden_size' is '64', expected int"),
        (dict(vocab_size=True), "'vocab_size' is True, expected int"),
        (dict(num_hidden_layers=0), "'num_hidden_layers' is 0, expected at least 1"),
        (dict(attention_bias=1), "'attention_bias' is 1, expected bool"),
        (dict(num_key_value_heads=3), "4 attention heads are not a multiple of 3"),
        (dict(num_attention_heads=5), "5 heads do not divide the width 64"),
        (dict(head_dim=7), "even width"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(UserError, match=message):
        read(**fields)


def test_inert_and_null_fields_are_no_obstacle():
    assert (
        read(attention_dropout=0.1, use_cache=False, sliding_window=None, eos_token_id=[1, 2], head_dim=None) == read()
    )
