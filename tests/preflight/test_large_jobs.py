"""A dictionary for each of Qwen3-4B's layers, from its text to its report, compiled for machines that are not here."""

import pytest
from preflight_setup import CONFIGS, needs_libtpu

from benchmarks import bench_jobs


@pytest.mark.slow
@pytest.mark.parametrize("job", ["node", "nodes", pytest.param("slice", marks=needs_libtpu)])
def test_every_program_of_a_large_job_fits(job):
    results = bench_jobs.programs(CONFIGS / "large/qwen3-4b-every-layer.flags", job)
    (needs,) = results.models
    assert needs.layers == 36 and needs.fits and needs.peak_bytes < results.limit_bytes
    stages = {program.name.partition(":")[0] for program in needs.programs}
    assert stages == {"capture", "train", "evaluate", "ablate"}
    for program in needs.programs:
        assert program.fits and program.sends is not None, program.name
    (step,) = (program for program in needs.programs if program.name == "train: topk step")
    # Of all dictionaries, whose sums a device sends of its own ones, with the rows.
    gradients = 36 * 2 * 20_480 * 2560 * 4
    assert sum(step.sends.values()) < 2 * 1.25 * gradients / 4
