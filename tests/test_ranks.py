"""Two processes under torchrun against one process: the same numbers, or an error on every rank.

All jobs of the file run in one pair of processes, since importing torch takes most of such a test's time.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_job import read_metrics, read_steps, rows, run_ranks, small_config, tensors_equal, write_rows
from tiny_run import save_base
from transformers import AutoTokenizer, LlamaForCausalLM

from packloop.config import RunConfig, load_config
from packloop.data.loader import build_data
from packloop.data.packing import pack
from packloop.engine.checkpoint import find_checkpoint
from packloop.engine.loop import train
from packloop.engine.model import load_tokenizer
from packloop.errors import ConfigError

pytestmark = pytest.mark.ranks

POISON = "§"  # only row 5 has it, and the base has NaN for its first byte's token
POISONED_ROW = 5
LR = {"lr_scheduler_type": "linear", "warmup_ratio": 0.25}


class Jobs:
    """The jobs to run, each on two ranks and, where something is compared, in this process too."""

    def __init__(self, directory: Path, base: Path):
        self.directory, self.base = directory, base
        self.specs: list[dict] = []
        self.single: dict[str, RunConfig] = {}

    def add(
        self,
        name: str,
        source: Path,
        *,
        single: dict | None = None,
        base: Path | None = None,
        damage: str | None = None,
        stop: dict | None = None,
        resume: str | None = None,
        **sections,
    ) -> None:
        """single: settings with which one process does the same work; None where there is nothing to compare.
        damage: resume a copy of the job `whole` in which this file is broken. stop: SIGTERM to one rank at a step.
        """
        base = base or self.base
        config = small_config(base, source, self.directory / name, **sections).model_dump(mode="json")
        resume = "latest" if damage else resume
        self.specs.append({"name": name, "config": config, "resume": resume, "damage": damage, "stop": stop})
        if single is not None:
            sections["train"] = sections.get("train", {}) | single
            self.single[name] = small_config(base, source, self.directory / f"{name}-single", **sections)

    def run(self) -> None:
        file = self.directory / "jobs.json"
        file.write_text(json.dumps(self.specs), encoding="utf-8")
        done = run_ranks(Path(__file__).with_name("ranks_worker.py"), str(file), str(self.directory))
        assert done.returncode == 0, done.stderr
        for config in self.single.values():
            train(config)

    def rank(self, name: str, rank: int) -> dict:
        return json.loads((self.directory / f"{name}.rank{rank}.json").read_text(encoding="utf-8"))

    def both(self, name: str) -> tuple[list[dict], list[dict]]:
        """(steps of two ranks, steps of one process), after checking that both ranks saw the same."""
        assert self.rank(name, 0)["error"] is None
        assert self.rank(name, 0)["steps"] == self.rank(name, 1)["steps"]
        return read_steps(self.directory / name), read_steps(self.directory / f"{name}-single")


def token_of_poison(base: Path) -> int:
    return AutoTokenizer.from_pretrained(base)(POISON, add_special_tokens=False)["input_ids"][0]


def save_poisoned_base(directory: Path) -> Path:
    """A base whose embedding of one token is NaN: the loss of every row with that token is, and of no other."""
    save_base(directory)
    llama = LlamaForCausalLM.from_pretrained(directory)
    llama.model.embed_tokens.weight.data[token_of_poison(directory)] = float("nan")
    llama.save_pretrained(directory)
    return directory


def num_packs(config: RunConfig) -> int:
    documents = build_data(config.data, load_tokenizer(config.model), seed=config.train.seed).train
    return pack(documents.lengths, config.data.packing, config.data.max_length, np.arange(len(documents))).num_packs


def write_uneven_rows(path: Path) -> Path:
    """Two rows of 3 and 900 label tokens, EOS among them; `§` is two tokens, for its two bytes."""
    made = [{"instruction": "short", "response": "§"}, {"instruction": "long", "response": "§" * 449 + "~"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


def write_poisoned_rows(path: Path) -> Path:
    made = rows(8)
    made[POISONED_ROW]["response"] = f"Hello {POISON}."
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, small_base, small_rows) -> Jobs:
    directory = tmp_path_factory.mktemp("ranks")
    jobs = Jobs(directory, small_base)
    once = {"gradient_accumulation_steps": 1}
    jobs.add(
        "row02",
        write_uneven_rows(directory / "uneven.jsonl"),
        single={"gradient_accumulation_steps": 2},
        data={"packing": "none", "max_length": 1000, "loss_on": "response"},
        train=once | {"num_train_epochs": 3},
    )
    # The packs of an epoch are no multiple of a window's 4, so one rank has fewer in the last window.
    for packing in ("bfd", "wrapped", "none"):
        jobs.add(
            f"row03-{packing}",
            small_rows,
            single={"gradient_accumulation_steps": 4},
            data={"packing": packing, "eval_split": 4},
            train={"num_train_epochs": 2, "gradient_checkpointing": "all"},
        )
    jobs.add(
        "row26",
        write_rows(directory / "seven.jsonl", 7),
        single={"per_device_train_batch_size": 4},
        data={"packing": "none"},
        train={"per_device_train_batch_size": 2, "num_train_epochs": 3} | once,
    )
    for accumulation in (1, 4):
        train_settings = {"gradient_accumulation_steps": accumulation, "num_train_epochs": 2} | LR
        jobs.add(f"row18-{accumulation}", small_rows, train=train_settings)
    jobs.add(
        "row27",
        write_poisoned_rows(directory / "poisoned.jsonl"),
        base=save_poisoned_base(directory / "poisoned-base"),
        data={"packing": "none", "shuffle": False},
        train=once,
        checkpoint={"every": 1},
    )
    jobs.add(
        "row14-stock",
        small_rows,
        single={"gradient_accumulation_steps": 4},
        train={"max_steps": 4, "gradient_checkpointing": "all"},
        kernels={"layer": "stock"},
    )
    jobs.add("stopped", small_rows, train={"max_steps": 8}, stop={"rank": 1, "step": 3})
    dropout = {"lora": {"dropout": 0.1}, "checkpoint": {"every": 3}}
    jobs.add("whole", small_rows, train={"max_steps": 8}, **dropout)
    jobs.add(
        "resumed",
        small_rows,
        train={"max_steps": 8},
        damage="checkpoints/step-000008/optimizer.safetensors",
        **dropout,
    )
    of_one = {"train": {"max_steps": 4}, "checkpoint": {"every": 2}}
    train(small_config(small_base, small_rows, directory / "of one", **of_one))
    jobs.add("of one", small_rows, resume=str(directory / "of one/checkpoints/step-000002"), **of_one)
    jobs.run()
    return jobs


def test_the_ranks_talk_over_gloo(jobs):
    assert jobs.rank("row26", 0)["backend"] == "gloo"


def assert_same_training(two: list[dict], one: list[dict]) -> None:
    assert len(two) == len(one) > 2
    for ours, expected in zip(two, one, strict=True):
        assert ours["label_tokens"] == expected["label_tokens"]
        assert ours["real_tokens"] == expected["real_tokens"]
        assert ours["learning_rate"] == expected["learning_rate"]
        assert abs(ours["loss"] - expected["loss"]) < 2e-5
        assert abs(ours["grad_norm"] / expected["grad_norm"] - 1) < 1e-3


def test_row02_ranks_with_3_and_900_label_tokens_equal_one_process(jobs):
    two, one = jobs.both("row02")
    assert all(step["label_tokens"] == 903 for step in two)
    assert_same_training(two, one)


@pytest.mark.parametrize("packing", ["bfd", "wrapped", "none"])
def test_row03_two_epochs_with_an_uneven_last_window(jobs, packing):
    two, one = jobs.both(f"row03-{packing}")
    assert num_packs(jobs.single[f"row03-{packing}"]) % 4 != 0
    assert_same_training(two, one)
    evaluations = [
        [values for values in read_metrics(jobs.directory / name) if "eval_loss" in values]
        for name in (f"row03-{packing}", f"row03-{packing}-single")
    ]
    assert len(evaluations[0]) == 2
    for ours, expected in zip(*evaluations, strict=True):
        assert ours["eval_label_tokens"] == expected["eval_label_tokens"]
        assert abs(ours["eval_loss"] - expected["eval_loss"]) < 2e-5


@pytest.mark.parametrize("layer", ["fused", "stock"])
def test_row14_checkpointing_on_two_ranks(jobs, layer):
    name = "row03-bfd" if layer == "fused" else "row14-stock"
    config = load_config(jobs.directory / name / "config.resolved.yaml")
    assert (config.kernels.layer, config.train.gradient_checkpointing) == (layer, "all")
    assert_same_training(*jobs.both(name))


def test_row26_seven_rows_on_two_ranks_count_once(jobs):
    two, one = jobs.both("row26")
    assert_same_training(two, one)
    # An epoch is two steps, of 4 and of 3 rows: its label tokens are those of the 7 rows.
    tokens = [step["label_tokens"] for step in two]
    assert tokens[0] + tokens[1] == tokens[2] + tokens[3] == tokens[4] + tokens[5]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_row18_learning_rates_on_two_ranks(jobs, accumulation):
    result = jobs.rank(f"row18-{accumulation}", 0)
    num_steps = 2 * -(-17 // (2 * accumulation))
    warmup = -(-num_steps // 4)
    expected = [
        1e-2 * (step / warmup if step < warmup else 1 - (step - warmup) / (num_steps - warmup))
        for step in range(num_steps)
    ]
    assert [step["learning_rate"] for step in result["steps"]] == pytest.approx(expected, abs=1e-15)


def test_row27_nan_on_one_rank_stops_all_before_the_step(jobs):
    """Windows of two rows: rows 4 and 5 are step 3, and row 5 is rank 1's."""
    for rank in (0, 1):
        result = jobs.rank("row27", rank)
        assert [step["step"] for step in result["steps"]] == [1, 2]
        assert result["error"].startswith("NonFiniteError")
        assert f"rank 1: rows [{POISONED_ROW}]" in result["error"]
        assert "rank 0" not in result["error"]
    run_dir = jobs.directory / "row27"
    assert [path.name for path in sorted((run_dir / "checkpoints").glob("step-*"))] == ["step-000001", "step-000002"]
    assert not (run_dir / "adapter_model.safetensors").exists()
    for checkpoint in (run_dir / "checkpoints").glob("step-*"):
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "adapter_model.safetensors").values())


