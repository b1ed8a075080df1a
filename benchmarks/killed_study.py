"""A study that is killed at random moments and started again: does it end, in what time, and is it then done?

Run: python -m benchmarks.killed_study --workdir=runs/killed [--kills 10] [--within 1700] [flags of study_run]
The study's process gets SIGKILL at moments drawn evenly from its first so many seconds, as they pass while it runs, and
is started again at once; its units end with it by themselves. Then it runs once more, which should do nothing. Without
flags it is `make study`, whose benchmarks come from the hub or from --task.path=FOLDER. Prints a line for each kill
and, last, one line of JSON. About as long as the study, 40 minutes on two cores.
"""

import argparse
import json
import random
import subprocess
import sys
import time


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--rows", default="configs/study")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--within", type=float, default=1700.0, help="seconds from which moments are drawn")
    parser.add_argument("--seed", type=int, default=15)
    args, further = parser.parse_known_args()
    command = [
        sys.executable,
        "-m",
        "experiments.study_run",
        f"--workdir={args.workdir}",
        f"--rows={args.rows}",
        *further,
    ]
    rng, start = random.Random(args.seed), time.monotonic()
    for number, moment in enumerate(sorted(rng.uniform(0, args.within) for _ in range(args.kills)), 1):
        study = subprocess.Popen(command)
        try:
            study.wait(max(start + moment - time.monotonic(), 1.0))
        except subprocess.TimeoutExpired:
            study.kill()
            study.wait()
            print(f"kill {number} of {args.kills} after {time.monotonic() - start:.0f} s", flush=True)
        else:
            sys.exit(f"the study ended with status {study.returncode} before kill {number}: lower --within")
    status = subprocess.run(command).returncode
    whole, again = time.monotonic() - start, time.monotonic()
    second = subprocess.run(command).returncode
    figures = dict(
        status=status, seconds=round(whole), second=second, second_seconds=round(time.monotonic() - again, 1)
    )
    print(json.dumps(dict(bench="killed_study", kills=args.kills, **figures)))


if __name__ == "__main__":
    main()
