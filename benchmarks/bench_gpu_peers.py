"""Speed on one GPU beside transformers, sae-lens and circuit-tracer on the same card.

Run: python -m benchmarks.bench_gpu_peers [--parts capture,generate,ablate,train,graph] [--small]
The model has the shape of Llama 3.2 1B with random weights (16 layers, width 2,048) and SmolLM2's tokenizer. capture:
the residual stream after the middle layer for 16 texts of 1,024 tokens, in bfloat16 and float32; the hook of the other
side ends the pass there, too. generate: new tokens after prompts of 128, in bfloat16. ablate: 100 features of a random
SAE one by one on 64 prompts in float32, against a hook and one pass of the whole model for each feature; the effects
must agree. train: steps of one dictionary (d 2,304, F 32,768, 8,192 tokens a step, products in bfloat16) against
sae-lens' trainer with autocast; compared in tokens/s. graph: SmolLM2's graph of 3,000 features with random transcoders
in float32, against circuit-tracer's. The sides take turns. ``--saelens`` and ``--circuit-tracer`` name interpreters
that have them, which see the GPU. Without a GPU, or with ``--small``, small shapes on the CPU: does it run? Prints a
line for each and, last, one line of JSON.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory of the same card

from saejax.runner import environment

environment.for_libraries()
environment.for_devices(deterministic=False, shares_gpu=True)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import saejax  # noqa: E402
from benchmarks.bench_attribute import random_transcoders  # noqa: E402
from benchmarks.by_turns import medians, seconds  # noqa: E402
from benchmarks.train_setup import Stepper, make_stack, sparse_sums  # noqa: E402
from saejax.attribution.trace.prompt import trace_prompt  # noqa: E402
from saejax.dictionaries import DictionaryConfig  # noqa: E402
from saejax.interventions.edits import mask  # noqa: E402
from saejax.interventions.engine import run_edits  # noqa: E402
from saejax.interventions.split_model import SplitModel  # noqa: E402
from saejax.models.source import ModelConfig, load_tokenizer, load_torch_model, resolve  # noqa: E402
from saejax.models.tokens import Tokens  # noqa: E402
from saejax.tasks.draw import make_prompts  # noqa: E402

GPU = torch.cuda.is_available() and jax.default_backend() == "gpu"
TORCH_DEVICE = "cuda" if GPU else "cpu"
KINDS = ("standard", "jumprelu", "topk", "batchtopk")
AGREEMENT = 5e-3  # logits, of effects in float32 whose logits differ by a few units


class Stopped(Exception):
    """The layer that was asked for has been computed."""


def make_model(folder: Path, small: bool) -> None:
    """Write a model of random weights in the hub's format."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer(resolve(ModelConfig(path="smollm2")))
    shape = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32)
    if small:
        shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=8)
    ends = dict(eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id)
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=8, tie_word_embeddings=True, **ends, **shape)
    with torch.device(TORCH_DEVICE):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_theirs(folder: Path, dtype: str) -> torch.nn.Module:
    """Return transformers' model on the device, as its users load it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(TORCH_DEVICE).eval()


def wait() -> None:
    """Wait for PyTorch's device."""
    if GPU:
        torch.cuda.synchronize()


def torch_seconds(run, *arguments) -> float:
    """Return the seconds of a call until PyTorch's device is done."""
    wait()
    start = time.perf_counter()
    run(*arguments)
    wait()
    return time.perf_counter() - start


def show(name: str, ours: float, theirs: float, unit: str, peer: str) -> dict[str, float]:
    """Print the rates of both sides and return them."""
    print(f"{name:24} {ours:14,.1f} {unit}, {peer} {theirs:14,.1f} (ratio {ours / theirs:.2f})", flush=True)
    return dict(ours=round(ours, 2), theirs=round(theirs, 2), ratio=round(ours / theirs, 3))


