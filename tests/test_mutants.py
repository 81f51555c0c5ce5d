"""Each bug of tests/mutants can still be put back, and has tests to find it; scripts/run_mutants.py runs them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
REPOSITORY = TESTS.parent
PATCHES = sorted((TESTS / "mutants").glob("*.patch"))
# Rows of the reliability list that need no GPU: a bug and a test each.
ROWS = [*range(1, 14), 15, *range(16, 20), 22, *range(25, 28)]


def test_every_row_has_its_bug():
    assert [int(path.stem) for path in PATCHES] == ROWS


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.stem)
def test_a_bug_can_be_put_back(path):
    command = ["git", "apply", "--check", str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    changed = re.findall(r"^\+\+\+ b/(.*)$", path.read_text(), re.MULTILINE)
    assert changed
    assert all(name.startswith("packloop/") for name in changed)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_has_a_test(row):
    pattern = re.compile(rf"^def test_row{row:02d}_\w+", re.MULTILINE)
    assert any(pattern.search(file.read_text(encoding="utf-8")) for file in TESTS.glob("test_*.py"))
