"""Generated text: equal to that of transformers and to plain forward passes; sampling; where it ends."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from loaded_models import fifty_prompts
from tiny_models import save_tiny, save_tiny_tokenizer

from saejax import load_model
from saejax.errors import UserError
from saejax.models import decoding, generation, source
from saejax.models.decoding import sampling_params
from saejax.models.generation import Generated, eos_ids
from saejax.models.sites import Site
from saejax.models.tokens import Tokens, pad
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig

TEXTS = ["The capital of France is", "3", "One day, she said that there was a way to see where the water went, and the"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Push:
    """Adds a vector that depends on the value, at the real positions of a site."""

    matrix_DxD: jax.Array
    site: Site = dataclasses.field(metadata=dict(static=True))

    def __call__(self, value_BxTxD, run):
        return value_BxTxD + jnp.where(run.mask_BxT[..., None], value_BxTxD @ self.matrix_DxD, 0.0)


@pytest.fixture(scope="module")
def tokens(lm):
    return lm.tokenize(TEXTS)


@pytest.fixture(scope="module")
def greedy(lm, tokens):
    return lm.generate(tokens, 20)


def rows(tokens: Tokens) -> list[list[int]]:
    return [ids[:length].tolist() for ids, length in zip(tokens.ids_BxT, tokens.lengths_B, strict=True)]


def assert_equals_transformers(lm, model, sequences, new, batched):
    ends = eos_ids(lm.source.folder, lm.tokenizer)
    batches = [sequences] if batched else [[ids] for ids in sequences]
    found = [done for batch in batches for done in lm.generate(pad(batch), new)]
    for ids, done in zip(sequences, found, strict=True):
        prompt = torch.tensor([ids])
        whole = model.generate(prompt, attention_mask=prompt * 0 + 1, max_new_tokens=new, do_sample=False)
        expected = whole[0, len(ids) :].tolist()  # with the end of text if there was one
        if expected[-1] in ends:
            assert (done.finished, list(done.ids)) == ("eos", expected[:-1])
        else:
            assert (done.finished, list(done.ids)) == ("length", expected)


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", pytest.param("llama", marks=pytest.mark.slow)])
def test_greedy_equals_transformers(family, one_device, tmp_path):
    """Learned positions and sliding windows among them, prompts longer and shorter than the window."""
    save_tiny(tmp_path, family, vocab_size=257)
    save_tiny_tokenizer(tmp_path, 257)
    lm = load_model(str(tmp_path), mesh=one_device)
    model = source.load_torch_model(lm.source, "float32")
    sequences = [np.random.default_rng(n).integers(1, 257, n).tolist() for n in (1, 4, 13, 33)]
    assert_equals_transformers(lm, model, sequences, 24, batched=True)


SLOW = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.parametrize(
    ("count", "new", "batched"), [pytest.param(20, 64, True, marks=SLOW), pytest.param(20, 64, False, marks=SLOW)]
)
def test_greedy_on_smollm2_equals_transformers(smollm2, smollm2_torch, count, new, batched):
    prompts = rows(smollm2.tokenize(fifty_prompts()[:count]))
    assert_equals_transformers(smollm2, smollm2_torch, prompts, new, batched)


def continue_without_cache(lm, tokens, new, edits=()) -> list[list[int]]:
    """The argmax of a whole forward pass for every new token."""
    sequences = rows(tokens)
    for _ in range(new):
        logits = lm(pad(sequences), edits=edits).logits_BxTxV
        for b, ids in enumerate(sequences):
            ids.append(int(np.argmax(logits[b, len(ids) - 1])))
    return [ids[len(prompt) :] for prompt, ids in zip(rows(tokens), sequences, strict=True)]


def until_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(0)] if 0 in ids else ids


@pytest.mark.parametrize("scale", [0, 1 / 16], ids=["plain", "edits"])
def test_without_a_cache_it_is_the_same(lm, tokens, greedy, scale):
    """Edits act on the prompt and on every new token."""
    matrix_DxD = scale * jax.random.normal(jax.random.key(0), (64, 64))
    edits = [Push(matrix_DxD, Site("resid_post", 1)), Push(-matrix_DxD, Site("attn_out", 3))] if scale else []
    found = lm.generate(tokens, 20, edits=edits)
    assert [list(done.ids) for done in found] == list(map(until_end, continue_without_cache(lm, tokens, 20, edits)))
    assert (found == greedy) == (not scale)
    assert len({done.ids for done in greedy}) == 3 and len({id for done in greedy for id in done.ids}) > 5


@pytest.mark.parametrize(
    "mesh", [pytest.param(dict(), marks=pytest.mark.slow), dict(data=4, model=2)], ids=["data 8", "data 4, model 2"]
)
def test_a_mesh_of_eight_devices_generates_the_same(lm, tokens, greedy, mesh):
    """Eight prompts are split over the devices, three are on all of them."""
    parallel = load_model(str(lm.source.folder), mesh=make_mesh(MeshConfig(**mesh)))
    assert parallel.generate(tokens, 20) == greedy
    eight = parallel.generate(pad((rows(tokens) * 3)[:8]), 20)
    assert eight == (greedy * 3)[:8]


def test_samples_repeat_by_seed_and_become_greedy(lm, tokens, greedy):
    options = dict(temperature=1.5, top_p=0.9)
    first = lm.generate(tokens, 20, seed=1, **options)
    assert lm.generate(tokens, 20, seed=1, **options) == first
    assert lm.generate(tokens, 20, seed=2, **options) != first
    same = lm.generate(pad(rows(tokens)[:1] * 3), 20, seed=1, **options)
    assert len({done.ids for done in same}) == 3  # prompts of a batch have draws of their own
    assert first != greedy
    assert lm.generate(tokens, 20, temperature=1e-4) == greedy
    assert lm.generate(tokens, 20, temperature=1.0, top_p=1e-6) == greedy


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (2.0, 0.95)])
def test_draws_have_the_probabilities_they_should(temperature, top_p):
    rng = np.random.default_rng(0)
    logits_V = 2 * rng.standard_normal(12)
    shares_V = np.exp(logits_V / temperature) / np.exp(logits_V / temperature).sum()
    kept, total = np.zeros(12, bool), 0.0
    for index in np.argsort(-shares_V):
        if total < top_p:
            kept[index] = True
        total += shares_V[index]
    expected_V = np.where(kept, shares_V, 0) / shares_V[kept].sum()
    draws = 40_000
    sampling = sampling_params(temperature, top_p, seed=3)
    ids = np.asarray(sampling(jnp.broadcast_to(jnp.float32(logits_V), (draws, 12)), jnp.int32(5)))
    found_V = np.bincount(ids, minlength=12) / draws
    assert not found_V[~kept].any()
    assert np.abs(found_V - expected_V).max() < 4 * 0.5 / draws**0.5


def test_a_prompt_that_ends_early_leaves_the_others_alone(lm, tokens, greedy, monkeypatch):
    end = greedy[1].ids[4]
    monkeypatch.setattr(generation, "eos_ids", lambda folder, tokenizer: (0, 9999, end))
    found = lm.generate(tokens, 20)
    for done, whole in zip(found, greedy, strict=True):
        if end in whole.ids:  # otherwise it ends as before
            assert done.ids == whole.ids[: whole.ids.index(end)] and done.finished == "eos"
        else:
            assert done == whole
    assert found[1].finished == "eos" and len(found[1].ids) <= 4
    monkeypatch.setattr(generation, "eos_ids", lambda folder, tokenizer: (greedy[0].ids[0],))
    assert lm.generate(pad(rows(tokens)[:1]), 20) == [Generated((), "", "eos")]  # nothing at all


def test_a_stop_string_ends_the_text_wherever_tokens_begin(lm, tokens, greedy, monkeypatch):
    """Inside a token, over several, and over the place where the host looks."""
    text, pieces = greedy[0].text, [lm.tokenizer.decode([id]) for id in greedy[0].ids]
    assert len(text) > 24
    for start, stop in [(0, 1), (3, 4), (5, 9), (len(text) - 2, len(text)), (len(text) // 2, len(text) // 2 + 8)]:
        string = text[start:stop]
        done = lm.generate(tokens, 20, stop=["never there", string])[0]
        assert done.text == text[: text.index(string)] and done.finished == "stop"
        tokens_needed = next(n for n in range(1, 21) if string in "".join(pieces[:n]))
        assert done.ids == greedy[0].ids[:tokens_needed]
    assert lm.generate(tokens, 20, stop=["never there"]) == greedy
    first, second = text[6:8], text[2:4]
    assert lm.generate(tokens, 20, stop=[first, second])[0].text == text[: min(text.index(first), text.index(second))]
    # A special token can be one, too.
    monkeypatch.setattr(generation, "eos_ids", lambda folder, tokenizer: ())
    assert lm.tokenizer.all_special_tokens == ["<end>"]
    name = lm.tokenizer.convert_ids_to_tokens(greedy[0].ids[3])
    monkeypatch.setattr(type(lm.tokenizer), "all_special_tokens", property(lambda self: [name]))
    monkeypatch.setattr(type(lm.tokenizer), "all_special_ids", property(lambda self: [greedy[0].ids[3]]))
    done = lm.generate(tokens, 20, stop=[name])[0]
    assert (done.ids, done.finished) == (greedy[0].ids[: greedy[0].ids.index(greedy[0].ids[3])], "stop")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": dict(eos_token_id=[5, 7]), "config.json": dict(eos_token_id=3)}, (5, 7)),
        ({"generation_config.json": dict(eos_token_id=5)}, (5,)),
        ({"generation_config.json": dict(), "config.json": dict(eos_token_id=3)}, (3,)),
        ({"config.json": dict(eos_token_id=None)}, (0,)),
    ],
)
def test_where_the_ids_that_end_a_text_are_found(lm, tmp_path, files, expected):
    for name, data in files.items():
        (tmp_path / name).write_text(json.dumps(data))
    assert eos_ids(tmp_path, lm.tokenizer) == expected


def test_prompts_of_like_length_and_any_limit_share_a_program(lm):
    others = [[5]] * 10  # as many prompts as nowhere else
    lm.generate(pad([[1, 2, 3], *others]), 3)
    programs = decoding.prefill._cache_size(), decoding.decode._cache_size()
    lm.generate(pad([list(range(1, 31)), *others]), 30)
    lm.generate(pad([[7], *others]), 17, stop=["xyz"])
    assert (decoding.prefill._cache_size(), decoding.decode._cache_size()) == programs


def test_the_context_can_be_filled_but_not_exceeded(lm):
    ids = np.random.default_rng(0).integers(1, 384, 120).tolist()
    full = lm.generate(pad([ids, [3]]), 8)
    assert list(full[0].ids) == until_end(continue_without_cache(lm, pad([ids]), 8)[0])
    with pytest.raises(UserError, match="9 new tokens after a prompt of 120: .* context of 128"):
        lm.generate(pad([ids]), 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_new_tokens=0), "0 new tokens .* expected at least 1"),
        (dict(temperature=-1.0), "temperature is -1.0"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(top_p=0.0), "top_p is 0.0"),
        (dict(stop="\n"), r"stop is '\\n': expected a list"),
        (dict(stop=["a", ""]), "none of them empty"),
        (dict(edits=[Push(jnp.zeros((64, 64)), Site("mlp_in", 9))]), "4 layers, 0 to 3"),
        (dict(edits=[Push(jnp.full((64, 64), jnp.nan), Site("mlp_out", 2))]), "the logits after prompt 0 of 3 are NaN"),
    ],
)
def test_bad_settings_and_logits_that_are_not_finite_are_refused(lm, tokens, options, message):
    with pytest.raises(UserError, match=message):
        lm.generate(tokens, **dict(max_new_tokens=4) | options)
