"""sae-lens' side of bench_quality: its own trainer on rows of a file, in an environment that has it.

Run by bench_quality: python bench_quality_saelens.py ROWS.npy FOLDER '{"kind": "topk", "k": 32, "lr": 1e-3, ...}'
Trains with sae-lens' ``fit`` and saves what it would publish to FOLDER.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.sae_trainer import SAETrainer


def batches(rows_NxD: np.ndarray, batch: int, seed: int):
    """Yield batches without end, with the rows shuffled anew in each epoch."""
    for epoch in range(10**6):
        order_N = np.random.default_rng([seed, epoch]).permutation(len(rows_NxD))
        for start in range(0, len(order_N) - batch + 1, batch):
            yield torch.from_numpy(rows_NxD[order_N[start : start + batch]])


def settings(request: dict, steps: int) -> dict:
    """Return sae-lens' settings of a kind, with penalties warmed up over a twentieth of the steps."""
    warmup = steps // 20
    if request["kind"] == "standard":
        return dict(l1_coefficient=request["l1"], l1_warm_up_steps=warmup)
    if request["kind"] == "jumprelu":
        # Its settings for a penalty on the size of activations, which move L0 within a thousand steps; with those for
        # a penalty on their number thresholds rise by a learning rate per step at most.
        anthropic = dict(jumprelu_sparsity_loss_mode="tanh", jumprelu_ste_to_input=True, jumprelu_bandwidth=2.0)
        anthropic |= dict(jumprelu_init_threshold=0.1, pre_act_loss_coefficient=3e-6)
        return anthropic | dict(l0_coefficient=request["l0_coefficient"], l0_warm_up_steps=warmup)
    return dict(k=request["k"])


def main() -> None:
    """Run the benchmark and print its figures."""
    rows_NxD, folder, request = np.load(sys.argv[1], mmap_mode="r"), Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.manual_seed(request["seed"])
    batch, samples = request["batch"], request["tokens"]
    steps, d = samples // batch, rows_NxD.shape[1]
    sae_class, config_class = get_sae_training_class(request["kind"])
    config = config_class(
        d_in=d,
        d_sae=request["features"],
        dtype="float32",
        device="cpu",
        normalize_activations="expected_average_only_in",
        metadata=SAEMetadata(model_name="smollm2", hook_name=request["hook"]),
        **settings(request, steps),
    )
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=samples,
            train_batch_size_samples=batch,
            lr=request["lr"],
            lr_end=request["lr"] / 100,
            lr_warm_up_steps=steps // 20,
            lr_decay_steps=steps // 5,
            device="cpu",
            autocast=True,
            dead_feature_window=100,
            n_batches_for_norm_estimate=50,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae_class(config),
        batches(rows_NxD, batch, request["seed"]),
    )
    trainer.fit()
    trainer.sae.save_inference_model(folder)


if __name__ == "__main__":
    main()
