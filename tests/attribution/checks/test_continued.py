"""Prompts continued with changed features: against hooks in PyTorch, and against the generation without changes."""

import numpy as np
import pytest
from made_transcoders import IDS

from saejax.attribution.local.edits import Change
from saejax.errors import UserError
from saejax.models.tokens import Tokens


def test_a_prompt_is_continued_with_changes_as_with_hooks_in_torch(traced, lm):
    import torch

    from saejax.models import source

    local, transcoders, *_ = traced
    changes = [Change(1, slice(3, None), 3, 2.0), Change(2, 2, 5, 1.5), Change(2, slice(0, 2), 5, 1.0)]
    found = local.generate(changes, 4)
    assert found.ids_N.tolist() == found.logits_NxV.argmax(axis=1).tolist() and len(found.ids_N) == 4
    model = source.load_torch_model(lm.source, "float32").double()

    def write(layer, feature, value_of):
        def hook(module, inputs, output):
            acts_T = np.asarray(transcoders[layer].encode(np.asarray(inputs[0][0].numpy(), np.float32)))[:, feature]
            moved_T = [value_of.get(t, value_of.get("on") if t >= 3 else None) for t in range(len(acts_T))]
            own_T = np.where(np.arange(len(acts_T)) > 0, acts_T, 0)
            added_T = [0 if value is None else value - own for value, own in zip(moved_T, own_T, strict=True)]
            direction_D = np.array(transcoders[layer].W_dec_FxD[...])[feature]
            return output + torch.from_numpy(np.array(added_T)[:, None] * direction_D).double()[None]

        return model.model.layers[layer].mlp.register_forward_hook(hook)

    write(1, 3, {"on": 2.0})
    write(2, 5, {0: 1.0, 1: 1.0, 2: 1.5})
    ids = list(IDS)
    for logits_V in found.logits_NxV:
        with torch.no_grad():
            np.testing.assert_allclose(logits_V, model(torch.tensor([ids])).logits[0, -1], atol=3e-5)
        ids.append(int(logits_V.argmax()))


def test_attention_may_be_held_while_a_prompt_is_continued(traced, lm):
    local, _, readouts, _ = traced
    row = [Change(0, 2, 3, 4.0), Change(1, 3, 5, 3.0)]
    free, held = (local.generate(row, 2, freeze) for freeze in ("none", "attention"))
    for found, freeze in ((free, "none"), (held, "attention")):
        wanted_V = local.run([row], freeze, readouts=readouts).logits_RxV[0]
        np.testing.assert_allclose(found.logits_NxV[0], wanted_V, atol=1e-5)
    assert np.abs(free.logits_NxV[0] - held.logits_NxV[0]).max() > 1e-4
    tokens = Tokens(np.array([IDS], np.int32), np.array([len(IDS)], np.int32))
    (plain,) = lm.generate(tokens, 3)
    assert local.generate([], 3, "attention").ids_N.tolist()[: len(plain.ids)] == list(plain.ids)
    with pytest.raises(UserError, match="freeze is 'all'"):
        local.generate(row, 2, "all")
