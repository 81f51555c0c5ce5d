"""Every Triton kernel on the CPU: the tests of all files that import `interpreter`, in one process that interprets."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

from interpreter import needs_triton, ordinary

CPU_SECONDS = 60  # of all, imports included


@ordinary
@needs_triton
def test_every_kernel_in_the_interpreter():
    here = Path(__file__)
    files = [path for path in here.parent.glob("test_*.py") if "\nfrom interpreter import" in path.read_text("utf-8")]
    files.remove(here)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *map(str, files), "-p", "no:cacheprovider", "-rs", "--durations=5"],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < CPU_SECONDS, f"{seconds:.0f} s of CPU time\n{result.stdout}"
