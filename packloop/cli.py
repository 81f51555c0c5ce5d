"""The command line: arguments -> RunConfig -> one call. Each verb imports what it needs when it runs."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Literal

import typer

from packloop.cli_errors import UsageError, asks_for_help, is_first_rank, say_error, usage_line
from packloop.engine.sampling import Sampling
from packloop.errors import ConfigError, InputError

app = typer.Typer(
    name="packloop",
    help="Fine-tune Llama models with QLoRA: a hand-written loop, packer and kernels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)
data_app = typer.Typer(help="Look at the data before training on it.", no_args_is_help=True)
app.add_typer(data_app, name="data")
bench_app = typer.Typer(help="Measure settings beside each other, report and compare.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, for example recipes/demo.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that replace the file's.")
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="Output directory of a run, or one of its checkpoints.")]


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False) -> None:
    _options.debug = debug
    logging.basicConfig(level=logging.INFO if debug else logging.ERROR, format="%(message)s")
    logging.getLogger("packloop").setLevel(logging.DEBUG if debug else logging.INFO)
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries: what came of them is said in one line
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "" if sys.stdout.isatty() else "1")
        # Notices to those libraries' callers; what a user can act on is checked and said by packloop itself.
        warnings.filterwarnings("ignore", module="peft|transformers")


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[
        str | None, typer.Option(metavar="latest|PATH", help="Continue from a checkpoint, exactly where it stopped.")
    ] = None,
) -> None:
    """Train as CONFIG says and write its output directory."""
    run_config = _load(config, overrides)
    from packloop.engine.loop import train as run

    result = run(run_config, resume=resume)
    if result.stopped_by is not None:
        again = shlex.join(["packloop", "train", str(config), *(overrides or ()), "--resume", "latest"])
        if is_first_rank():
            typer.echo(f"stopped at step {result.state.step}; continue with: {again}")
        raise typer.Exit(128 + result.stopped_by)
    if is_first_rank():
        typer.echo(f"finished: {result.state.step} steps, {result.state.real_tokens:,} tokens, in {result.run_dir}")


@app.command()
def validate(config: ConfigFile, overrides: Overrides = None) -> None:
    """Check CONFIG without loading anything and print it with every default filled in."""
    from packloop.config import dump_config

    typer.echo(dump_config(_load(config, overrides)), nl=False)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the configuration."""
    from packloop.config import RunConfig

    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))


@data_app.command()
def stats(config: ConfigFile, overrides: Overrides = None) -> None:
    """Rows, token lengths, packs, fill, and what was truncated or dropped and why."""
    from rich.console import Console

    from packloop.data.report import render_stats

    run_config, data, _ = _load_data(config, overrides)
    Console().print(render_stats(data, run_config.data, seed=run_config.train.seed))


@data_app.command()
def preview(
    config: ConfigFile,
    overrides: Overrides = None,
    pack: Annotated[int, typer.Option(min=0, help="Which pack of the first epoch.")] = 0,
) -> None:
    """One packed row: its documents, and which tokens are trained on."""
    from rich.console import Console

    from packloop.data.report import render_preview

    run_config, data, tokenizer = _load_data(config, overrides)
    Console().print(render_preview(data, run_config.data, tokenizer, seed=run_config.train.seed, pack=pack))


@app.command()
def generate(
    run: RunDir,
    text: Annotated[str | None, typer.Option(help="One text to write the response for.")] = None,
    file: Annotated[Path | None, typer.Option(help="json, jsonl, csv or parquet file of texts.")] = None,
    field: Annotated[str | None, typer.Option(help="Column of --file; default: the template's own.")] = None,
    sample: Annotated[int | None, typer.Option(help="Rows held out by the run, else of its training.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write {instruction, response} rows to this .jsonl file.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="The likeliest token each time, no sampling.")] = False,
    temperature: Annotated[float, typer.Option(help="Above 1 more varied, towards 0 likelier.")] = Sampling.temperature,
    top_p: Annotated[float, typer.Option(help="Sample of tokens of this total probability.")] = Sampling.top_p,
    max_new_tokens: Annotated[int, typer.Option(help="Longest response.")] = Sampling.max_new_tokens,
    batch_size: Annotated[int, typer.Option(help="Texts at a time.")] = Sampling.batch_size,
    seed: Annotated[int, typer.Option(help="Of the sampling, and of the rows of --sample.")] = Sampling.seed,
) -> None:
    """Write responses with the model of RUN, for a text, a file of texts or held-out rows."""
    from packloop.engine.generate_rows import generate_command

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        greedy=greedy,
        temperature=temperature,
        top_p=top_p,
        batch_size=batch_size,
        seed=seed,
    )
    generate_command(run, text=text, file=file, field=field, sample=sample, output=output, sampling=sampling)


@app.command()
def merge(
    run: RunDir,
    output: Annotated[Path, typer.Option(help="Directory for the merged model; must not exist or be empty.")],
    base: Annotated[
        Literal["original", "dequantized"],
        typer.Option(help="Weights to merge into: as published, or as training saw them through NF4."),
    ] = "original",
) -> None:
    """Merge the adapter of RUN into its base, in fp32, cast once."""
    from packloop.engine.merge import merge as run_merge

    run_merge(run, output, base=base)
    typer.echo(f"merged model in {output}")


@app.command()
def push(
    run: RunDir,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Hub repository, for example you/llama2-7b-dolly.")],
    merged: Annotated[bool, typer.Option("--merged", help="Merge the adapter into its base and push that.")] = False,
    base: Annotated[
        Literal["original", "dequantized"], typer.Option(help="Weights that --merged merges into, as in merge.")
    ] = "original",
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="Upload metrics.jsonl too.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before uploading.")] = False,
) -> None:
    """Upload the adapter of RUN, or its merged model, to the Hugging Face Hub."""
    from packloop.engine.publish import push as run_push

    run_push(run, repo, merged=merged, base=base, private=private, metrics=metrics, yes=yes)


@app.command()
def doctor() -> None:
    """What this machine has, what will be used and why, and what to install for better."""
    from rich.console import Console

    from packloop.engine.doctor import doctor_report

    Console().print(doctor_report())


@app.command()
def profile(
    config: ConfigFile,
    overrides: Overrides = None,
    synthetic: Annotated[
        str | None,
        typer.Option(
            metavar="SHAPE|DIR",
            help="Random weights: llama2-7b, llama3-8b, tinyllama-1.1b, tiny, a model. Rows stay CONFIG's: "
            "data.source=bundled needs no download.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="DIR|NAME|bundled", help="Instead of the model's; the default with --synthetic: bundled."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps timed, and then profiled.")] = 3,
    warmup: Annotated[int, typer.Option(min=0, help="Steps before them.")] = 3,
    output: Annotated[Path, typer.Option(help="New directory for report, plot and trace.")] = Path("profile"),
) -> None:
    """Where the time of CONFIG's training steps goes, what limits them, and which setting to change."""
    from packloop.bench.profile_run import profile_command

    run_config = _load(config, overrides)
    profile_command(run_config, synthetic=synthetic, tokenizer=tokenizer, steps=steps, warmup=warmup, output=output)


@bench_app.command()
def run(
    matrix: Annotated[Path, typer.Argument(metavar="MATRIX", help="YAML file, for example benchmarks/tutorial.yaml.")],
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option(help="Directory for the results; one begun before is continued.")] = ...,
    synthetic: Annotated[
        str | None,
        typer.Option(
            metavar="SHAPE|DIR",
            help="Random weights: llama2-7b, llama3-8b, tinyllama-1.1b, tiny, or a directory with a config.json.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="DIR|NAME|bundled", help="Whose tokens; default: the model's, of random weights bundled."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Timed steps of a cell, instead of the matrix's; compare needs 5 or more."),
    ] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="CELL", help="Measure this cell; may be repeated.")] = None,
    commit: Annotated[str | None, typer.Option(help="Commit to name where this is no git checkout.")] = None,
) -> None:
    """Measure every cell of MATRIX in a process of its own; stopped, the same command goes on at the next cell.

    Exit code 1 where a cell failed or its steps were wrong; out of memory is a result.
    """
    from packloop.bench.run import run_matrix

    is_sound = run_matrix(
        matrix,
        output,
        overrides=overrides or (),
        synthetic=synthetic,
        tokenizer=tokenizer,
        steps=steps,
        only=only or (),
        commit=commit,
    )
    if not is_sound:
        raise typer.Exit(1)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="MEMORY",
            help="GPU memory allowed: 20, 20GiB or 24GB; default: train.memory_budget_gib, else all but 2 GiB.",
        ),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="A GPU, for example a10g or a100-80gb; default: the one at hand.")
    ] = None,
    synthetic: Annotated[
        str | None,
        typer.Option(
            metavar="SHAPE|DIR",
            help="llama2-7b, llama3-8b, tinyllama-1.1b, tiny or a model's directory in place of CONFIG's, with "
            "the bundled tokenizer and rows: no download.",
        ),
    ] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Check with two real steps on the GPU at hand.")] = False,
) -> None:
    """Predict memory and speed of CONFIG on a GPU, and find the fastest settings, without training."""
    run_config = _load(config, overrides)
    from rich.console import Console

    from packloop.bench.plan import plan as run_plan
    from packloop.bench.plan_tables import render, render_check

    forecast = run_plan(run_config, gpu=gpu, budget=budget, synthetic=synthetic, at_hand=probe)
    Console().print(render(forecast), crop=False)
    if probe:
        from packloop.bench.plan_check import check_at_hand

        Console().print(render_check(check_at_hand(forecast, synthetic=synthetic)))


