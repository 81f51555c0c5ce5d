"""What the command line refuses: exit code, one line that names the remedy, and which process of several says it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from small_job import small_config
from tiny_run import save_run

from packloop import cli, cli_errors
from packloop.config import dump_config


def command(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    """(exit code, what is on stderr) of `packloop ARGUMENTS` in this process."""
    monkeypatch.setattr(sys, "argv", ["packloop", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, capsys.readouterr().err


USAGE = [
    ("train {yaml} --train.max_steps 3", "no such option --train.max_steps: settings are written train.max_steps=3, "),
    ("train {yaml} --train.max_steps=3", "no such option --train.max_steps: settings are written train.max_steps=3, "),
    ("train {yaml} -train.max_steps=3", "no such option -train.max_steps: settings are written train.max_steps=3, "),
    ("train {yaml} --train.seed lora.r=8", "no such option --train.seed: settings are written train.seed=VALUE, "),
    ("train --data.columns={{a: b}} {yaml}", "no such option --data.columns: settings are written 'data.columns={a: b"),
    ("train {yaml} --resum latest", "no such option --resum; nearest: --resume"),
    ("train {yaml} --debug", "--debug comes before the verb: packloop --debug train ..."),
    ("train {yaml} --resume", "--resume needs a value, latest|PATH; `packloop train --help` says what there is"),
    ("merge RUN --a.b=c", "no such option --a.b; "),
    ("trian {yaml}", "no such command 'trian'; nearest: train"),
    ("bench rnu", "no such command 'rnu'; nearest: run"),
    ("xyz", "no such command 'xyz'; allowed: train, validate, "),
    ("train", "missing argument 'CONFIG'; `packloop train --help` says what there is"),
    ("merge RUN", "missing option '--output'; `packloop merge --help`"),
    ("merge RUN --output o --base x", "--base x: "),
    ("profile {yaml} --steps 0", "--steps 0: "),
]


@pytest.mark.parametrize(("arguments", "line"), USAGE)
def test_a_wrong_command_line_is_one_line(tmp_path, monkeypatch, capsys, arguments, line):
    words = arguments.replace(": ", ":\0").split()
    words = [word.replace("\0", " ").format(yaml=tmp_path / "run.yaml") for word in words]
    code, said = command(monkeypatch, capsys, *words)
    assert code == 2
    assert said.startswith(f"error: {line}")
    assert said.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["data"], ["--help"], ["train", "--help"]])
def test_help_is_no_error(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["packloop", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == (0 if "--help" in arguments else 2)
    shown = capsys.readouterr()
    assert "Usage: packloop" in shown.out + shown.err
    assert "error: " not in shown.out + shown.err


# The command line or the configuration has to change: 2. What they name has to: 1.
CODES = [
    ("train nope.yaml", 2, "configuration 'nope.yaml' does not exist"),
    ("train .", 2, "configuration '.': a .yaml file is needed"),
    ("train {yaml} data.source=none.jsonl", 2, "none.jsonl: no such file; check data.source"),
    ("train {yaml} data.source=none.jsonl data.eval_split=heldout", 2, "none.jsonl: no such file"),
    ("train {yaml} data.eval_split=heldout", 2, "data.eval_split='heldout': "),
    ("train {yaml} data.eval_split=999", 2, "data.eval_split=999 holds out "),
    ("train {yaml} lora.target_modules=[foo]", 2, "lora.target_modules=['foo'] match no layer"),
    ("train {yaml} model.name_or_path=/none", 2, "model.name_or_path='/none' does not exist"),
    ("train {yaml} --resume nope", 2, "--resume nope: no such directory"),
    ("train {yaml} --resume latest", 1, "no usable checkpoint in "),
    ("train {yaml} data.source={bad}", 1, "{bad}, line 2: not JSON"),
    ("train {yaml} train.output_dir={full}", 1, "train.output_dir='{full}' is not empty"),
    ("train {yaml} model.name_or_path={full}", 1, "model.name_or_path='{full}': no tokenizer.json in it"),
    ("train {yaml} model.name_or_path=nobody/none", 1, "model.name_or_path='nobody/none' is no directory here"),
    ("data preview {yaml} --pack 99999", 2, "pack 99999: "),
    ("plan {yaml} --gpu foo", 2, "GPU 'foo' is not known"),
    ("plan {yaml} --gpu a10g --synthetic foo", 2, "model shape 'foo'"),
    ("generate nope --text a", 2, "run 'nope' is not a directory"),
    ("generate {run}", 2, "one of --text, --file and --sample is needed, given none"),
    (
        "generate {run} --text a --sample 1",
        2,
        "one of --text, --file and --sample is needed, given --text and --sample",
    ),
    ("generate {run} --text a --temperature 0", 2, "--temperature 0.0: a number above 0"),
    ("generate {run} --file none.csv", 2, "none.csv: no such file; check --file"),
    ("generate {run} --file {bad} --field foo", 2, "--field foo: no such column"),
    ("generate {run} --file {blank}", 1, "{blank}: none of its 1 rows can be used"),
    ("generate {run} --text a --output {bad}", 1, "--output {bad} exists and is not overwritten"),
    ("merge nope --output o", 2, "run 'nope' is not a directory"),
    ("merge {run} --output {full}", 1, "output '{full}' exists and is not empty"),
    ("push nope a/b", 2, "'nope' holds neither"),
    ("bench report nope --output o", 2, "results '{here}/nope': no such directory"),
]


@pytest.fixture(scope="module")
def places(small_base, small_rows, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("places")
    places = {
        "yaml": root / "run.yaml",
        "bad": root / "bad.jsonl",
        "blank": root / "blank.jsonl",
        "full": root / "full",
    }
    config = small_config(small_base, small_rows, root / "out")
    places["yaml"].write_text(dump_config(config))
    places["bad"].write_text('{"instruction": "Write", "response": "Hello"}\n{\n')
    places["blank"].write_text(json.dumps({"instruction": " ", "response": " "}) + "\n")
    places["full"].mkdir()
    (places["full"] / "file.jsonl.bin").touch()
    return places | {"run": save_run(small_config(small_base, small_rows, root / "run"))}


@pytest.mark.parametrize(("arguments", "code", "line"), CODES)
def test_exit_codes(places, tmp_path, monkeypatch, capsys, arguments, code, line):
    monkeypatch.chdir(tmp_path)
    given, said = command(monkeypatch, capsys, *(word.format(**places) for word in arguments.split()))
    (shown,) = [one for one in said.splitlines() if one.startswith("error: ")]
    assert shown.startswith(f"error: {line.format(here=tmp_path, **places)}")
    assert given == code


def test_ranks_but_the_first_leave_an_error_to_it(places, monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(cli_errors.time, "sleep", waited.append)
    for rank, said in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        for arguments in (["trian"], ["train", "nope.yaml"]):
            code, shown = command(monkeypatch, capsys, *arguments)
            assert (code, shown.startswith("error: ")) == (2, said)
    assert len(waited) == 2
    # An error that only one rank may have is said by a rank that has not been ended meanwhile.
    code, shown = command(monkeypatch, capsys, "train", str(places["yaml"]), f"data.source={places['bad']}")
    assert (code, len(waited)) == (1, 3)
    assert shown.splitlines()[-1].startswith("error: ")
