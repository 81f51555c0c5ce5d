"""Tests in Triton's interpreter, which TRITON_INTERPRET=1 chooses before Triton is imported, for a whole process.

An ordinary run skips what is `interpreted`; test_interpreter.py starts a second process on all files that import this,
which runs that alone or, unless it is marked `ordinary`, too.
"""

from __future__ import annotations

import importlib.util
import os

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

interpreted = pytest.mark.skipif(not INTERPRETING, reason="runs in the process that test_interpreter.py starts")
ordinary = pytest.mark.skipif(INTERPRETING, reason="of an ordinary process")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton"
)
