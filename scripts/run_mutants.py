"""Puts each bug of tests/mutants back into a copy of the repository and shows that a test finds it.

    python scripts/run_mutants.py [NAME]...

tests/mutants/NN.patch is a bug that shipped in some trainer; the tests called test_rowNN_* are there to find it. Any
other NAME.patch is a bug of packloop's own; its tests are called test_NAME_*. The tests must pass as the repository
is, and at least one must fail with the patch. Exits 1 where a bug survives, or a patch no longer applies, or a bug has
no test that runs. A bug that shows on a GPU only has no patch: it is listed as not run, with the file of its tests.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
MUTANTS = REPOSITORY / "tests" / "mutants"
NUM_AT_ONCE = 2
TIMEOUT_S = 600
# Paged memory is the CUDA driver's: the CPU has none to lose.
GPU_TESTS = {"24": "tests/gpu/test_gpu_paging.py"}
# pytest's exit codes that say something about the tests themselves.
PASSED, FAILED = 0, 1


@dataclass(frozen=True)
class Verdict:
    name: str
    outcome: str  # "killed", or what is wrong
    by: str  # the test that failed, or the last line of what went wrong
    seconds: float


def main() -> int:
    names = sys.argv[1:] or sorted(path.stem for path in MUTANTS.glob("*.patch"))
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        verdicts = []
        for verdict in pool.map(judge, names):
            print(f"{verdict.name:<12}  {verdict.outcome:<22} {verdict.seconds:5.0f} s  {verdict.by}", flush=True)
            verdicts.append(verdict)
    num_killed = sum(verdict.outcome == "killed" for verdict in verdicts)
    print(f"{num_killed} of {len(verdicts)} bugs found")
    if not sys.argv[1:]:
        for name, file in GPU_TESTS.items():
            print(f"{name} not run, needs a GPU: its tests are in {file}")
    return int(num_killed < len(verdicts))


def judge(name: str) -> Verdict:
    """Runs the tests of one bug without it and with it, in a copy that is thrown away."""
    begin = time.monotonic()

    def verdict(outcome: str, by: str) -> Verdict:
        return Verdict(name, outcome, by, time.monotonic() - begin)

    if name in GPU_TESTS:
        return verdict("needs a GPU", f"its tests are in {GPU_TESTS[name]}")
    with tempfile.TemporaryDirectory(prefix=f"mutant-{name}-") as directory:
        copy = Path(directory) / "repository"
        copy_repository(copy)
        files = files_with_tests_of(name, copy)
        if not files:
            return verdict("no test", f"nothing is called {prefix_of_tests(name)}*")
        code, said = run_tests(name, copy, files)
        if code != PASSED:
            return verdict("fails without the bug", said)
        patch = MUTANTS / f"{name}.patch"
        applied = subprocess.run(["git", "apply", str(patch)], cwd=copy, capture_output=True, text=True)
        if applied.returncode != 0:
            return verdict("patch does not apply", applied.stderr.strip().partition("\n")[0])
        code, said = run_tests(name, copy, files)
        outcome = {PASSED: "survived", FAILED: "killed"}.get(code, f"pytest exited {code}")
        return verdict(outcome, said)


def copy_repository(target: Path) -> None:
    """What git tracks or would track, as it is in the working tree."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (REPOSITORY / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, target / name)


def prefix_of_tests(name: str) -> str:
    return f"test_row{name}_" if name.isdecimal() else f"test_{name}_"


def files_with_tests_of(name: str, copy: Path) -> list[str]:
    tests, wanted = sorted((copy / "tests").glob("test_*.py")), f"def {prefix_of_tests(name)}"
    return [str(file.relative_to(copy)) for file in tests if wanted in file.read_text(encoding="utf-8")]


def run_tests(name: str, copy: Path, files: list[str]) -> tuple[int, str]:
    """(pytest's exit code, the first test that failed or pytest's last line)."""
    environment = os.environ | {
        "PYTHONPATH": str(copy),  # before any installed packloop
        "PACKLOOP_SHARED_DATA": os.environ.get("PACKLOOP_SHARED_DATA", str(REPOSITORY.parent / "shared" / "data")),
        "OMP_NUM_THREADS": "1",
    }
    if any("\nfrom interpreter import" in (copy / file).read_text(encoding="utf-8") for file in files):
        environment["TRITON_INTERPRET"] = "1"  # or its tests of kernels would be skipped
    options = ["-x", "-q", "-rfE", "-p", "no:cacheprovider", "-k", prefix_of_tests(name)]
    command = [sys.executable, "-m", "pytest", *options, *files]
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return FAILED, f"no end after {TIMEOUT_S} s"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1:]
    return done.returncode, failed[1] if failed else "".join(last)


if __name__ == "__main__":
    sys.exit(main())
