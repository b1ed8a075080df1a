"""Running a model with sites captured and edits on."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loaded_models import mesh_of

from saejax import load_model
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.errors import UserError
from saejax.models import language_model
from saejax.models.config import DecoderConfig
from saejax.models.parameters import parameter_table
from saejax.models.sites import KINDS, Site
from saejax.models.tokens import Tokens, as_tokens, pad

TEXTS = ["The capital of France is", "3 + 4 =", "One day, she said that there was a way to see where the water went"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Add:
    """Adds a vector at the real positions of a site."""

    vector_D: jax.Array
    site: Site = dataclasses.field(metadata=dict(static=True))

    def __call__(self, value_BxTxD, run):
        return value_BxTxD + run.mask_BxT[..., None] * self.vector_D[None, None, :]


@pytest.fixture(scope="module")
def tokens(lm):
    return lm.tokenize(TEXTS)


def test_tokens_are_padded_on_the_right(lm, tokens):
    assert tokens.ids_BxT.dtype == np.int32
    assert tokens.ids_BxT.shape == (3, tokens.lengths_B.max())
    for row, length, text in zip(tokens.ids_BxT, tokens.lengths_B, TEXTS, strict=True):
        assert lm.tokenizer.decode(row[:length]) == text
    np.testing.assert_array_equal(tokens.mask_BxT.sum(1), tokens.lengths_B)
    assert all(mask[last] and not mask[last + 1 :].any() for mask, last in zip(tokens.mask_BxT, tokens.last_B))


@pytest.mark.parametrize(
    "texts, message",
    [
        ([], "no texts"),
        (["fine", ""], r"text 1 of 2 \(''\) has no tokens"),
        (["fine", "a b " * 100], r"text 1 of 2 \('a b a b .*\.\.\.'\) has 301 tokens, more than .* context of 128"),
    ],
)
def test_texts_that_cannot_be_run(lm, texts, message):
    with pytest.raises(UserError, match=message):
        lm.tokenize(texts)
    with pytest.raises(UserError, match="texts is one string: expected a list"):
        lm.tokenize("The capital")
    larger = copy.copy(lm)  # whose tokenizer has a token that the model lacks
    larger.tokenizer = copy.deepcopy(lm.tokenizer)
    larger.tokenizer.add_tokens([f"<{number}>" for number in range(lm.config.vocab)])
    for read in (larger.encode, lambda text: larger.tokenize([text])):
        with pytest.raises(UserError, match=f"expected 0 to {lm.config.vocab - 1}, the ids of this model"):
            read(f"The capital <{lm.config.vocab - 1}>")
    for run in (lm, lambda tokens: lm.generate(tokens, 1)):
        with pytest.raises(UserError, match=r"tokens is a str: expected the result of lm.tokenize\(texts\)"):
            run("The capital")
        for strange in (["The capital"], [[0.5]], [[[1]]], [[3, True]], [], 3):
            with pytest.raises(UserError, match="or a list of lists of token ids"):
                run(strange)
        for strange, said in (
            ([1, 2], r"one list of 2 ids: .*; of one prompt give \[tokens\]"),
            (np.array([1, 2]), "one list of 2 ids"),
            ([[1], []], "has an empty prompt"),
            (np.zeros((2, 0), int), "has an empty prompt"),
            ([[2**32 + 3, 1]], "token ids are 1 to 2147483647: expected 0 to 383"),
            ([[[1, 2], [3]]], "tokens is a list: expected"),  # NumPy makes no array of it
            (dict(input_ids=[1, 2]), "one list of 2 ids"),
            (dict(input_ids=[[1, 2, 3]], attention_mask=[[1, 0, 1]]), "of prompt 0 is no mask of padding"),
            (dict(input_ids=[[1, 2], [3, 4]], attention_mask=[[1, 1], [0, 0]]), "has an empty prompt"),
            (dict(input_ids=[[1, 2], [3, 4]], attention_mask=[[1, 1]]), "input_ids and attention_mask are no lists"),
            (dict(input_ids=[[[1], [2]]]), "input_ids and attention_mask are no lists"),
            (dict(input_ids=3), "input_ids and attention_mask are no lists"),
        ):
            with pytest.raises(UserError, match=said):
                run(strange)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_a_tokenizer_of_transformers_returns_is_read_without_its_padding(lm, side, caplog):
    texts = ["The capital", "The capital of the river is"]
    expected, tokenizer = lm(lm.tokenize(texts)), copy.deepcopy(lm.tokenizer)
    tokenizer.padding_side = side
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    for kind in ("np", "pt"):
        found = lm(tokenizer(texts, padding=True, return_tensors=kind))
        np.testing.assert_array_equal(found.logits_BxTxV, expected.logits_BxTxV)
    assert lm.generate(tokenizer(texts), 3)[0].ids == lm.generate(lm.tokenize(texts), 3)[0].ids
    assert "padding token" not in caplog.text
    as_tokens(tokenizer(texts, padding=True, return_tensors="np")["input_ids"], tokenizer)
    assert f"1 of 2 prompts {dict(left='begin', right='end')[side]} in the padding token" in caplog.text


def test_what_is_meant_is_accepted(lm):
    """Lists of token ids, one edit, one feature."""
    config = DictionaryConfig("standard", "resid_post.1", "", lm.config.d_model, 24, max_norm=1e3, target_max_norm=1e3)
    tokens, dictionary = pad([[1, 2, 3], [4]]), Dictionary.initial(config, jax.random.key(0))
    plain, edited = lm(tokens), lm(tokens, edits=[dictionary.ablate([3])])
    np.testing.assert_array_equal(lm([[1, 2, 3], [4]]).logits_BxTxV, plain.logits_BxTxV)
    np.testing.assert_array_equal(lm(jnp.array([[4]])).logits_BxTxV, lm([[4]]).logits_BxTxV)
    assert lm.generate([[1, 2, 3], [4]], 3) == lm.generate(tokens, 3)
    for edit in (dictionary.ablate(3), dictionary.ablate(np.int32(3)), dictionary.ablate(jnp.array([3]))):
        np.testing.assert_array_equal(lm(tokens, edits=edit).logits_BxTxV, edited.logits_BxTxV)
    assert lm.generate(tokens, 3, edits=dictionary.steer(3, 2.0)) == lm.generate(
        tokens, 3, edits=[dictionary.steer([3], 2.0)]
    )
    for features in (0.5, "3", [True], [None], [[]]):
        with pytest.raises(UserError, match="features are"):
            dictionary.ablate(features)
    for edits in ("resid_post.1", [dictionary], 3, [None]):
        with pytest.raises(UserError, match=r"edits has a \w+: expected edits such as"):
            lm(tokens, edits=edits)


def test_an_answer_is_one_token(lm, smollm2):
    output = smollm2(smollm2.tokenize(["3 + 5 ="]))
    assert output.logit("8") == output.logit(smollm2.token_id("8")) != output.logit("5")
    for answer, pieces in (
        (" 8", r"' ' \(216\), '8' \(40\)"),
        ("\u041f\u0430\u0440\u0438\u0436", r".*, '\u0436' \(\d+\)"),
    ):
        with pytest.raises(UserError, match=rf"is \d tokens: {pieces}; give the id of one of them, or a word of one"):
            output.logit(answer)
        with pytest.raises(UserError, match=rf"is \d tokens: {pieces}; give the id of one"):
            smollm2.token_id(answer)
    with pytest.raises(UserError, match="the answer is 7: expected a text"):
        smollm2.token_id(7)
    for answer in (-1, smollm2.config.vocab, True, 3.0):
        with pytest.raises(UserError, match=rf"the answer is {answer}: expected a token's id, 0 to \d+, or a word"):
            output.logit(answer)


@pytest.mark.parametrize(
    ("ids", "lengths", "options", "message"),
    [
        ([[1, 384]], [2], {}, "token ids are 1 to 384: expected 0 to 383"),
        ([[-1, 3]], [2], {}, "token ids are -1 to 3"),
        ([[1, 2]], [3], {}, "expected 1 to 2"),
        ([[1, 2]], [0], {}, "expected 1 to 2"),
        ([[1] * 129], [129], {}, "expected 1 to 128"),
        ([[1, 2]], [2, 2], {}, "shapes"),
        ([[1, 2]], [2], dict(capture=["resid_post.4"]), "4 layers, 0 to 3"),
        ([[1, 2]], [2], dict(capture=["mlp.1"]), "there is no site 'mlp.1'.* or attn_pattern in the same way"),
        ([[1, 2]], [2], dict(capture="attn_pattern"), "names no layer: expected attn_pattern, a dot and a layer"),
        ([[1, 2]], [2], dict(edits=[Add(jnp.zeros(64), Site("mlp_in", 9))]), "there is no site mlp_in.9"),
    ],
)
def test_tokens_and_sites_of_another_model(lm, ids, lengths, options, message):
    with pytest.raises(UserError, match=message):
        lm(Tokens(np.array(ids, np.int32), np.array(lengths, np.int32)), **options)


def test_logit_reads_a_word_as_the_text_going_on(lm, tokens):
    output = lm(tokens)
    assert output.logits_BxTxV.shape == (*tokens.ids_BxT.shape, lm.config.vocab)
    for answer, token in (("water", lm.token_id(" water")), (" water", lm.token_id(" water")), (77, 77)):
        for row, last in enumerate(tokens.last_B):
            assert output.logit(answer)[row] == output.logits_BxTxV[row, last, token]
    assert [lm.token_id(" water")] == lm.tokenizer(" water")["input_ids"]
    with pytest.raises(UserError, match="the answer 'water' is 3 tokens: 'w'"):  # as it is written
        lm.token_id("water")
    assert np.ndim(lm(lm.tokenize(TEXTS[:1])).logit("water")) == 0
    with pytest.raises(UserError, match="no tokens"):
        lm.token_id("")


def test_many_layers_are_captured_as_few_are(lm, tokens, monkeypatch):
    names = [f"{kind}.{layer}" for layer in (3, 1, 0) for kind in KINDS if (kind, layer) != ("mlp_in", 3)]
    few = lm(tokens, capture=names, logits=False)
    monkeypatch.setattr(language_model, "_UNROLLED", 0)
    many = lm(tokens, capture=names[::-1], logits=False)  # in another order, so that it is compiled anew
    assert few.logits_BxTxV is many.logits_BxTxV is None
    for name in names:
        np.testing.assert_allclose(few.sites[name], many.sites[name], atol=1e-4, err_msg=name)
    with pytest.raises(UserError, match="logits=False"):
        few.logit("water")


@pytest.mark.parametrize("kinds", [["resid_post"], ["resid_post", "mlp_in", "attn_out"]])
def test_of_many_layers_only_those_asked_for_are_in_memory(kinds):
    """Bytes of the compiled program, in values of a site: results, and what it keeps meanwhile."""
    sizes = dict(n_layers=40, d_model=64, n_heads=4, n_kv_heads=4, d_head=16, d_mlp=64, vocab=8, context=64)
    rest = dict(tied=True, norm="rms", norm_eps=1e-6, activation="silu", gated=True)
    config = DecoderConfig(family="llama", **sizes, **rest, score_scale=0.3)
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, (shape, _) in parameter_table(config).items()}
    batch = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((32, 64), (32,)))
    sites = tuple(Site(kind, layer) for kind in kinds for layer in (3, 8, 17, 30, 39 - kinds.index(kind)))
    program = language_model.forward.lower(config, sites, False, params, *batch).compile().memory_analysis()
    value = 32 * 64 * 64 * 4
    assert program.output_size_in_bytes == pytest.approx(len(sites) * value, rel=0.01)
    assert program.temp_size_in_bytes < 16 * value  # of a layer: queries, keys, values, scores, the MLP


def test_edits_change_what_comes_after_them_at_real_positions(lm, tokens):
    vector = jnp.arange(64.0)
    names = ["resid_mid.1", "mlp_out.1", "resid_post.2"]
    clean = lm(tokens, capture=names)
    edited = lm(tokens, capture=names, edits=[Add(vector, Site("mlp_out", 1)), Add(-vector, Site("mlp_out", 1))])
    np.testing.assert_allclose(edited.logits_BxTxV, clean.logits_BxTxV, atol=1e-4)
    edited = lm(tokens, capture=names, edits=[Add(vector, Site("mlp_out", 1))])
    # Programs with and without edits round otherwise; the edit itself adds up to 63.
    np.testing.assert_allclose(edited.sites["resid_mid.1"], clean.sites["resid_mid.1"], atol=1e-4)
    change = np.asarray(edited.sites["mlp_out.1"] - clean.sites["mlp_out.1"])
    mask = tokens.mask_BxT
    np.testing.assert_allclose(change[mask], np.broadcast_to(vector, change[mask].shape), atol=1e-4)
    assert not change[~mask].any()
    assert np.abs(np.asarray(edited.sites["resid_post.2"] - clean.sites["resid_post.2"]))[mask].max() > 10


def test_one_compilation_per_sites_edits_and_padded_length(lm):
    forward = language_model.forward
    run = lambda n, **kwargs: lm(pad([[5] * n, *[[6]] * 10]), **kwargs)  # noqa: E731  # as many prompts as nowhere else
    site = Site("mlp_out", 1)
    run(3), run(3, capture=["mlp_in.1"]), run(3, edits=[Add(jnp.zeros(64), site)])
    before = forward._cache_size()
    run(9), run(16), run(16, capture=["mlp_in.1"]), run(7, edits=[Add(jnp.ones(64), site)])
    assert forward._cache_size() == before
    run(17)
    assert forward._cache_size() == before + 1


@pytest.mark.parametrize(
    "shape, texts",
    # Eight prompts are split over "data"; three are not divided by it and go to every device.
    [
        pytest.param((1, 1, 8), TEXTS, marks=pytest.mark.slow),
        ((1, 4, 2), TEXTS),
        ((1, 4, 2), [*TEXTS, *TEXTS, "a", "b"]),
    ],
)
def test_meshes_agree(lm, tiny_llama, shape, texts):
    spread, tokens = load_model(str(tiny_llama), mesh=mesh_of(*shape)), lm.tokenize(texts)
    edits = [Add(jnp.ones(64), Site("resid_post", 1))]  # on the default device, not on the mesh
    one, many = (model(tokens, capture=["resid_post.2"], edits=edits) for model in (lm, spread))
    assert many.logits_BxTxV.sharding.device_set == set(jax.devices())
    np.testing.assert_allclose(many.logits_BxTxV, one.logits_BxTxV, atol=1e-4)
    np.testing.assert_allclose(many.sites["resid_post.2"], one.sites["resid_post.2"], atol=1e-4)
