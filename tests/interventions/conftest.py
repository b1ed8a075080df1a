"""A tiny model, prompts, dictionaries at its sites, runs of stages, and fp64 runs in PyTorch to compare with."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from full_passes import PlainRun
from runs import write_members

from saejax.config import Configs
from saejax.dictionaries import Dictionary, DictionaryConfig, save_dictionary
from saejax.interventions import rows, split_model
from saejax.models.settings import ModelConfig
from saejax.parallel.settings import MeshConfig
from saejax.runner.workspace import Run
from saejax.tasks.behaviours import Prompt, PromptScore, write_prompts
from saejax.tasks.gate import write_gate

N_FEATURES = 160
_SUBJECTS = ("cat", "dogs", "water", "year", "war", "capital", "way", "she", "France", "3 + 4", "Paris")


@pytest.fixture(scope="module")
def few_shapes():
    """Fill batches up to few shapes: compiling a program takes longer than all that the tests of a file run by it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_model, "LENGTH_STEP", 32)
        for name, value in dict(_STEP=128, _ROWS=128, _SHARES=(1 / 8, 1 / 2)).items():
            patch.setattr(rows, name, value)
        yield


@pytest.fixture(scope="session")
def tiny(lm):
    """The tiny Llama in fp32 on one device."""
    return lm


@pytest.fixture(scope="session")
def tiny_torch(tiny):
    """The same weights in PyTorch, fp64."""
    from saejax.models import source

    return source.load_torch_model(tiny.source, "float32").double()


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    """22 prompts of 6 to 30 tokens: 14 train, 8 test."""
    return [_prompt(i, "train" if i < 14 else "test") for i in range(22)]


@pytest.fixture(scope="session")
def make_prompt():
    """make_prompt(i, split, behaviour, varied): the i-th prompt."""
    return _prompt


