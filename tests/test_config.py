"""Configurations: each fault is one line that names the key, and nothing is loaded to find it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from packloop.config import RunConfig, changed_keys, dump_config, load_config, parse_config
from packloop.errors import ConfigError, InputError

REPOSITORY = Path(__file__).resolve().parents[1]
SECTIONS = "model, lora, data, train, kernels, checkpoint, log"

# Overrides, and what the one line said about them begins with; and for some what it ends with.
BAD_OVERRIDES = [
    ("train.learning_rat=1e-4", "train.learning_rat=0.0001: no such setting; nearest: train.learning_rate"),
    ("train.lr=1e-4", "train.lr=0.0001: no such setting; "),
    ("train.batch_size=4", "train.batch_size=4: no such setting; "),
    ("trian.max_steps=3", "trian={'max_steps': 3}: no such section; nearest: train"),
    ("optimizer.lr=3", "optimizer={'lr': 3}: no such section; allowed: " + SECTIONS),
    ("learning_rate=3", "override 'learning_rate=3': section.key=value is needed"),
    ("train.learning_rate", "override 'train.learning_rate': section.key=value is needed"),
    ("=3", "override '=3': section.key=value is needed"),
    ("train.dropout=0.1", "train.dropout=0.1: no such setting; it belongs at lora.dropout"),
    ("model.max_length=512", "model.max_length=512: no such setting; it belongs at data.max_length"),
    ("lora.learning_rate=1.0", "lora.learning_rate=1.0: no such setting; it belongs at train.learning_rate"),
    ("train.checkpoint_every=5", "train.checkpoint_every=5: no such setting; it belongs at checkpoint.every"),
    ("data.every=5", "data.every=5: no such setting; it belongs at checkpoint.every or log.every"),
    ("train.max_steps.x=5", "train.max_steps={'x': 5}: allowed: a whole number of at least 1 or null"),
    ("train=5", "override 'train=5': section.key=value is needed"),
    ("model.name_or_path=", "model.name_or_path=null: allowed: text that is not empty"),
    ("model.name_or_path=''", "model.name_or_path='': allowed: text that is not empty"),
    ("model.name_or_path=7", "model.name_or_path=7: allowed: text"),
    ("model.revision=1234", "model.revision=1234: allowed: text or null"),
    ("model.dtype=bfloat", "model.dtype='bfloat': allowed: bfloat16, float32; nearest: bfloat16"),
    ("model.dtype=float16", "model.dtype='float16': allowed: bfloat16, float32; nearest: "),
    ("model.quantization=int8", "model.quantization='int8': allowed: nf4, none"),
    ("model.quantization=NF4", "model.quantization='NF4': allowed: nf4, none; nearest: nf4"),
    ("model.quantization=null", "model.quantization=null: allowed: nf4, none"),
    ("model.double_quant=1", "model.double_quant=1: allowed: true or false"),
    ("model.trust_remote_code=sure", "model.trust_remote_code='sure': allowed: true or false"),
    ("lora.enabled='true'", "lora.enabled='true': allowed: true or false"),
    ("lora.r=0", "lora.r=0: allowed: a whole number of at least 1"),
    ("lora.r=-8", "lora.r=-8: allowed: a whole number of at least 1"),
    ("lora.r=8.0", "lora.r=8.0: allowed: a whole number of at least 1"),
    ("lora.r=true", "lora.r=true: allowed: a whole number of at least 1"),
    ("lora.r=eight", "lora.r='eight': allowed: a whole number of at least 1"),
    ("lora.alpha=0", "lora.alpha=0: allowed: a number above 0"),
    ("lora.alpha=.inf", "lora.alpha=inf: allowed: a number above 0"),
    ("lora.dropout=1.0", "lora.dropout=1.0: allowed: a number of at least 0.0 and below 1.0"),
    ("lora.dropout=-0.1", "lora.dropout=-0.1: allowed: a number of at least 0.0 and below 1.0"),
    ("lora.bias=all", "lora.bias='all': allowed: none"),
    ("lora.target_modules=foo", "lora.target_modules='foo': allowed: a list of names or all-linear"),
    ("lora.target_modules=all_linear", "lora.target_modules='all_linear': allowed: ", "; nearest: all-linear"),
    ("lora.target_modules=[q_proj, 3]", "lora.target_modules=['q_proj', 3]: allowed: a list of names or all-linear"),
    ("lora.target_modules=[]", "lora.target_modules is empty, so nothing would be trained"),
    ("data.source=''", "data.source='': allowed: text that is not empty"),
    ("data.eval_split=-1", "data.eval_split=-1: allowed: a whole number of at least 0, a number "),
    ("data.eval_split=1.5", "data.eval_split=1.5: allowed: ", "or text that is not empty"),
    ("data.eval_split=null", "data.eval_split=null: allowed: a whole number of at least 0"),
    ("data.eval_split=''", "data.eval_split='': allowed: a whole number of at least 0"),
    ("data.template=alpacca", "data.template='alpacca': allowed: instruction_from_response, ", "nearest: alpaca"),
    ("data.template={prompt: x, respons: '{y}'}", "data.template.respons='{y}': no such setting; nearest: data.templ"),
    ("data.template={prompt: x}", "data.template.response is missing; allowed: text"),
    ("data.template={prompt: 3, response: '{y}'}", "data.template.prompt=3: allowed: text"),
    ("data.template={prompt: x, response: y}", "data.template.response='y': it names no column"),
    ("data.template={prompt: '{x', response: '{y}'}", "data.template.prompt='{x': "),
    (
        "data.template=[alpaca]",
        "data.template=['alpaca']: allowed: instruction_from_response, alpaca, dolly or {prompt",
    ),
    ("data.columns=[a]", "data.columns=['a']: allowed: a mapping of names to names"),
    ("data.columns={response: 3}", "data.columns={'response': 3}: allowed: a mapping of names to names"),
    ("data.max_length=1", "data.max_length=1: allowed: a whole number of at least 2"),
    ("data.max_length=2k", "data.max_length='2k': allowed: a whole number of at least 2"),
    ("data.packing=bdf", "data.packing='bdf': allowed: wrapped, bfd, none; nearest: bfd"),
    ("data.packing=true", "data.packing=true: allowed: wrapped, bfd, none"),
    ("data.loss_on=responses", "data.loss_on='responses': allowed: all, response; nearest: response"),
    ("data.on_long_row=cut", "data.on_long_row='cut': allowed: truncate, split, drop, error"),
    ("data.on_bad_row=ignore", "data.on_bad_row='ignore': allowed: error, skip"),
    ("train.output_dir=''", "train.output_dir='': allowed: text that is not empty"),
    ("train.num_train_epochs=0", "train.num_train_epochs=0: allowed: a number above 0"),
    ("train.max_steps=0", "train.max_steps=0: allowed: a whole number of at least 1 or null"),
    ("train.max_steps=1e3", "train.max_steps=1000.0: allowed: a whole number of at least 1 or null"),
    ("train.learning_rate=.nan", "train.learning_rate=nan: allowed: a number above 0"),
    ("train.learning_rate=fast", "train.learning_rate='fast': allowed: a number above 0"),
    ("train.warmup_ratio=1.1", "train.warmup_ratio=1.1: allowed: a number of at least 0.0 and at most 1.0"),
    ("train.adam_beta2=1.0", "train.adam_beta2=1.0: allowed: a number of at least 0 and below 1"),
    ("train.lr_scheduler_type=constant", "train.lr_scheduler_type='constant': ", "nearest: constant_with_warmup"),
    ("train.optim=adamw", "train.optim='adamw': allowed: ", "nearest: adamw_32bit"),
    ("train.gradient_checkpointing=true", "train.gradient_checkpointing=true: allowed: "),
    ("train.gradient_checkpointing=-1", "train.gradient_checkpointing=-1: allowed: ", "a whole number of at least 0"),
    ("train.eval_every=0", "train.eval_every=0: allowed: epoch or a whole number of at least 1"),
    ("train.seed=-1", "train.seed=-1: allowed: a whole number of at least 0"),
    ("kernels.attention=flash", "kernels.attention='flash': allowed: auto, eager, sdpa, ", "nearest: flash_attn"),
    ("kernels.gated=torch", "kernels.gated='torch': allowed: auto, quack, none"),
    ("kernels.token_reuse=torch", "kernels.token_reuse='torch': allowed: auto, first_layer, none"),
    ("checkpoint.every=epochs", "checkpoint.every='epochs': allowed: epoch, never or a whole number", "nearest: epoch"),
    ("checkpoint.keep=0", "checkpoint.keep=0: allowed: a whole number of at least 1"),
    ("log.trackers=tensorboard", "log.trackers='tensorboard': allowed: a list of tensorboard, wandb, mlflow, trackio"),
    ("log.trackers=[tensorbord]", "log.trackers=['tensorbord']: allowed: a list of ", "nearest: tensorboard"),
    ("train.seed=[1", "override 'train.seed=[1': "),
    ("train.seed=!!python/object/apply:os.getpid []", "override 'train.seed=!!python/object/apply:os.getpid []': "),
]

# What cannot go together: every name in the tuple is in the line.
CONTRADICTIONS = [
    (["data.packing=bfd", "kernels.attention=cudnn"], ("data.packing", "kernels.attention")),
    (["lora.enabled=false"], ("lora.enabled", "model.quantization")),
    (["lora.enabled=false", "model.quantization=none"], ("lora.enabled", "model.dtype")),
    (
        ["lora.enabled=false", "model.quantization=none", "model.dtype=float32", "kernels.layer=fused"],
        ("lora.enabled", "kernels.layer"),
    ),
    (["kernels.prefix_reuse=micro_batch", "data.packing=wrapped"], ("kernels.prefix_reuse", "data.packing")),
    (
        ["kernels.prefix_reuse=micro_batch", "data.packing=bfd", "kernels.padding=keep"],
        ("kernels.prefix_reuse", "kernels.padding"),
    ),
    (["kernels.layer=stock", "kernels.rms_norm=triton"], ("kernels.rms_norm", "kernels.layer")),
    (["kernels.layer=stock", "kernels.lora=fused"], ("kernels.lora", "kernels.layer")),
    (["kernels.layer=stock", "kernels.dequant_cache=all"], ("kernels.dequant_cache", "kernels.layer")),
    (["kernels.layer=stock", "kernels.keep_inputs=3"], ("kernels.keep_inputs", "kernels.layer")),
    (["model.quantization=none", "kernels.dequant_cache=1"], ("kernels.dequant_cache", "model.quantization")),
]

BAD_FILES = {
    "list": ("- train\n", "sections are needed (" + SECTIONS),
    "text": ("train\n", "sections are needed"),
    "number as a section": ("train: 3\n", "train=3: settings are needed, for example train.output_dir="),
    "empty section": ("train:\nlora: {r: 4}\n", "train=null: settings are needed"),
    "key twice": ("train: {seed: 1, seed: 2}\n", "the key 'seed' is given twice"),
    "section twice": ("train: {seed: 1}\ntrain: {seed: 2}\n", "the key 'train' is given twice"),
    "tabs": ("train:\n\tseed: 1\n", "cannot start any token"),
    "python tag": ("train: !!python/name:os.system\n", "could not determine a constructor"),
    "number as a key": ("train: {3: 4}\n", "train.3=4: no such setting"),
    "unknown section": ("tokenizer: {}\n", "tokenizer={}: no such section"),
    "section at the wrong place": ("learning_rate: 1.0\n", "learning_rate=1.0: no such section; it belongs at train.l"),
    "two documents": ("train: {}\n---\ntrain: {}\n", "expected a single document"),
}

RUN_CASES = """
import contextlib, io, json, sys
from packloop import cli

