"""New text from a model: left-padded batches, KV cache, everything that training relies on put back afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from packloop.config import RunConfig
from packloop.data.tokenize import decode_response, encode_prompt
from packloop.engine.finished_run import ADAPTER_FILE, FinishedRun, load_run_tokenizer, open_run
from packloop.engine.model import load_base
from packloop.engine.vocabulary import check_prompts
from packloop.errors import InputError
from packloop.kernels.patch import find_llama


def generate_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    do_sample: bool,
    temperature: float,
    top_p: float,
    batch_size: int,
    seed: int,
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """What the model writes after each prompt, up to its EOS or `max_new_tokens`, stripped; in the order of `prompts`.

    temperature, top_p: used with `do_sample`; no other filter is applied. seed: of a random stream of this call's own;
    the same seed and batch size give the same texts. on_batch: called with the number of prompts just finished. Leaves
    the model's modes, `use_cache`, generation settings and torch's random state as they were. Raises InputError for a
    prompt that leaves no room for `max_new_tokens` among the model's positions, or has tokens that it lacks.
    """
    llama = find_llama(model)
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    check_prompts(prompt_ids, tokenizer, llama.config.vocab_size)
    _check_room(prompt_ids, max_new_tokens, llama.config.max_position_embeddings)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if do_sample else {}
    padding_id = _padding_id(tokenizer, llama.config.vocab_size)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        use_cache=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=padding_id,
        **sampling,
    )
    # Longest first: what does not fit in memory fails at once, and a batch holds prompts of about one length.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompt_ids[index]))
    texts = [""] * len(prompts)
    with torch.no_grad(), _inference(model, llama), _random_stream(seed, llama.device):
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            width = len(prompt_ids[chosen[0]])
            input_ids_BT = torch.full((len(chosen), width), padding_id)
            attention_mask_BT = torch.zeros_like(input_ids_BT)
            for row, index in enumerate(chosen):
                start = width - len(prompt_ids[index])
                input_ids_BT[row, start:] = torch.tensor(prompt_ids[index])
                attention_mask_BT[row, start:] = 1
            output_BT = llama.generate(
                input_ids=input_ids_BT.to(llama.device),
                attention_mask=attention_mask_BT.to(llama.device),
                generation_config=settings,
            )
            for index, new_ids in zip(chosen, output_BT[:, width:].tolist(), strict=True):
                # What follows a row's EOS is padding up to the batch's longest text.
                if tokenizer.eos_token_id in new_ids:
                    new_ids = new_ids[: new_ids.index(tokenizer.eos_token_id)]
                texts[index] = decode_response(tokenizer, prompt_ids[index], new_ids).strip()
            if on_batch:
                on_batch(len(chosen))
    return texts


def load_run(
    run_dir: str | Path, device: torch.device | None = None
) -> tuple[RunConfig, PeftModel | LlamaForCausalLM, PreTrainedTokenizerBase]:
    """(configuration, model, tokenizer) of a finished run or one of its checkpoints, its base loaded as in training.

    device: the first GPU where there is one, otherwise the CPU. Raises InputError where something is missing or the
    adapter does not fit the base. Weights come from safetensors only.
    """
    run = open_run(run_dir)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_run_tokenizer(run)
    if run.kind == "full":
        trained = {"name_or_path": str(run.weights), "revision": None, "trust_remote_code": False}
        return run.config, load_base(run.config.model.model_copy(update=trained), device).eval(), tokenizer
    return run.config, _with_adapter(load_base(run.config.model, device), run).eval(), tokenizer


def _with_adapter(base: LlamaForCausalLM, run: FinishedRun) -> PeftModel:
    where = f"the adapter in {str(run.weights)!r}"
    try:
        with safe_open(run.weights / ADAPTER_FILE, framework="pt") as file:
            saved = set(file.keys())
        with warnings.catch_warnings():
            # PEFT warns about names that do not match, and goes on with an adapter that is partly random: see below.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(base, str(run.weights), torch_device=str(base.device))
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{where} cannot be loaded onto {run.config.model.name_or_path!r}: {reason}") from error
    # save_embedding_layers: left at "auto", it looks the base model up on the Hub.
    different = saved ^ set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if different:
        raise InputError(
            f"{where} does not fit the base {run.config.model.name_or_path!r}: {min(different)} is in one only; "
            "use the model it was trained on"
        )
    return model


def _check_room(prompt_ids: Sequence[Sequence[int]], max_new_tokens: int, num_positions: int) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens}: at least 1 is needed")
    for number, ids in enumerate(prompt_ids, start=1):
        if len(ids) + max_new_tokens > num_positions:
            room = num_positions - len(ids)
            remedy = f"shorten it or ask for at most {room} new tokens" if room > 0 else "shorten it"
            raise InputError(
                f"prompt {number} of {len(prompt_ids)} has {len(ids)} tokens and {max_new_tokens} new ones are asked "
                f"for; the model has {num_positions} positions; {remedy}"
            )


def _padding_id(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> int:
    """A token of the model's for masked slots. Many tokenizers pad with EOS; a text's end would look like padding."""
    for token_id in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, 0):
        if token_id is not None and token_id != tokenizer.eos_token_id and token_id < vocabulary:
            return token_id
    return 1


@contextmanager
def _inference(model: nn.Module, llama: LlamaForCausalLM) -> Iterator[None]:
    """Evaluation mode, KV cache on, and the model's own generation settings (a temperature, say) out of the way."""
    modes = [(module, module.training) for module in model.modules()]
    use_cache, generation_config = llama.config.use_cache, llama.generation_config
    try:
        model.eval()
        llama.config.use_cache = True
        llama.generation_config = GenerationConfig()
        yield
    finally:
        llama.generation_config = generation_config
        llama.config.use_cache = use_cache
        for module, was_training in modes:
            module.training = was_training


@contextmanager
def _random_stream(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the generators of the CPU and of `device`, and gives both their earlier state back afterwards."""
    cuda_devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda_devices):
        torch.default_generator.manual_seed(seed)
        if cuda_devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
