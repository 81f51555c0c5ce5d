"""Cells of other trainers as those of ours: operations of their steps, ceilings, and the report over both."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from forked import fork_from
from tiny_run import save_tokenizer

from benchmarks import against_peers
from benchmarks.peers import ours, process, settings, work
from benchmarks.peers.cells import make_cell, save_cells
from benchmarks.peers.shapes import shape_config
from packloop.bench.conditions import describe_conditions
from packloop.bench.cost import splits_of
from packloop.bench.flops import adapter_parameters, layer_parameters
from packloop.bench.report import write_report
from packloop.bench.results import Cell, load_cells
from packloop.bench.tutorial import PUBLISHED, other_job, trains_like

REPOSITORY = Path(__file__).resolve().parents[1]


# A trainer of Hugging Face's on the checkpoint, in the place of TRL's, which is not installed where these tests run.
TRAINER_SIDE = """
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from benchmarks.peers import live, measure, rows, settings, work


class HuggingFace:
    who = "TRL"

    def __init__(self, arguments):
        tokenizer = rows.load_tokenizer(arguments.model)
        documents = rows.documents(arguments.data, tokenizer, arguments.packing, arguments.length)
        tokens = [token for document in documents for token in document]
        starts = range(0, len(tokens) - arguments.length + 1, arguments.length)
        self._packs = [tokens[start : start + arguments.length] for start in starts]
        self._model = arguments.model

    def turn(self, arguments):
        base = LlamaForCausalLM.from_pretrained(self._model, dtype=torch.bfloat16, attn_implementation="sdpa")
        adapter = LoraConfig(r=64, target_modules=settings.TARGETS[arguments.targets], task_type="CAUSAL_LM")
        data = [{"input_ids": pack, "labels": pack, "attention_mask": [1] * len(pack)} for pack in self._packs]
        with tempfile.TemporaryDirectory() as directory:
            trainer = Trainer(
                model=get_peft_model(base, adapter),
                args=TrainingArguments(
                    output_dir=directory,
                    per_device_train_batch_size=arguments.batch,
                    gradient_accumulation_steps=arguments.accumulation,
                    max_steps=arguments.warmup + arguments.steps,
                    use_cpu=True,
                    bf16=False,
                    **settings.QUIET_TRAINER,
                ),
                train_dataset=data,
            )
            pairs = work.pairs_per_token(data, arguments.packing)
            return measure.measure_trainer(trainer, arguments, pairs_per_token=pairs)


def parse(words):
    parser = settings.peer_parser("")
    parser.add_argument("--attention", default="flash_attention_2")
    parser.add_argument("--liger", action="store_true")
    return parser.parse_args(words)