@bench_app.command()
def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS...", help="Directories of `packloop bench run`, or of benchmarks/against_peers.py."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Directory for report.md, report.html and what they link to.")],
    rows: Annotated[int, typer.Option(min=1, help="Rows of the data set that costs are for.")] = 15_011,
    epochs: Annotated[float, typer.Option(min=0.01, help="Passes over it.")] = 3,
    tokens_per_row: Annotated[
        float,
        typer.Option(
            min=1,
            help="Real tokens of its mean row, by `packloop data stats`; the default is of 100 of the tutorial's.",
        ),
    ] = 151,
    prices: Annotated[Path | None, typer.Option(help="A price file of your own, instead of the one shipped.")] = None,
    instance: Annotated[list[str] | None, typer.Option(help="Only this instance's cost; may be repeated.")] = None,
) -> None:
    """Write RESULTS as Markdown and as one HTML page, with plots and costs."""
    from packloop.bench.cost import DataSet
    from packloop.bench.report import write_report

    data = DataSet(rows, epochs, tokens_per_row)
    markdown, page = write_report(results, output, data=data, prices=prices, instances=instance or ())
    typer.echo(f"report in {page} and {markdown}")


@bench_app.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="Results directory to compare with.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="Results directory that is judged.")],
    fail_below: Annotated[
        float, typer.Option(help="Fail where B's tokens/s are surely below this share of A's.")
    ] = 0.97,
    allow_different: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY|all", help="A condition that may differ, for example driver; may be repeated."),
    ] = None,
) -> None:
    """Fail (exit code 1) where B is slower than A, needs more memory or has lost a cell.

    Exit code 2 where they cannot be compared: run under different conditions, or with too few timed steps to judge.
    """
    from packloop.bench.compare import compare_directories, describe_comparison

    comparison = compare_directories(before, after, fail_below=fail_below, allow_different=allow_different or ())
    typer.echo(describe_comparison(comparison))
    if comparison.failures or comparison.unjudged:
        raise typer.Exit(1 if comparison.failures else 2)


def main() -> None:
    """Entry point. One line an error, exit code 1, 2 (command line) or 3 (memory); a traceback too with --debug."""
    _options.debug = False
    try:
        sys.exit(app(prog_name="packloop", standalone_mode=False))
    except UsageError as error:
        if asks_for_help(error):
            error.show()
        else:
            say_error(usage_line(error, typer.main.get_command(app), sys.argv[1:]), is_shared=True)
        sys.exit(2)
    except InputError as error:
        if _options.debug:
            traceback.print_exc()
        say_error(str(error), is_shared=isinstance(error, ConfigError))
        sys.exit(error.exit_code)
    except typer.Abort:
        print("aborted", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        from packloop.engine.budget import is_out_of_memory
        from packloop.engine.out_of_memory import first_sentence

        if _options.debug or not is_out_of_memory(error):
            raise
        remedy = "use smaller batches, a shorter length or a GPU with more memory"
        print(f"error: out of memory ({first_sentence(error)}); {remedy}", file=sys.stderr)
        sys.exit(3)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _load(config: Path, overrides: list[str] | None):
    from packloop.config import load_config

    return load_config(config, overrides or ())


def _load_data(config: Path, overrides: list[str] | None):
    run_config = _load(config, overrides)
    from packloop.data.loader import build_data
    from packloop.engine.model import load_tokenizer

    tokenizer = load_tokenizer(run_config.model)
    return run_config, build_data(run_config.data, tokenizer, seed=run_config.train.seed), tokenizer
