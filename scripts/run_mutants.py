"""Puts each bug of tests/mutants back into a copy of the repository and shows that a test finds it.

    python scripts/run_mutants.py [ROW]...

tests/mutants/NN.patch is a bug that shipped in some trainer; the tests called test_rowNN_* are there to find it. They
must pass as the repository is, and at least one must fail with the patch. Exits 1 where a bug survives, or a patch no
longer applies, or a row has no test that runs.
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
# pytest's exit codes that say something about the tests themselves.
PASSED, FAILED = 0, 1


@dataclass(frozen=True)
class Verdict:
    row: str
    outcome: str  # "killed", or what is wrong
    by: str  # the test that failed, or the last line of what went wrong
    seconds: float


def main() -> int:
    rows = sys.argv[1:] or sorted(path.stem for path in MUTANTS.glob("*.patch"))
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        verdicts = []
        for verdict in pool.map(judge, rows):
            print(f"{verdict.row}  {verdict.outcome:<22} {verdict.seconds:5.0f} s  {verdict.by}", flush=True)
            verdicts.append(verdict)
    num_killed = sum(verdict.outcome == "killed" for verdict in verdicts)
    print(f"{num_killed} of {len(verdicts)} bugs found")
    return int(num_killed < len(verdicts))


def judge(row: str) -> Verdict:
    """Runs the tests of one row without its bug and with it, in a copy that is thrown away."""
    begin = time.monotonic()

    def verdict(outcome: str, by: str) -> Verdict:
        return Verdict(row, outcome, by, time.monotonic() - begin)

    with tempfile.TemporaryDirectory(prefix=f"mutant-{row}-") as directory:
        copy = Path(directory) / "repository"
        copy_repository(copy)
        files = files_with_tests_of(row, copy)
        if not files:
            return verdict("no test", f"nothing is called test_row{row}_*")
        code, said = run_tests(row, copy, files)
        if code != PASSED:
            return verdict("fails without the bug", said)
        patch = MUTANTS / f"{row}.patch"
        applied = subprocess.run(["git", "apply", str(patch)], cwd=copy, capture_output=True, text=True)
        if applied.returncode != 0:
            return verdict("patch does not apply", applied.stderr.strip().partition("\n")[0])
        code, said = run_tests(row, copy, files)
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


def files_with_tests_of(row: str, copy: Path) -> list[str]:
    tests = sorted((copy / "tests").glob("test_*.py"))
    return [str(file.relative_to(copy)) for file in tests if f"def test_row{row}_" in file.read_text(encoding="utf-8")]


def run_tests(row: str, copy: Path, files: list[str]) -> tuple[int, str]:
    """(pytest's exit code, the first test that failed or pytest's last line)."""
    environment = os.environ | {
        "PYTHONPATH": str(copy),  # before any installed packloop
        "PACKLOOP_SHARED_DATA": os.environ.get("PACKLOOP_SHARED_DATA", str(REPOSITORY.parent / "shared" / "data")),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rf", "-p", "no:cacheprovider", "-k", f"test_row{row}_"]
    try:
        done = subprocess.run(
            [*command, *files], cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return FAILED, f"no end after {TIMEOUT_S} s"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1:]
    return done.returncode, failed[1] if failed else "".join(last)


if __name__ == "__main__":
    sys.exit(main())
