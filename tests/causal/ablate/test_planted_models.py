"""Real models whose truth is planted, through the stage's own code: where features are what the model reads, they do
more at equal dose than principal components; where it reads one dense direction, components do, and the answer says so.
"""

import itertools
import string

import numpy as np
import pytest
from runs import write_members
from safetensors.numpy import load_file, save_file
from tiny_models import save_tiny_llama, save_tiny_tokenizer

from saejax import load_model
from saejax.causal.ablate import run as stage
from saejax.causal.ablate.report import _as_well
from saejax.config import Configs
from saejax.dictionaries import Dictionary, DictionaryConfig, save_dictionary
from saejax.settings import AblateConfig, CorpusConfig, MeshConfig, ModelConfig, TaskConfig
from saejax.tasks.behaviours import Prompt, write_prompts
from saejax.workspace import Run

WIDTH, FEATURES, CARRIERS = 64, 60, 4
ENDS = string.ascii_uppercase[:20] + string.digits[:4], string.ascii_uppercase[20:] + string.digits[4:] + "xqvkzj"


class World:
    """A stream that is sum_i f_i W_i + z v + c, of which the answer's tokens read the carriers, or v; less c.

    The layers of the model add nothing, so that the stream is the embedding of its token. The carriers, features 0 to
    3, fire on every token. Where ``dense``, each writes a little of v, and most of v is no feature's.
    """

    def __init__(self, dense: bool):
        rng = np.random.default_rng(7)
        across_DxD = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
        self.v_D, constant_D = across_DxD[FEATURES], across_DxD[FEATURES + 1]
        self.of_v = 0.5 if dense else 0.0
        write_FxD = across_DxD[:FEATURES].copy()
        write_FxD[:CARRIERS] *= np.sqrt(1 - self.of_v**2)
        self.read_FxD = across_DxD[:FEATURES] / np.linalg.norm(write_FxD, axis=1, keepdims=True)
        write_FxD[:CARRIERS] += self.of_v * self.v_D
        self.write_FxD = write_FxD
        f_VxF = (rng.random((384, FEATURES)) < 0.1) * rng.uniform(0.5, 1.5, (384, FEATURES))
        f_VxF[:, :CARRIERS] = rng.uniform(1.0, 1.4, (384, CARRIERS))
        self.z_V = rng.uniform(-3.5, -2.5, 384) if dense else np.zeros(384)
        self.stream_VxD = f_VxF @ write_FxD + 2.0 * constant_D
        reads_D = self.v_D if dense else write_FxD[:CARRIERS].sum(axis=0)
        self.gain_D = reads_D - (1.9 if dense else 1.2) * constant_D
        self.gain_D += 0.1 * rng.choice([-1.0, 1.0], FEATURES - CARRIERS) @ write_FxD[CARRIERS:]  # and a little of all
        self.gain_D *= 0.5 if dense else 0.2  # or the answers would be all that the model says
        self.unembed_VxD = 0.15 * rng.normal(size=(384, WIDTH))

    def save(self, folder, ends, answers):
        """Writes the model; ``ends`` are the ids of the tokens that prompts end with, ``answers`` of both answers."""
        self.z_V[ends] = -self.z_V[ends]
        weights = load_file(folder / "model.safetensors")
        for name in weights:
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weights[name] = np.zeros_like(weights[name])
        self.unembed_VxD[answers] = self.gain_D, -self.gain_D
        self.stream_VxD += self.z_V[:, None] * self.v_D
        weights["model.embed_tokens.weight"] = self.stream_VxD.astype(np.float32)
        weights["lm_head.weight"] = self.unembed_VxD.astype(np.float32)
        weights["model.norm.weight"] = np.ones(WIDTH, np.float32)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    def differences(self, ids, features):
        """Logit differences after prompts that end with these tokens, without some features, by the formula."""
        x_PxD = self.stream_VxD[ids]
        f_PxF = np.maximum(x_PxD @ self.read_FxD.T - 0.1 / np.linalg.norm(self.write_FxD, axis=1), 0.0)
        x_PxD = x_PxD - f_PxF[:, features] @ self.write_FxD[features]
        return 2 * x_PxD @ self.gain_D / np.sqrt(np.square(x_PxD).mean(axis=1) + 1e-6)

    def dictionary(self, source):
        """Reads every feature, 0.1 too little, and none of what is no feature's."""
        config = DictionaryConfig(
            kind="standard", site="resid_post.1", d_in=WIDTH, n_features=FEATURES, model=source.name,
            fingerprint=source.fingerprint, max_norm=1e9,
        )  # fmt: skip
        norm_Fx1 = np.linalg.norm(self.write_FxD, axis=1, keepdims=True)
        arrays = dict(
            W_enc_DxF=(self.read_FxD * norm_Fx1).T,
            b_enc_F=np.full(FEATURES, -0.1),
            W_dec_FxD=self.write_FxD / norm_Fx1,
            b_dec_D=np.zeros(WIDTH),
        )
        return Dictionary(config, **{name: np.asarray(array, np.float32) for name, array in arrays.items()})


def prompts():
    """Train and test prompts that end with different letters."""
    return [
        Prompt("planted", split, text, " runs", " far", text, " far", ())
        for split, letters in zip(("train", "test"), ENDS, strict=True)
        for text in (f"The {noun}{letter}" for noun, letter in itertools.product(("cat ", "war "), letters))
    ]


def planted(folder, dense):
    """The stage's results on a planted model."""
    model, baseline, train, unit = (folder / name for name in ("model", "baseline", "train", "ablate"))
    save_tiny_llama(model)
    save_tiny_tokenizer(model, 384)
    plain = load_model(str(model))
    ids = {letter: plain.tokenize([f"The cat {letter}"]).ids_BxT[0, -1] for letter in "".join(ENDS)}
    assert len(set(ids.values())) == len(ids)
    world = World(dense)
    world.save(model, list(ids.values()), [plain.token_id(" runs"), plain.token_id(" far")])
    source = load_model(str(model)).source
    for made in (baseline, unit):
        made.mkdir()
    write_prompts(baseline / "prompts.jsonl", prompts())
    save_dictionary(train, world.dictionary(source))
    write_members(train, "")
    config = AblateConfig(
        top=CARRIERS, draws=99, draw_prompts=0, bootstrap=500, curve=False, baselines=("components",), text_documents=4
    )
    configs = Configs(ModelConfig(path=str(model)), MeshConfig(), config, CorpusConfig(), TaskConfig())
    run = Run("ablate", "topk", unit, configs, {"baseline": baseline, "train/topk": train}, say=lambda line: None)
    tested = [ids[prompt.text[-1]] for prompt in prompts() if prompt.split == "test"]
    return world, tested, stage.run_ablate(run).behaviours["planted"]


@pytest.mark.parametrize("dense", [False, True])
def test_at_equal_dose_the_basis_wins_that_the_model_reads(tmp_path, dense):
    world, tested, result = planted(tmp_path, dense)
    assert {entry.feature for entry in result.top} == set(range(CARRIERS))
    drop_P = world.differences(tested, []) - world.differences(tested, list(range(CARRIERS)))
    assert result.joint.logit_diff_drop.mean == pytest.approx(drop_P.mean(), rel=1e-4)
    assert result.grades.harms.holds and result.grades.beyond_matched.holds, result.grades
    components = result.doses["components"]
    for at in (components.by_norm, components.by_kl):
        assert (at.difference.high < 0) if dense else (at.difference.low > 0)
    assert result.grades.beyond_bases.holds is not dense
    assert _as_well(result) == (["principal components"] if dense else [])
    assert (result.grades.highest == "beyond_matched") is dense
