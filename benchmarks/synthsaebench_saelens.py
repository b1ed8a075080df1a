"""sae-lens' side of bench_synthsaebench: its generator of a world of ours, and its judgement of an export of ours.

Run by bench_synthsaebench, where sae-lens is installed: python synthsaebench_saelens.py WORLD.npz SAE COUNT BATCH
With "" for SAE there is no judgement. Prints one line of JSON.
"""

import json
import statistics
import sys
import time
from dataclasses import asdict

import numpy as np
import torch
from sae_lens import SAE
from sae_lens.synthetic import ActivationGenerator, FeatureDictionary, HierarchyNode, hierarchy_modifier
from sae_lens.synthetic.evals import eval_sae_on_synthetic_data

REPEATS = 7


def roots(world: dict[str, np.ndarray]) -> list[HierarchyNode]:
    """Return the trees of the world."""
    parent_J, exclusive, scaled = world["parent_J"], bool(world["exclusive"]), bool(world["scaled"])

    def node(feature: int) -> HierarchyNode:
        children = [node(int(child)) for child in np.flatnonzero(parent_J == feature)]
        return HierarchyNode(feature, children, exclusive and len(children) > 1, scaled and bool(children))

    return [node(int(root)) for root in np.unique(parent_J[parent_J >= 0]) if parent_J[root] < 0]


def main() -> None:
    """Run the benchmark and print its figures."""
    world = {name: array for name, array in np.load(sys.argv[1]).items()}
    folder, count, batch = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.manual_seed(0)
    tensor = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in world.items() if array.ndim}
    features, width = world["directions_JxD"].shape
    dictionary = FeatureDictionary(features, width, bias=True, initializer=None)  # or it trains directions of its own
    dictionary.feature_vectors.data, dictionary.bias.data = tensor["directions_JxD"], tensor["bias_D"]
    trees = roots(world)
    generator = ActivationGenerator(
        features,
        tensor["rate_J"],
        tensor["std_J"],
        tensor["mean_J"],
        hierarchy_modifier(trees) if trees else None,
        (tensor["loading_JxQ"], tensor["latent_std_J"] ** 2),
    )
    seconds = []
    with torch.no_grad():
        for _ in range(REPEATS + 1):
            start = time.process_time(), time.perf_counter()
            dictionary(generator.sample(batch))
            seconds.append((time.process_time() - start[0], time.perf_counter() - start[1]))
        fired_J, square, seen = torch.zeros(features), 0.0, 0
        while seen < count:
            code_BxJ = generator.sample(batch)
            fired_J += (code_BxJ > 0).sum(0)
            square += float(dictionary(code_BxJ).double().square().sum())
            seen += batch
    processor, wall = (statistics.median(column) for column in zip(*seconds[1:], strict=True))
    judged = None
    if folder:
        judged = asdict(eval_sae_on_synthetic_data(SAE.load_from_disk(folder), dictionary, generator, count, batch))
    world_has = dict(l0=float(fired_J.sum() / seen), square=square / seen, rate_J=(fired_J / seen).tolist())
    print(json.dumps(dict(judged=judged, world=world_has, processor=processor, wall=wall)))


if __name__ == "__main__":
    main()