def _prompt(i: int, split: str, behaviour: str = "tiny", varied: bool = True) -> Prompt:
    """Return a prompt of 5 to 25 tokens; of 11, if they are not varied: each length compiles programs of its own."""
    subjects = _SUBJECTS if varied else [text for text in _SUBJECTS if " " not in text]
    first, second = subjects[i % len(subjects)], subjects[(3 * i + 1 + (not varied) * (i // 10)) % len(subjects)]
    text = f"The {first} near the {second}" + " and so on" * (i % 4 if varied else 1)
    return Prompt(
        behaviour=behaviour,
        split=split,
        text=text,
        correct=" runs" if i % 2 else " the",
        wrong=" far" if i % 3 else " way",
        counterpart=text,
        counterpart_correct=" run",
        items=(first,),
    )


@pytest.fixture(scope="session")
def make_answered(tiny):
    """make_answered(behaviour): 16 train and 16 test prompts that the model answers correctly, with counterparts."""

    def make(behaviour: str) -> list[Prompt]:
        made = []
        for i in range(32):
            prompt = _prompt(i, "train" if i < 16 else "test", behaviour, varied=False)
            # Few pairs of answers, as each is a run of its own.
            right, wrong = prompt.correct, " far"
            output = tiny(tiny.tokenize([prompt.text]))
            if output.logit(tiny.token_id(right)) <= output.logit(tiny.token_id(wrong)):
                right, wrong = wrong, right
            counterpart = prompt.text.replace(" near ", " that ")
            fields = dict(correct=right, wrong=wrong, counterpart=counterpart, template=str(i % 2))
            made.append(dataclasses.replace(prompt, **fields))
        return made

    return make


@pytest.fixture(scope="session")
def make_dictionary(tiny, prompts):
    """make_dictionary(site, dead=0, seed=11, features=160, scales=1): random directions, a tenth of tokens fires each.

    Some positions are sinks. Decoder rows differ in length by a factor of up to ``scales``.
    """

    def make(site: str, dead: int = 0, seed: int = 11, features: int = N_FEATURES, scales: float = 1.0) -> Dictionary:
        rng = np.random.default_rng(seed)
        tokens = tiny.tokenize([prompt.text for prompt in prompts])
        x_NxD = np.asarray(tiny(tokens, capture=[site], logits=False).sites[site])[tokens.mask_BxT]
        W_dec_FxD = rng.normal(size=(features, x_NxD.shape[1]))
        W_dec_FxD /= np.linalg.norm(W_dec_FxD, axis=1, keepdims=True)
        W_enc_DxF = (W_dec_FxD + 0.02 * rng.normal(size=W_dec_FxD.shape)).T
        b_dec_D = x_NxD.mean(axis=0)
        share_F = rng.uniform(0.02, 0.3, features)
        pre_NxF = (x_NxD - b_dec_D[None, :]) @ W_enc_DxF
        b_enc_F = -np.array([np.quantile(pre_F, 1 - share) for pre_F, share in zip(pre_NxF.T, share_F, strict=True)])
        b_enc_F[features - dead :] = -1e4
        W_dec_FxD *= scales ** rng.uniform(-0.5, 0.5, (features, 1)) if scales > 1 else 1.0
        norms_N = np.unique(np.linalg.norm(x_NxD, axis=1).round(4))
        limit = int(0.9 * len(norms_N))
        limit += int(np.argmax(np.diff(norms_N[limit : limit + 8])))  # in a gap, so that rounding decides nothing
        config = DictionaryConfig(
            kind="standard",
            site=site,
            d_in=x_NxD.shape[1],
            n_features=features,
            max_norm=float(norms_N[limit : limit + 2].mean()),
            model=tiny.source.name,
            fingerprint=tiny.source.fingerprint,
        )
        arrays = dict(W_enc_DxF=W_enc_DxF, b_enc_F=b_enc_F, W_dec_FxD=W_dec_FxD, b_dec_D=b_dec_D)
        return Dictionary(config, **{name: jax.numpy.asarray(a, np.float32) for name, a in arrays.items()})

    return functools.cache(make)


@pytest.fixture(scope="session")
def pairs(tiny, prompts) -> list[Prompt]:
    """Prompts whose counterpart is another one of as many tokens."""
    lengths = tiny.tokenize([prompt.text for prompt in prompts]).lengths_B.tolist()
    last = {length: prompt.text for length, prompt in zip(lengths, prompts, strict=True)}
    paired = [dataclasses.replace(p, counterpart=last[n]) for n, p in zip(lengths, prompts, strict=True)]
    return [pair for pair in paired if pair.counterpart != pair.text]


@pytest.fixture
def plain(tiny, tiny_torch):
    """plain(dictionary, prompt) -> PlainRun."""

    def make(dictionary: Dictionary, prompt: Prompt) -> PlainRun:
        ids_T = tiny.tokenize([prompt.text]).ids_BxT[0].tolist()
        return PlainRun(tiny_torch, dictionary, ids_T, tiny.token_id(prompt.correct), tiny.token_id(prompt.wrong))

    return make


@pytest.fixture(scope="session")
def save_inputs(make_dictionary):
    """save_inputs(folder, prompts): what stages read of earlier ones, scored prompts and the dictionary topk."""

    def save(folder, prompts, dictionary=None):
        baseline, train = folder / "baseline", folder / "train" / "topk"
        baseline.mkdir()
        write_prompts(baseline / "prompts.jsonl", prompts, [PromptScore(1.0, True, None)] * len(prompts))
        write_gate(baseline, {}, dict(first="one answer is right in every prompt"))
        save_dictionary(train, dictionary or make_dictionary("resid_post.1"))
        write_members(train, "")
        return {"baseline": baseline, "train/topk": train}

    return save


@pytest.fixture
def stage_run(tmp_path, tiny_llama):
    """stage_run(stage, unit, inputs, folder, *settings): a run of a stage on the tiny model, and what it says."""

    def make(stage, unit, inputs, folder, *settings, **fields):
        (tmp_path / folder).mkdir(exist_ok=True)
        lines = []
        configs = Configs(ModelConfig(path=str(tiny_llama)), MeshConfig(), *settings)
        return Run(stage, unit, tmp_path / folder, configs, inputs, say=lines.append, **fields), lines

    return make