results = []
for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["packloop", *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
    heavy = [name for name in ("torch", "transformers", "datasets", "accelerate") if name in sys.modules]
    results.append({"code": code, "err": err.getvalue(), "out": out.getvalue(), "heavy": heavy})
json.dump(results, sys.stdout)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, dict]:
    """What `packloop train` says to each case, all of them asked of one process; each would train if it were valid."""
    directory = tmp_path_factory.mktemp("configs")
    good = directory / "good.yaml"
    good.write_text("train: {output_dir: /nonexistent/run}\n")
    cases = {override: ["train", str(good), override] for override, *_ in BAD_OVERRIDES}
    cases |= {" ".join(overrides): ["train", str(good), *overrides] for overrides, _ in CONTRADICTIONS}
    for number, (name, (text, _)) in enumerate(BAD_FILES.items()):
        (directory / f"{number}.yaml").write_text(text)
        cases[name] = ["train", str(directory / f"{number}.yaml")]
    command = [sys.executable, "-c", RUN_CASES]
    done = subprocess.run(
        command, input=json.dumps(list(cases.values())), capture_output=True, text=True, cwd=REPOSITORY, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, json.loads(done.stdout), strict=True))


def the_line(answer: dict) -> str:
    """The one line of a refusal, after checking that it is one and that nothing was loaded for it."""
    assert answer["code"] == 2
    assert answer["heavy"] == []
    assert answer["out"] == ""
    line, end = answer["err"][:-1], answer["err"][-1:]
    assert end == "\n"
    assert "\n" not in line
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.mark.parametrize("case", BAD_OVERRIDES, ids=[case[0] for case in BAD_OVERRIDES])
def test_bad_override(answers, case):
    override, beginning, *ending = case
    line = the_line(answers[override])
    assert line.startswith(beginning)
    assert all(line.endswith(text) for text in ending)


