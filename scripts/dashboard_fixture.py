"""Writes the contexts that SAEDashboard finds for a small dictionary: tests/interpret/sae_dashboard.json.

    python -m venv build/dashboard && build/dashboard/bin/pip install sae-dashboard torch==2.13.0
    build/dashboard/bin/python scripts/dashboard_fixture.py

Does not import saejax; an installed torchvision must match the build of torch. The dictionary reads the sum of a
token's and a position's embedding, so the file holds everything that determines an activation, and the tool's output.
The tool does not show first tokens, so no feature fires there.
"""

import importlib.metadata
import json
from pathlib import Path

import numpy as np
import torch
from sae_dashboard.components_config import SequencesConfig
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import StandardSAE, StandardSAEConfig
from transformer_lens import HookedTransformer, HookedTransformerConfig

PATH = Path(__file__).parent.parent / "tests" / "interpret" / "sae_dashboard.json"
VOCABULARY, WIDTH, FEATURES, TEXTS, LENGTH, SHOWN = 48, 12, 8, 24, 16, 10
HOOK = "blocks.0.hook_resid_pre"


def main() -> None:
    """Write the fixture."""
    rng = np.random.default_rng(0)
    sizes = dict(n_layers=1, d_model=WIDTH, n_ctx=LENGTH, d_head=6, n_heads=2, d_vocab=VOCABULARY, act_fn="relu")
    model = HookedTransformer(HookedTransformerConfig(**sizes, device="cpu", seed=0))
    embed_VxD = rng.normal(size=(VOCABULARY, WIDTH)).round(3)
    ids_NxT = np.stack([rng.permutation(VOCABULARY)[:TEXTS] for _ in range(LENGTH)], axis=1)  # no ties
    W_dec_FxD = rng.normal(size=(FEATURES, WIDTH))
    W_dec_FxD /= np.linalg.norm(W_dec_FxD, axis=1, keepdims=True)
    arrays = dict(W_enc=W_dec_FxD.T.round(3), b_enc=-rng.uniform(0.2, 1.5, FEATURES).round(3), W_dec=W_dec_FxD)
    position_TxD = rng.normal(scale=0.3, size=(LENGTH, WIDTH)).round(3)
    position_TxD[0] = np.linalg.lstsq(arrays["W_enc"].T, np.full(FEATURES, -9.0), rcond=None)[0].round(3)
    model.W_E.data = torch.tensor(embed_VxD, dtype=torch.float32)
    model.W_pos.data = torch.tensor(position_TxD, dtype=torch.float32)
    sae = StandardSAE(StandardSAEConfig(d_in=WIDTH, d_sae=FEATURES, apply_b_dec_to_input=False))
    for name, array in arrays.items():
        getattr(sae, name).data = torch.tensor(array, dtype=torch.float32)
    sae.b_dec.data[:] = 0
    config = SaeVisConfig(hook_point=HOOK, features=list(range(FEATURES)), minibatch_size_tokens=TEXTS)
    config.feature_centric_layout.seq_cfg = SequencesConfig(
        buffer=None, top_acts_group_size=SHOWN, n_quantiles=0, compute_buffer=True
    )
    dashboard = SaeVisRunner(config).run(encoder=sae, model=model, tokens=torch.tensor(ids_NxT))
    features = []
    for feature in range(FEATURES):
        data = dashboard.feature_data_dict[feature]
        group = data.sequence_data.seq_group_data[0]
        features.append(
            dict(
                title=data.acts_histogram_data.title,
                top=[
                    dict(
                        text=sequence.original_index,
                        position=sequence.qualifying_token_index,
                        ids=sequence.token_ids,
                        acts=[round(act, 4) for act in sequence.feat_acts],
                    )
                    for sequence in group.seq_data
                ],
            )
        )
    data = dict(
        version=importlib.metadata.version("sae-dashboard"),
        embed=embed_VxD.tolist(),
        position=position_TxD.tolist(),
        ids=ids_NxT.tolist(),
        W_enc=arrays["W_enc"].tolist(),
        b_enc=arrays["b_enc"].tolist(),
        features=features,
    )
    PATH.write_text(json.dumps(data, separators=(",", ":")) + "\n")
    print(f"{PATH}: {PATH.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
