"""Memory that ends during a run: exit code 3, where it went, what to change; what was written before stays."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from small_job import small_config, too_long, write_rows

from packloop import cli
from packloop.config import dump_config
from packloop.engine import generate, loop
from packloop.engine.loop import train
from packloop.errors import OutOfMemoryError

# As CUDA's allocator, cuBLAS and the host's allocator say it.
SAID = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 22 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
]


def test_a_step_that_finds_no_room_tells_where_memory_went(tmp_path, monkeypatch, capsys):
    """Really: the host's allocator is asked for twice what there is."""
    source, length = tmp_path / "rows.jsonl", too_long()
    source.write_text(json.dumps({"instruction": "Write.", "response": "a b c d e f g h " * length}) + "\n")
    config = small_config(
        "bundled",
        source,
        tmp_path / "run",
        data={"max_length": length, "packing": "none"},
        train={"gradient_accumulation_steps": 1, "optim": "adamw_32bit"},
        kernels={"layer": "stock", "attention": "eager"},
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    monkeypatch.setattr(sys, "argv", ["packloop", "train", str(tmp_path / "config.yaml")])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 3
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    _, _, told = shown.partition("error: out of memory (")
    first, *rows, remedies = told.strip().splitlines()
    assert "DefaultCPUAllocator" in first
    assert [row.rsplit(maxsplit=2)[0].strip() for row in rows] == [
        "frozen weights",
        "adapter, its gradient",
        "optimizer state",
    ]
    assert remedies.startswith("use train.gradient_checkpointing=all, or kernels.attention=auto, or ")
    for setting in ("train.optim=paged_adamw_32bit", "model.quantization=nf4", "data.max_length", "lora.r"):
        assert setting in remedies


@pytest.mark.parametrize("said", SAID, ids=lambda error: str(error)[:20])
def test_checkpoints_of_before_are_kept_and_a_run_goes_on_from_them(small_base, tmp_path, monkeypatch, said):
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    config = small_config(small_base, rows, tmp_path / "run", train={"max_steps": 3}, checkpoint={"every": 1})
    whole = loop.train_step
    taken = []

    def third_finds_no_room(*arguments, **options):
        if len(taken) == 2:
            raise said
        taken.append(None)
        return whole(*arguments, **options)

    monkeypatch.setattr(loop, "train_step", third_finds_no_room)
    with pytest.raises(OutOfMemoryError, match=r"out of memory \(.*\):\n  frozen weights") as caught:
        train(config)
    assert caught.value.exit_code == 3
    assert caught.value.__cause__ is said, "which --debug shows"
    monkeypatch.setattr(loop, "train_step", whole)
    assert train(config, resume="latest").state.step == 3


def test_another_error_of_torch_stays_what_it_is(small_base, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "rows.jsonl", 12)

    def fails(*_, **__):
        raise RuntimeError("shapes do not agree")

    monkeypatch.setattr(loop, "train_step", fails)
    with pytest.raises(RuntimeError, match="shapes do not agree"):
        train(small_config(small_base, rows, tmp_path / "run"))


def test_a_model_that_finds_no_room_is_told_without_a_table(small_base, tmp_path, monkeypatch):
    def load(*_):
        raise SAID[0]

    monkeypatch.setattr(loop, "load_model", load)
    config = small_config(small_base, write_rows(tmp_path / "rows.jsonl", 12), tmp_path / "run")
    told = r"out of memory while the model was loaded \(CUDA out of memory\); use model.quantization=nf4, or a GPU"
    with pytest.raises(OutOfMemoryError, match=told):
        train(config)


def test_every_command_leaves_with_one_line_and_code_3(small_base, tmp_path, monkeypatch, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    train(small_config(small_base, rows, tmp_path / "run", train={"max_steps": 1}))

    def no_room(*_, **__):
        raise SAID[1]

    monkeypatch.setattr(generate, "load_base", no_room)
    monkeypatch.setattr(sys, "argv", ["packloop", "generate", str(tmp_path / "run"), "--text", "Hello."])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 3
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "CUBLAS_STATUS_ALLOC_FAILED" in line
    assert Path(tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_remedies_are_those_that_the_configuration_leaves(small_base, tmp_path, monkeypatch):
    config = small_config(
        small_base,
        write_rows(tmp_path / "rows.jsonl", 12),
        tmp_path / "run",
        train={"gradient_checkpointing": "all", "per_device_train_batch_size": 2},
        kernels={"dequant_cache": 0, "keep_inputs": 0},
    )

    def no_room(*_, **__):
        raise SAID[0]

    monkeypatch.setattr(loop, "train_step", no_room)
    with pytest.raises(OutOfMemoryError) as caught:
        train(config)
    remedies = str(caught.value).splitlines()[-1]
    assert "gradient_checkpointing" not in remedies
    assert "kernels." not in remedies
    assert "a lower train.per_device_train_batch_size with more train.gradient_accumulation_steps" in remedies