@pytest.mark.parametrize(("overrides", "names"), CONTRADICTIONS)
def test_settings_that_cannot_go_together(answers, overrides, names):
    line = the_line(answers[" ".join(overrides)])
    assert all(name in line for name in names)
    assert "; use " in line


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(answers, name):
    assert BAD_FILES[name][1] in the_line(answers[name])


def test_every_fault_has_its_line():
    with pytest.raises(ConfigError) as caught:
        parse_config({"train": {"seed": -1, "lr": 3}, "lora": {"r": 0}, "trian": {}})
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert {line.split("=")[0] for line in lines} == {"train.seed", "train.lr", "lora.r", "trian"}


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing.yaml", "does not exist; recipes/ holds examples"), ("run.toml", r"a \.yaml file is needed")],
)
def test_a_file_that_is_none(tmp_path, name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(tmp_path / name)
    assert caught.value.exit_code == 2


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "directory.yaml").mkdir()
    (tmp_path / "latin.yaml").write_bytes(b"train: {output_dir: caf\xe9}\n")
    for name in ("directory.yaml", "latin.yaml"):
        with pytest.raises(InputError, match="cannot be read") as caught:
            load_config(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_overrides_replace_the_files_values_and_are_read_as_yaml(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "train: {learning_rate: 2e-4, max_steps: 5}\ndata: {columns: {input: context}}\n"
    )
    overrides = ["train.max_steps=null", "lora.target_modules=[o_proj]", "data.columns.response=body", "lora.dropout=0"]
    config = load_config(tmp_path / "run.yaml", overrides)
    assert config.train.learning_rate == 2e-4
    assert config.train.max_steps is None
    assert config.lora.target_modules == ["o_proj"]
    assert config.data.columns == {"input": "context", "response": "body"}
    assert config.lora.dropout == 0.0
    # A value that holds `=` is cut at the first one only.
    assert load_config(None, ["data.source=a=b.jsonl"]).data.source == "a=b.jsonl"


def test_an_empty_file_is_the_defaults(tmp_path):
    (tmp_path / "run.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "run.yaml") == RunConfig()


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["data.template={prompt: '{q}', response: '{a}'}", "data.eval_split=0.1", "train.gradient_checkpointing=3"],
        ["data.eval_split=test", "lora.target_modules=all-linear", "log.trackers=[wandb]", "model.revision='1e4'"],
    ],
)
def test_a_dumped_configuration_reads_back_equal(tmp_path, overrides):
    config = load_config(None, overrides)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "run.yaml") == config


def test_the_defaults_are_the_recipe():
    recipe = REPOSITORY / "recipes/llama2-7b-dolly.yaml"
    if not recipe.exists():
        pytest.skip("recipes/llama2-7b-dolly.yaml is not there yet")
    different = changed_keys(RunConfig(), load_config(recipe))
    assert {key: default for key, (default, _) in different.items() if default != "auto"} == {}
    written = yaml.safe_load(recipe.read_text())
    assert set(written) == set(RunConfig.model_fields)


def test_the_schema_describes_every_setting():
    schema = RunConfig.model_json_schema()
    for section, reference in schema["properties"].items():
        model = schema["$defs"][reference["$ref"].rpartition("/")[2]]
        assert model["additionalProperties"] is False, section
        assert set(model["properties"]) == set(RunConfig.model_fields[section].annotation.model_fields)
