"""Generation: the right text, in order, stopping at EOS, and nothing of the training state disturbed."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from tiny_run import run_config, save_base, save_run
from transformers import AutoTokenizer

from packloop.config import load_config
from packloop.data.prompts import get_template
from packloop.data.tokenize import encode_prompt, tokenize_rows
from packloop.engine.generate import generate_texts, load_run
from packloop.engine.model import load_model, load_tokenizer
from packloop.errors import InputError
from packloop.kernels.patch import find_llama

PROMPTS = [
    "the tap",
    "Dear Ms Ortega, the tap in the kitchen leaks. Could you send",
    "Write a note",
    "### Instruction:\nUse the Input below",
    "a",
]
GREEDY = {"max_new_tokens": 12, "do_sample": False, "temperature": 1.0, "top_p": 1.0, "batch_size": 2, "seed": 0}
SAMPLED = GREEDY | {"do_sample": True, "temperature": 0.9, "top_p": 0.9}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def run_dir(base, tmp_path_factory) -> Path:
    return save_run(run_config(base, tmp_path_factory.mktemp("runs") / "run"))


@pytest.fixture(scope="module")
def loaded(run_dir):
    _, model, tokenizer = load_run(run_dir)
    return model, tokenizer


def stop_after(model, tokenizer, prompt: str) -> str:
    """Greedy continuation by hand: the whole sequence through the model for every token, no cache, no padding."""
    ids = encode_prompt(tokenizer, prompt)
    start = len(ids)
    with torch.no_grad():
        while len(ids) - start < GREEDY["max_new_tokens"]:
            next_id = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if next_id == tokenizer.eos_token_id:
                break
            ids.append(next_id)
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_batches_give_what_one_prompt_at_a_time_gives_in_the_order_of_the_prompts(loaded):
    model, tokenizer = loaded
    expected = [stop_after(model, tokenizer, prompt) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)
    for batch_size in (1, 2, 5):
        assert generate_texts(model, tokenizer, PROMPTS, **GREEDY | {"batch_size": batch_size}) == expected


def test_a_text_ends_at_eos_whatever_its_batch_goes_on_with(base):
    config = run_config(base, base / "unused", model={"quantization": "none"}, lora={"enabled": False})
    tokenizer = load_tokenizer(config.model)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # the confusable case
    model = load_model(config.model, config.lora, torch.device("cpu")).eval()
    letter = {name: tokenizer.convert_tokens_to_ids(name) for name in "ABPQRSTUVW"}
    successor = torch.arange(300)  # "A" is followed by "B" and that by EOS; "P" by "Q" by "R" and so on
    successor[letter["A"]], successor[letter["B"]] = letter["B"], tokenizer.eos_token_id
    for first, second in zip("PQRSTUV", "QRSTUVW"):
        successor[letter[first]] = letter[second]
    with torch.no_grad():
        embedding = torch.randn(300, 64, generator=torch.Generator().manual_seed(3))
        model.model.embed_tokens.weight.copy_(embedding)
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()  # what is left is the token itself
        model.lm_head.weight.zero_()
        model.lm_head.weight.index_add_(0, successor, torch.nn.functional.normalize(embedding, dim=1))
    for padding in (tokenizer.eos_token, "Z"):  # "Z" is a token like any other, which decoding shows
        tokenizer.pad_token = padding
        assert generate_texts(model, tokenizer, ["A", "P"], **GREEDY | {"max_new_tokens": 6}) == ["B", "QRSTUV"]


def test_row07_the_model_is_given_bos_once_and_no_special_token_from_the_text(loaded):
    model, tokenizer = loaded
    seen = []
    embedding = find_llama(model).get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
    try:
        generate_texts(model, tokenizer, ["a tap </s> leaks", "<s>the tap"], **GREEDY | {"max_new_tokens": 1})
    finally:
        hook.remove()
    for row in seen[0].tolist():
        real = row[next(i for i, token in enumerate(row) if token == tokenizer.bos_token_id) :]
        assert real.count(tokenizer.bos_token_id) == 1
        assert tokenizer.eos_token_id not in row


def test_generation_starts_from_exactly_the_prompt_part_of_a_training_document(loaded):
    from packloop.data.sources import Rows

    _, tokenizer = loaded
    template = get_template("instruction_from_response")
    row = {"instruction": "Write a note", "response": "the tap leaks"}
    documents, _ = tokenize_rows(
        Rows([row], [0]), template, tokenizer, loss_on="response", max_length=None, on_long_row="error"
    )
    prompt_ids = encode_prompt(tokenizer, template.render_prompt(row))
    assert documents.token_ids[: len(prompt_ids)].tolist() == prompt_ids
    assert documents.counts[: len(prompt_ids)].sum() == 0


def test_sampling_repeats_with_its_seed_and_leaves_torchs_random_state_alone(loaded):
    model, tokenizer = loaded
    before = torch.get_rng_state()
    first = generate_texts(model, tokenizer, PROMPTS, **SAMPLED)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert generate_texts(model, tokenizer, PROMPTS, **SAMPLED) == first
    assert generate_texts(model, tokenizer, PROMPTS, **SAMPLED | {"seed": 1}) != first


def test_a_small_top_p_is_greedy_and_the_models_own_settings_do_not_count(loaded):
    model, tokenizer = loaded
    llama = find_llama(model)
    greedy = generate_texts(model, tokenizer, PROMPTS, **GREEDY)
    original = llama.generation_config
    try:
        llama.generation_config = type(original)(do_sample=True, temperature=50.0, repetition_penalty=9.0, max_length=3)
        assert generate_texts(model, tokenizer, PROMPTS, **SAMPLED | {"top_p": 1e-6}) == greedy
        assert generate_texts(model, tokenizer, PROMPTS, **GREEDY) == greedy
        assert llama.generation_config.repetition_penalty == 9.0
    finally:
        llama.generation_config = original


def test_row16_the_cache_is_on_while_generating_and_use_cache_and_modes_come_back(loaded):
    model, tokenizer = loaded
    llama = find_llama(model)
    widths = []
    hook = llama.model.register_forward_pre_hook(
        lambda _, __, kwargs: widths.append((kwargs["input_ids"].shape[1], llama.training)), with_kwargs=True
    )
    for use_cache in (False, True):
        llama.config.use_cache = use_cache
        model.train()
        llama.model.layers[1].eval()
        generate_texts(model, tokenizer, PROMPTS[:2], **GREEDY)
        assert llama.config.use_cache is use_cache
        assert model.training
        assert llama.model.layers[0].mlp.training
        assert not llama.model.layers[1].mlp.training
    hook.remove()
    llama.config.use_cache = False
    assert not any(training for _, training in widths)
    assert {width for width, _ in widths[1:12]} == {1}  # after the prompt one token at a time


def test_state_comes_back_after_an_error_too(loaded):
    model, tokenizer = loaded
    model.train()

    def fail(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_texts(model, tokenizer, PROMPTS, **GREEDY, on_batch=fail)
    assert model.training
    assert find_llama(model).config.use_cache is False
    model.eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_bit_equal_before_and_after_generation(tmp_path, dtype):
    """On CPUs with AVX512-BF16 the first inference repacks 4-bit weights, and adapters get no gradient any more."""
    base = save_base(tmp_path / "base", intermediate_size=128)  # the repacking takes multiples of 64
    config = run_config(base, tmp_path / "run", model={"dtype": dtype})
    tokenizer = load_tokenizer(config.model)
    torch.manual_seed(0)
    model = load_model(config.model, config.lora, torch.device("cpu"))
    input_ids = torch.arange(3, 35).view(2, 16)

    def gradients() -> dict[str, torch.Tensor]:
        model.train()
        model.zero_grad()
        model(input_ids, labels=input_ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    generate_texts(model, tokenizer, PROMPTS, **GREEDY)
    after = gradients()
    assert sum(bool(gradient.any()) for name, gradient in before.items() if "lora_B" in name) == 6
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in model.modules())


def test_a_prompt_without_room_is_refused_before_anything_is_generated(loaded):
    model, tokenizer = loaded
    long = "the tap leaks " * 40
    done = []
    with pytest.raises(InputError, match=r"prompt 2 of 3 has \d+ tokens and 12 new .* 160 positions; shorten it"):
        generate_texts(model, tokenizer, ["a", long, "b"], **GREEDY, on_batch=done.append)
    assert not done
    assert generate_texts(model, tokenizer, [], **GREEDY) == []
    with pytest.raises(InputError, match="at least 1"):
        generate_texts(model, tokenizer, ["a"], **GREEDY | {"max_new_tokens": 0})


def test_a_loaded_run_is_the_trained_model(run_dir, loaded):
    model, _ = loaded
    config = load_config(run_dir / "config.resolved.yaml")
    torch.manual_seed(1)
    trained = load_model(config.model, config.lora, torch.device("cpu"))
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    input_ids = torch.arange(3, 35).view(2, 16)
    with torch.no_grad():
        assert torch.equal(trained.eval()(input_ids).logits, model(input_ids).logits)


def test_a_fully_trained_run_loads_from_its_own_directory(base, tmp_path):
    config = run_config(base, tmp_path / "run", model={"quantization": "none"}, lora={"enabled": False})
    save_run(config)
    (tmp_path / "run/config.resolved.yaml").write_text(
        (tmp_path / "run/config.resolved.yaml").read_text().replace(str(base), "gone/elsewhere")
    )
    _, model, tokenizer = load_run(tmp_path / "run")
    assert len(generate_texts(model, tokenizer, PROMPTS, **GREEDY)) == len(PROMPTS)


def test_an_adapter_of_another_shape_or_with_missing_layers_is_refused(base, tmp_path):
    run = save_run(run_config(base, tmp_path / "run"))
    other = save_run(run_config(base, tmp_path / "other", lora={"target_modules": ["q_proj"]}))
    wide = save_run(run_config(base, tmp_path / "wide", lora={"r": 8}))
    for source, reason in ((other, "is in one only"), (wide, "size mismatch")):
        (run / "adapter_model.safetensors").write_bytes((source / "adapter_model.safetensors").read_bytes())
        with pytest.raises(InputError, match=reason) as caught:
            load_run(run)
        assert "\n" not in str(caught.value)


def test_loading_a_run_asks_nothing_of_the_hub(base, tmp_path):
    run = save_run(run_config(base, tmp_path / "run"))
    file = run / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "no-such/model"}))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)  # PEFT warns where such a look-up fails
        load_run(run)


def test_a_pickled_adapter_is_never_loaded(base, tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    run = save_run(run_config(base, tmp_path / "run"))
    (run / "adapter_model.safetensors").unlink()
    torch.save({"x": Payload()}, run / "adapter_model.bin")
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors"):
        load_run(run)
    assert not (tmp_path / "executed").exists()


def test_the_llama_2_tokenizer_pads_without_eos_and_adds_bos_once(shared_data, tmp_path):
    base = save_base(tmp_path / "base", vocab_size=32000)
    for file in (shared_data / "llama2-tokenizer").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    config = run_config(base, tmp_path / "run", model={"quantization": "none"})
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, config.lora, torch.device("cpu")).eval()
    prompts = ["### Response:\n", "Dear Ms Ortega, </s> the tap leaks", "ünïcode ✓"]
    assert encode_prompt(tokenizer, prompts[0])[0] == tokenizer.bos_token_id
    batched = generate_texts(model, tokenizer, prompts, **GREEDY | {"batch_size": 3})
    assert batched == [generate_texts(model, tokenizer, [prompt], **GREEDY)[0] for prompt in prompts]
    assert AutoTokenizer.from_pretrained(base).bos_token not in "".join(batched)
