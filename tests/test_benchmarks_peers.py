"""The comparison with other packages, as far as a CPU without those packages can go."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import fork_from
from tiny_run import save_base, save_tokenizer
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from benchmarks import against_peers
from benchmarks.peers import live, measure, memory, ours, process, rows, settings
from benchmarks.peers.cases import CASES, Case, Check
from benchmarks.peers.cells import save_cells
from benchmarks.peers.process import LiveProcess, environment
from benchmarks.peers.shapes import shape_config
from benchmarks.peers.summary import judge, table
from benchmarks.peers.sweep import best_batches
from packloop.bench.floor import Floor, groups_of
from packloop.bench.results import load_cells
from packloop.bench.steps import lap_figures

REPOSITORY = Path(__file__).resolve().parents[1]


def test_documented_commands_and_cases_are_the_scripts():
    page = (REPOSITORY / "docs/benchmarks.md").read_text()
    section = page.split("## Beside other trainers")[1].split("\n## ")[0]
    commands = re.findall(r"^python benchmarks/against_peers.py (.+)$", section.replace("\\\n", " "), re.MULTILINE)
    assert commands
    for command in commands:
        assert against_peers.parse(shlex.split(command)).cases
    bounds = {
        name: float(bound)
        for names, bound in re.findall(r"^\| (`[^|]+) \| ([0-9.]+) \|", section, re.MULTILINE)
        for name in re.findall(r"`([^`]+)`", names)
    }
    assert bounds == {name: case.bound for name, case in CASES.items()}
    for option in set(re.findall(r"`(--[a-z-]+)", section)):
        assert option in against_peers.parse.__code__.co_consts


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
    assert config.kernels.prefix_reuse == "auto"
    assert ours.run_config(_ours(places, "--prefix-reuse", "none")).kernels.prefix_reuse == "none"


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

    assert memory.or_out_of_memory(fail) == {"out_of_memory": True, "reason": "CUDA out of memory."}


def test_a_turn_of_ours_starts_afresh_and_runs_with_its_floor(places):
    arguments = _ours(places, "--warmup", "1", "--steps", "2", "--floor")
    side = ours.Packloop(arguments)
    row, again = live.take_turn(side, arguments), side.turn(arguments)
    without = side.turn(_ours(places, "--warmup", "1", "--steps", "2", "--dropout", "0"))
    assert len(row["losses"]) == 3
    assert row["losses"] == again["losses"] != without["losses"]
    assert row["losses"][0] == pytest.approx(torch.tensor(300.0).log().item(), abs=0.3)
    assert row["real_tokens_per_s"]["median"] <= row["slot_tokens_per_s"]["median"]
    assert row["fraction_of_floor"] == pytest.approx(row["floor_ms"] / row["step_ms"]["median"])
    assert row["chosen"]["recompute_layers"] == 0
    assert row["conditions"]["versions"]["torch"] == torch.__version__
    assert str(Path(places["data"]).parent) not in json.dumps(row)


def test_floor_has_every_product_of_the_model(places):
    config = shape_config("tiny", places["tokenizer"])
    floor = Floor(config, num_slots=64, num_labels=60, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert len(floor.products) == 2 * (len(groups_of(config)) + 1)
    weights = sum(group.in_features * sum(group.out_features) for group in groups_of(config))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    linears = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    assert weights * config.num_hidden_layers == sum(linear.weight.numel() for linear in linears)


def _command(places: dict[str, str], tmp_path: Path, *words: str) -> list[str]:
    command = [*words, "--dry-run", "tiny", "--work", str(tmp_path / "work"), "--output-dir", str(tmp_path / "out")]
    return [*command, "--tokenizer", places["tokenizer"], "--data", places["data"], "--ours-args", "--length 160"]


def test_driver_writes_rows_cells_and_what_could_not_run(places, tmp_path, capsys, monkeypatch):
    fork_from(process, monkeypatch)
    against_peers.main(_command(places, tmp_path, "all-linear-unsloth", "--turns", "ABA", "--no-extras", "--rehearse"))
    result = json.loads((tmp_path / "out" / "all-linear-unsloth.json").read_text())
    mine, theirs, again = result["rows"]
    assert mine["who"] == "packloop", mine
    assert mine["real_tokens_per_s"]["median"] > 0, mine
    assert mine["settings"]["targets"] == "all-linear"
    assert again["losses"] == mine["losses"]
    assert "GPU" in theirs["skipped"]
    assert result["verdicts"][0]["ratio"] is None
    printed = capsys.readouterr().out
    assert "no rate" in printed
    assert [line.split()[0] for line in printed.splitlines() if line.split()[1:2] == ["Unsloth"]][:2] == [
        "rehearsal",
        "B",
    ]
    their_cell, ours_cell = load_cells(tmp_path / "out" / "all-linear-unsloth")
    assert (ours_cell.who, ours_cell.status, ours_cell.figures.timed_steps) == ("packloop", "measured", 2)
    assert ours_cell.settings["lora.target_modules"] == "all-linear"
    assert ours_cell.config["data"]["source"] == ours_cell.asked["data"]["source"] == "rows.json"
    assert ours_cell.asked["kernels"]["layer"] == "auto" != ours_cell.config["kernels"]["layer"]
    assert (their_cell.who, their_cell.status) == ("Unsloth", "failed")
    assert "GPU" in their_cell.reason
    assert their_cell.session == ours_cell.session
    assert (ours_cell.name, their_cell.name) == ("packloop-batch-1", "not-run")


def test_a_sweep_tries_the_peer_with_and_without_recomputation(places, tmp_path, monkeypatch):
    monkeypatch.setattr(against_peers.Comparison, "_why_not", lambda self: None)
    for case, other, option in (
        ("qv-liger", "B, recomputing", "--checkpointing"),
        ("cap22-qv", "B, not recomputing", "--no-checkpointing"),
    ):
        words = ["--sweep", "2", "--sweep-side", "B", "--checkpointing-too", "--peer", "unsloth"]
        comparison = against_peers.Comparison(case, against_peers.parse(_command(places, tmp_path, case, *words)))
        assert [side for _, side, _ in comparison._sweep_turns()] == ["B", other]
        commands = [comparison._side(side)._words for side in ("B", other)]
        assert commands[1] == [*commands[0], option]
        opposite = {"--checkpointing", "--no-checkpointing"} - {option}
        assert opposite <= set(commands[0])


def test_the_peer_rehearses_each_batch_once(places, tmp_path):
    def turns(*words: str) -> list[str]:
        arguments = against_peers.parse(_command(places, tmp_path, "qv-liger", "--no-extras", "--rehearse", *words))
        comparison = against_peers.Comparison("qv-liger", arguments)
        made = comparison._sweep_turns() if arguments.sweep else comparison._turns()
        return [" ".join([turn, *options[:2]]) for turn, _, options in made]

    assert turns() == ["A", "rehearsal", "B", "B", "A"]
    batch_16 = ["rehearsal --batch 16", "B at batch 16 --batch 16"]
    assert turns("--turns", "AB", "--peer-batch-too", "16") == ["A", "rehearsal", "B", *batch_16]
    swept = ["A --batch 2", "A --batch 4", "rehearsal --batch 2", "B --batch 2", "rehearsal --batch 4", "B --batch 4"]
    assert turns("--sweep", "2,4") == swept


def test_a_sweep_that_is_stopped_keeps_its_rows(places, tmp_path):
    # More lines than the pipe takes while nobody reads: however late it is stopped, it is not done.
    batches = ",".join(["1", "2"] * 2000)
    command = _command(places, tmp_path, "qv-liger", "--sweep", batches, "--sweep-side", "A")
    script = REPOSITORY / "benchmarks" / "against_peers.py"
    with subprocess.Popen([sys.executable, script, *command], stdout=subprocess.PIPE, text=True) as driver:
        ready, first, second = (driver.stdout.readline() for _ in range(3))
        driver.terminate()
        time.sleep(0.3)
        driver.terminate()  # as `timeout` sends it: to its child and to the child's group
        driver.communicate(timeout=200)
    assert "packloop is ready" in ready
    assert "batch 1, bfd" in first
    assert "batch 2, bfd" in second
    swept = json.loads((tmp_path / "out" / "qv-liger-sweep.json").read_text())["rows"]
    assert [row["settings"]["batch"] for row in swept[:2]] == [1, 2]
    assert 2 <= len(swept) < 4000
    cells = load_cells(tmp_path / "out" / "qv-liger-sweep")
    assert [cell.name for cell in cells] == ["packloop-batch-1", "packloop-batch-2"]


FAULTY = """
import os, sys, time
import torch
from benchmarks.peers import live, settings

