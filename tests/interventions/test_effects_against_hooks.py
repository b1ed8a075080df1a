"""Joint and single effects of every kind of ablation against plain PyTorch hooks in float64, within 2e-5 logits."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from saejax.dictionaries import Dictionary
from saejax.interventions import edits, engine
from saejax.interventions.edits import ActivationReplacement
from saejax.interventions.rows import gather
from saejax.interventions.split_model import SplitModel

SETS = [[3], [40], [7, 90, 120], list(range(0, 160, 2)), []]


@pytest.fixture(scope="module")
def few(prompts):
    return prompts[:6]


@pytest.fixture(scope="module")
def dictionaries(tiny, make_dictionary) -> dict[str, Dictionary]:
    """An SAE, and a transcoder of the same size whose features write to the MLP's output."""
    sae, reads = make_dictionary("resid_post.1"), make_dictionary("mlp_in.1")
    config = dataclasses.replace(reads.config, target="mlp_out.1", target_max_norm=1e9, centred=False)
    arrays = reads.arrays
    # Without centring, the encoder's bias takes the decoder's bias along.
    arrays["b_enc_F"] = arrays["b_enc_F"] - arrays["b_dec_D"] @ arrays["W_enc_DxF"]
    return dict(sae=sae, transcoder=Dictionary(config, **arrays))


class TorchPrompt:
    """One prompt in PyTorch: what the dictionary reads, its features, and the logit difference after a change.

    Args:
      model: the model, float64.
      dictionary: of layer 1.
      ids_T: the prompt.
      answers: token ids of the correct and the wrong answer.
    """

    def __init__(self, model: Any, dictionary: Dictionary, ids_T: list[int], answers: tuple[int, int]):
        self._model, self._config, self._ids_T, self._answers = model, dictionary.config, ids_T, answers
        arrays = {name: np.asarray(array, np.float64) for name, array in dictionary.arrays.items()}
        block = model.model.layers[1]
        self._module = block.mlp if self._config.target else block
        kept: dict[str, np.ndarray] = {}
        self.logit_diff(lambda value_TxD: value_TxD, kept)
        x_TxD = kept["read"] if self._config.target else kept["value"]
        centre_D = arrays["b_dec_D"] if self._config.centred else 0.0
        self.usable_T = np.linalg.norm(x_TxD, axis=1) <= self._config.max_norm
        self.f_TxF = np.maximum((x_TxD - centre_D) @ arrays["W_enc_DxF"] + arrays["b_enc_F"], 0.0)
        self.W_dec_FxD = arrays["W_dec_FxD"]
        self.rebuilt_TxD = self.f_TxF @ self.W_dec_FxD + arrays["b_dec_D"]

    def logit_diff(self, change: Any, kept: dict[str, np.ndarray] | None = None) -> float:
        """Return the logit difference when the site's value, [T, D], becomes ``change(value)``."""

        def hook(module: Any, inputs: Any, output: Any) -> Any:
            value_1xTxD = output[0] if isinstance(output, tuple) else output
            if kept is not None:
                kept.update(read=inputs[0][0].numpy(), value=value_1xTxD[0].numpy())
            changed_1xTxD = torch.from_numpy(np.asarray(change(value_1xTxD[0].numpy())))[None]
            return (changed_1xTxD, *output[1:]) if isinstance(output, tuple) else changed_1xTxD

        handle = self._module.register_forward_hook(hook)
        with torch.no_grad():
            logits_V = self._model(torch.tensor([self._ids_T])).logits[0, -1]
        handle.remove()
        return float(logits_V[self._answers[0]] - logits_V[self._answers[1]])

    def ablated(self, fall_TxF: np.ndarray, features: list[int], error: str) -> float:
        """Return the logit difference when the activations of some features fall by ``fall_TxF``."""
        change_TxD = fall_TxF[:, features] @ self.W_dec_FxD[features]

        def change(value_TxD: np.ndarray) -> np.ndarray:
            if error == "drop":
                value_TxD = np.where(self.usable_T[:, None], self.rebuilt_TxD, value_TxD)
            return value_TxD - change_TxD

        return self.logit_diff(change)


def drawn_falls(tiny, dictionary, few, source, positions, error) -> list[np.ndarray]:
    """Return by how much each prompt's activations fall under random replacement, [T, F] each.

    What the draws are is tested elsewhere; here they are those of the engine.
    """
    split = SplitModel(tiny, dictionary, positions, error)
    falls: list[Any] = [None] * len(few)
    features_F = np.arange(dictionary.config.n_features)
    for number, run in enumerate(split.run(few)):
        edited = engine.EditedRun(run, run, source.of_run(number))
        fall_BxTxF, _ = gather(split.point, split.dictionary, *edited.arrays, features_F, len(run.index_P))
        for row, prompt in enumerate(run.index_P):
            falls[prompt] = np.asarray(fall_BxTxF, np.float64)[row, : run.last_B[row] + 1]
    return falls


@pytest.mark.parametrize("positions", ["all", "last", "1:4"])
@pytest.mark.parametrize("error", ["keep", "drop"])
@pytest.mark.parametrize("kind", ["zero", "mean", "random"])
@pytest.mark.parametrize("name", ["sae", "transcoder"])
def test_effects_equal_torch_hooks(tiny, tiny_torch, few, dictionaries, name, kind, error, positions):
    dictionary = dictionaries[name]
    mean_F = np.linspace(0.0, 0.5, dictionary.config.n_features).astype(np.float32)
    source = ActivationReplacement(
        kind, mean_F=mean_F if kind == "mean" else None, seed=np.uint32(3) if kind == "random" else None
    )
    batch = edits.mask(dictionary, SETS, 1.0, source)
    got_ExP = engine.effects(tiny, few, batch, ("logit_diff",), positions, error)[:, :, 0]
    drawn = drawn_falls(tiny, dictionary, few, source, positions, error) if kind == "random" else [None] * len(few)
    largest = 0.0
    for p, (prompt, drawn_TxF) in enumerate(zip(few, drawn, strict=True)):
        ids_T = tiny.tokenize([prompt.text]).ids_BxT[0].tolist()
        run = TorchPrompt(tiny_torch, dictionary, ids_T, (tiny.token_id(prompt.correct), tiny.token_id(prompt.wrong)))
        asked_T = np.zeros(len(ids_T), bool)
        asked_T[dict(all=slice(None), last=slice(-1, None)).get(positions, slice(1, 4))] = True
        editable_Tx1 = (asked_T & run.usable_T)[:, None]
        fall_TxF = editable_Tx1 * (run.f_TxF - (mean_F if kind == "mean" else 0.0))
        if drawn_TxF is not None:
            fall_TxF = drawn_TxF
        wanted_E = np.array([run.ablated(fall_TxF, features, error) for features in SETS])
        np.testing.assert_allclose(got_ExP[:, p], wanted_E, atol=2e-5)
        largest = max(largest, float(np.ptp(wanted_E)))
    assert largest > 0.02, "an edit changes something"