live.serve(parse, HuggingFace)
"""


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    """What the driver leaves of one case on this CPU: the directories `cells` and `out`."""
    root = tmp_path_factory.mktemp("compared")
    save_tokenizer(root / "tokenizer")
    examples = [{"instruction": f"Note {n}", "input": "", "output": "leaks " * (1 + n % 5)} for n in range(60)]
    (root / "rows.json").write_text(json.dumps(examples))
    (root / "work").mkdir()
    (root / "work" / "trainer_side.py").write_text(TRAINER_SIDE)
    command = ["tutorial-eager", "--dry-run", "tiny", "--work", str(root / "work"), "--output-dir", str(root / "out")]
    command += ["--tokenizer", str(root / "tokenizer"), "--data", str(root / "rows.json"), "--no-extras"]
    options = "--length 128 --batch 2 --steps 2"
    with pytest.MonkeyPatch.context() as patch:
        fork_from(process, patch)
        patch.setitem(against_peers.PEERS, "trl", "trainer_side")
        patch.setattr(against_peers.Comparison, "_why_not", lambda _: None)
        against_peers.main([*command, "--turns", "AB", "--ours-args", options, "--peer-args", options])
    return root


def cells_of(root: Path) -> tuple[Cell, Cell]:
    """(the peer's, ours)"""
    theirs, mine = sorted(load_cells(root / "out" / "tutorial-eager"), key=lambda cell: cell.who)
    assert (theirs.who, mine.who) == ("TRL", "packloop")
    assert (theirs.status, mine.status) == ("measured", "measured"), (theirs.reason, mine.reason)
    return theirs, mine


def test_a_peer_s_cell_has_operations_and_ceilings_as_ours_has(compared):
    theirs, mine = cells_of(compared)
    rows = json.loads((compared / "out" / "tutorial-eager.json").read_text())["rows"]
    for cell, row in ((mine, rows[0]), (theirs, rows[1])):
        assert cell.ceilings.gemm_tflops > 0
        assert cell.num_parameters == mine.num_parameters > 0
        # A CPU has no peak in the table: the measured rate of products is it.
        assert cell.flops.peak_tflops == cell.ceilings.gemm_tflops
        seconds = cell.figures.step_ms.median / 1e3
        assert cell.flops.model_tflops * seconds * 1e12 == pytest.approx(row["flops_per_step"]["needed"])
        assert cell.flops.hardware_tflops * seconds * 1e12 == pytest.approx(row["flops_per_step"]["executed"])
        assert [split.source for split in splits_of(cell)] == ["FLOPs"]
    assert theirs.ceilings == mine.ceilings, "one size of micro-batch, measured once for the session"


def test_a_peer_s_operations_follow_from_its_settings_and_tokens(compared):
    """By hand: wrapped rows of 128 tokens, 4 a step, all of them recomputed, every slot through the head."""
    theirs, _ = cells_of(compared)
    config = shape_config("tiny", str(compared / "tokenizer"))
    lora = work.peers_run(argparse.Namespace(dropout=0.1, targets="qv", checkpointing=True)).lora
    layers, tokens = config.num_hidden_layers, 4 * 128
    weights, adapters, head = layer_parameters(config), adapter_parameters(config, lora), 64 * config.vocab_size
    attention = 64 * 4 * 128 * 129 / 2  # features x pairs
    needed = layers * (tokens * (4 * weights + 6 * adapters) + 12 * attention) + 4 * (tokens - 4) * head
    executed = layers * (tokens * (6 * weights + 8 * adapters) + 18 * attention) + 4 * tokens * head
    executed -= tokens * 2 * 3 * 64 * 64  # the first layer's q, k and v pass no gradient on
    seconds = theirs.figures.step_ms.median / 1e3
    assert theirs.flops.model_tflops * 1e12 * seconds == pytest.approx(needed)
    assert theirs.flops.hardware_tflops * 1e12 * seconds == pytest.approx(executed)


def test_ours_and_a_peer_need_the_same_for_the_same_packs(compared):
    arguments = ["--tokenizer", str(compared / "tokenizer"), "--data", str(compared / "rows.json"), "--shape", "tiny"]
    options = ["--length", "128", "--batch", "2", "--packing", "wrapped", "--warmup", "1", "--steps", "2"]
    row = ours.Packloop(parsed := ours.parse([*arguments, *options])).turn(parsed)
    theirs, _ = cells_of(compared)
    seconds = theirs.figures.step_ms.median / 1e3
    # Prompts have no labels in ours here, and in the peer's packs they do: only the head differs.
    labels = theirs.figures.label_tokens_per_step - row["label_tokens_per_step"]
    of_labels = 4 * labels * 64 * shape_config("tiny", str(compared / "tokenizer")).vocab_size
    needed = theirs.flops.model_tflops * 1e12 * seconds
    assert row["flops_per_step"]["needed"] == pytest.approx(needed - of_labels)


@pytest.mark.parametrize(
    ("attention", "packing", "visited"),
    [
        ("eager", "wrapped", 1000),
        ("eager", "bfd", 1000),
        ("sdpa", "bfd", 1000),
        ("sdpa", "wrapped", 30 * 12),
        ("flash_attention_2", "bfd", 30 * 12),
        (None, "bfd", 30 * 12),
    ],
)
def test_pairs_that_a_mask_hides_are_executed_where_the_attention_does_not_skip_them(attention, packing, visited):
    arguments = argparse.Namespace(packing=packing, **({"attention": attention} if attention else {}))
    counts = {"real_tokens": 10, "slot_tokens": 12, "label_tokens": 8, "masked_pairs": 1000, "pairs_per_token": 30}
    done = work.peers_work(arguments, **counts)
    assert (done.pairs, done.visited_pairs, done.head_rows) == (300, visited, 12)


def test_pairs_are_within_documents_where_the_packs_keep_them_apart():
    packed = [{"input_ids": [0] * 5, "seq_lengths": [3, 2]}, {"input_ids": [0] * 4, "seq_lengths": [4]}]
    assert work.pairs_per_token(packed, "bfd") == (6 + 3 + 10) / 9
    assert work.pairs_per_token(packed, "wrapped") == (15 + 10) / 9


def _h200_row(turn: str, who: str, **more) -> dict:
    """A made-up turn on an H200."""
    conditions = describe_conditions(None, None).model_copy(
        update={"device": "NVIDIA H200", "device_memory_gib": 139.8}
    )
    laps = [{"ms": 1000.0, "real_tokens": 16000, "slot_tokens": 16384, "label_tokens": 9000, "loss": 1.0}] * 6
    words = ["--data", "d", "--model", "m", "--packing", "wrapped", "--batch", "4"]
    shown = settings.settings_of(settings.peer_parser("").parse_args(words)) | {"attention": "eager", "liger": False}
    row = {"turn": turn, "who": who, "laps": laps, "warmup_steps": 1, "settings": shown}
    return {**row, "flops_per_step": {"needed": 4e14, "executed": 6e14}, "conditions": conditions.model_dump(), **more}


def test_a_peer_s_cell_is_projected_and_checked_against_the_tutorial(tmp_path):
    ceilings = {"gemm_tflops": 700.0, "copy_tb_per_s": 4.0}
    row = _h200_row("B", "TRL", ceilings=ceilings)
    cell = make_cell([row], session="s", shape="llama2-7b", all_rows=[row])
    assert (cell.flops.model_tflops, cell.flops.hardware_tflops) == (pytest.approx(400), pytest.approx(600))
    assert cell.flops.model_utilisation == pytest.approx(400 / 989)
    assert other_job(cell) is None, "the keys that the tutorial's job is known by are those of the peers' settings"
    assert trains_like(cell, PUBLISHED[0])
    save_cells(tmp_path / "results", [row], session="s", shape="llama2-7b")
    markdown, _ = write_report([tmp_path / "results"], tmp_path / "report")
    text = markdown.read_text()
    assert "arithmetic x 14.13" in text
    assert "projected from" in text, "the rule's error is checked with it"
    without = make_cell([_h200_row("B", "TRL")], session="s", shape="llama2-7b", all_rows=[row])
    assert without.flops.peak_tflops == 989
    assert splits_of(without) == []


def test_the_report_treats_the_peer_s_cells_as_ours(compared, tmp_path):
    markdown, page = write_report([compared / "out" / "tutorial-eager"], tmp_path / "report")
    text = markdown.read_text()
    checks = text.partition("Utilisation, checks and clocks")[2].partition("\n\n## ")[0]
    rows = {line.split("|")[1].strip(): line.split("|")[2:] for line in checks.splitlines() if line.startswith("| ")}
    for name in ("TRL: batch-2", "packloop-batch-2"):
        assert all(entry.strip().endswith("%") for entry in rows[name][:2]), rows[name]
        assert all(float(entry) > 0 for entry in rows[name][2:5])
    assert "TRL: batch-2" in page.read_text()
