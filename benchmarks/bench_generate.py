"""Speed of generation, compared with transformers and with the time that reading all weights takes.

Run: python -m benchmarks.bench_generate [--model smollm2] [--batches 1,8] [--new 48] [--rounds 3]
Both continue the same prompts of 128 tokens greedily in float32, in turn. Seconds of a token are those of ``new``
tokens more, so that reading the prompt does not count. The floor reads every weight once a token, at the rate of a sum
over a gigabyte here. Last, one line of JSON.
"""

import argparse
import functools
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.by_turns import medians, seconds
from saejax import load_model
from saejax.models.language_model import LanguageModel
from saejax.models.source import load_torch_model
from saejax.models.tokens import Tokens

PROMPT, FIRST = 128, 8
TEXT = "The students went to the library because they had to read the books that their teacher had asked them to read. "


def bandwidth() -> float:
    """Return the bytes per second at which a gigabyte is summed."""
    x_N = jnp.ones(2**28)
    total = jax.jit(jnp.sum)
    return x_N.nbytes / min([seconds(total, x_N) for _ in range(5)][1:])


def of_a_token(run: Callable[[int], None], new: int) -> float:
    """Return the seconds that each of ``new`` more tokens takes."""
    first, all_of_them = (seconds(run, count) for count in (FIRST, FIRST + new))
    return (all_of_them - first) / new


def measure(lm: LanguageModel, torch_model: torch.nn.Module, batch: int, new: int, rounds: int) -> dict[str, float]:
    """Return the median seconds of a token by either side, and the share of new tokens that are the same."""
    words = np.array(lm.tokenizer(TEXT * 8)["input_ids"])
    ids_BxT = np.stack([np.roll(words, 3 * b)[:PROMPT] for b in range(batch)]).astype(np.int32)
    tokens = Tokens(ids_BxT, np.full(batch, PROMPT, np.int32))
    inputs = dict(input_ids=torch.tensor(ids_BxT, dtype=torch.int64), attention_mask=torch.ones(batch, PROMPT))
    generated: dict[str, list[list[int]]] = {}

    def ours(count: int) -> None:
        generated["ours"] = [list(row.ids) for row in lm.generate(tokens, count)]

    def theirs(count: int) -> None:
        with torch.no_grad():
            out = torch_model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        generated["theirs"] = out[:, PROMPT:].tolist()

    ways = {name: functools.partial(of_a_token, run, new) for name, run in dict(ours=ours, theirs=theirs).items()}
    timings = medians(ways, rounds)
    lengths = {len(row) for row in generated["ours"]}
    assert lengths == {FIRST + new}, f"texts ended after {lengths} tokens"
    same = np.mean(np.array(generated["ours"]) == np.array(generated["theirs"]))
    return timings | dict(same=float(same))


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8])
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    lm = load_model(args.model)
    torch_model = load_torch_model(lm.source, "float32").eval()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params))
    rows = []
    for batch in args.batches:
        row = measure(lm, torch_model, batch, args.new, args.rounds)
        floor = weights / bandwidth()
        rows.append(dict(batch=batch, **row, floor=floor))
        print(
            f"{batch:3} prompts: {row['ours'] * 1e3:.1f} ms a token, transformers {row['theirs'] * 1e3:.1f} "
            f"(ratio {row['theirs'] / row['ours']:.2f}), floor {floor / row['ours']:.0%} of ours; "
            f"{row['same']:.1%} of the tokens are the same",
            flush=True,
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