def measure_capture(folder: Path, dtype: str, rows: int, length: int) -> dict[str, float]:
    """Capture one site in the middle with either side; tokens/s."""
    lm, model = saejax.load_model(str(folder), dtype=dtype, check=False), load_theirs(folder, dtype)
    layer = lm.config.n_layers // 2
    ids_BxT = np.random.default_rng(0).integers(0, lm.config.vocab, (rows, length)).astype(np.int32)
    tokens, ids = Tokens(ids_BxT, np.full(rows, length, np.int32)), torch.tensor(ids_BxT, dtype=torch.int64)
    ids, site, kept = ids.to(TORCH_DEVICE), f"resid_post.{layer}", []

    def hook(module, args, output):
        kept[:] = [output[0] if isinstance(output, tuple) else output]
        raise Stopped

    model.model.layers[layer].register_forward_hook(hook)

    def theirs() -> None:
        with torch.inference_mode(), contextlib.suppress(Stopped):
            model.model(ids, use_cache=False)

    def ours() -> jax.Array:
        return lm(tokens, capture=[site], logits=False).sites[site]

    ways = dict(ours=lambda: seconds(ours), theirs=lambda: torch_seconds(theirs))
    taken = medians(ways, 5)
    error = np.abs(np.asarray(ours(), np.float32) - kept[0].float().cpu().numpy()).max() / kept[0].abs().max().item()
    print(f"  largest difference {error:.1e} of the largest value")
    return show(
        f"capture {dtype}", ids_BxT.size / taken["ours"], ids_BxT.size / taken["theirs"], "tokens/s", "transformers"
    )


def measure_generate(folder: Path, batch: int, prompt: int, new: int) -> dict[str, float]:
    """Continue prompts greedily with either side; new tokens/s of the batch, without reading the prompt."""
    lm, model = saejax.load_model(str(folder), dtype="bfloat16", check=False), load_theirs(folder, "bfloat16")
    ids_BxT = np.random.default_rng(1).integers(100, lm.config.vocab, (batch, prompt)).astype(np.int32)
    tokens, first = Tokens(ids_BxT, np.full(batch, prompt, np.int32)), 8
    inputs = dict(input_ids=torch.tensor(ids_BxT, dtype=torch.int64), attention_mask=torch.ones(batch, prompt))
    inputs = {name: value.to(TORCH_DEVICE) for name, value in inputs.items()}

    def theirs(count: int) -> None:
        with torch.inference_mode():
            model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)

    def ours(count: int) -> None:
        lengths = {len(row.ids) for row in lm.generate(tokens, count)}
        assert lengths == {count}, f"texts ended after {lengths} tokens"

    def of_a_token(time_of, run) -> float:
        return (time_of(run, first + new) - time_of(run, first)) / new

    ways = dict(ours=lambda: of_a_token(seconds, ours), theirs=lambda: of_a_token(torch_seconds, theirs))
    taken = medians(ways, 2)
    return show(
        f"generate, {batch} at once", batch / taken["ours"], batch / taken["theirs"], "tokens/s", "transformers"
    )


