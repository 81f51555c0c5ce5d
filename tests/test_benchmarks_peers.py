"""The comparison with other packages, as far as a CPU without those packages can go."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import save_base, save_tokenizer
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # benchmarks is not part of the installed package

from benchmarks import against_peers  # noqa: E402
from benchmarks.peers import measure, ours, rows, settings  # noqa: E402
from benchmarks.peers.shapes import shape_config  # noqa: E402
from packloop.bench.floor import Floor, groups_of  # noqa: E402
from packloop.bench.steps import lap_figures  # noqa: E402


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """A tokenizer's directory and a file of rows."""
    root = tmp_path_factory.mktemp("peers")
    save_tokenizer(root / "tokenizer")
    examples = [{"instruction": f"Note {n}", "input": "", "output": "leaks " * (1 + n % 5)} for n in range(40)]
    (root / "rows.json").write_text(json.dumps(examples))
    return {"tokenizer": str(root / "tokenizer"), "data": str(root / "rows.json")}


def _ours(places: dict[str, str], *options: str):
    shared = ["--tokenizer", places["tokenizer"], "--data", places["data"], "--shape", "tiny"]
    return ours.parse([*shared, "--length", "160", "--batch", "2", *options])


def test_settings_name_no_place_on_the_machine(places):
    shown = settings.settings_of(_ours(places, "--targets", "all-linear"))
    assert shown["targets"] == "all-linear"
    assert not {"model", "data", "tokenizer"} & set(shown)
    assert str(Path(places["data"]).parent) not in json.dumps(shown)


def test_options_become_the_run_they_name(places):
    config = ours.run_config(_ours(places, "--stock", "--attention", "eager", "--recompute-layers", "all"))
    assert (config.kernels.layer, config.kernels.attention) == ("stock", "eager")
    assert config.train.gradient_checkpointing == "all"
    assert config.kernels.dequant_cache == "auto"
    assert ours.run_config(_ours(places, "--cached-layers", "7")).kernels.dequant_cache == 7


def test_documents_are_packloops_and_enough_of_them(places):
    tokenizer = rows.load_tokenizer(places["tokenizer"])
    once = rows.documents(places["data"], tokenizer, "bfd", 160)
    assert all(ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id for ids in once)
    many = rows.enough_documents(once, num_packs=100, length=160, seed=0)
    assert sum(map(len, many)) >= 100 * 160
    assert sorted(many[: len(once)]) == sorted(once)


def test_a_changed_token_is_found():
    given = [[1, 5, 2], [1, 6, 7, 2]]
    packed = [{"input_ids": [1, 6, 7, 2, 1, 5, 2], "seq_lengths": [4, 3]}]
    rows.check_same_tokens(packed, given, "bfd")
    rows.check_same_tokens([{"input_ids": [1, 5, 2, 1]}, {"input_ids": [6, 7, 2]}], given, "wrapped")
    with pytest.raises(ValueError, match="documents"):
        rows.check_same_tokens([{"input_ids": [1, 6, 7, 2, 1, 4, 2], "seq_lengths": [4, 3]}], given, "bfd")


def test_laps_of_a_trainer_count_what_it_trains_on(tmp_path):
    model = LlamaForCausalLM.from_pretrained(save_base(tmp_path / "base"))
    ids = [1, 5, 6, 7, 2, 0, 0, 0]
    example = {
        "input_ids": ids,
        "labels": [-100, 5, 6, 7, 2, -100, -100, -100],
        "attention_mask": [1] * 5 + [0] * 3,
    }
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=[example] * 8)
    meter = measure.StepMeter()
    meter.watch(trainer)
    trainer.train()
    assert [(lap.real_tokens, lap.slot_tokens, lap.label_tokens) for lap in meter.laps] == [(20, 32, 16)] * 2
    assert all(lap.ms > 0 and lap.loss > 0 for lap in meter.laps)
    row = lap_figures(meter.laps, warmup=1)
    assert row["timed_steps"] == 1
    assert row["real_tokens_per_s"]["median"] == pytest.approx(20 / meter.laps[1].ms * 1e3)


def test_a_batch_without_mask_is_all_real_tokens():
    ids = torch.tensor([[1, 5, 2, 1, 6, 2]])
    labels = torch.tensor([[-100, 5, 2, -100, 6, 2]])
    assert measure._count({"input_ids": ids, "labels": labels})[:2] == (6, 6)


def test_out_of_memory_is_a_row():
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    assert measure.or_out_of_memory(fail) == {"out_of_memory": True, "reason": "CUDA out of memory."}


def test_ours_runs_with_its_floor(places):
    row = ours.train(_ours(places, "--warmup", "1", "--steps", "2", "--floor"))
    assert len(row["losses"]) == 3
    assert row["losses"][0] == pytest.approx(torch.tensor(300.0).log().item(), abs=0.3)
    assert row["real_tokens_per_s"]["median"] <= row["slot_tokens_per_s"]["median"]
    assert row["fraction_of_floor"] == pytest.approx(row["floor_ms"] / row["step_ms"]["median"])
    assert row["chosen"]["recompute_layers"] == 0
    json.dumps(row)


def test_floor_has_every_product_of_the_model(places):
    config = shape_config("tiny", places["tokenizer"])
    floor = Floor(config, num_slots=64, num_labels=60, device=torch.device("cpu"))
    assert len(floor.products) == 2 * (len(groups_of(config)) + 1)
    weights = sum(group.in_features * sum(group.out_features) for group in groups_of(config))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    linears = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    assert weights * config.num_hidden_layers == sum(linear.weight.numel() for linear in linears)


def test_driver_writes_rows_and_says_what_could_not_run(places, tmp_path):
    output = tmp_path / "result.json"
    command = ["all-linear-unsloth", "--dry-run", "tiny", "--turns", "AB", "--work", str(tmp_path / "work")]
    command += ["--tokenizer", places["tokenizer"], "--data", places["data"], "--output", str(output)]
    against_peers.main([*command, "--ours-args", "--length 160"])
    result = json.loads(output.read_text())
    mine, theirs = result["rows"]
    assert mine["who"] == "packloop", mine
    assert mine["real_tokens_per_s"]["median"] > 0, mine
    assert mine["settings"]["targets"] == "all-linear"
    assert "GPU" in theirs["skipped"]
    assert result["ratio"] is None


def test_ratios_are_of_the_turns_means():
    figures = [("A", 120.0), ("B", 100.0), ("B", 80.0), ("A", 96.0), ("ours, eager", 45.0)]
    found = against_peers.ratios([{"turn": turn, "real_tokens_per_s": {"median": rate}} for turn, rate in figures])
    assert found["ratio"] == pytest.approx(108 / 90)
    assert found["ratio_range"] == pytest.approx([96 / 100, 120 / 80])
    assert found["extra_ratios"] == {"ours, eager": pytest.approx(0.5)}


def test_driver_refuses_a_peer_the_case_lacks(capsys):
    with pytest.raises(SystemExit):
        against_peers.parse(
            ["tutorial-eager", "--peer", "unsloth", "--work", "w", "--tokenizer", "t", "--data", "d", "--output", "o"]
        )
    assert "has no options for unsloth" in capsys.readouterr().err
