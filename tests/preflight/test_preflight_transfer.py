"""What preflight says of stages that compare dictionaries: as many as the stage will find."""

import jax.numpy as jnp
import pytest
from preflight_setup import plan_run, shape

from saejax.dictionaries import Dictionary, DictionaryConfig, save_dictionary
from saejax.errors import UserError
from saejax.matching.transfer.cost import transfer_cost


def test_a_folder_of_a_stack_is_as_many_dictionaries_as_it_holds(tmp_path):
    arrays = dict(W_enc_DxF=(8, 1), b_enc_F=(1,), W_dec_FxD=(1, 8), b_dec_D=(8,))
    for layer in range(4):
        config = DictionaryConfig(kind="standard", site=f"resid_post.{layer}", d_in=8, n_features=1, centred=False)
        one = Dictionary(config, **{name: jnp.zeros(size) for name, size in arrays.items()})
        save_dictionary(tmp_path / f"resid_post.{layer}" / "dictionary", one)

    def pairs(*names):
        plan = plan_run(shape("qwen3-0.6b"), "resid_post.3", train__kinds=("topk",), transfer__dictionaries=names)
        return transfer_cost(plan, "").counts["pairs"]

    assert pairs(str(tmp_path)) == 6 and pairs(str(tmp_path), "topk") == 10
    assert pairs(f"{tmp_path}/resid_post.0", "topk") == 1
    with pytest.raises(UserError, match="nothing/here"):
        pairs(f"{tmp_path}/nothing/here", "topk")
    with pytest.raises(UserError, match="standard"):
        pairs("standard", "topk")