def measure_ablation(folder: Path, prompts: int, features: int) -> dict[str, float]:
    """Remove features one by one with either side; effects of a feature on a prompt a second."""
    lm, model = saejax.load_model(str(folder), check=False), load_theirs(folder, "float32")
    layer, tokenizer = lm.config.n_layers // 2, lm.tokenizer
    described = DictionaryConfig(
        kind="topk", site=f"resid_post.{layer}", d_in=lm.config.d_model, n_features=4 * lm.config.d_model, k=32
    )
    dictionary = saejax.Dictionary.initial(described, jax.random.key(0)).with_sink_norms(lm.sink_norm)
    drawn = make_prompts("agreement", prompts, 2, 42, tokenizer).prompts[:prompts]
    split = SplitModel(lm, dictionary)
    tokenizer.padding_side, tokenizer.pad_token = "right", tokenizer.pad_token or tokenizer.eos_token
    tokens = tokenizer([prompt.text for prompt in drawn], return_tensors="pt", padding=True).to(TORCH_DEVICE)
    last_B = tokens["attention_mask"].sum(1) - 1
    ids = [[tokenizer(answer)["input_ids"][0] for answer in (p.correct, p.wrong)] for p in drawn]
    answers_Bx2, here = torch.tensor(ids, device=TORCH_DEVICE), model.model.layers[layer]
    seen: list[torch.Tensor] = []

    def without(change_BxTxD: torch.Tensor | None) -> torch.Tensor:
        def hook(module, args, output):
            x_BxTxD = output[0] if isinstance(output, tuple) else output
            seen[:] = [x_BxTxD]
            edited = x_BxTxD if change_BxTxD is None else x_BxTxD - change_BxTxD
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        handle = here.register_forward_hook(hook)
        with torch.inference_mode():
            logits_BxTxV = model(**tokens, use_cache=False).logits
        handle.remove()
        chosen_Bx2 = logits_BxTxV[torch.arange(len(last_B)), last_B].gather(1, answers_Bx2)
        return chosen_Bx2[:, 0] - chosen_Bx2[:, 1]

    clean_B = without(None)
    x_BxTxD = jnp.asarray(seen[0].cpu().numpy())
    real_BxT = tokens["attention_mask"].bool().cpu().numpy() & np.asarray(dictionary.is_not_sink(x_BxTxD))
    f_BxTxF = np.array(dictionary.encode(x_BxTxD)) * real_BxT[..., None]
    chosen = np.argsort(-(f_BxTxF != 0).any(1).sum(0), kind="stable")[:features]
    f_BxTxS = torch.tensor(f_BxTxF[..., chosen], device=TORCH_DEVICE)
    rows_SxD = torch.tensor(np.array(dictionary.W_dec_FxD)[chosen], device=TORCH_DEVICE)
    results: dict[str, np.ndarray] = {}

    def theirs() -> None:
        drops = [clean_B - without(f_BxTxS[..., s, None] * rows_SxD[s]) for s in range(features)]
        results["theirs"] = torch.stack(drops).cpu().numpy()

    def ours() -> None:
        edits = mask(dictionary, [[int(feature)] for feature in chosen])
        clean_P, *edited_SxP = run_edits(split, split.run(drawn), edits)["logit_diff"]
        results["ours"] = clean_P - np.array(edited_SxP)

    taken = medians(dict(ours=lambda: seconds(ours), theirs=lambda: torch_seconds(theirs)), 2)
    worst = np.abs(results["ours"] - results["theirs"]).max()
    print(f"  largest difference of effects {worst:.1e} logits, of effects up to {np.abs(results['theirs']).max():.1e}")
    assert worst < AGREEMENT, "the two sides differ: this is a bug"
    effects = features * prompts
    return show("ablate float32", effects / taken["ours"], effects / taken["theirs"], "effects/s", "hooks")


