"""Merging: into the base that was asked for, summed in float32, rounded once, written whole or not at all."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_run import run_config, save_base, save_run
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from packloop.engine.finished_run import open_run
from packloop.engine.merge import _check_free_space, _parse_size, merge
from packloop.engine.model import load_base
from packloop.errors import InputError

INPUT_IDS = torch.tensor([[1, 40, 77, 123, 9, 250, 31, 200], [1, 3, 5, 8, 13, 21, 34, 55]])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def nf4_run(base, tmp_path_factory) -> Path:
    return save_run(run_config(base, tmp_path_factory.mktemp("nf4") / "run"))


@torch.no_grad()
def merged_logits(directory: Path) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model(INPUT_IDS).logits


@torch.no_grad()
def adapter_logits(run_dir: Path, *, quantization: str) -> torch.Tensor:
    """The adapter on its base, through stock PEFT."""
    config = open_run(run_dir).config.model.model_copy(update={"quantization": quantization})
    model = PeftModel.from_pretrained(load_base(config, torch.device("cpu")), run_dir)
    return model.eval()(INPUT_IDS).logits


def test_row12_each_choice_of_base_gives_the_adapters_logits_on_it(nf4_run, tmp_path):
    on_nf4 = adapter_logits(nf4_run, quantization="nf4")
    on_original = adapter_logits(nf4_run, quantization="none")
    dequantized = merged_logits(merge(nf4_run, tmp_path / "dequantized", base="dequantized"))
    original = merged_logits(merge(nf4_run, tmp_path / "original", base="original"))
    scale = on_nf4.std()
    assert (dequantized - on_nf4).abs().max() < 1e-5 * scale
    assert (original - on_original).abs().max() < 1e-5 * scale
    assert (original - on_nf4).abs().max() > 0.1 * scale
    assert (dequantized - on_original).abs().max() > 0.1 * scale


def test_row12_the_sum_is_rounded_once(tmp_path):
    base = save_base(tmp_path / "base")
    # An update of the size of bf16's rounding: rounding base or update before the sum moves many weights.
    config = run_config(base, tmp_path / "run", model={"dtype": "bfloat16", "quantization": "none"})
    run_dir = save_run(config, adapter_std=2e-3)
    merge(run_dir, tmp_path / "merged", base="original")
    merged, weights = load_file(tmp_path / "merged/model.safetensors"), load_file(base / "model.safetensors")
    adapter = load_file(run_dir / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    a = adapter[f"base_model.model.{name}.lora_A.weight"].double()
    b = adapter[f"base_model.model.{name}.lora_B.weight"].double()
    exact = weights[f"{name}.weight"].double() + 8 / 4 * b @ a
    got = merged[f"{name}.weight"]
    assert got.dtype == torch.bfloat16
    assert (got != exact.to(torch.bfloat16)).sum() <= 2  # float32 sums may fall on the other side of a tie
    twice = weights[f"{name}.weight"].bfloat16() + (2 * b @ a).bfloat16()
    assert (twice != exact.to(torch.bfloat16)).float().mean() > 0.05
    untouched = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(merged[untouched], weights[untouched].bfloat16())


@pytest.mark.parametrize("disk_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_row12_dequantized_weights_are_the_ones_that_loading_holds(disk_dtype, double_quant, tmp_path):
    base = save_base(tmp_path / "base", dtype=disk_dtype)
    model = {"dtype": "bfloat16", "double_quant": double_quant}
    run_dir = save_run(run_config(base, tmp_path / "run", model=model), adapter_std=0.0)
    merge(run_dir, tmp_path / "merged", base="dequantized")
    merged = load_file(tmp_path / "merged/model.safetensors")
    loaded = load_base(open_run(run_dir).config.model, torch.device("cpu"))
    quantized = {n: m for n, m in loaded.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(quantized) == 2 * 7
    for name, parameter in loaded.named_parameters():
        layer = quantized.get(name.removesuffix(".weight"))
        if layer is not None:
            parameter = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(merged[name], parameter), name


def test_row12_an_adapter_of_another_base_is_refused(nf4_run, tmp_path):
    run = open_run(nf4_run)
    other = save_base(tmp_path / "other", intermediate_size=128)
    config = run.config.model_copy(update={"model": run.config.model.model_copy(update={"name_or_path": str(other)})})
    run_dir = tmp_path / "run"
    save_run(config.model_copy(update={"train": config.train.model_copy(update={"output_dir": str(run_dir)})}))
    (run_dir / "adapter_model.safetensors").write_bytes((nf4_run / "adapter_model.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"does not fit the base .*down_proj is \(64, 96\) .* \(64, 128\)"):
        merge(run_dir, tmp_path / "merged", base="original")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "setting",
    [{"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}}, {"alora_invocation_tokens": [3, 4]}],
)
def test_row12_an_adapter_that_is_not_plain_lora_is_refused(nf4_run, tmp_path, setting):
    run_dir = copy_run(nf4_run, tmp_path / "run")
    file = run_dir / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | setting))
    with pytest.raises(InputError, match=f"has {next(iter(setting))}=.*only plain LoRA"):
        merge(run_dir, tmp_path / "merged", base="original")


def test_row16_and_row17_the_exported_config_has_the_kv_cache_on_and_no_tensor_parallel_slices(tmp_path):
    base = save_base(tmp_path / "base", pretraining_tp=2, use_cache=False)
    assert json.loads((base / "config.json").read_text())["pretraining_tp"] == 2
    run_dir = save_run(run_config(base, tmp_path / "run"))
    merge(run_dir, tmp_path / "merged", base="dequantized")
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert AutoConfig.from_pretrained(tmp_path / "merged").use_cache is True
    assert config["use_cache"] is True
    assert config.get("pretraining_tp", 1) == 1
    assert "quantization_config" not in config
    assert str(tmp_path) not in json.dumps(config)
    assert GenerationConfig.from_pretrained(tmp_path / "merged").use_cache is True


def test_row17_a_config_with_tensor_parallel_slices_loads_and_gives_the_plain_models_logits(tmp_path):
    plain, sliced = save_base(tmp_path / "plain"), save_base(tmp_path / "sliced", pretraining_tp=2)
    logits = []
    for base in (plain, sliced):
        model = load_base(run_config(base, tmp_path / "run").model, torch.device("cpu"))
        assert getattr(model.config, "pretraining_tp", 1) == 1
        logits.append(model(INPUT_IDS).logits)
    assert torch.equal(*logits)


def test_shards_are_cut_at_the_size_and_load_through_their_index(nf4_run, tmp_path):
    merge(nf4_run, tmp_path / "whole", base="dequantized")
    merge(nf4_run, tmp_path / "sharded", base="dequantized", max_shard_size="100KB")
    files = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "sharded/model.safetensors.index.json").read_text())
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 100_000 for file in files)
    whole = load_file(tmp_path / "whole/model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    sharded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    assert torch.equal(merged_logits(tmp_path / "whole"), merged_logits(tmp_path / "sharded"))


def test_a_sharded_base_gives_the_same_model(nf4_run, base, tmp_path):
    sharded = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    for file in base.glob("*token*"):
        (sharded / file.name).write_bytes(file.read_bytes())
    run_dir = copy_run(nf4_run, tmp_path / "run")
    yaml = run_dir / "config.resolved.yaml"
    yaml.write_text(yaml.read_text().replace(str(base), str(sharded)))
    merge(nf4_run, tmp_path / "from-one", base="original")
    merge(run_dir, tmp_path / "from-many", base="original")
    one, many = (load_file(tmp_path / name / "model.safetensors") for name in ("from-one", "from-many"))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("choice", ["original", "dequantized"])
def test_tied_embeddings_stay_tied(choice, tmp_path):
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    run_dir = save_run(run_config(base, tmp_path / "run"))
    merge(run_dir, tmp_path / "merged", base=choice)
    assert "lm_head.weight" not in load_file(tmp_path / "merged/model.safetensors")
    quantization = {"original": "none", "dequantized": "nf4"}[choice]
    expected = adapter_logits(run_dir, quantization=quantization)
    assert (merged_logits(tmp_path / "merged") - expected).abs().max() < 1e-5 * expected.std()


def test_the_merged_directory_has_tokenizer_card_and_generation_settings(nf4_run, tmp_path):
    out = merge(nf4_run, tmp_path / "merged", base="dequantized")
    expected, got = (AutoTokenizer.from_pretrained(path) for path in (nf4_run, out))
    text = "the tap in the kitchen </s> leaks"
    assert got(text).input_ids == expected(text).input_ids
    card = (out / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "NF4 weights that it was trained on" in card
    assert str(tmp_path) not in card
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1


def test_the_cards_snippets_load_the_models(nf4_run, base, tmp_path, monkeypatch):
    merged = merge(nf4_run, tmp_path / "merged", base="dequantized")
    monkeypatch.chdir(base.parent)  # a local base is named by its last part
    for directory in (nf4_run, merged):
        snippet = (directory / "README.md").read_text().split("```python\n")[1].split("```")[0]
        names: dict = {}
        exec(snippet.replace('here = "."', f"here = {str(directory)!r}"), names)
        for module in names["model"].modules():  # bitsandbytes' own fast path for some CPUs, which rounds differently
            module.support_avx512bf16_for_cpu = False
        with torch.no_grad():
            logits = names["model"].eval()(INPUT_IDS).logits
        expected = adapter_logits(nf4_run, quantization="nf4")
        assert (logits - expected).abs().max() < 1e-5 * expected.std()
        assert names["tokenizer"].eos_token == "</s>"


def test_generation_settings_that_cannot_be_saved_as_they_are_do_not_stop_a_merge(nf4_run, base, tmp_path):
    other = copy_run(base, tmp_path / "base")
    settings = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "temperature": 0.9,
        "top_p": 0.6,
        "transformers_version": "4.31.0",
    }
    (other / "generation_config.json").write_text(json.dumps(settings))
    run_dir = copy_run(nf4_run, tmp_path / "run")
    yaml = run_dir / "config.resolved.yaml"
    yaml.write_text(yaml.read_text().replace(str(base), str(other)))
    merge(run_dir, tmp_path / "merged", base="original")
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == 2


def test_a_run_without_adapter_has_nothing_to_merge(base, tmp_path):
    config = run_config(base, tmp_path / "run", model={"quantization": "none"}, lora={"enabled": False})
    with pytest.raises(InputError, match="already is a full model"):
        merge(save_run(config), tmp_path / "merged", base="original")


def test_dequantized_needs_a_quantised_run(base, tmp_path):
    run_dir = save_run(run_config(base, tmp_path / "run", model={"quantization": "none"}))
    with pytest.raises(InputError, match="use base=original"):
        merge(run_dir, tmp_path / "merged", base="dequantized")


def test_a_directory_with_something_in_it_is_left_alone(nf4_run, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        merge(nf4_run, tmp_path / "merged", base="original")
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["notes.txt"]


def test_an_empty_directory_is_filled(nf4_run, tmp_path):
    (tmp_path / "merged").mkdir()
    merge(nf4_run, tmp_path / "merged", base="original")
    assert (tmp_path / "merged/model.safetensors").is_file()


def test_a_run_that_was_not_finished_names_its_newest_checkpoint(nf4_run, tmp_path):
    run_dir = copy_run(nf4_run, tmp_path / "run")
    checkpoint = run_dir / "checkpoints/step-000020"
    copy_run(nf4_run, checkpoint)
    copy_run(nf4_run, run_dir / "checkpoints/step-000010")
    (run_dir / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"training has not finished.*step-000020"):
        merge(run_dir, tmp_path / "merged", base="original")
    merge(checkpoint, tmp_path / "merged", base="original")
    assert open_run(checkpoint).root == run_dir


def test_no_space_is_found_out_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match=r"1073741824\.00 GiB are needed and .* GiB are free in"):
        _check_free_space(tmp_path / "deep/merged", 2**60)


def test_a_write_that_the_disk_refuses_leaves_nothing(nf4_run, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot be written") as caught:
            merge(nf4_run, tmp_path / "merged", base="original")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_lacks_a_weight_is_named(nf4_run, base, tmp_path):
    broken = copy_run(base, tmp_path / "base")
    weights = load_file(broken / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    run_dir = copy_run(nf4_run, tmp_path / "run")
    yaml = run_dir / "config.resolved.yaml"
    yaml.write_text(yaml.read_text().replace(str(base), str(broken)))
    with pytest.raises(InputError, match=r"lacks the weight model\.norm\.weight"):
        merge(run_dir, tmp_path / "merged", base="original")
    assert not (tmp_path / "merged").exists()


def test_a_damaged_adapter_is_one_line(nf4_run, tmp_path):
    run_dir = copy_run(nf4_run, tmp_path / "run")
    (run_dir / "adapter_model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(InputError, match="cannot be read") as caught:
        merge(run_dir, tmp_path / "merged", base="original")
    assert "\n" not in str(caught.value)


def test_shard_sizes_are_read_in_decimal_units():
    assert _parse_size("4GB") == 4_000_000_000
    assert _parse_size("1.5 mb") == 1_500_000
    for bad in ("4", "GB", "0GB", "-1GB", "4GiB"):
        with pytest.raises(InputError, match="4GB is needed"):
            _parse_size(bad)


def copy_run(source: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    return target
