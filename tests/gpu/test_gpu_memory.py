"""Memory on a GPU: `auto` keeps to its budget, what does not fit ends with exit code 3, a resume measures nothing."""

from __future__ import annotations

import gc
import shutil
import sys

import pytest
import torch
from small_job import read_metrics, read_steps, small_config, write_rows
from tiny_run import save_base

from packloop import cli
from packloop.config import RunConfig, dump_config, load_config
from packloop.engine import loop, memory, run
from packloop.engine.budget import GIB
from packloop.engine.planner.policy import MemoryPlan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

NUM_LAYERS, NUM_STEPS = 8, 6
SMALLEST = MemoryPlan(recompute_layers=NUM_LAYERS, cached_layers=0, keep_inputs_layers=0)
LARGEST = MemoryPlan(recompute_layers=0, cached_layers=NUM_LAYERS, keep_inputs_layers=NUM_LAYERS)


@pytest.fixture(autouse=True)
def own_memory():
    """Each test from an empty allocator, under no limit: a run takes its own back, however it ends."""
    assert torch.cuda.get_per_process_memory_fraction() == 1
    yield
    assert torch.cuda.get_per_process_memory_fraction() == 1
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> RunConfig:
    """NF4, 8 layers of 1024, micro-batches of some 8,000 tokens: activations are the larger part of memory."""
    directory = tmp_path_factory.mktemp("job")
    base = save_base(
        directory / "base",
        dtype=torch.bfloat16,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
    )
    return small_config(
        base,
        write_rows(directory / "rows.jsonl", 1200),
        directory / "unused",
        model={"quantization": "nf4", "dtype": "bfloat16"},
        lora={"r": 16, "dropout": 0.1, "target_modules": "all-linear"},
        data={"max_length": 1024},
        train={"max_steps": NUM_STEPS, "per_device_train_batch_size": 8, "learning_rate": 1e-3},
        kernels={"attention": "document", "layer": "fused"},
        checkpoint={"every": 3, "keep": 9},
    )


def planned(config: RunConfig, plan: MemoryPlan) -> RunConfig:
    """The same run with the numbers of layers given."""
    return changed(
        config,
        train={"gradient_checkpointing": plan.recompute_layers},
        kernels={"dequant_cache": plan.cached_layers, "keep_inputs": plan.keep_inputs_layers},
    )


def changed(config: RunConfig, **sections: dict) -> RunConfig:
    """The same run with these settings."""
    values = {name: getattr(config, name).model_copy(update=settings) for name, settings in sections.items()}
    return config.model_copy(update=values)


def counted_bytes(config: RunConfig, run_dir, **options) -> int:
    """What a run reserved at the peak of its steps, with its paged optimizer state; it writes into `run_dir`."""
    gc.collect()
    torch.cuda.empty_cache()
    paged: list[int] = []
    make = run.make_optimizer

    def make_and_look(*arguments):
        optimizer = make(*arguments)
        paged.append(optimizer.paged_bytes)
        return optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_optimizer", make_and_look)
        loop.train(changed(config, train={"output_dir": str(run_dir)}), **options)
    assert paged[0] > 0
    return torch.cuda.max_memory_reserved() + paged[0]


def chosen(run_dir) -> MemoryPlan:
    """The plan in the resolved configuration."""
    config = load_config(run_dir / "config.resolved.yaml")
    return MemoryPlan(
        recompute_layers=config.train.gradient_checkpointing,
        cached_layers=config.kernels.dequant_cache,
        keep_inputs_layers=config.kernels.keep_inputs,
    )


@pytest.fixture(scope="module")
def least_and_most(job, tmp_path_factory) -> tuple[int, int]:
    """Bytes of the runs with the smallest and the largest plan."""
    directory = tmp_path_factory.mktemp("extremes")
    least, most = (counted_bytes(planned(job, plan), directory / str(n)) for n, plan in enumerate((SMALLEST, LARGEST)))
    print(f"smallest plan {least / GIB:.2f} GiB, largest {most / GIB:.2f} GiB")
    assert most > 1.3 * least
    return least, most


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_auto_stays_under_its_budget_and_uses_it(job, least_and_most, tmp_path, share):
    least, most = least_and_most
    budget = least + share * (most - least)
    config = changed(job, train={"memory_budget_gib": budget / GIB})
    counted = counted_bytes(config, tmp_path / "run")
    print(f"budget {budget / GIB:.2f} GiB, counted {counted / GIB:.2f} GiB, {chosen(tmp_path / 'run')}")
    assert len(read_steps(tmp_path / "run")) == NUM_STEPS
    assert counted <= budget
    # Spent, but for what the largest micro-batch of all epochs would take and these few steps' do not.
    assert counted >= least + 0.35 * (budget - least)
    assert chosen(tmp_path / "run") not in (SMALLEST, LARGEST)


