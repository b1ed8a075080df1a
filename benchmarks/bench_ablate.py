"""Speed of exact feature ablation, compared with a plain loop with hooks in PyTorch.

Run: python -m benchmarks.bench_ablate [--dictionary runs/demo/train/topk] [--features 200] [--prompts 80]
Of the features that fire on the prompts of a behaviour, 200 are drawn at random, and 200 are those that fire on most
prompts. Each is removed from all prompts, in fp32 on both sides: by ``run_edits``, and by a hook on the
decoder layer of the transformers model, one forward pass over the batch of prompts for each feature. Both sides must
give the same effects. They run in one process, ours before the hooks (which compiles, printed apart) and after them
(median over rounds). Then every feature of the dictionary is measured by ours alone. Prints a table, in which "by work"
is the ratio of the two sides' floating-point operations (that of the seconds where both run them at one rate), and,
last, one line of JSON.
"""

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from saejax import load_dictionary, load_model
from saejax.dictionaries import Dictionary
from saejax.flops import head_flops, pass_flops
from saejax.interventions import engine
from saejax.interventions.edits import mask
from saejax.interventions.split_model import SplitModel
from saejax.models import source
from saejax.models.sites import Site
from saejax.tasks.behaviours import Prompt
from saejax.tasks.draw import make_prompts
from saejax.tasks.settings import BEHAVIOURS

AGREEMENT = 1e-3  # of the two sides' effects, in logits


class PlainLoop:
    """Ablation as it is usually written: a hook on a layer, and a forward pass of the whole model per feature.

    Args:
      path: of the model.
      dictionary: at a ``resid_post`` site.
      prompts: one batch, padded on the right.
    """

    def __init__(self, path: str, dictionary: Dictionary, prompts: Sequence[Prompt]):
        site = Site.parse(dictionary.site)
        if site.kind != "resid_post":
            raise SystemExit(f"{dictionary.site}: this benchmark takes a dictionary at a resid_post site")
        model_source = source.resolve(source.ModelConfig(path=path))
        self._model, tokenizer = source.load_torch_model(model_source), source.load_tokenizer(model_source)
        tokenizer.padding_side = "right"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self._tokens = tokenizer([prompt.text for prompt in prompts], return_tensors="pt", padding=True)
        self._last_B = self._tokens["attention_mask"].sum(1) - 1
        self.shape = tuple(self._tokens["input_ids"].shape)
        ids = [[tokenizer(answer)["input_ids"][0] for answer in (p.correct, p.wrong)] for p in prompts]
        self._answers_Bx2 = torch.tensor(ids)
        self._layer = self._model.model.layers[site.layer]
        x_BxTxD = self._run(lambda x_BxTxD: None)[1]
        real_BxT = self._tokens["attention_mask"].bool().numpy()
        f_BxTxF = np.array(dictionary.encode(x_BxTxD.numpy()))
        f_BxTxF[~(real_BxT & np.asarray(dictionary.is_not_sink(x_BxTxD.numpy())))] = 0
        self._f_BxTxF, self._W_dec_FxD = torch.from_numpy(f_BxTxF), torch.from_numpy(np.array(dictionary.W_dec_FxD))
        self.clean_B = self._run(lambda x_BxTxD: None)[0]

    def without(self, feature: int) -> np.ndarray:
        """Return the logit differences [B] with a feature removed."""
        change_BxTxD = self._f_BxTxF[:, :, feature, None] * self._W_dec_FxD[feature]
        return self._run(lambda x_BxTxD: x_BxTxD - change_BxTxD)[0]

    @torch.inference_mode()
    def _run(self, edit) -> tuple[np.ndarray, torch.Tensor]:
        seen = []

        def hook(module, args, output):
            x_BxTxD = output[0] if isinstance(output, tuple) else output
            seen.append(x_BxTxD)
            edited = edit(x_BxTxD)
            if edited is None:
                return None
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        handle = self._layer.register_forward_hook(hook)
        try:
            logits_BxTxV = self._model(**self._tokens, use_cache=False).logits
        finally:
            handle.remove()
        last_BxV = logits_BxTxV[torch.arange(len(self._last_B)), self._last_B]
        chosen_Bx2 = last_BxV.gather(1, self._answers_Bx2)
        return (chosen_Bx2[:, 0] - chosen_Bx2[:, 1]).double().numpy(), seen[0]


class Effects(NamedTuple):
    """Drops of the logit difference without each of S features, and the tokens that were run for them."""

    drop_SxP: np.ndarray
    tokens: int


