"""The test that tries to refute reasoning features: planted detectors of words are refuted, features of context not."""

import dataclasses
import types

import jax
import numpy as np
import pytest

import saejax
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.errors import UserError
from saejax.interventions import falsify as module
from saejax.interventions.falsify import RULE, falsify, judge_injection
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import pad

WORDS, LOGIC = 120, 20  # plain words of the language, and those of reasoning, which come after them
LENGTH = 64  # words of a text
FAR, RECENT = 4, 8  # a word follows from the one so many tokens before; tokens over which that is counted


class Words:
    """A tokenizer of a language whose words are numbers."""

    bos_token_id = None

    def __call__(self, text, add_special_tokens=False, verbose=True):
        # "a" is what the tokens in front are measured with.
        return {"input_ids": [0 if word == "a" else int(word) for word in text.split()]}

    def decode(self, ids, clean_up_tokenization_spaces=False):
        return f" {ids[0]}"

    def convert_ids_to_tokens(self, token):
        return str(token)


@dataclasses.dataclass
class World(LanguageModel):
    """A model whose one site says which word stands here, one-hot, and how many of the last words followed.

    Texts that reason have many words of reasoning, and most of their plain words follow from the one ``FAR`` tokens
    before: word + 60, modulo 120. Ordinary text has few such words, and follows by chance alone.
    """

    seed: int
    tokenizer: Words = dataclasses.field(default_factory=Words)
    source = types.SimpleNamespace(name="", fingerprint="")
    config = types.SimpleNamespace(context=512)

    def sink_norm(self, site):
        return 1e6

    def encode(self, text):
        return self.tokenizer(text)["input_ids"]

    largest = 0  # tokens that were run at once

    def __call__(self, tokens, capture, logits):
        ids_BxT = tokens.ids_BxT
        self.largest = max(self.largest, ids_BxT.size)
        before_BxT = np.pad(ids_BxT, ((0, 0), (FAR, 0)), constant_values=WORDS)[:, : ids_BxT.shape[1]]
        follows_BxT = (before_BxT < WORDS) & (ids_BxT == (before_BxT + 60) % WORDS)
        count_BxT = np.cumsum(np.pad(follows_BxT, ((0, 0), (RECENT, 0))), axis=1)
        count_BxT = count_BxT[:, RECENT:] - count_BxT[:, :-RECENT]
        x_BxTxD = np.concatenate([np.eye(WORDS + LOGIC)[ids_BxT], count_BxT[..., None]], axis=-1).astype(np.float32)
        return types.SimpleNamespace(sites={capture[0]: jax.numpy.asarray(x_BxTxD)})

    def texts(self, rng):
        """128 texts that reason, and 128 ordinary ones."""
        return [[self._text(rng, *rates) for _ in range(128)] for rates in ((0.2, 0.8), (0.03, 0.0))]

    def _text(self, rng, logic, follows):
        words = rng.integers(0, WORDS, LENGTH)
        for place in range(LENGTH):
            if rng.random() < logic:
                words[place] = rng.integers(WORDS, WORDS + LOGIC)
            elif place >= FAR and words[place - FAR] < WORDS and rng.random() < follows:
                words[place] = (words[place - FAR] + 60) % WORDS
        return " ".join(map(str, words))

    def dictionary(self, detectors, states):
        """Features that fire on 4 words of reasoning each, and those of plain words where 2 of the last followed."""
        rng = np.random.default_rng(self.seed)
        W_enc_DxF = np.zeros((WORDS + LOGIC + 1, detectors + states), np.float32)
        b_enc_F = np.zeros(detectors + states, np.float32)
        for feature in range(detectors):
            W_enc_DxF[WORDS + rng.choice(LOGIC, 4, replace=False), feature] = rng.uniform(1, 3, 4)
        for feature in range(detectors, detectors + states):
            W_enc_DxF[rng.choice(WORDS, 60, replace=False), feature] = W_enc_DxF[-1, feature] = 1.0
            b_enc_F[feature] = -2.5
        width, features = W_enc_DxF.shape
        config = DictionaryConfig(kind="standard", site="resid_post.0", d_in=width, n_features=features)
        arrays = dict(W_enc_DxF=W_enc_DxF, b_enc_F=b_enc_F, W_dec_FxD=W_enc_DxF.T, b_dec_D=np.zeros(width, np.float32))
        return Dictionary(config, **{name: jax.numpy.asarray(array) for name, array in arrays.items()})