def measure_training(
    kind: str, d: int, features: int, batch: int, k: int, steps: int, saelens: str
) -> dict[str, float]:
    """Train with either side, one after the other; tokens/s."""
    batches = sparse_sums(2, batch, d)
    stepper = Stepper(make_stack(kind, d, features, batch, k, "bfloat16", products="dense"), batches)
    stepper.run(3)  # compiles
    ours = batch * steps / np.median([stepper.run(steps) for _ in range(3)])
    del stepper
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "batches.npy"
        np.save(path, batches)
        command = [saelens, str(Path(__file__).with_name("bench_train_saelens.py")), str(path), str(features), str(k)]
        lines = [json.dumps(dict(kind=kind, autocast=True, steps=n)) for n in (3, steps, steps, steps)]
        requests = "\n".join(lines) + "\n"
        ran = subprocess.run([*command, TORCH_DEVICE], input=requests, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr[-2000:]
    answers = [json.loads(line)["seconds"] for line in ran.stdout.splitlines() if line.startswith("{")]
    return show(f"train {kind}", ours, batch * steps / float(np.median(answers[1:])), "tokens/s", "sae-lens")


def measure_graph(folder: Path, small: bool, circuit_tracer: str) -> dict[str, float]:
    """Trace graphs of prompts of 32 tokens; rows (targets) a second. Of random transcoders, every one is active."""
    lm = saejax.load_model("smollm2")
    transcoders, rows = random_transcoders(lm.config), 200 if small else 3000
    text = "One day she said that there was a way to see where the water went, and it was not far from here. A road "
    ids = lm.tokenizer(text * 3)["input_ids"][:33]

    def trace(at: int) -> None:
        trace_prompt(lm, transcoders, ids[at : at + 32], max_features=rows, max_logits=3, logit_mass=1.0)

    trace(0)
    ours = float(np.median([seconds(trace, 1), seconds(trace, 0), seconds(trace, 1)]))
    load_torch_model(lm.source).save_pretrained(folder / "smollm2")
    lm.tokenizer.save_pretrained(folder / "smollm2")
    exported = []
    for layer in range(lm.config.n_layers):
        dictionary = transcoders.load(layer)
        places = dict(site=f"mlp_in.{layer}", target=f"mlp_out.{layer}")
        config = dataclasses.replace(dictionary.config, **places, signed=True)  # as circuit-tracer's TopK is
        exported.append(saejax.Dictionary(config, **dictionary.arrays))
    saejax.save_transcoders(folder / "set", exported)
    judge = Path(__file__).parents[1] / "tests/attribution/circuit_tracer_judge.py"
    request = [str(folder / "smollm2"), str(folder / "set"), ",".join(map(str, ids[:32])), str(rows), TORCH_DEVICE]
    ran = subprocess.run([circuit_tracer, "-W", "ignore", str(judge), "time", *request], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    theirs = json.loads(ran.stdout.splitlines()[-1])["seconds"]
    return show("graph float32", (rows + 3) / ours, (rows + 3) / theirs, "rows/s", "circuit-tracer")


def main() -> int:
    """Run the parts and print their figures; one that fails does not stop the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="capture,generate,ablate,train,graph")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--saelens", default=sys.executable, help="an interpreter that has sae-lens")
    parser.add_argument("--circuit-tracer", default=sys.executable, help="an interpreter that has circuit-tracer")
    args = parser.parse_args()
    small, parts = args.small or not GPU, args.parts.split(",")
    shape = (128, 1024, 512, 16, 5) if small else (2304, 32_768, 8192, 64, 20)
    failed, results = (
        0,
        dict[str, object](device=jax.devices()[0].device_kind, jax=jax.__version__, torch=torch.__version__),
    )
    print(json.dumps(results), flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if {"capture", "generate", "ablate"} & {*parts}:
            make_model(folder / "model", small)
        ask = functools.partial(functools.partial, folder=folder / "model")
        wanted = {
            "capture bfloat16": ask(measure_capture, dtype="bfloat16", rows=16, length=128 if small else 1024),
            "capture float32": ask(measure_capture, dtype="float32", rows=16, length=128 if small else 1024),
            **{
                f"generate {b}": ask(measure_generate, batch=b, prompt=128, new=16 if small else 64) for b in (1, 8, 64)
            },
            "ablate float32": ask(measure_ablation, prompts=16 if small else 64, features=10 if small else 100),
            **{f"train {kind}": functools.partial(measure_training, kind, *shape, args.saelens) for kind in KINDS},
            "graph float32": functools.partial(measure_graph, folder, small, args.circuit_tracer),
        }
        for name, measure in wanted.items():
            if name.split()[0] in parts:
                try:
                    results[name] = measure()
                except Exception as error:
                    print(f"{name}: {type(error).__name__}: {error}", flush=True)
                    failed, results[name] = 1, type(error).__name__
                jax.clear_caches()
    print(json.dumps(results))
    return failed


if __name__ == "__main__":
    sys.exit(main())