def measure(split: SplitModel, prompts: Sequence[Prompt], features: Sequence[int]) -> tuple[float, Effects]:
    """Return the seconds of the effects of some features one by one, the clean run and compiling included."""
    tokens, program = 0, engine.run_rows

    def count(*arguments: Any) -> Any:
        nonlocal tokens
        tokens += arguments[3].row_SxN.size
        return program(*arguments)

    start = time.perf_counter()
    edits = mask(split.dictionary, [[int(feature)] for feature in features])
    with mock.patch.object(engine, "run_rows", count):
        clean_P, *edited_SxP = engine.run_edits(split, split.run(prompts), edits)["logit_diff"]
    return time.perf_counter() - start, Effects(clean_P - np.array(edited_SxP), tokens)


def work(split: SplitModel, plain: PlainLoop, features: int, effects: Effects) -> tuple[float, float]:
    """Return the floating-point operations of ours and of the hooks."""
    config = split.point.config
    texts, length = plain.shape
    below = Site.parse(str(split.point.site)).layer + 1
    head = pass_flops(config, texts * length, length, below)
    tail = pass_flops(config, effects.tokens, length, config.n_layers - below)
    full_pass = pass_flops(config, texts * length, length, config.n_layers) + head_flops(config, texts * length)
    return head + tail, features * full_pass


def compare(
    split: SplitModel, plain: PlainLoop, prompts: Sequence[Prompt], features: Sequence[int], rounds: int
) -> tuple[float, float, float, float, Effects]:
    """Return our seconds with compiling and our median without, the hooks' seconds, the ratio, and our figures.

    Ends if the two sides differ by more than ``AGREEMENT`` logits.
    """
    first, _ = measure(split, prompts, features)
    start = time.perf_counter()
    theirs_SxP = np.stack([plain.without(int(feature)) for feature in features])
    theirs = time.perf_counter() - start
    our_seconds = []
    for _ in range(rounds):
        seconds, effects = measure(split, prompts, features)
        our_seconds.append(seconds)
    worst = np.abs(effects.drop_SxP - (plain.clean_B[None, :] - theirs_SxP)).max()
    if worst > AGREEMENT:
        raise SystemExit(f"the two sides differ by {worst:.2g} logits: this is a bug")
    ours = float(np.median(our_seconds))
    return first, ours, theirs, theirs / ours, effects


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dictionary", default="runs/demo/train/topk", help="of this model; make demo trains it")
    parser.add_argument("--behaviour", default="agreement", choices=BEHAVIOURS)
    parser.add_argument("--prompts", type=int, default=80)
    parser.add_argument("--features", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--all", action=argparse.BooleanOptionalAction, default=True, help="then all features, too")
    args = parser.parse_args()
    lm, dictionary = load_model(args.model), load_dictionary(args.dictionary)
    prompts = make_prompts(args.behaviour, args.prompts, 2, 42, lm.tokenizer).prompts[: args.prompts]
    split, plain = SplitModel(lm, dictionary), PlainLoop(args.model, dictionary, prompts)
    fires_PxF = (plain._f_BxTxF != 0).any(dim=1).numpy()
    on_P_of_F = fires_PxF.sum(0)
    drawn = np.random.default_rng(0).permutation(np.flatnonzero(on_P_of_F))[: args.features]
    frequent = np.argsort(-on_P_of_F, kind="stable")[: args.features]
    print(
        f"{args.behaviour}: {args.prompts} prompts; {int((on_P_of_F > 0).sum()):,} of {len(on_P_of_F):,} features fire"
    )
    print(
        f"{'features':>20} {'first s':>8} {'ours s':>8} {'hooks s':>8} {'ratio':>7} {'by work':>8} "
        f"{'GFLOP/s':>11} {'effects/s':>10} {'rows skipped':>13} {'tokens':>9}"
    )
    ratios = {}
    for name, features in (("ratio", drawn), ("ratio_frequent", frequent)):
        first, our_s, their_s, ratios[name], effects = compare(split, plain, prompts, features, args.rounds)
        skipped = (effects.drop_SxP == 0).mean()  # a feature that does not fire changes nothing, to the last bit
        ours, hooks = work(split, plain, len(features), effects)
        rates = f"{ours / our_s / 1e9:.0f} / {hooks / their_s / 1e9:.0f}"
        label = f"{len(features)} {'at random' if name == 'ratio' else 'most frequent'}"
        print(
            f"{label:>20} {first:8.2f} {our_s:8.2f} {their_s:8.1f} {ratios[name]:7.1f} {hooks / ours:8.1f} {rates:>11} "
            f"{effects.drop_SxP.size / our_s:10,.0f} "
            f"{skipped:13.0%} {effects.tokens:9,}",
            flush=True,
        )
    line = dict(bench="ablate", **{name: round(ratio, 1) for name, ratio in ratios.items()})
    if args.all:
        seconds, effects = measure(split, prompts, range(dictionary.config.n_features))
        line["all_features_s"] = round(seconds, 1)
        print(f"all {dictionary.config.n_features:,} features: {seconds:.1f} s, {effects.tokens:,} tokens")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
