"""Tests in Triton's interpreter, which TRITON_INTERPRET=1 chooses before Triton is imported, for a whole process.

An ordinary run of such a file skips what is `interpreted` and starts a second process on the file, which runs that
alone or, unless it is marked `ordinary`, too.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

interpreted = pytest.mark.skipif(not INTERPRETING, reason="runs in the process that test_in_the_interpreter starts")
ordinary = pytest.mark.skipif(INTERPRETING, reason="of an ordinary process")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton"
)


def run_in_interpreter(file: str) -> None:
    """Runs that file's tests in the interpreter. AssertionError with their output where one fails or none passes."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", file, "-p", "no:cacheprovider", "-rs"],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout
