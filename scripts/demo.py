"""The main job on what the package carries, on a CPU in minutes: `python scripts/demo.py [RUN_DIRECTORY]`.

Measures the bundled Llama on the held-out rows, trains it as `recipes/demo.yaml` says, measures it again, prints some
rows side by side, merges the adapter and loads the result with plain transformers. Exits with 1 where the training did
not do what it should. RUN_DIRECTORY (default: the recipe's train.output_dir) is replaced where an earlier demo left it;
the merged model and the figures go beside it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Read when the libraries below are imported. Model and data are on the disk, so nothing is to be looked up; and threads
# that wait are to sleep: while they spin, every other process on the same cores slows them all down.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from packloop.bundled.score import score
from packloop.config import RunConfig, load_config
from packloop.data.loader import build_data, eval_batches
from packloop.data.prompts import Template, get_template
from packloop.data.sources import load_rows
from packloop.data.tokenize import Documents
from packloop.engine.evaluate import evaluate
from packloop.engine.generate import generate_texts, load_run
from packloop.engine.generate_rows import Generation, print_generations, template_fields
from packloop.engine.loop import train
from packloop.engine.merge import merge
from packloop.engine.model import load_base, load_tokenizer
from packloop.engine.output_dir import check_output_dir
from packloop.errors import InputError
from packloop.kernels.patch import patched

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "demo.yaml"
ROWS_SHOWN = 4
# For the reader to try; of the kind that the bundled data hold, and not in them.
TEXT = "We are excited to share some news: from May, Maple Bakery will offer home delivery!"
# The longest instruction of the bundled data has fewer tokens.
MAX_NEW_TOKENS = 48
GENERATION_BATCH = 60

# What the training must reach: shares of the held-out rows, and the tuned model's loss as a share of the base's.
TUNED_SHARE_AT_LEAST = 0.70
BASE_SHARE_BELOW = 0.10
LOSS_RATIO_AT_MOST = 0.5


@dataclass(frozen=True)
class Measurement:
    """A model on the held-out rows. loss: nats per response token; instructions: greedy, in the rows' order."""

    loss: float
    num_right: int
    instructions: list[str]


@dataclass(frozen=True)
class HeldOut:
    """The held-out rows as they were written (with `kind` and `entity`) and as the documents of the recipe."""

    rows: list[dict[str, str]]
    documents: Documents
    template: Template


def main(arguments: Sequence[str]) -> int:
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logging.getLogger("packloop").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module="peft|transformers")
    console = Console(highlight=False)
    overrides = [f"train.output_dir={arguments[0]}"] if arguments else []
    config = load_config(RECIPE, overrides)
    run_dir = Path(config.train.output_dir)
    merged_dir = run_dir.with_name(run_dir.name + "-merged")
    result_file = run_dir.with_name(run_dir.name + "-result.json")
    _make_room(run_dir, merged_dir, result_file)
    seconds: dict[str, float] = {}

    tokenizer = load_tokenizer(config.model)
    held_out = load_held_out(config, tokenizer)
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())
    with _stage(f"The base model on {len(held_out.rows)} held-out rows", "base measured", seconds):
        base = measure(load_base(config.model, accelerator.device), tokenizer, held_out, config, accelerator)
    with _stage(f"packloop train recipes/{RECIPE.name}", "trained", seconds):
        train(config)
    with _stage("The tuned model on the same rows", "tuned measured", seconds):
        _, model, tokenizer = load_run(run_dir)
        tuned = measure(model, tokenizer, held_out, config, accelerator)
    show(held_out, tuned, console)
    with _stage(f"packloop merge {run_dir} --output {merged_dir} --base dequantized", "merged", seconds):
        # Into the weights that training saw, so that the merged model must write what the adapter's model wrote.
        merge(run_dir, merged_dir, base="dequantized")
        plain = generate_plainly(merged_dir, held_out.template.render_prompt(held_out.rows[0]))
        print(f"AutoModelForCausalLM writes for the first held-out row: {plain}")

    faults = find_faults(base, tuned, len(held_out.rows))
    if plain != tuned.instructions[0]:
        faults.append(f"the merged model wrote {plain!r}, the adapter's {tuned.instructions[0]!r}")
    _write_result(result_file, base, tuned, held_out, seconds)
    print_summary(base, tuned, len(held_out.rows), seconds)
    print(f"\nThe run is in {run_dir}, the merged model in {merged_dir}. A text of your own:")
    command = Path(sys.executable).with_name("packloop")
    print(f"  {_shown(command)} generate {run_dir} --greedy --text '{TEXT}'")
    for fault in faults:
        print(f"demo failed: {fault}", file=sys.stderr)
    return 1 if faults else 0


