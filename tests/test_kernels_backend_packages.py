"""A backend whose package is there and cannot be imported is one that cannot run, with the reason and the remedy."""

from __future__ import annotations

import sys

import pytest
import torch

from packloop.kernels import flash_attention
from packloop.kernels.attention import choose_backend, usable_backends

DTYPE, GPU = torch.bfloat16, torch.device("cuda")
INSTALL = {"flash_attn": "pip install flash-attn --no-build-isolation", "flash_attn_4": "pip install flash-attn-4"}
# What an import runs -> what it raises, as the reason says it.
BROKEN = {
    "import no_such_module_at_all": "ModuleNotFoundError: No module named 'no_such_module_at_all'",
    "raise ImportError('undefined symbol: _ZN3c10')": "ImportError: undefined symbol: _ZN3c10",
    "import math; math.no_such_name": "AttributeError: module 'math' has no attribute 'no_such_name'",
    "no_such_name": "NameError: name 'no_such_name' is not defined",
    "{}['sm_90']": "KeyError: 'sm_90'",
    "def f(:": "SyntaxError: invalid syntax (MODULE, line 1)",
    "assert False": "AssertionError",
    "1 / 0": "ZeroDivisionError: division by zero",
    "class Own(Exception): ...\nraise Own('no GPU')": "Own: no GPU",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes modules of a flash_attn in place of any that is installed, on what the code takes to be a GPU."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))

    def is_ours(name: str) -> bool:
        return name.partition(".")[0] in ("flash_attn", "cutlass")

    before = {name: module for name, module in sys.modules.items() if is_ours(name)}
    for name in before:
        del sys.modules[name]

    def write(**sources: str) -> None:
        files = {"flash_attn/__init__.py": "", "cutlass.py": ""}
        for name, source in {**files, **{f"flash_attn/{name}.py": source for name, source in sources.items()}}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source + "\n", encoding="utf-8")

    flash_attention._why_not_loaded.cache_clear()
    yield write
    flash_attention._why_not_loaded.cache_clear()
    for name in [name for name in sys.modules if is_ours(name)]:
        del sys.modules[name]
    sys.modules.update(before)


def cannot(raised: str, name: str, module: str) -> str:
    return f"its package cannot be imported ({raised.replace('MODULE', module)}): {INSTALL[name]}"


@pytest.mark.parametrize(("source", "raised"), BROKEN.items())
def test_what_a_backends_module_raises_is_why_it_cannot_run(package, source, raised):
    package(flash_attn_interface=source, **{"cute/__init__": "", "cute/interface": source})
    reasons = usable_backends(is_packed=True, dtype=DTYPE, device=GPU)
    assert reasons["flash_attn"] == cannot(raised, "flash_attn", "flash_attn_interface.py")
    assert reasons["flash_attn_4"] == cannot(raised, "flash_attn_4", "interface.py")
    assert reasons["varlen"] is None
    with pytest.raises(ValueError, match=r"^kernels\.attention=flash_attn: its package cannot be imported"):
        choose_backend("flash_attn", is_packed=True, dtype=DTYPE, device=GPU, heads=(1, 1, 8))


@pytest.mark.parametrize(("source", "raised"), BROKEN.items())
def test_what_the_package_around_it_raises_is_too(package, source, raised):
    """Looking for a module of a package imports the package."""
    package(**{"__init__": source, "flash_attn_interface": "", "cute/__init__": "", "cute/interface": ""})
    for name in ("flash_attn", "flash_attn_4"):
        assert flash_attention.why_not(name, dtype=DTYPE, device=GPU) == cannot(raised, name, "__init__.py")


def test_a_package_that_can_be_imported_can_run(package):
    package(flash_attn_interface="", **{"cute/__init__": "", "cute/interface": ""})
    assert flash_attention.why_not("flash_attn", dtype=DTYPE, device=GPU) is None
    assert flash_attention.why_not("flash_attn_4", dtype=DTYPE, device=GPU) is None


def test_a_module_that_is_not_there_is_not_installed(package, monkeypatch):
    package(flash_attn_interface="")
    missing = f"its package is not installed: {INSTALL['flash_attn_4']}"
    assert flash_attention.why_not("flash_attn_4", dtype=DTYPE, device=GPU) == missing
    assert flash_attention.why_not("flash_attn", dtype=DTYPE, device=GPU) is None
    # Nor is one whose package is missing.
    monkeypatch.setitem(flash_attention._INSTALL, "flash_attn", (("no_such_package.interface",), "pip install it"))
    found = flash_attention.why_not("flash_attn", dtype=DTYPE, device=GPU)
    assert found == "its package is not installed: pip install it"
