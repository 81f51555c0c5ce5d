"""Each bug of tests/mutants can still be put back, and has tests to find it; scripts/run_mutants.py runs them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
REPOSITORY = TESTS.parent
PATCHES = sorted((TESTS / "mutants").glob("*.patch"))
# The rows of the reliability list, then bugs of our own: a patch and a test each. Row 24 needs a GPU: its tests are in
# gpu/test_gpu_paging.py.
NAMES = [f"{row:02d}" for row in range(1, 28) if row != 24]
NAMES += ["documents_apart", "grouped_heads", "prefix_weights", "row15", "saved_output"]


def test_every_name_has_its_bug():
    assert [path.stem for path in PATCHES] == NAMES


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.stem)
def test_a_bug_can_be_put_back(path):
    command = ["git", "apply", "--check", str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    changed = re.findall(r"^\+\+\+ b/(.*)$", path.read_text(), re.MULTILINE)
    assert changed
    assert all(name.startswith("packloop/") for name in changed)


@pytest.mark.parametrize("name", NAMES)
def test_a_bug_has_a_test(name):
    pattern = re.compile(rf"^def test_{'row' if name.isdecimal() else ''}{name}_\w+", re.MULTILINE)
    assert any(pattern.search(file.read_text(encoding="utf-8")) for file in TESTS.glob("test_*.py"))