def load_held_out(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
    template = get_template(config.data.template)
    fields = (*template.fields, "kind", "entity")
    rows = load_rows(
        config.data.source, split=config.data.eval_split, columns={}, required=fields, on_bad_row="error"
    ).rows
    data = build_data(config.data, tokenizer, seed=config.train.seed)
    return HeldOut(rows=rows, documents=data.eval, template=template)


def measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    held_out: HeldOut,
    config: RunConfig,
    accelerator: Accelerator,
) -> Measurement:
    """Response loss, greedy instructions and how many of them are right; the model is left as it was."""
    batches = eval_batches(
        held_out.documents,
        packing=config.data.packing,
        max_length=config.data.max_length,
        per_device_batch_size=config.train.per_device_train_batch_size,
        rank=0,
        world_size=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    with patched(model, attention="sdpa") as llama:
        loss, _ = evaluate(model, llama, batches, accelerator)
    instructions = generate_texts(
        model,
        tokenizer,
        [held_out.template.render_prompt(row) for row in held_out.rows],
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        temperature=1.0,
        top_p=1.0,
        batch_size=GENERATION_BATCH,
        seed=0,
    )
    num_right, _ = score(held_out.rows, instructions)
    print(f"loss {loss:.4f} nats per response token, {num_right} of {len(held_out.rows)} instructions right")
    return Measurement(loss=loss, num_right=num_right, instructions=instructions)


def show(held_out: HeldOut, tuned: Measurement, console: Console) -> None:
    """A few held-out rows, evenly spread: the text, the instruction written for it, and the true one."""
    chosen = range(0, len(held_out.rows), max(1, len(held_out.rows) // ROWS_SHOWN))[:ROWS_SHOWN]
    results = [
        Generation(row=row, generated=tuned.instructions[index], truth=held_out.template.render_response(row).strip())
        for index, row in ((index, held_out.rows[index]) for index in chosen)
    ]
    print("\n== Held-out rows: input, generated instruction, ground truth")
    print_generations(results, template_fields(held_out.template), console)


def generate_plainly(directory: Path, prompt: str) -> str:
    """What the model in `directory` writes, loaded and run without anything of packloop."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt_ids = tokenizer(prompt, return_tensors="pt").input_ids
    output_ids = model.generate(
        input_ids=prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
    )
    return tokenizer.decode(output_ids[0, prompt_ids.shape[1] :], skip_special_tokens=True).strip()


def find_faults(base: Measurement, tuned: Measurement, num_rows: int) -> list[str]:
    """A line for each bound that does not hold."""
    faults = []
    if tuned.num_right < TUNED_SHARE_AT_LEAST * num_rows:
        faults.append(
            f"the tuned model is right on {_share(tuned, num_rows)}, and {TUNED_SHARE_AT_LEAST:.0%} is needed"
        )
    if base.num_right >= BASE_SHARE_BELOW * num_rows:
        faults.append(f"the base is right on {_share(base, num_rows)}, and less than {BASE_SHARE_BELOW:.0%} is needed")
    if tuned.loss > LOSS_RATIO_AT_MOST * base.loss:
        faults.append(f"the loss fell from {base.loss:.4f} to {tuned.loss:.4f}, and half of it or less is needed")
    return faults


def print_summary(base: Measurement, tuned: Measurement, num_rows: int, seconds: Mapping[str, float]) -> None:
    print(f"\n== Summary: {num_rows} held-out rows, greedy")
    print(f"{'':34}{'base':>10}{'tuned':>10}")
    print(f"{'right kind and right entity':34}{_share(base, num_rows):>10}{_share(tuned, num_rows):>10}")
    print(f"{'loss, nats per response token':34}{base.loss:>10.4f}{tuned.loss:>10.4f}")
    times = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    print(f"seconds: {times}; in all {sum(seconds.values()):.0f}")


def _share(measured: Measurement, num_rows: int) -> str:
    return f"{measured.num_right / num_rows:.1%}"


def _write_result(
    path: Path, base: Measurement, tuned: Measurement, held_out: HeldOut, seconds: Mapping[str, float]
) -> None:
    result = {
        "base": dataclasses.asdict(base),
        "tuned": dataclasses.asdict(tuned),
        "rows": held_out.rows,
        "seconds": dict(seconds),
    }
    path.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _make_room(run_dir: Path, merged_dir: Path, result_file: Path) -> None:
    """Removes what an earlier demo left, finished or not: its result file tells. Other files there are refused."""
    if result_file.exists():
        for directory in (run_dir, merged_dir):
            shutil.rmtree(directory, ignore_errors=True)
    for directory in (run_dir, merged_dir):
        check_output_dir(directory, resume=None)
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    result_file.write_text("{}\n", encoding="utf-8")


def _shown(path: Path) -> str:
    """The path as seen from here, where it lies below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


@contextmanager
def _stage(title: str, name: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"\n== {title}", flush=True)
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        sys.exit(f"error: {error}")
