"""The command line as it is used: exit codes, one line an error, and torch only where it is needed."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from small_job import fork, small_config, wait

from packloop import cli
from packloop.config import RunConfig, dump_config

REPOSITORY = Path(__file__).resolve().parents[1]
ENTRY = "from packloop.cli import main; main()"
VERBS = ("train", "validate", "schema", "data", "generate", "merge", "push", "doctor", "bench")


def packloop(*arguments: str, prefix: str = "") -> subprocess.CompletedProcess:
    """The command in an interpreter of its own, which costs seconds where it imports torch."""
    command = [sys.executable, "-c", prefix + ENTRY, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=120)


def forked(log: Path, *arguments: str) -> tuple[int, str]:
    """(exit code, output) of the command in a fork of this process, which has torch already."""
    code = wait(start(log, *arguments))
    return code, log.read_text()


def start(log: Path, *arguments: str) -> int:
    def run() -> None:
        sys.argv = ["packloop", *arguments]
        cli.main()

    return fork(run, log)


def error_line(output: str) -> str:
    """The one line that begins with `error: `, after checking that there is no traceback."""
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    return line


def test_help_takes_less_than_half_a_second_and_imports_no_torch():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = packloop("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert shown.returncode == 0
    assert all(verb in shown.stdout for verb in VERBS)
    # CPU time, since the clock's depends on what else the machine does.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    said = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, 'transformers' in sys.modules));"
    assert packloop("--help", prefix=said).stdout.splitlines()[-1] == "False False"


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.app([verb, "--help"])
    assert stop.value.code == 0
    assert "Usage:" in capsys.readouterr().out


def test_validate_prints_every_setting_and_loads_nothing(tmp_path):
    (tmp_path / "run.yaml").write_text("lora: {r: 8}\n")
    said = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr));"
    shown = packloop("validate", str(tmp_path / "run.yaml"), "train.seed=5", prefix=said)
    assert shown.returncode == 0
    assert shown.stderr.strip() == "False"
    values = yaml.safe_load(shown.stdout)
    expected = RunConfig().model_dump(mode="json")
    expected["lora"]["r"], expected["train"]["seed"] = 8, 5
    assert values == expected


def test_schema_is_the_json_schema(capsys):
    with pytest.raises(SystemExit):
        cli.app(["schema"])
    assert json.loads(capsys.readouterr().out) == RunConfig.model_json_schema()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "missing.yaml"], 2, "error: configuration 'missing.yaml' does not exist"),
        (["train", "README.md"], 2, "a .yaml file is needed"),
        (["validate", "missing.yaml"], 2, "does not exist"),
        (["validate", "{good}", "train.seed=x"], 2, "error: train.seed='x': allowed: a whole number of at least 0"),
        (["train", "{good}", "nonsense"], 2, "section.key=value is needed"),
        (["data", "stats", "{good}", "data.packing=x"], 2, "error: data.packing='x'"),
        (["no-such-verb"], 2, "error: no such command"),
        (["train", "{good}", "--no-such-option"], 2, "error: no such option"),
        (["generate", "/nonexistent"], 2, "error: "),
        (["merge", "/nonexistent", "--output", "/nonexistent/merged"], 2, "error: "),
        (["push", "/nonexistent", "me/model", "--merged", "--base", "original"], 2, "error: "),
        (["push", "/nonexistent", "not a name"], 2, "error: "),
    ],
)
def test_exit_codes_and_messages(tmp_path, arguments, code, message):
    (tmp_path / "good.yaml").write_text("")
    arguments = [argument.format(good=tmp_path / "good.yaml") for argument in arguments]
    given, output = forked(tmp_path / "log", *arguments)
    assert given == code
    assert message in " ".join(output.split())
    assert "Traceback" not in output


def test_debug_shows_the_traceback(tmp_path):
    code, output = forked(tmp_path / "log", "--debug", "train", "missing.yaml")
    assert code == 2
    assert "Traceback" in output
    assert "ConfigError: configuration 'missing.yaml' does not exist" in output


GOOD_LINE = '{"instruction": "Write", "response": "Hello there"}\n'
BAD_DATA = {
    "missing file": ({}, "data.source=nowhere.jsonl", "nowhere.jsonl"),
    "wrong extension": ({"rows.txt": GOOD_LINE}, "data.source={dir}/rows.txt", ".txt"),
    "malformed line": ({"rows.jsonl": GOOD_LINE * 2 + '{"instruction": \n'}, "data.source={dir}/rows.jsonl", "line 3"),
    "missing column": ({"rows.jsonl": '{"prompt": "a", "response": "b"}\n'}, "data.source={dir}/rows.jsonl", "prompt"),
    "empty data": ({"rows.jsonl": ""}, "data.source={dir}/rows.jsonl", "rows.jsonl"),
    "empty list": ({"rows.json": "[]"}, "data.source={dir}/rows.json", "rows.json"),
    "not utf-8": ({"rows.jsonl": b'{"instruction": "caf\xe9"}\n'}, "data.source={dir}/rows.jsonl", "UTF-8"),
    "no label token": (
        {"rows.jsonl": '{"instruction": "' + "long " * 90 + '", "response": "short"}\n'},
        "data.source={dir}/rows.jsonl",
        "none of 1 rows is left",
    ),
    "no such model": ({}, "model.name_or_path={dir}/no-model", "no-model"),
    "no network": ({}, "model.name_or_path=someone/some-llama", "someone/some-llama"),
    "no data set without network": ({}, "data.source=someone/some-rows", "someone/some-rows"),
    "all rows held out": ({"rows.jsonl": GOOD_LINE}, "data.source={dir}/rows.jsonl data.eval_split=1", "eval_split=1"),
    "no such layer": ({}, "lora.target_modules=[q_prj]", "q_prj"),
}


# What has to change there is a setting, not what it names.
WRONG_SETTINGS = {"missing file", "wrong extension", "no such model", "all rows held out", "no such layer"}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_input_is_one_line_and_leaves_no_output_directory(small_base, small_rows, tmp_path, name):
    files, overrides, message = BAD_DATA[name]
    for file, content in files.items():
        (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    config = small_config(small_base, small_rows, tmp_path / "run", data={"loss_on": "response"})
    (tmp_path / "run.yaml").write_text(dump_config(config))
    given = overrides.format(dir=tmp_path).split()
    code, output = forked(tmp_path / "log", "train", str(tmp_path / "run.yaml"), *given)
    line = error_line(output)
    assert message in line
    assert code == (2 if name in WRONG_SETTINGS else 1)
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_loaded(small_base, small_rows, tmp_path):
    missing = [name for name in ("trackio", "mlflow", "wandb") if importlib.util.find_spec(name) is None]
    if not missing:
        pytest.skip("every tracker is installed")
    config = small_config(small_base, small_rows, tmp_path / "run", log={"trackers": missing[:1]})
    (tmp_path / "run.yaml").write_text(dump_config(config))
    code, output = forked(tmp_path / "log", "train", str(tmp_path / "run.yaml"))
    assert code == 2
    assert f"pip install {missing[0]}" in error_line(output)
    assert not (tmp_path / "run").exists()


def test_train_ends_with_what_it_did_and_exit_code_0(small_base, small_rows, tmp_path):
    config = small_config(small_base, small_rows, tmp_path / "run", train={"max_steps": 2}, log={"every": 1})
    (tmp_path / "run.yaml").write_text(dump_config(config))
    code, output = forked(tmp_path / "log", "train", str(tmp_path / "run.yaml"))
    assert code == 0
    assert "step 1/2  loss " in output
    assert f"finished: 2 steps, {tokens(tmp_path / 'run'):,} tokens, in {tmp_path / 'run'}" in output
    code, output = forked(tmp_path / "again", "train", str(tmp_path / "run.yaml"))
    assert code == 1
    assert "--resume latest" in error_line(output)
    code, output = forked(
        tmp_path / "changed", "train", str(tmp_path / "run.yaml"), "train.seed=1", "--resume", "latest"
    )
    assert code == 2
    assert "train.seed: 0 in the checkpoint, 1 given" in error_line(output)


def tokens(run_dir: Path) -> int:
    return sum(json.loads(line)["real_tokens"] for line in (run_dir / "metrics.jsonl").read_text().splitlines())


def test_ctrl_c_while_loading_exits_130(small_base, tmp_path):
    """The rows are a pipe that nobody writes to, so the command is caught in the middle of reading them."""
    os.mkfifo(tmp_path / "rows.jsonl")
    config = small_config(small_base, tmp_path / "rows.jsonl", tmp_path / "run")
    (tmp_path / "run.yaml").write_text(dump_config(config))
    child = start(tmp_path / "log", "train", str(tmp_path / "run.yaml"))
    while (pipe := opened_by_a_reader(tmp_path / "rows.jsonl")) is None:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), (tmp_path / "log").read_text()
        time.sleep(0.01)
    time.sleep(0.5)  # between the pipe's opening and its reading Python would not look at the signal
    os.kill(child, signal.SIGINT)
    assert wait(child) == 130
    os.close(pipe)
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert not (tmp_path / "run").exists()


def opened_by_a_reader(fifo: Path) -> int | None:
    """A descriptor of the pipe, which can be had without waiting only once somebody else reads from it."""
    try:
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None
