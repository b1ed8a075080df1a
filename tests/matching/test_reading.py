"""Comparison over text: planted features of models and tokenizers, rare and dead features, and attention sinks."""

import dataclasses
import itertools
import weakref
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.activations.in_memory import capture
from saejax.config import Configs
from saejax.dictionaries import Dictionary, DictionaryConfig, save_dictionary
from saejax.files import write_array
from saejax.interpret import firings
from saejax.matching import in_memory
from saejax.matching.importance import read_features
from saejax.matching.match import match
from saejax.matching.rows import paired_products
from saejax.matching.transfer import compared as compared_file
from saejax.matching.transfer import reading
from saejax.matching.transfer.activity import MIN_FIRINGS, ReadText, encode, read_text, site_values
from saejax.matching.transfer.compared import Compared, measures_of
from saejax.matching.transfer.reading import SCORES, Reading, SharedText
from saejax.matching.transfer.results import ComparedPair, ComparedRows
from saejax.matching.transfer.settings import TransferConfig
from saejax.models.settings import ModelConfig
from saejax.page.tables import MISSING
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.stages.transfer import report
from saejax.stages.transfer import run as transfer_run
from saejax.stages.transfer.run import Comparison, score

SITE, TEXTS, TOKENS = "resid_post.0", 60, 20
TEXT_N, END_N = np.repeat(np.arange(TEXTS), TOKENS), np.tile(np.arange(1, TOKENS + 1), TEXTS)


def random_dictionary(width, features, seed, fingerprint="a", **changes):
    config = DictionaryConfig(
        kind="standard", site=SITE, d_in=width, n_features=features, max_norm=50.0, fingerprint=fingerprint,
        centred=False,
    )  # fmt: skip
    return Dictionary(config, **{**Dictionary.initial(config, jax.random.key(seed)).arrays, **changes})


def reader(rows_FxD, fingerprint, threshold=0.5):
    """A dictionary that reads planted directions off: the encoder is the pseudo-inverse."""
    count, width = rows_FxD.shape
    arrays = dict(W_enc_DxF=np.linalg.pinv(rows_FxD), W_dec_FxD=rows_FxD, b_enc_F=np.full(count, -threshold))
    arrays = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
    return random_dictionary(width, count, 0, fingerprint, b_dec_D=jnp.zeros(width), **arrays)


def made_reading(folder, *parts):
    """A reading of dictionaries: (dictionary, values [N, D], tokens as their model reads them)."""
    compared, reads, norms = [], {}, {}
    (folder / "text").mkdir(parents=True)
    for number, (dictionary, values_NxD, read) in enumerate(parts):
        path, fingerprint = folder / "train" / f"d{number}" / "dictionary", dictionary.config.fingerprint
        save_dictionary(path, dictionary)
        compared.append(Compared(f"d{number}", path, dictionary.config))
        reads[fingerprint] = read
        norms[fingerprint, SITE] = 50.0
        encode(dictionary, values_NxD, 64).save(folder / "text" / f"activity-{number:04d}.npz")
        np.save(folder / "text" / f"values-{fingerprint}-{SITE}.npy", values_NxD)
    return Reading(TransferConfig(), compared, make_mesh(), SharedText(folder / "text", reads, norms))


def read_of(text_N=TEXT_N, end_N=END_N):
    """Texts of twenty tokens, of which each ends a character further, or at given places."""
    return ReadText((np.arange(TOKENS),) * TEXTS, 0, text_N, end_N)


def shared_share(found, first=0, second=1):
    """The share of pairs by activity that are shared, and the ceiling, as the stage computes them."""
    (_, matched), *_ = match([("x", *found.rows(first, second, SCORES, False))], make_mesh())
    rows = found.rows(first, second, SCORES, True)
    paired = np.flatnonzero(matched.partner_F >= 0)
    value_F = np.full(len(matched.partner_F), np.nan)
    value_F[paired] = paired_products(rows[0], paired, rows[1], matched.partner_F[paired])
    return score(dataclasses.replace(matched, value_F=value_F), found.compared_features(first, second))


def planted(rng, tokens, features, rate):
    return (rng.random((tokens, features)) < rate) * (1 + rng.random((tokens, features)))