def run_world(seed, detectors=10, states=10, **settings):
    world = World(seed)
    texts = world.texts(np.random.default_rng(seed))
    dictionary = world.dictionary(detectors, states)
    return falsify(world, dictionary, range(detectors + states), *texts, **settings)


@pytest.fixture(scope="module")
def worlds():
    return [run_world(0), run_world(1), run_world(2, random_dictionary=World(9).dictionary(12, 0))]


def test_planted_detectors_of_words_are_told_from_features_of_context(worlds):
    rows = [row for world in worlds for row in world.features if row.group == "tested"]
    wrong = [row for row in rows if row.test.driver != ("tokens" if row.feature < 10 else "context")]
    assert len(rows) == 60 and len(wrong) <= 6, wrong[:2]
    share = worlds[0].shares[0]
    assert (share.group, share.features) == ("tested", 20) and 0.35 <= share.tokens.mean <= 0.65
    assert share.tokens.low < share.tokens.mean < share.tokens.high


def test_features_that_fire_below_zero_are_tested_by_size():
    """Signed ones are the same with all activations turned around."""
    world = World(3)
    texts, dictionary = world.texts(np.random.default_rng(3)), world.dictionary(4, 4)
    config = dataclasses.replace(dictionary.config, kind="topk", k=8, signed=True)
    arrays = {name: -array if name in ("W_enc_DxF", "b_enc_F") else array for name, array in dictionary.arrays.items()}
    turned = Dictionary(config, **arrays | dict(b_enc_F=0 * arrays["b_enc_F"]))
    found = falsify(world, turned, range(4), *texts)
    assert [row.test.driver for row in found.features if row.group == "tested"] == ["tokens"] * 4


def test_the_tokens_are_those_that_were_planted(worlds):
    W_enc_DxF = np.asarray(World(0).dictionary(10, 10).W_enc_DxF[...])
    for row in worlds[0].features[:10]:
        planted = {f" {word}" for word in np.flatnonzero(W_enc_DxF[: WORDS + LOGIC, row.feature])}
        assert set(row.tokens[: len(planted)]) == planted


def test_prompts_are_read_whole_in_batches_of_bounded_size():
    """Words of reasoning stand at the end of long texts alone: features that fire on them are found by them."""
    world, rng = World(0), np.random.default_rng(0)
    plain = [" ".join(map(str, rng.integers(0, WORDS, count))) for count in rng.integers(200, 500, 24)]
    reasoning = [f"{text} {' '.join(map(str, WORDS + np.arange(LOGIC)))}" for text in plain]
    result = falsify(world, world.dictionary(3, 0), range(3), reasoning, plain)
    assert [row.test.driver for row in result.features if row.group == "tested"] == ["tokens"] * 3
    assert world.largest <= module._BATCH_TOKENS


def test_a_feature_that_is_silent_on_training_texts_is_undecided():
    """A defect: nothing was inserted, and "driven by context" was said."""
    world, rng = World(0), np.random.default_rng(0)
    plain = [" ".join(map(str, rng.integers(0, WORDS, LENGTH))) for _ in range(16)]
    reasoning = [f"{text} {' '.join(map(str, WORDS + np.arange(LOGIC)))}" for text in plain]
    (row,) = falsify(world, world.dictionary(1, 0), [0], plain, plain, test_texts=reasoning).features
    assert row.real.low > 0 and not row.tokens and (row.test.driver, row.test.reach) == ("undecided", None)


def test_controls_are_tested_too(worlds):
    result = worlds[2]
    # All features are tested ones: none is left to be drawn at random.
    assert [share.group for share in result.shares] == ["tested", "random dictionary"]
    assert result.rule == RULE and (result.texts, result.ordinary) == (64, 64)


def test_activations_are_the_dictionarys(worlds):
    """The mean of the largest activations, by hand."""
    reasoning, ordinary = World(0).texts(np.random.default_rng(0))
    W_enc_DxF = np.asarray(World(0).dictionary(10, 10).W_enc_DxF[...], np.float64)
    for name, texts in (("real", reasoning[1::2]), ("ordinary", ordinary[1::2])):
        ids = [[int(word) for word in text.split()] for text in texts]
        expected_F = np.mean([np.max(W_enc_DxF[text], axis=0) for text in ids], axis=0)[:10]
        means = [getattr(row, name).mean for row in worlds[0].features[:10]]
        np.testing.assert_allclose(means, expected_F, rtol=1e-5)


