"""Log-likelihoods against PyTorch, token by token, and where contexts and continuations meet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import load_model
from saejax.errors import UserError
from saejax.models import source
from saejax.models.language_model import LanguageModel
from saejax.models.settings import ModelConfig
from saejax.tasks import likelihood
from saejax.tasks.likelihood import encode_pair, loglikelihoods

RNG = np.random.default_rng(0)
# Lengths on both sides of every padding step, a context and a continuation of one token, and the longest of all.
SIZES = [(1, 1), (5, 1), (1, 7), (12, 4), (15, 17), (30, 3), (40, 60), (100, 28), (3, 2), (64, 64)]
PAIRS = [tuple(RNG.integers(1, 380, size=n).tolist() for n in sizes) for sizes in SIZES]


@pytest.fixture(scope="module")
def expected(lm):
    """Of each pair, from transformers in fp64: the log-likelihood, the tokens, and those that were the likeliest."""
    import torch

    model = source.load_torch_model(lm.source, "float32").double()
    found = []
    for context, continuation in PAIRS:
        with torch.no_grad():
            logp = torch.log_softmax(model(torch.tensor([context + continuation])).logits[0], -1)
        predicted = logp[len(context) - 1 : -1]
        chosen = predicted[torch.arange(len(continuation)), torch.tensor(continuation)]
        hits = predicted.argmax(-1) == torch.tensor(continuation)
        found.append((chosen.sum().item(), len(continuation), int(hits.sum())))
    return found


def check(found, expected):
    assert [(one.tokens, one.correct_tokens) for one in found] == [each[1:] for each in expected]
    np.testing.assert_allclose([one.total for one in found], [each[0] for each in expected], rtol=2e-5)
    assert all(one.per_token == one.total / one.tokens for one in found)


@pytest.mark.parametrize("batch_tokens", [256, 4096])
def test_they_are_those_of_pytorch(lm, expected, batch_tokens):
    check(loglikelihoods(lm, *zip(*PAIRS), batch_tokens=batch_tokens), expected)
    check(loglikelihoods(lm, *zip(PAIRS[2]), batch_tokens=1), expected[2:3])  # one alone
    assert loglikelihoods(lm, [], []) == []


def test_batches_split_over_devices(tiny_llama, expected):
    eight = load_model(str(tiny_llama))
    assert eight.mesh.shape["data"] == 8
    check(loglikelihoods(eight, *zip(*PAIRS), batch_tokens=512), expected)


def test_logits_exist_only_where_they_are_needed(lm):
    x_BxTxD, positions = jnp.zeros((4, 128, 64)), jnp.zeros((4, 16), jnp.int32)
    program = jax.make_jaxpr(likelihood.token_scores, static_argnums=0)
    text = str(program(lm.config, lm.params, x_BxTxD, positions, positions))
    assert "4,16,384" in text and "128,384" not in text


@pytest.mark.parametrize(
    "context, continuation, said",
    [
        ([1], [], "continuation 1 has no tokens"),
        ([], [1], "context 1 has no tokens"),
        ([1] * 100, [1] * 29, "100 tokens and its continuation 29, together more than the model's context of 128"),
    ],
)
def test_bad_pairs_are_refused(lm, context, continuation, said):
    with pytest.raises(UserError, match=said):
        loglikelihoods(lm, [[1, 2], context], [[3], continuation])


def test_nan_is_refused(lm):
    params = lm.params | dict(final_norm_D=jnp.full_like(lm.params["final_norm_D"], jnp.nan))
    broken = LanguageModel(lm.config, params, lm.tokenizer, lm.source, lm.mesh)
    with pytest.raises(UserError, match="continuation 0 of 1 has the log-likelihood nan"):
        loglikelihoods(broken, [[1, 2]], [[3]])


def test_spaces_between_the_two_belong_to_the_continuation_and_special_tokens_come_once():
    tokenizer = source.load_tokenizer(source.resolve(ModelConfig()))
    together = tokenizer("The answer is 42.")["input_ids"]
    for context, continuation in [("The answer is", " 42."), ("The answer is ", "42."), ("The answer is 42.", "")]:
        ids = encode_pair(tokenizer, context, continuation)
        assert ids[0] + ids[1] == together
    # Where a token reaches over the border, the text is the same, too.
    for context, continuation, last in [(r"so $\boxed{", r"\frac{1}{2}}$", "boxed"), ("x =", "= 3", "x")]:
        ids = encode_pair(tokenizer, context, continuation)
        assert ids[0] + ids[1] == tokenizer(context + continuation)["input_ids"]
        assert tokenizer.decode(ids[0]).endswith(last)
    assert encode_pair(tokenizer, "The answer is ", "42.") == encode_pair(tokenizer, "The answer is", " 42.")
    assert encode_pair(tokenizer, "Q\n", "A")[0] == tokenizer("Q")["input_ids"]

    def with_start(text, add_special_tokens=True, verbose=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return dict(input_ids=[1, *ids] if add_special_tokens else ids)

    plain = encode_pair(tokenizer, "a b", " c")
    assert encode_pair(with_start, "a b", " c") == ([1, *plain[0]], plain[1])
    assert encode_pair(with_start, "a b", " c", "never") == plain
