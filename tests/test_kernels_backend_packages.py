"""A backend whose package is there and cannot be imported is one that cannot run, with the reason and the remedy."""

from __future__ import annotations

import importlib
import sys

import pytest

from packloop.kernels import flash_attention


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("import math; math.no_such_name", "AttributeError: module 'math' has no attribute 'no_such_name'"),
        ("import math", None),
    ],
)
def test_what_a_packages_import_raises_is_why_its_backend_cannot_run(tmp_path, monkeypatch, source, reason):
    (tmp_path / "broken_backend.py").write_text(source + "\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_backend", raising=False)

    class Backend:
        def __init__(self):
            importlib.import_module("broken_backend")

    found = flash_attention._why_not_loaded(Backend, "pip install it")
    assert found == (reason and f"its package cannot be imported ({reason}): pip install it")