def test_a_dictionary_shares_all_with_itself_and_rare_features_are_left_out(tmp_path):
    rng = np.random.default_rng(0)
    rates = np.where(np.arange(24) < 16, 0.1, 0.004)
    f_NxF = planted(rng, TEXTS * TOKENS, 24, rates[None])
    rows_FxD = rng.normal(size=(24, 32))
    part = reader(rows_FxD, "a"), (f_NxF @ rows_FxD).astype(np.float32), read_of()
    found = made_reading(tmp_path, part, part)
    scores, (first_F, second_G) = shared_share(found), found.compared_features(0, 1)
    assert scores.shared.mean == 1 and scores.matched.mean > 0.999
    halves = [f_NxF[read_of().text_N % 2 == half] > 0 for half in (0, 1)]
    expected_F = np.all([fires.sum(0) >= MIN_FIRINGS for fires in halves], axis=0)
    np.testing.assert_array_equal(first_F, expected_F)
    np.testing.assert_array_equal(second_G, expected_F)
    assert 16 <= expected_F.sum() < 24


def test_a_split_in_five_percent_of_the_words_leaves_a_match_above_nine_tenths(tmp_path):
    """The other side has one token more where a word is split; both parts carry noise of their own."""
    rng = np.random.default_rng(1)
    f_NxF, rows_FxD = planted(rng, TEXTS * TOKENS, 16, 0.1), rng.normal(size=(16, 24))
    first = read_of()
    source_M = np.repeat(np.arange(len(f_NxF)), 1 + (rng.random(len(f_NxF)) < 0.05))
    is_start_M = np.r_[source_M[1:] == source_M[:-1], False]  # of a token that is split
    g_NxF = np.where(is_start_M[:, None], planted(rng, len(source_M), 16, 0.1), f_NxF[source_M])
    doubled = dataclasses.replace(first, end_N=2 * first.end_N)
    second = read_of(first.text_N[source_M], doubled.end_N[source_M] - is_start_M)
    values = [(f @ rows_FxD + 0.05 * rng.normal(size=(len(f), 24))).astype(np.float32) for f in (f_NxF, g_NxF)]
    parts = [(reader(rows_FxD, "a"), values[0], doubled), (reader(rows_FxD, "b"), values[1], second)]
    found = made_reading(tmp_path, *parts)
    scores = shared_share(found)
    assert scores.shared.mean > 0.9 and scores.matched.mean > 0.9 and found.tokens(0, 1) == len(f_NxF)


def test_two_models_of_other_widths_share_what_was_planted(tmp_path):
    """Half of the features of each are of both: the share is within a tenth of that."""
    rng = np.random.default_rng(2)
    common, private = planted(rng, TEXTS * TOKENS, 12, 0.1), [planted(rng, TEXTS * TOKENS, 12, 0.1) for _ in range(2)]
    parts = []
    for width, fingerprint, own in zip((32, 48), "ab", private, strict=True):
        rows_FxD, f_NxF = rng.normal(size=(24, width)), np.concatenate([common, own], axis=1)
        parts.append((reader(rows_FxD, fingerprint), (f_NxF @ rows_FxD).astype(np.float32), read_of()))
    assert abs(shared_share(made_reading(tmp_path, *parts)).shared.mean - 0.5) < 0.1


def described(fingerprint, number=0):
    config = random_dictionary(16, 8, 0, fingerprint).config
    return Compared(f"{fingerprint}{number}", Path(), config)


def test_models_of_equal_width_are_compared_by_activity_alone():
    first, same, second, unknown = described("a"), described("a", 1), described("b"), described("")
    measures = "decoder", "activity"
    assert measures_of(measures, first, second) == ["activity"] and measures_of(("decoder",), first, second) == []
    assert measures_of(("decoder",), first, same) == measures_of(("decoder",), first, unknown) == ["decoder"]


def test_dictionaries_of_other_tools_are_of_the_models_that_they_name(monkeypatch):
    """Pythia-1.4B and Gemma-2B are equally wide, and files of other tools have no fingerprints."""

    def published(model, fingerprint=""):
        config = dataclasses.replace(described(fingerprint).config, model=model)
        return Compared(model, Path(), config)

    pythia, gemma, unnamed = map(published, ("pythia-1.4b", "google/gemma-2b", ""))
    ours, folder = published("EleutherAI/pythia-1.4b", "x"), published("/models/a/pythia-1.4b", "x")
    assert measures_of(("decoder", "activity"), pythia, gemma) == ["activity"]
    assert not measures_of(("decoder",), ours, gemma) and pythia.model_key != gemma.model_key
    for each in (unnamed, ours, folder, published("EleutherAI/Pythia-1.4b")):
        assert measures_of(("decoder",), pythia, each) == ["decoder"]
    loaded = []

    def load(config, mesh):
        loaded.append(config.path)
        return SimpleNamespace(source=SimpleNamespace(fingerprint="x"))

    monkeypatch.setattr(reading, "resolve", lambda config, decoder: SimpleNamespace(name=config.path, fingerprint="x"))
    monkeypatch.setattr(reading, "load_configured_model", load)
    config = ModelConfig(path="EleutherAI/pythia-1.4b")
    for each in (pythia, gemma, unnamed):
        reading.load_model_of(config, each, None, by_name=True)
    reading.load_model_of(config, gemma, None)
    assert loaded == ["EleutherAI/pythia-1.4b", "google/gemma-2b", *2 * ["EleutherAI/pythia-1.4b"]]


