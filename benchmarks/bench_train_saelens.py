"""sae-lens' side of bench_train: its own trainer, in a process of its own with an environment that has it.

Run by bench_train: reads lines of JSON from its input, trains on the arrays of a file and answers each with a line.
    {"kind": "topk", "autocast": true, "steps": 2}     ->  {"seconds": 0.9}
The first line for a kind and precision makes the trainer, which later lines go on with; "forget": true drops all.
"""

import json
import sys
import time

import numpy as np
import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer

GROUPS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)  # of a Matryoshka dictionary, as ours by default
SETTINGS = {
    "standard": dict(l1_coefficient=0.5),
    "jumprelu": dict(l0_coefficient=1.0),
    "topk": dict(),
    "batchtopk": dict(),
    "matryoshka": dict(),
}
NAMES = {"matryoshka": "matryoshka_batchtopk"}  # theirs, where it is another


def make_trainer(
    kind: str, autocast: bool, batches_NxBxD: torch.Tensor, features: int, k: int, device: str
) -> SAETrainer:
    """Return a trainer as its runner makes one, with Adam, warm-up, clipping and dead counters; it logs nothing."""
    batch, d = batches_NxBxD.shape[1:]
    settings = SETTINGS[kind] | (dict(k=k) if kind in ("topk", "batchtopk", "matryoshka") else {})
    if kind == "matryoshka":
        settings["matryoshka_widths"] = [round(share * features) for share in GROUPS]
    sae_class, config_class = get_sae_training_class(NAMES.get(kind, kind))
    sae = sae_class(config_class(d_in=d, d_sae=features, dtype="float32", device=device, **settings))
    config = SAETrainerConfig(
        total_training_samples=1000 * batch,
        train_batch_size_samples=batch,
        lr=1e-3,
        lr_end=1e-4,
        lr_warm_up_steps=50,
        lr_decay_steps=200,
        device=device,
        autocast=autocast,
        logger=LoggingConfig(log_to_wandb=False),
    )

    def data():
        while True:
            yield from batches_NxBxD

    return SAETrainer(config, sae, data())


def run(trainer: SAETrainer, steps: int) -> float:
    """Return the seconds of so many steps, as ``SAETrainer.fit`` takes them."""
    start = time.perf_counter()
    for _ in range(steps):
        trainer.maybe_reset_sparsity()
        trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1
    return time.perf_counter() - start


def main() -> None:
    """Run the benchmark and print its figures."""
    path, features, k = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    device = sys.argv[4] if len(sys.argv) > 4 else "cpu"
    batches_NxBxD = torch.from_numpy(np.load(path)).to(device)
    torch.manual_seed(0)
    trainers: dict[tuple[str, bool], SAETrainer] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("forget"):
            trainers.clear()
            answer = dict(seconds=0.0)
        else:
            side = request["kind"], request["autocast"]
            if side not in trainers:
                trainers[side] = make_trainer(*side, batches_NxBxD, features, k, device)
            answer = dict(seconds=run(trainers[side], request["steps"]))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
