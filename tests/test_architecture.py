"""Who may import whom, and what the repository must not be."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "packloop"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
SOURCES = sorted(
    path for folder in ("packloop", "scripts", "examples", "benchmarks") for path in (REPOSITORY / folder).rglob("*.py")
)
HEAVY = {"torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "safetensors", "numpy"}

# What each part may import of the package, beside itself.
ALLOWED_PARTS = {
    "cli": {"errors", "cli_errors", "config", "engine", "data", "bench"},
    "cli_errors": set(),
    "config": {"errors", "config_faults", "data.prompts"},
    "config_faults": set(),
    "errors": set(),
    "data": {"errors", "config"},
    "kernels": set(),
    "engine": {"errors", "config", "data", "kernels", "gpus", "__version__"},
    "bench": {"errors", "config", "config_faults", "data", "kernels", "engine", "gpus", "__version__"},
    "gpus": {"errors"},
}
# What the kernels may import from elsewhere: these, and in the files named, these too.
KERNEL_PACKAGES = {"torch", "triton", "flash_attn"}
KERNEL_EXCEPTIONS = {
    "document_attention.py": {"numpy"},
    "gated.py": {"quack"},
    "llama_rope.py": {"transformers"},
    "nf4.py": {"bitsandbytes"},
    "patch.py": {"transformers"},
}
# Functions that import or run packages which nobody here has written, and give what these raise as a reason.
MAY_CATCH_ALL = {
    "attention.py": {"_time_backends"},
    "flash_attention.py": {"_why_not_made", "_is_installed"},
    "gated.py": {"_why_not_importable", "_why_not_running"},
}


def imports_of(path: Path) -> dict[str, list[tuple[str, bool]]]:
    """(dotted name, whether at the top level) of everything imported, under the top-level package's name."""
    found: dict[str, list[tuple[str, bool]]] = {}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            found.setdefault(name.partition(".")[0], []).append((name, id(node) in top))
    return found


def part_of(path: Path) -> str:
    """`engine` for packloop/engine/loop.py, `cli` for packloop/cli.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_the_checks_see_imports(tmp_path):
    text = "import torch.nn\nfrom packloop.engine import loop\ndef f():\n    import peft\n"
    (tmp_path / "module.py").write_text(text)
    assert imports_of(tmp_path / "module.py") == {
        "torch": [("torch.nn", True)],
        "packloop": [("packloop.engine.loop", True)],
        "peft": [("peft", False)],
    }
    assert len(MODULES) > 30


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(PACKAGE)) for path in MODULES])
def test_parts_import_only_what_they_may(path):
    part = part_of(path)
    if part in ("__init__", "bundled"):
        assert "packloop" not in imports_of(path)
        return
    for name, _ in imports_of(path).get("packloop", []):
        inside = name.removeprefix("packloop.")
        allowed = ALLOWED_PARTS[part] | {part}
        assert any(inside == one or inside.startswith(f"{one}.") for one in allowed), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "kernels").glob("*.py")), ids=lambda path: path.name)
def test_kernels_see_torch_triton_and_flash_attention_only(path):
    allowed = KERNEL_PACKAGES | KERNEL_EXCEPTIONS.get(path.name, set()) | {"packloop"}
    assert set(imports_of(path)) - set(sys.stdlib_module_names) <= allowed


def test_the_command_line_imports_nothing_heavy_before_a_verb_needs_it():
    for name in ("cli", "config", "config_faults", "errors", "data/prompts", "data/packing", "data/sources"):
        at_top = {
            package
            for package, names in imports_of(PACKAGE / f"{name}.py").items()
            if any(is_at_top for _, is_at_top in names)
        }
        assert not at_top & (HEAVY - {"numpy"}), name
    at_top = [name for name, is_at_top in imports_of(PACKAGE / "cli.py")["packloop"] if is_at_top]
    assert {name.rpartition(".")[0] for name in at_top} == {
        "packloop.cli_errors",
        "packloop.engine.sampling",
        "packloop.errors",
    }


@pytest.mark.parametrize("path", sorted((PACKAGE / "data").glob("*.py")), ids=lambda path: path.name)
def test_data_never_touches_cuda(path):
    names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert not names & {"cuda", "to", "pin_memory"}


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(PACKAGE)) for path in MODULES])
def test_nothing_is_unpickled_and_no_error_is_swallowed(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not {"pickle", "dill", "joblib"} & set(imports_of(path))
    excepted = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name in MAY_CATCH_ALL.get(path.name, ())
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and id(node) not in excepted:
            caught = [name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)] if node.type else [None]
            assert not {None, "Exception", "BaseException"} & set(caught), f"{path.name}:{node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("torch", "load"), f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(REPOSITORY)) for path in SOURCES])
def test_no_file_is_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450


def test_a_package_called_kernels_is_never_ours():
    """Hugging Face publishes one, which transformers and bitsandbytes import where they find it."""
    code = "import importlib.util as u; spec = u.find_spec('kernels'); print(spec.origin if spec else None)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert not done.stdout.startswith(str(REPOSITORY / "kernels"))
    assert not (REPOSITORY / "kernels").exists()
    assert done.stdout.strip() == "None" or "site-packages" in done.stdout
