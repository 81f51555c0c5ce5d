"""Memory is reserved in segments that grow, also where torch was imported long before packloop asks for it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

_RESERVE = """
import torch
from packloop.config import RunConfig
from packloop.engine.run import set_numerics
set_numerics(RunConfig())
held = torch.empty(2**26, device="cuda")
print({segment["is_expandable"] for segment in torch.cuda.memory_snapshot()})
"""


@pytest.mark.parametrize(("asked", "grow"), [(None, "{True}"), ("expandable_segments:False", "{False}")])
def test_segments_grow_unless_the_environment_says_otherwise(asked, grow):
    variables = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    variables |= {} if asked is None else {"PYTORCH_CUDA_ALLOC_CONF": asked}
    done = subprocess.run([sys.executable, "-c", _RESERVE], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == grow