def test_a_signal_to_one_rank_stops_both_after_the_same_step(jobs):
    for rank in (0, 1):
        result = jobs.rank("stopped", rank)
        assert result["error"] is None
        assert result["stopped_by"] == signal.SIGTERM
        assert [step["step"] for step in result["steps"]] == [1, 2, 3, 4]
    assert find_checkpoint(jobs.directory / "stopped", "latest").state.step == 4


def test_resume_on_two_ranks_past_a_damaged_checkpoint_is_exact(jobs):
    for rank in (0, 1):
        assert jobs.rank("resumed", rank)["error"] is None
        assert jobs.rank("resumed", rank)["steps"] == jobs.rank("whole", rank)["steps"][6:]
    whole, resumed = jobs.directory / "whole", jobs.directory / "resumed"
    assert (resumed / "checkpoints/step-000008.damaged").is_dir()
    assert read_metrics(resumed) == read_metrics(whole)
    for file in ("adapter_model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        ours, expected = (load_file(run_dir / "checkpoints/step-000008" / file) for run_dir in (resumed, whole))
        assert tensors_equal(ours, expected), file
    assert not torch.equal(expected["0.torch"], expected["1.torch"]), "both ranks draw the same dropout"


def contents(run_dir: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_a_checkpoint_of_one_process_is_refused_by_both_of_two_which_write_nothing(jobs):
    run_dir = jobs.directory / "of one"
    for rank in (0, 1):
        result = jobs.rank("of one", rank)
        assert result["error"] == (
            "ConfigError: cannot resume step-000002 with 2 processes on a CPU each: it was written by 1 process on a "
            "CPU, whose random numbers and shares of the packs are part of it; resume with 1 process on a CPU, or "
            "start a new run in another train.output_dir"
        )
        assert result["steps"] == []
    assert sorted(path.name for path in (run_dir / "checkpoints").glob("step-*")) == ["step-000002", "step-000004"]
    assert [step["step"] for step in read_steps(run_dir)] == [1, 2, 3, 4]


def test_a_checkpoint_of_two_processes_is_refused_by_one_which_writes_nothing(jobs):
    run_dir = jobs.directory / "stopped"
    config = load_config(run_dir / "config.resolved.yaml")
    before = contents(run_dir)
    with pytest.raises(ConfigError, match="with 1 process on a CPU: it was written by 2 processes on a CPU each"):
        train(config, resume="latest")
    assert contents(run_dir) == before