def test_what_auto_chose_is_kept_by_a_resume_that_measures_nothing(job, least_and_most, tmp_path, monkeypatch):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    config = changed(job, train={"memory_budget_gib": sum(least_and_most) / 2 / GIB})
    counted = counted_bytes(config, whole)
    plan = chosen(whole)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints/step-000006")

    def measure(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(memory, "_measure", measure)
    monkeypatch.setattr(memory, "_run_passes", measure)
    assert counted_bytes(config, resumed, resume="latest") <= counted * 1.02
    assert chosen(resumed) == plan
    assert read_metrics(resumed) == read_metrics(whole)
    with pytest.raises(AssertionError, match="measured again"):  # as a new run would
        counted_bytes(config, tmp_path / "new")


def run_command(config: RunConfig, directory, monkeypatch, capsys, *options: str) -> tuple[int, str]:
    """(exit code, what it said on stderr) of `packloop train`."""
    gc.collect()
    torch.cuda.empty_cache()
    (directory / "config.yaml").write_text(dump_config(changed(config, train={"output_dir": str(directory / "run")})))
    monkeypatch.setattr(sys, "argv", ["packloop", "train", str(directory / "config.yaml"), *options])
    code = 0
    try:
        cli.main()
    except SystemExit as left:
        code = left.code or 0
    return code, capsys.readouterr().err


def rows_of(table: str) -> dict[str, float]:
    """Name -> GiB of an out-of-memory message's table."""
    cells = [line.split() for line in table.splitlines() if line.startswith("  ") and line.endswith(" GiB")]
    return {" ".join(words[:-2]): float(words[-2]) for words in cells}


def test_a_budget_below_the_model_is_exit_code_3(job, tmp_path, monkeypatch, capsys):
    code, said = run_command(changed(job, train={"memory_budget_gib": 0.02}), tmp_path, monkeypatch, capsys)
    assert code == 3
    assert "train.memory_budget_gib=0.02 does not hold the model" in said
    assert list(rows_of(said)) == ["frozen weights", "adapter, its gradient", "optimizer state", "allowed"]
    assert "Traceback" not in said


def test_a_budget_below_the_smallest_plan_is_exit_code_3_and_its_advice_works(
    job, least_and_most, tmp_path, monkeypatch, capsys
):
    least, _ = least_and_most
    code, said = run_command(changed(job, train={"memory_budget_gib": least / 2 / GIB}), tmp_path, monkeypatch, capsys)
    assert code == 3, said
    rows = rows_of(said)
    print(said)
    assert f"out of memory with {SMALLEST}; predicted:" in said
    assert rows["allowed"] == pytest.approx(least / 2 / GIB, abs=0.006)
    assert rows["reserved in all"] > rows["allowed"]
    assert "a higher train.memory_budget_gib" in said
    assert "a lower train.per_device_train_batch_size" in said
    less = {"per_device_train_batch_size": 1, "memory_budget_gib": least / 2 / GIB}
    code, said = run_command(changed(job, train=less), tmp_path, monkeypatch, capsys)
    assert code == 0, said


def test_a_step_that_finds_no_room_is_exit_code_3_and_resume_takes_what_is_advised(
    job, least_and_most, tmp_path, monkeypatch, capsys
):
    """Settings by hand, so that nothing is measured beforehand: it is the first step of a resumed run that fails."""
    least, most = least_and_most
    roomy = planned(job, LARGEST)
    code, said = run_command(changed(roomy, train={"max_steps": NUM_STEPS}), tmp_path, monkeypatch, capsys)
    assert code == 0, said
    shutil.rmtree(tmp_path / "run/checkpoints/step-000006")
    tight = {"memory_budget_gib": (least + 0.3 * (most - least)) / GIB}
    code, said = run_command(changed(roomy, train=tight), tmp_path, monkeypatch, capsys, "--resume", "latest")
    assert code == 3, said
    rows = rows_of(said)
    print(said)
    assert rows["activations, gradients of them, buffers"] > 0
    assert rows["reserved at the peak"] <= tight["memory_budget_gib"]
    assert f"dequantised weights of {NUM_LAYERS} layers" in rows
    assert "use train.gradient_checkpointing=all, or kernels.dequant_cache=none" in said
    assert "also with --resume" in said
    code, said = run_command(
        changed(planned(job, SMALLEST), train=tight), tmp_path, monkeypatch, capsys, "--resume", "latest"
    )
    assert code == 0, said
    assert [values["step"] for values in read_steps(tmp_path / "run")] == list(range(1, NUM_STEPS + 1))
