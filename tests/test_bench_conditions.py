"""Conditions of a measurement: what nvidia-smi says, what git says, and nothing about whose machine it is."""

from __future__ import annotations

import getpass
import json
import platform
import subprocess
from pathlib import Path

from packloop.bench.conditions import describe_conditions, gpu_state, parse_state, source_state

ROOT = Path(__file__).resolve().parents[1]


def test_an_answer_of_nvidia_smi():
    state = parse_state("1980, 3201, 119.53, 700.00, 31")
    assert (state.sm_clock_mhz, state.memory_clock_mhz) == (1980, 3201)
    assert (state.power_w, state.power_limit_w, state.temperature_c) == (119.53, 700, 31)
    slice_of_one = parse_state("1980, 3201, [N/A], [Insufficient Permissions], 31")
    assert slice_of_one.power_w is None
    assert slice_of_one.power_limit_w is None


def test_this_machine():
    assert gpu_state() is None  # the tests of the CPU hide a GPU
    conditions = describe_conditions(None, None, packages=["pytest", "no-such-package"])
    assert conditions.device.startswith("CPU, ")
    assert {"torch", "transformers", "packloop", "pytest"} <= set(conditions.versions)
    assert "no-such-package" not in conditions.versions
    written = json.dumps(conditions.model_dump())
    for private in (platform.node(), str(Path.home()), str(ROOT)):
        assert private not in written
    assert f'"{getpass.getuser()}"' not in written


def test_the_commit_is_git_s():
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    expected = asked.stdout.strip() if asked.returncode == 0 else None
    assert source_state()[0] == expected
    named = describe_conditions(None, None, commit="0123abc").commit
    assert named == (expected or "0123abc")
