"""Puts faults into the numeric code, one at a time, and counts those that the tests notice.

``make faults``, or ``python scripts/inject_faults.py statistics models`` for some packages. ``scripts/faults.toml``
lists the faults: a sign, an off-by-one, a denominator, a lost mask, a null that is none. The functions were drawn at
random, so that not only those are tried which are known to be tested. The test files named with a fault run on a copy
of the last commit: a git worktree that is removed at the end. The tree you work in is never touched. First the tests
run without a fault, since a test that fails anyway notices nothing.

Prints a line for each fault, the faults that were missed, and one line of JSON. The exit status is 1 if the tests fail
without a fault or a fault does not fit the code any more, 0 otherwise.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FAULTS = Path(__file__).with_name("faults.toml")
# A fault may make a loop endless; the tests named take a minute at most without one.
TIMEOUT = 600.0


class Fault(NamedTuple):
    """A fragment of a file, what takes its place, and the tests that are expected to notice."""

    file: str
    line: str
    fault: str
    tests: list[str]

    @property
    def package(self) -> str:
        """The folder below ``saejax/``."""
        return Path(self.file).parts[1]

    def apply(self, tree: Path) -> str:
        """Write the fault into a copy of the repository; return the file's text without it."""
        text = (tree / self.file).read_text()
        (tree / self.file).write_text(text.replace(self.line, self.fault))
        return text


def read_faults(packages: Sequence[str]) -> list[Fault]:
    """Return the faults in some packages, in all where none are named."""
    with open(FAULTS, "rb") as file:
        faults = [Fault(**entry) for entry in tomllib.load(file)["fault"]]
    return [fault for fault in faults if not packages or fault.package in packages]


def find_outdated(faults: Sequence[Fault], tree: Path) -> list[str]:
    """Return a message for each fault whose line does not occur exactly once, and for each test file that is gone."""
    messages = []
    for fault in faults:
        path = tree / fault.file
        if (count := path.read_text().count(fault.line) if path.is_file() else 0) != 1:
            messages.append(f"{fault.file}: {fault.line!r} occurs {count} times, expected once")
        messages += [f"{fault.file}: there is no {test}" for test in fault.tests if not (tree / test).exists()]
    return messages


def run_tests(tree: Path, tests: Sequence[str]) -> str:
    """Run test files until one fails, in a copy of the repository.

    Args:
      tree: the copy.
      tests: files or folders of tests.

    Returns:
      The test that failed, or what else went wrong; empty if all passed.
    """
    options = ["-x", "-q", "-n", "0", "-m", "not slow", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    environment = os.environ | dict(PYTHONPATH=str(tree))
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"no end after {TIMEOUT:.0f} s"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    # 5: there is no such test here, as of a file whose tests are all slow or take a library that is not installed.
    if failed or done.returncode in (0, 5):
        return failed[1] if failed else ""
    sys.exit(f"inject_faults: pytest ended with status {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def main() -> None:
    """Run the faults of the packages named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", nargs="*", help="folders below saejax/; all if none is given")
    parser.add_argument("--skip_clean", action="store_true", help="do not run the tests without a fault first")
    arguments = parser.parse_args()
    faults = read_faults(arguments.packages)
    with tempfile.TemporaryDirectory(prefix="saejax-faults-") as scratch:
        tree = Path(scratch) / "tree"
        worktree = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*worktree, "add", "--quiet", "--detach", str(tree), "HEAD"], check=True)
        try:
            if outdated := find_outdated(faults, tree):
                sys.exit(
                    "\n".join(["inject_faults: some faults do not fit the code: mend scripts/faults.toml", *outdated])
                )
            tests = [] if arguments.skip_clean else sorted({test for fault in faults for test in fault.tests})
            for test in tests:
                if failed := run_tests(tree, [test]):
                    sys.exit(f"inject_faults: without a fault {failed}: mend this first")
            missed = []
            for fault in faults:
                start, text = time.monotonic(), fault.apply(tree)
                noticed = run_tests(tree, fault.tests)
                (tree / fault.file).write_text(text)
                missed += [] if noticed else [fault]
                outcome = f"caught by {noticed}" if noticed else "MISSED"
                print(f"{time.monotonic() - start:4.0f} s  {fault.file}: {fault.line}\n        {outcome}", flush=True)
        finally:
            subprocess.run([*worktree, "remove", "--force", str(tree)], check=True)
    for fault in missed:
        print(f"\nmissed by {' '.join(fault.tests)}\n  {fault.file}\n  - {fault.line}\n  + {fault.fault}")
    print(json.dumps(dict(faults=len(faults), caught=len(faults) - len(missed), missed=len(missed))))


if __name__ == "__main__":
    main()
