"""Which attention runs for heads of a size, on a GPU that is stood in for, and what `auto` makes of one that raises."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_data_loader import documents_of, loader_of
from test_prefix import TEMPLATED

from packloop.bench.plan import attentions
from packloop.config import load_config
from packloop.data import layout as layout_module
from packloop.data import prefix
from packloop.engine import plan
from packloop.engine.batch import to_device
from packloop.errors import ConfigError, InputError
from packloop.gpus import require_gpu
from packloop.kernels import attention as attention_module
from packloop.kernels import flash_attention
from packloop.kernels.attention import choose_backend, usable_backends

BF16, GPU = torch.bfloat16, torch.device("cuda")
RECIPE = "recipes/llama2-7b-dolly.yaml"
IN_EIGHTHS = "takes heads of a multiple of 8 up to 256 features, this model's have 100"
REASON = "takes heads of 16, 32, 64 or 128 features, this model's have"
# Head dim -> what can run packed documents on a Hopper GPU, the packages being there.
ABLE = {
    80: {"eager", "sdpa", "flash_attn", "varlen", "flash_attn_4"},
    96: {"eager", "sdpa", "flash_attn", "varlen", "flash_attn_4"},
    100: {"eager", "sdpa"},
    128: {"eager", "sdpa", "flash_attn", "varlen", "flash_attn_4", "document"},
}


@pytest.fixture
def gpu(monkeypatch):
    """What the code takes to be a Hopper GPU with all packages, `document` the fastest. Yields the names timed."""
    timed, times = [], {"document": 1.0, "flash_attn": 2.0, "varlen": 3.0, "flash_attn_4": 4.0, "cudnn": 5.0}

    def time_backend(name, *_):
        timed.append(name)
        return times.get(name, 9.0)

    monkeypatch.setattr(layout_module, "SLOT_MULTIPLE", 8)
    monkeypatch.setattr(prefix, "LEAST_PREFIX", 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(flash_attention, "why_not_loaded", lambda _name: None)
    monkeypatch.setattr(attention_module, "time_backend", time_backend)
    monkeypatch.setattr(plan, "to_device", lambda batch, _device: to_device(batch, torch.device("cpu")))
    return timed


def resolved(head_dim: int, *overrides: str, packing: str = "bfd") -> dict[str, str]:
    config = load_config(RECIPE, [f"data.packing={packing}", *overrides])
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 4 * head_dim}
    loader = loader_of(documents_of(*TEMPLATED), packing, max_length=60, per_device_batch_size=6)
    return plan._resolve_layout(config, SimpleNamespace(config=SimpleNamespace(**heads)), loader, GPU)


def options(head_dim: int, *, is_packed: bool = True) -> dict:
    return {"is_packed": is_packed, "dtype": BF16, "device": GPU, "heads": (4, 2, head_dim)}


@pytest.mark.parametrize("head_dim", ABLE)
@pytest.mark.parametrize("is_packed", [True, False])
def test_heads_that_each_backend_takes(gpu, head_dim, is_packed):
    reasons = usable_backends(is_packed=is_packed, dtype=BF16, device=GPU, head_dim=head_dim)
    able = {name for name, reason in reasons.items() if reason is None}
    assert able == ABLE[head_dim] | ({"cudnn"} if not is_packed and head_dim != 100 else set())
    assert head_dim == 128 or reasons["document"] == f"{REASON} {head_dim}"
    assert head_dim != 100 or reasons["flash_attn"] == reasons["varlen"] == IN_EIGHTHS


@pytest.mark.parametrize(
    ("name", "capability", "taken"),
    [
        ("document", (9, 0), (16, 32, 64, 128)),
        ("flash_attn", (8, 0), (8, 64, 136, 192, 256)),
        ("varlen", (8, 6), (8, 64, 136, 192, 256)),
        ("flash_attn_4", (9, 0), (8, 64, 136, 192, 256)),
        ("flash_attn_4", (10, 0), (8, 64)),
        ("cudnn", (9, 0), (8, 64, 136, 192, 256)),
        ("cudnn", (8, 0), (8, 64)),
        ("sdpa", (8, 0), (1, 8, 16, 32, 64, 100, 128, 136, 192, 256, 264)),
    ],
)
def test_head_dims_of_a_capability(name, capability, taken):
    sizes = (1, 8, 16, 32, 64, 100, 128, 136, 192, 256, 264)
    found = [size for size in sizes if flash_attention.why_not_heads(name, size, capability) is None]
    between = {16, 32, 128} if name not in ("document", "sdpa") else set()
    assert found == sorted({*taken, *between})


@pytest.mark.parametrize("head_dim", ABLE)
@pytest.mark.parametrize("name", ["document", "flash_attn", "varlen", "flash_attn_4"])
def test_one_that_is_asked_for_and_cannot_run_is_refused(gpu, head_dim, name):
    if name in ABLE[head_dim]:
        assert choose_backend(name, **options(head_dim)) == (name, "as set")
        return
    with pytest.raises(
        ValueError, match=rf"^kernels\.attention={name}: takes heads of .*, this model's have"
    ) as caught:
        choose_backend(name, **options(head_dim))
    assert str(caught.value).endswith(f"have {head_dim}; or use kernels.attention=auto")
    with pytest.raises(ConfigError, match=rf"^kernels\.attention={name}: takes heads of"):
        resolved(head_dim, f"kernels.attention={name}")
    if name == "document":  # as it is predicted
        with pytest.raises(InputError, match=rf"^kernels\.attention=document: {REASON} {head_dim}; use kernels"):
            attentions(load_config(RECIPE, ["kernels.attention=document"]), require_gpu("h200"), head_dim)


@pytest.mark.parametrize(
    ("head_dim", "packing", "expected"),
    [
        (80, "bfd", ("flash_attn", "drop", "none")),
        (96, "bfd", ("flash_attn", "drop", "none")),
        (100, "bfd", ("sdpa", "keep", "none")),
        (128, "bfd", ("document", "drop", "micro_batch")),
        (96, "none", ("flash_attn", "drop", "none")),
        (128, "none", ("document", "drop", "micro_batch")),
        (100, "none", ("sdpa", "keep", "none")),
        (100, "wrapped", ("sdpa", "keep", "none")),
    ],
)
def test_auto_takes_what_can_run(gpu, head_dim, packing, expected):
    found = resolved(head_dim, packing=packing)
    assert (found["attention"], found["padding"], found["prefix_reuse"]) == expected
    assert set(gpu) <= ABLE[head_dim]


@pytest.mark.parametrize("head_dim", [80, 96, 100])
@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_beginnings_that_cannot_be_shared_are_refused_in_one_line(gpu, head_dim, attention):
    asked = ["kernels.prefix_reuse=micro_batch", f"kernels.attention={attention}"]
    with pytest.raises(ConfigError) as caught:
        resolved(head_dim, *asked)
    line = (
        r"^kernels\.prefix_reuse=micro_batch: kernels\.attention=\w+ knows no beginnings that documents share, and no "
        rf"other can run here \(document: {REASON} {head_dim}\); use kernels\.prefix_reuse=none$"
    )
    assert caught.match(line)
    with pytest.raises(InputError, match=line):
        attentions(load_config(RECIPE, ["data.packing=bfd", *asked]), require_gpu("h200"), head_dim)


def test_padding_that_cannot_be_dropped_is_refused_in_one_line(gpu):
    with pytest.raises(ConfigError) as caught:
        resolved(100, "kernels.padding=drop")
    assert str(caught.value) == (
        "kernels.padding=drop: kernels.attention=sdpa needs packs in rows of their own, and no other can run here "
        f"(document: {REASON} 100; flash_attn, varlen, flash_attn_4: {IN_EIGHTHS}); use kernels.padding=keep"
    )


@pytest.mark.parametrize(
    ("head_dim", "packing", "expected"),
    [
        (80, "bfd", ["varlen"]),
        (96, "wrapped", ["varlen", "sdpa"]),
        (100, "bfd", ["sdpa"]),
        (128, "bfd", ["document", "varlen"]),
    ],
)
def test_what_is_predicted_can_run(head_dim, packing, expected):
    config = load_config(RECIPE, [f"data.packing={packing}"])
    assert attentions(config, require_gpu("h200"), head_dim) == expected


def test_numerics_that_attention_cannot_have_are_refused_as_in_training():
    def predicted(*overrides: str) -> list[str]:
        return attentions(load_config(RECIPE, ["data.packing=bfd", *overrides]), require_gpu("h200"), 128)

    assert predicted("model.dtype=float32") == ["sdpa"]
    assert predicted("train.deterministic=true") == ["document"]
    with pytest.raises(ConfigError, match=r"attention=document: needs model\.dtype=bfloat16, given float32; use"):
        predicted("model.dtype=float32", "kernels.attention=document")
    with pytest.raises(ConfigError, match=r"attention=varlen: PyTorch's copy has no deterministic backward"):
        predicted("train.deterministic=true", "kernels.attention=varlen")


def raising(monkeypatch, errors: dict[str, Exception]) -> None:
    def time_backend(name, *_):
        if name in errors:
            raise errors[name]
        return 1.0 if name == "varlen" else 2.0

    monkeypatch.setattr(attention_module, "time_backend", time_backend)


def test_auto_leaves_out_what_raises_and_names_it(gpu, monkeypatch):
    raising(monkeypatch, {"document": RuntimeError("out of\nresource"), "varlen": AssertionError()})
    found, why = choose_backend("auto", layout=object(), **options(128))
    assert found == "flash_attn"
    assert why == (
        "fastest forward + backward of one layer: flash_attn 2.00 ms, flash_attn_4 2.00 ms; "
        "varlen raises AssertionError; document raises RuntimeError: out of resource"
    )


def test_where_all_that_pack_raise_auto_takes_rows(gpu, monkeypatch):
    names = ("document", "flash_attn", "varlen", "flash_attn_4")
    raising(monkeypatch, dict.fromkeys(names, ValueError("no")))
    found, why = choose_backend("auto", layout=object(), **options(128))
    assert (found, why.partition(": ")[0]) == ("sdpa", "no other runs")
    found = resolved(96)
    assert (found["attention"], found["padding"], found["prefix_reuse"]) == ("sdpa", "keep", "none")


def test_where_nothing_runs_auto_says_why(gpu, monkeypatch):
    raising(
        monkeypatch, dict.fromkeys(usable_backends(is_packed=False, dtype=BF16, device=GPU, head_dim=64), OSError())
    )
    with pytest.raises(ValueError, match=r"^kernels\.attention=auto: none of them runs: sdpa raises OSError; .*; use"):
        choose_backend("auto", layout=object(), **options(64, is_packed=False))


def test_memory_that_suffices_for_none_is_said_to_be_short(gpu, monkeypatch):
    short = torch.OutOfMemoryError("tried to allocate")
    raising(monkeypatch, {"document": short})
    assert choose_backend("auto", layout=object(), **options(128))[0] == "varlen"
    raising(monkeypatch, dict.fromkeys(ABLE[128], short))
    with pytest.raises(torch.OutOfMemoryError):
        choose_backend("auto", layout=object(), **options(128))