def test_the_rule_is_undecided_where_nothing_is_shown():
    rng = np.random.default_rng(0)
    noise_N, level_N = rng.normal(size=(2, 60))
    assert judge_injection(noise_N, noise_N, level_N).reach is None
    middle_N = level_N + 5 - level_N.mean() + noise_N.mean()
    for control_N, injected_N, real_N, driver in (
        (noise_N, noise_N, level_N, "undecided"),
        (noise_N, noise_N, level_N + 5, "context"),
        (noise_N, noise_N + 5, level_N + 5, "tokens"),
        (noise_N, noise_N + 2.5, middle_N, "undecided"),
        (noise_N[:3], noise_N[:3] + 5, level_N[:3] + 5, "undecided"),  # three texts agree by chance
    ):
        assert judge_injection(control_N, injected_N, real_N).driver == driver
    assert judge_injection(noise_N, noise_N + 2.5, middle_N).reach.mean == pytest.approx(0.5)
    assert judge_injection(np.zeros(8), np.zeros(8), np.zeros(8)).reach is None


@pytest.mark.parametrize("texts", [6, 32])
def test_what_drives_a_feature_is_rarely_told_where_words_bring_it_half_of_the_way(texts):
    """100 features each that words bring no part of the way, half of it, or all of it."""
    found = {}
    for reach in (0.0, 0.5, 1.0):
        drivers = []
        for seed in range(100):
            random_N, change_N, real_N = np.random.default_rng([seed, texts]).normal(size=(3, texts))
            drivers.append(judge_injection(random_N, random_N + 5 * reach + change_N, 5 + real_N, seed).driver)
        found[reach] = [drivers.count(driver) for driver in ("tokens", "context")]
    print(f"{texts} texts: driven by tokens and by context of 100, by the share of the way: {found}")
    assert max(found[0.5]) <= 8 and min(found[1.0][0], found[0.0][1]) >= 80
    assert max(found[1.0][1], found[0.0][0]) <= 8


def test_a_real_model(tiny, make_dictionary):
    texts = [f"The {word} near the dogs runs so {word}" for word in ("cat", "war", "year", "water", "way", "capital")]
    result = saejax.falsify(tiny, make_dictionary("resid_post.1"), [3, 8], texts, texts[::-1] * 2)
    assert [row.group for row in result.features] == ["tested"] * 2 + ["random features"] * 2
    with pytest.raises(UserError, match="falsify has 1, 1, 1, 1 texts"):
        saejax.falsify(tiny, make_dictionary("resid_post.1"), [3], texts[:2], texts[:2])
    for features, message in (([160], "do not exist"), ([-1], "do not exist"), ([3, 3], "none twice")):
        with pytest.raises(UserError, match=message):
            saejax.falsify(tiny, make_dictionary("resid_post.1"), features, texts, texts)
    damaged = make_dictionary("resid_post.1")
    damaged = Dictionary(damaged.config, **damaged.arrays | dict(b_enc_F=damaged.b_enc_F[...].at[3].set(np.nan)))
    with pytest.raises(UserError, match="an activation is not finite"):
        saejax.falsify(tiny, damaged, [3], texts, texts)


def test_a_transcoders_features_are_silent_where_its_target_is_a_sink(tiny, make_dictionary):
    ids, sites = tiny.encode("The cat near the dogs runs so cat"), ["mlp_in.1", "mlp_out.1"]
    read_TxD, written_TxD = (value[0] for value in tiny(pad([ids]), capture=sites, logits=False).sites.values())
    norm_T = np.linalg.norm(written_TxD, axis=1)
    limit = float(np.sort(norm_T)[len(norm_T) // 2 :][:2].mean())
    made = make_dictionary(sites[0])
    config = dataclasses.replace(made.config, target=sites[1], max_norm=1e9, target_max_norm=limit)
    every_F = np.arange(config.n_features, dtype=np.int32)
    (acts_TxF,) = module._activations(tiny, made.with_config(config), every_F, [ids])
    expected_TxF = np.asarray(made.encode(read_TxD))
    assert (norm_T > limit).any() and expected_TxF[norm_T > limit].any()
    np.testing.assert_allclose(acts_TxF, np.where(norm_T[:, None] > limit, 0, expected_TxF), atol=1e-4)


def test_a_feature_of_few_tokens_gets_as_many_insertions_as_its_control():
    assert module._insert([1, 2, 3], [[7], [8, 9]], np.array([1, 2, 3])) == [1, 7, 2, 8, 9, 3, 7]
    assert module._insert([1, 2], [], np.array([1, 2])) == [1, 2]