class Faulty:
    who = "faulty"

    def __init__(self, arguments):
        print("row: nothing of the kind", flush=True)

    def turn(self, arguments):
        print('row: {"who": "noise"}', flush=True)
        if arguments.batch == 2:
            raise torch.OutOfMemoryError("no room")
        if arguments.batch == 3:
            sys.exit("the end of it")
        if arguments.batch == 4:
            time.sleep(600)
        return {"batch": arguments.batch, "pid": os.getpid()}

live.serve(settings.job_parser("").parse_args, Faulty)
"""


def test_a_side_that_fails_is_a_row_and_starts_again(tmp_path, monkeypatch):
    fork_from(process, monkeypatch)
    (tmp_path / "faulty_side.py").write_text(FAULTY)
    words = ["faulty_side", "--data", "none"]
    side = LiveProcess("?", words, name="faulty", work=tmp_path, timeout_s=240, env=environment())
    try:
        side.start()
        first = side.turn(["--batch", "1"])
        assert (first["who"], first["batch"]) == ("faulty", 1)
        full = side.turn(["--batch", "2"])
        assert full["out_of_memory"] is True
        assert full["reason"] == "no room"
        assert side.turn(["--batch", "1"])["pid"] == first["pid"]
        assert "the end of it" in side.turn(["--batch", "3"])["failed"]
        again = side.turn(["--batch", "1"])
        assert again["pid"] != first["pid"]
        side._timeout_s = 2
        assert "no row within 2 s" in side.turn(["--batch", "4"])["failed"]
        side._timeout_s = 240
        assert "the end of it" in side.turn(["--batch", "3"])["failed"]
        assert "the end of it" in side.turn(["--batch", "1"])["failed"]  # two in a row: not once more
    finally:
        side.close()


def test_a_side_that_cannot_start_says_so_at_every_turn(tmp_path):
    side = LiveProcess("?", ["no_such_module"], name="none", work=tmp_path, timeout_s=240, env=environment())
    side.start()
    rows = [side.turn([]), side.turn([])]
    side.close()
    assert all("no_such_module" in row["failed"] for row in rows)
    assert len(list((tmp_path / "logs").iterdir())) == 1


def _row(turn: str, rate: float, **more) -> dict:
    return {"turn": turn, "who": turn, "real_tokens_per_s": {"median": rate}, **more}


def test_bounds_are_held_against_the_turns_means():
    figures = [("A", 120.0), ("B", 100.0), ("B", 80.0), ("A", 96.0), ("ours, eager", 87.0)]
    rows = [_row(turn, rate) for turn, rate in figures] + [{"turn": "B", "who": "B", "failed": "no"}]
    case = Case(ours="", peers={}, bound=1.3, checks=(Check("ours, eager", "B", 0.97), Check("none", "B", 1.0)))
    main, eager, none = judge(case, rows)
    assert main["ratio"] == pytest.approx(108 / 90)
    assert main["ratio_range"] == pytest.approx([96 / 100, 120 / 80])
    assert main["met"] is False
    assert (eager["ratio"], eager["met"]) == (pytest.approx(87 / 90), False)
    assert (none["ratio"], none["met"]) == (None, None)
    assert "NO" in table([{"case": "tried", "rows": rows, "verdicts": [main]}])


def test_a_fraction_of_the_floor_can_stand_in_for_the_bound():
    rows = [_row("A", 110.0, fraction_of_floor=0.91), _row("B", 100.0)]
    assert judge(Case(ours="", peers={}, bound=1.2, or_of_floor=0.90), rows)[0]["met"] is True
    assert judge(Case(ours="", peers={}, bound=1.2, or_of_floor=0.92), rows)[0]["met"] is False
    assert judge(Case(ours="", peers={}, bound=1.2), rows)[0]["met"] is False


def test_a_best_batch_needs_half_and_double():
    swept = [_row("TRL", rate, batch=batch) for batch, rate in ((2, 90.0), (4, 100.0))]
    assert best_batches(swept) == ["TRL: batch 4 is the fastest, 100 real tokens/s; 8 not tried"]
    full = {"turn": "TRL", "batch": 8, "out_of_memory": True}
    assert "so its best (2: 90, 8: no memory)" in best_batches([*swept, full])[0]
    assert best_batches([full]) == ["TRL: no batch has a rate"]


def test_cells_join_the_laps_of_turns(places, tmp_path):
    arguments = _ours(places, "--warmup", "1", "--steps", "2", "--floor")
    side = ours.Packloop(arguments)
    turns = [{"turn": "A", **live.take_turn(side, arguments)} for _ in range(2)]
    save_cells(tmp_path, [*turns, {"turn": "B", "who": "TRL", "failed": "first\nlast"}], session="s", shape="tiny")
    theirs, mine = sorted(load_cells(tmp_path), key=lambda cell: cell.who)
    timed = [lap["ms"] for row in turns for lap in row["laps"][1:]]
    assert mine.figures.warmup_steps == 2
    assert mine.figures.step_ms_all[2:] == pytest.approx(timed, abs=1e-3)
    assert mine.figures.step_ms.min == pytest.approx(min(timed))
    assert mine.floor.fraction == pytest.approx(mine.floor.ms / mine.figures.step_ms.median)
    assert (theirs.status, theirs.reason) == ("failed", "last")


def test_every_case_names_options_that_its_sides_know(places):
    for case in CASES.values():
        for words in ("", *(options for _, options in case.extras)):
            _ours(places, *case.ours.split(), *words.split())
        names = {"A", "B", *(name for name, _ in case.extras)}
        assert all({check.over, check.under} <= names for check in case.checks)


def test_a_turn_cannot_change_what_was_loaded():
    parser = settings.peer_parser("")
    loaded = parser.parse_args(["--data", "d", "--model", "m"])
    settings.check_turn(loaded, parser.parse_args(["--data", "d", "--model", "m", "--batch", "8", "--steps", "2"]))
    with pytest.raises(ValueError, match="dropout"):
        settings.check_turn(loaded, parser.parse_args(["--data", "d", "--model", "m", "--dropout", "0"]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tutorial-eager", "--peer", "unsloth"], "has no options for unsloth"),
        (["qv-liger", "--sweep", "2,x"], "whole numbers of packs"),
        (["qv-liger", "--turns", "ABC"], "letters A and B"),
    ],
)
def test_driver_refuses_what_makes_no_sense(words, said, capsys):
    with pytest.raises(SystemExit):
        against_peers.parse([*words, "--work", "w", "--tokenizer", "t", "--data", "d", "--output-dir", "o"])
    assert said in capsys.readouterr().err
