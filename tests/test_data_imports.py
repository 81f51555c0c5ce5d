"""What the data package may load."""

from __future__ import annotations

import subprocess
import sys


def printed_by(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_packing_prompts_sources_tokenize_and_report_load_no_heavy_package():
    names = ("packing", "prompts", "sources", "files", "tokenize", "report")
    modules = printed_by(f"import sys, {', '.join(f'packloop.data.{name}' for name in names)}; print(*sys.modules)")
    assert "packloop.data.sources" in modules
    assert modules.isdisjoint({"torch", "transformers", "datasets", "pyarrow", "pandas"})


def test_data_loads_neither_engine_nor_kernels_and_leaves_cuda_alone():
    modules = printed_by(
        """
import sys
import numpy as np, torch
import packloop.data.report
from packloop.data.loader import PackLoader
from packloop.data.tokenize import Documents
documents = Documents(np.arange(20, dtype=np.int32), np.ones(20, bool), np.arange(0, 21, 4), np.arange(5))
for packing in ("wrapped", "bfd", "none"):
    loader = PackLoader(documents, packing=packing, max_length=8, per_device_batch_size=2,
                        gradient_accumulation_steps=1, rank=0, world_size=1, seed=0, shuffle=True, pad_token_id=0)
    loader.next_window()
assert not torch.cuda.is_initialized()
print(*sys.modules)
"""
    )
    assert "packloop.data.loader" in modules
    assert not [name for name in modules if name.startswith(("packloop.engine", "packloop.kernels"))]
