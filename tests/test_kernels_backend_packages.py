"""A backend whose package is missing, broken or of another version cannot run: with the reason and the remedy."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from test_kernels_patch import make_llama

from packloop.kernels import flash_attention
from packloop.kernels.attention import choose_backend, load_backend, usable_backends
from packloop.kernels.patch import patched

DTYPE, GPU = torch.bfloat16, torch.device("cuda")
INSTALL = {
    "flash_attn": "pip install flash-attn --no-build-isolation",
    "flash_attn_4": "pip install --pre flash-attn-4",
}
RUNS = {"dtype": DTYPE, "device": GPU, "head_dim": 64}
# The functions of flash-attn 2.8 and flash-attn-4 with the parameters that are theirs.
FLASH_ATTN = """
def _flash_attn_forward(q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
    alibi_slopes, return_softmax): ...
def _flash_attn_varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
    return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False): ...
def _flash_attn_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
    window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None): ...
def _flash_attn_varlen_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
    deterministic, rng_state=None, zero_tensors=False): ...
"""
FLASH_ATTN_4 = """
def _flash_attn_fwd(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    softmax_scale=None, causal=False, return_lse=False): ...
def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, cu_seqlens_q=None, cu_seqlens_k=None,
    max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None): ...
"""
BOTH = {"flash_attn_interface": FLASH_ATTN, "cute/__init__": "", "cute/interface": FLASH_ATTN_4}
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

    flash_attention._why_not_made.cache_clear()
    yield write
    flash_attention._why_not_made.cache_clear()
    for name in [name for name in sys.modules if is_ours(name)]:
        del sys.modules[name]
    sys.modules.update(before)


def cannot(raised: str, name: str, module: str) -> str:
    return f"its package cannot be imported ({raised.replace('MODULE', module)}): {INSTALL[name]}"


@pytest.mark.parametrize(("source", "raised"), BROKEN.items())
def test_what_a_backends_module_raises_is_why_it_cannot_run(package, source, raised):
    package(flash_attn_interface=source, **{"cute/__init__": "", "cute/interface": source})
    reasons = usable_backends(is_packed=True, **RUNS)
    assert reasons["flash_attn"] == cannot(raised, "flash_attn", "flash_attn_interface.py")
    assert reasons["flash_attn_4"] == cannot(raised, "flash_attn_4", "interface.py")
    assert reasons["varlen"] is None
    for name in INSTALL:
        with pytest.raises(ValueError, match=re.escape(f"attention {name!r}: {reasons[name]}")):
            load_backend(name)
    with pytest.raises(ValueError, match=r"^kernels\.attention=flash_attn: its package cannot be imported"):
        choose_backend("flash_attn", is_packed=True, dtype=DTYPE, device=GPU, heads=(1, 1, 8))


@pytest.mark.parametrize(("source", "raised"), BROKEN.items())
def test_what_the_package_around_it_raises_is_too(package, source, raised):
    """Looking for a module of a package imports the package."""
    package(**{"__init__": source, "flash_attn_interface": "", "cute/__init__": "", "cute/interface": ""})
    for name in ("flash_attn", "flash_attn_4"):
        assert flash_attention.why_not(name, **RUNS) == cannot(raised, name, "__init__.py")


def test_a_package_that_can_be_imported_can_run(package):
    package(**BOTH)
    for name in INSTALL:
        assert flash_attention.why_not(name, **RUNS) is None
        assert type(load_backend(name)) is flash_attention.BACKENDS[name]


@pytest.mark.parametrize(
    ("name", "module", "change", "said"),
    [
        ("flash_attn", "flash_attn_interface", ("deterministic, ", ""), "got an unexpected keyword argument 'determ"),
        ("flash_attn", "flash_attn_interface", ("alibi_slopes, return_softmax", "alibi_slopes, return_softmax, sinks"),
         "missing a required argument: 'sinks'"),
        ("flash_attn", "flash_attn_interface", ("_flash_attn_varlen_forward", "_of_another_name"), None),
        ("flash_attn_4", "cute/interface", ("dq=None, dk=None, dv=None", "dqkv=None"), "keyword argument 'dq'"),
        ("flash_attn_4", "cute/interface", ("_flash_attn_bwd", "_of_another_name"), None),
    ],
)  # fmt: skip
def test_functions_of_another_version_are_not_called(package, name, module, change, said):
    source = BOTH[module].replace("\n    ", " ")
    assert change[0] in source
    package(**{**BOTH, module: source.replace(*change)})
    reason = flash_attention.why_not(name, **RUNS)
    remedy = {
        "flash_attn": "pip install 'flash-attn>=2.8,<2.9' --no-build-isolation",
        "flash_attn_4": "pip install flash-attn-4==4.0.0b36",
    }[name]
    assert reason.endswith(f": {remedy}")
    assert reason.startswith(f"its package has no {change[0]}: " if said is None else "its package's _flash_attn_")
    assert said is None or said in reason
    assert "\n" not in reason
    with pytest.raises(ValueError, match=rf"^attention '{name}': its package"):
        load_backend(name)
    assert [flash_attention.why_not(other, **RUNS) for other in INSTALL if other != name] == [None]


@pytest.mark.parametrize("has_softcap", [True, False])
def test_operators_that_are_registered_with_torch_are_looked_into(package, has_softcap):
    """flash-attn's functions are such where torch can compile them: their own call takes any arguments."""
    registered = FLASH_ATTN.replace("\n    ", " ").replace(
        "def _flash_attn_forward(",
        "import torch\n"
        "@torch.library.custom_op('packloop_tests::forward', mutates_args=(), schema='(Tensor q) -> Tensor')\n"
        "def _flash_attn_forward(",
    )
    package(flash_attn_interface=registered if has_softcap else registered.replace("softcap, ", "", 1))
    reason = flash_attention.why_not("flash_attn", **RUNS)
    assert (reason is None) == has_softcap
    assert has_softcap or "'softcap'" in reason


@pytest.mark.parametrize("name", INSTALL)
def test_a_package_that_is_not_installed_is_named_with_its_command(name, monkeypatch):
    monkeypatch.setattr(flash_attention, "_is_installed", lambda _module: False)
    missing = re.escape(f"attention {name!r}: its package is not installed: {INSTALL[name]}")
    with pytest.raises(ValueError, match=missing):
        load_backend(name)
    with pytest.raises(ValueError, match=missing), patched(make_llama(), attention=name):
        pass
    with pytest.raises(ValueError, match="attention 'document': its package is not installed: pip install triton"):
        load_backend("document")


def test_a_module_that_is_not_there_is_not_installed(package, monkeypatch):
    package(flash_attn_interface=FLASH_ATTN)
    missing = f"its package is not installed: {INSTALL['flash_attn_4']}"
    assert flash_attention.why_not("flash_attn_4", **RUNS) == missing
    assert flash_attention.why_not("flash_attn", **RUNS) is None
    # Nor is one whose package is missing.
    monkeypatch.setitem(flash_attention._INSTALL, "flash_attn", (("no_such_package.interface",), "pip install it"))
    found = flash_attention.why_not("flash_attn", **RUNS)
    assert found == "its package is not installed: pip install it"
