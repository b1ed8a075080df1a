"""A model whose answer is known by construction: the right features come first, with the effects of the formula."""

import numpy as np
import pytest
from full_passes import ablate_sets

from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.interventions import slopes as screening
from saejax.interventions.split_model import SplitModel
from saejax.tasks.behaviours import Prompt

PLANTED = [7, 3, 11]  # features that write the answer, strongest first


@pytest.fixture(scope="module")
def planted(identity_llama):
    """Prompts, and a linear dictionary that is a basis of the stream: three of its directions write the answer."""
    answers = identity_llama.token_id(" runs"), identity_llama.token_id(" far")
    unembed_VxD = np.asarray(
        identity_llama.params["embed_VxD"] if identity_llama.config.tied else identity_llama.params["unembed_DxV"].T
    )
    gain_D = np.asarray(identity_llama.params["final_norm_D"], np.float64)
    along_D = (unembed_VxD[answers[0]] - unembed_VxD[answers[1]]).astype(np.float64) * gain_D
    rng = np.random.default_rng(0)
    across_FxD = rng.normal(size=(64, 64))
    across_FxD -= np.outer(across_FxD @ along_D, along_D) / (along_D @ along_D)  # these write nothing of it
    W_dec_FxD = across_FxD / np.linalg.norm(across_FxD, axis=1, keepdims=True)
    for strength, feature in zip((3.0, 2.0, 1.0), PLANTED, strict=True):
        W_dec_FxD[feature] = 0.3 * W_dec_FxD[feature] + strength * along_D / np.linalg.norm(along_D)
    W_dec_FxD /= np.linalg.norm(W_dec_FxD, axis=1, keepdims=True)
    config = DictionaryConfig(
        kind="standard", site="resid_post.1", d_in=64, n_features=64, model=identity_llama.source.name,
        fingerprint=identity_llama.source.fingerprint, max_norm=1e9,
    )  # fmt: skip
    W_enc_DxF = rng.normal(size=(64, 64)) / 8
    b_enc_F = np.where(np.isin(np.arange(64), PLANTED), 2.0, 0.0)  # the planted ones fire everywhere
    arrays = dict(W_enc_DxF=W_enc_DxF, b_enc_F=b_enc_F, W_dec_FxD=W_dec_FxD, b_dec_D=np.zeros(64))
    dictionary = Dictionary(config, **{name: np.asarray(array, np.float32) for name, array in arrays.items()})
    texts = [f"The {noun} near the {other}" for noun in ("cat", "dog", "war", "year") for other in ("way", "water")]
    prompts = [Prompt("x", "test", text, " runs", " far", text, " far", ()) for text in texts]
    return dictionary, prompts, along_D


def test_effects_equal_the_formula_and_the_right_features_come_first(identity_llama, planted):
    dictionary, prompts, along_D = planted
    split = SplitModel(identity_llama, dictionary)
    runs = split.run(prompts)
    diffs = ablate_sets(split, runs, [[feature] for feature in range(64)] + [PLANTED])
    eps = identity_llama.config.norm_eps
    W_dec_FxD = np.asarray(dictionary.W_dec_FxD[...], np.float64)
    worst = 0.0
    for run in runs:
        for row, p in enumerate(run.index_P):
            x_D = np.asarray(run.value_BxTxD[row, run.last_B[row]], np.float64)
            f_F = np.asarray(dictionary.encode(x_D.astype(np.float32)), np.float64)

            def answer(x_D):
                return along_D @ x_D / np.sqrt(np.mean(x_D**2) + eps)

            wanted_S = [answer(x_D - f_F[i] * W_dec_FxD[i]) for i in range(64)]
            wanted_S.append(answer(x_D - f_F[PLANTED] @ W_dec_FxD[PLANTED]))
            scale = np.abs(answer(x_D))
            worst = max(worst, np.abs(diffs.ablated_SxP[:, p] - wanted_S).max() / scale)
    assert worst < 1e-4
    drop_F = diffs.drop_SxP[:64].mean(axis=1)
    assert set(np.argsort(-np.abs(drop_F))[:3].tolist()) == set(PLANTED)
    assert set(screening.leaders(screening.attribution(split, runs).mean(axis=0), 3)) == set(PLANTED)