def comparison(tmp_path, dictionaries):
    """A comparison of all pairs by their decoders."""
    compared = []
    for number, dictionary in enumerate(dictionaries):
        path = tmp_path / "train" / f"d{number}"
        save_dictionary(path, dictionary)
        compared.append(Compared(f"d{number}", path, dictionary.config))
    (tmp_path / "transfer").mkdir()
    configs = Configs(TransferConfig(measures=("decoder",)), MeshConfig())
    run = SimpleNamespace(configs=configs, folder=tmp_path / "transfer", say=lambda line: None)
    return Comparison(run, compared, list(itertools.combinations(range(len(compared)), 2)))


def test_dead_features_do_not_dilute_decoder_scores(tmp_path):
    own, second = (random_dictionary(32, 200, seed) for seed in (0, 1))
    dead_F = np.arange(200) % 5 < 2
    rows = [np.asarray(one.W_dec_FxD[...]) for one in (own, second)]
    copy = Dictionary(own.config, **own.arrays | dict(W_dec_FxD=jnp.asarray(np.where(dead_F[:, None], *rows[::-1]))))
    for number in range(2):
        folder = tmp_path / "evaluate" / f"d{number}"
        folder.mkdir(parents=True)
        write_array(folder / "firing_rate.npy", np.where(dead_F, 0, 0.01).astype(np.float32))
    made = comparison(tmp_path, [own, copy])
    (pair,) = made.measure("000-d0", 0, lambda done, total: None).results
    scores = pair.measures["decoder"]
    assert scores.scores.matched.mean > 0.999 and scores.scores.shared.mean == 1
    assert scores.compared == (120, 120) and scores.left_out == (80, 80)


def test_dictionaries_are_dropped_after_use(tmp_path, monkeypatch):
    """However many are compared, few are in memory at once, and rows stay within a limit."""
    alive, most = weakref.WeakSet(), [0]
    load = compared_file.load_dictionary

    def counted(folder, **options):
        dictionary = load(folder, **options)
        alive.add(dictionary)
        most[0] = max(most[0], len(alive))
        return dictionary

    monkeypatch.setattr(compared_file, "load_dictionary", counted)
    monkeypatch.setattr(transfer_run, "_ROW_BYTES", 5 * 24 * 16 * 4)
    made = comparison(tmp_path, [random_dictionary(16, 24, seed) for seed in range(8)])
    for first in range(7):
        made.measure(f"{first:03d}-d{first}", first, lambda done, total: None)
    assert most[0] <= 3
    assert made._weights.cache_info().currsize == 5


def test_where_nothing_fires_there_are_no_partners_and_no_figure(tmp_path):
    values_NxD = np.random.default_rng(0).normal(size=(TEXTS * TOKENS, 16)).astype(np.float32)
    dead, live = random_dictionary(16, 24, 0, b_enc_F=np.full(24, -1e6, np.float32)), random_dictionary(16, 24, 1)
    found = made_reading(tmp_path, *((each, values_NxD, read_of()) for each in (dead, live)))
    scores = shared_share(found)
    assert scores.matched.mean == scores.shared.mean == 0 and not found.compared_features(0, 1)[0].any()
    both = ComparedRows(scores, scores, compared=(0, 9), left_out=(24, 15), ceiling=0.0)
    pair = ComparedPair("a", "b", dict(activity=both))
    ((_, *cells, _),) = report._pairs_table([pair], dict(a="a", b="b")).rows
    assert set(cells) == {MISSING} and np.isnan(report._share_matrix(["a", "b"], [pair], "activity", "scores")).all()
    line = transfer_run._line(SimpleNamespace(name="a"), [pair])
    assert line == "a, 1 pair: by activity, no feature could be compared"


@pytest.mark.parametrize("sizes", [(3, 5), (5, 3)])
def test_scores_leave_features_out_on_both_sides(sizes):
    rng = np.random.default_rng(4)
    first, second = (rng.normal(size=(size, 8)).astype(np.float32) for size in sizes)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    second /= np.linalg.norm(second, axis=1, keepdims=True)
    masks = np.arange(sizes[0]) != 1, np.arange(sizes[1]) != 0
    ((_, found),) = match([("x", first * masks[0][:, None], second * masks[1][:, None])], make_mesh())
    scores = score(found, masks)
    table = (first @ second.T)[np.ix_(*masks)]
    assert scores.nearest.mean == pytest.approx(np.maximum(table.max(1), 0).mean(), abs=1e-6)
    assert scores.nearest_back.mean == pytest.approx(np.maximum(table.max(0), 0).mean(), abs=1e-6)


