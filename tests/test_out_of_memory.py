"""Memory that ends during a run: exit code 3, where it went, what to change; what was written before stays."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from small_job import small_config, too_long, write_rows

from packloop import cli
from packloop.config import RunConfig, changed_keys, dump_config, parse_config
from packloop.engine import generate, loop, out_of_memory, run
from packloop.engine.loop import train
from packloop.engine.out_of_memory import less_memory, remedies
from packloop.engine.run_dir import config_for_resume, may_change_on_resume
from packloop.errors import ConfigError, OutOfMemoryError

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
    resumed, _, in_a_new_run = remedies.partition("; in a new run: ")
    assert resumed == ("use train.gradient_checkpointing=all, or train.optim=paged_adamw_32bit, also with --resume")
    assert in_a_new_run == (
        "kernels.attention=auto, or model.quantization=nf4, or a lower data.max_length, or a lower lora.r"
    )


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

    monkeypatch.setattr(run, "load_model", load)
    config = small_config(small_base, write_rows(tmp_path / "rows.jsonl", 12), tmp_path / "run")
    told = r"while the model was loaded \(CUDA out of memory\); in a new run: model.quantization=nf4, or a GPU"
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


# Settings that take more memory than they must; and for each setting that a remedy may name, what it advises.
COSTLY = {
    "model": {"quantization": "none"},
    "train": {"gradient_checkpointing": "none", "memory_budget_gib": 20.0, "per_device_train_batch_size": 4},
    "kernels": {"layer": "fused", "attention": "eager", "dequant_cache": "none", "keep_inputs": "all"},
}
ADVISED = {
    "train.gradient_checkpointing": "all",
    "kernels.dequant_cache": "none",
    "kernels.keep_inputs": "none",
    "train.memory_budget_gib": 22.0,
    "train.optim": "paged_adamw_32bit",
    "kernels.attention": "auto",
    "train.per_device_train_batch_size": 2,
    "model.quantization": "nf4",
    "data.max_length": 1024,
    "lora.r": 32,
}


def changed(config: RunConfig, key: str, value: object) -> RunConfig:
    values = config.model_dump()
    section, name = key.split(".")
    values[section][name] = value
    return parse_config(values)


def test_what_is_advised_for_a_resumed_run_is_accepted_by_one_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(out_of_memory, "may_be_raised", lambda budget_gib: budget_gib is not None)
    costly = parse_config(COSTLY)
    cached = changed(changed(costly, "model.quantization", "nf4"), "kernels.dequant_cache", 7)
    unpaged = changed(changed(costly, "train.memory_budget_gib", None), "train.optim", "adamw_32bit")
    met = set()
    for config in (costly, cached, unpaged):
        (tmp_path / "config.resolved.yaml").write_text(dump_config(config))
        unchanged = config_for_resume(config, tmp_path)
        resumed, _, in_a_new_run = remedies(config, 32).partition("; in a new run: ")
        for key, text in less_memory(config, 32).items():
            met.add(key)
            given = changed(config, key, ADVISED[key])
            assert (text in resumed) != (text in in_a_new_run), text
            if text in resumed:
                assert list(changed_keys(unchanged, config_for_resume(given, tmp_path))) == [key]
            elif ADVISED[key] == "auto":  # stands for what the checkpoint has
                assert config_for_resume(given, tmp_path) == unchanged
            else:
                with pytest.raises(ConfigError, match="cannot resume under another configuration"):
                    config_for_resume(given, tmp_path)
    assert met == set(ADVISED)
    assert {key for key in met if may_change_on_resume(key)} == {
        "train.gradient_checkpointing",
        "train.memory_budget_gib",
        "train.optim",
        "kernels.dequant_cache",
        "kernels.keep_inputs",
    }


def test_nothing_is_advised_that_takes_no_less(monkeypatch):
    monkeypatch.setattr(out_of_memory, "may_be_raised", lambda budget_gib: False)

    def of_memory(**kernels) -> list[str]:
        config = parse_config({"train": {"gradient_checkpointing": 32}, "kernels": kernels})
        return [key for key in less_memory(config, 32) if key.startswith("kernels.") or "checkpointing" in key]

    assert of_memory(layer="fused", dequant_cache=0, keep_inputs="all") == [], "layers that recompute keep no inputs"
    assert of_memory(layer="fused", dequant_cache=1, keep_inputs=0) == ["kernels.dequant_cache"]
    assert of_memory(layer="stock") == []
    assert less_memory(parse_config({"train": {"optim": "adamw_32bit", "memory_budget_gib": 9.0}}), None) == {
        "GPU": "a GPU with more memory"
    }, "a budget counts paged state too"
