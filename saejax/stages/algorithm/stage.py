"""The stage ``algorithm``."""

from saejax.ground_truth.results import AlgorithmResults
from saejax.runner.stage import Stage
from saejax.stages.algorithm.run import run_algorithm
from saejax.stages.algorithm.settings import AlgorithmConfig
from saejax.stages.ground_truth.report import algorithm_sections

ALGORITHM = Stage(
    name="algorithm",
    summary="trains a small transformer on an algorithm, and says which of its features change its answers",
    run=run_algorithm,
    results=AlgorithmResults,
    groups=(AlgorithmConfig,),
    makes_model=True,
    names=lambda configs: configs[AlgorithmConfig].names,
    section=algorithm_sections,
    revision=5,  # p-values of the algorithm's variables are of permutations
)