def test_dictionaries_of_one_shape_are_encoded_by_one_program():
    """Of a shape that no other test has."""
    values_NxD, before = np.random.default_rng(0).normal(size=(20, 9)), firings._encode_tokens._cache_size()
    for layer in range(3):
        dictionary = random_dictionary(9, 17, layer)
        place = dict(site=f"resid_post.{layer}", max_norm=2.0 + layer / 4, fingerprint=str(layer))
        placed = dataclasses.replace(dictionary.config, **place)
        activity = encode(dictionary.with_config(placed), values_NxD, 16)
        real_N = np.linalg.norm(values_NxD, axis=1) <= 2.0 + layer / 4
        assert 0 < real_N.sum() < 20 and np.array_equal(activity.real_N, real_N)
        wanted_NxF = np.asarray(dictionary.encode(values_NxD)) * real_N[:, None]
        np.testing.assert_allclose(activity.f_NxF.toarray(), wanted_NxF, atol=1e-5)
    assert firings._encode_tokens._cache_size() == before + 1


def test_dictionaries_that_normalise_tokens_are_not_moved_to_other_sites(tmp_path):
    values_NxD = np.random.default_rng(0).normal(size=(len(TEXT_N), 8)).astype(np.float32)
    plain, normal = random_dictionary(8, 16, 0), random_dictionary(8, 16, 1)
    normal = normal.with_config(dataclasses.replace(normal.config, input_norm="layer_norm"))
    found = made_reading(tmp_path, *((each, values_NxD, read_of()) for each in (plain, plain, normal)))
    assert found.transfers(0, 1).keys() == {"onto_second", "onto_first"} and found.transfers(0, 2) == {}


def test_only_saes_with_an_encoder_move_to_other_sites():
    """Maps are multiplied into encoder and decoder; matching pursuit reads by its decoder alone."""
    config = random_dictionary(8, 16, 0).config
    assert reading.is_movable(config)
    for change in (dict(kind="matching_pursuit", k=2), dict(input_norm="layer_norm"), dict(target="mlp_out.0")):
        assert not reading.is_movable(dataclasses.replace(config, **change))


def test_transcoders_are_read_without_the_sinks_of_their_targets(lm, tmp_path, monkeypatch):
    """Also where memory holds the values of one pair of sites alone, and where values are given."""
    texts = ["The cat near the dogs runs to Paris.", "She said that it was far, and 3 + 4 = 7."]
    read = read_text(lm.tokenizer, texts, 64, lm.bos)
    norm_N = np.linalg.norm(site_values(lm, read, ["mlp_out.1"], 256)["mlp_out.1"], axis=1)
    limit = float(np.sort(norm_N)[len(norm_N) // 2 :][:2].mean())
    compared, lines = [], []
    for number, sites in enumerate((dict(site="mlp_in.1", target="mlp_out.1"), dict(site="resid_post.0"))):
        limits = dict(max_norm=1e9, target_max_norm=limit if "target" in sites else None)
        config = DictionaryConfig(kind="standard", d_in=64, n_features=24, centred=False, **sites, **limits)
        folder = tmp_path / f"d{number}" / "dictionary"
        save_dictionary(folder, Dictionary.initial(config, jax.random.key(number)))
        compared.append(Compared(f"d{number}", folder, config))
    monkeypatch.setattr(reading, "load_model_of", lambda *arguments: lm)
    monkeypatch.setattr(reading, "_VALUE_BYTES", 1)
    shared = reading.read_shared_text(
        reading.TextsToRead(texts, 64, 256), compared, ModelConfig(), lm.mesh, folder=tmp_path / "text",
        keep_values=True, say=lines.append,
    )  # fmt: skip
    assert shared.activity(0).real_N.tolist() == (norm_N <= limit).tolist() and (norm_N > limit).any()
    assert shared.activity(1).real_N.all() and [len(shared.values(each)) for each in compared] == [len(norm_N)] * 2
    assert lines[-1].endswith("2 texts, 3 sites")
    transcoder = compared[0].load()
    features = read_features(lm, transcoder, dict(enumerate(texts)), np.zeros(24), np.zeros((0, 24)))
    assert features.activity.real_N.tolist() == (norm_N <= limit).tolist()
    acts = capture(lm, texts, ["mlp_in.1", "mlp_out.1"])
    inside_N = np.linalg.norm(acts["mlp_out.1"], axis=1) <= limit
    assert in_memory._encode(acts, transcoder).real_N.tolist() == inside_N.tolist()
