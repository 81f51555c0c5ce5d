"""What a profile says of a step: classes of kernels, busy time, and a real profile on the CPU."""

from __future__ import annotations

import pytest
import torch
from small_job import small_config, write_rows

from packloop.bench.kernel_classes import CLASSES, is_gemm, likely_class
from packloop.bench.profile import profile_step
from packloop.bench.steps import Job
from packloop.bench.synthetic import random_model, shape_config
from packloop.bench.trace import Work, exclusive_ms, trace_of
from packloop.data.loader import build_data
from packloop.engine.model import load_tokenizer

KERNELS = {
    "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNN": "base GEMM",
    "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_NNT": "base GEMM",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_execute_kernel__5x_cublas": "base GEMM",
    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_nn_align8>(Params)": "base GEMM",
    "ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_tn": "base GEMM",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16>(...)": "base GEMM",
    "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64, 4, cutlass::bfloat16_t>>(...)": "attention",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>(Flash_bwd_params)": "attention",
    "kernel_cutlass_kernel_flash_attncuteflash_fwdFlashAttentionForwardSm90_object_at__tensorptrbf16": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0": "attention",
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>::Params)": "attention",
    "document_attention_backward_keys_kernel": "attention",
    "_nf4_dequantize_kernel": "NF4 dequantisation",
    "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*, ...)": "NF4 dequantisation",
    "_project_kernel": "LoRA",
    "_add_input_gradient_kernel": "LoRA",
    "_cast_many_kernel": "LoRA",
    "_rms_norm_backward_kernel": "norms",
    "_rope_kernel": "RoPE",
    "_swiglu_forward_kernel": "activation",
    "_cross_entropy_kernel": "head + loss",
    "void kOptimizer32bit2State<float, 0>(float*, float*, float*, float*, ...)": "optimizer",
    "Memcpy HtoD (Pinned -> Device)": "copies",
    "Memset (Device)": "copies",
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(...)>": "copies",
    "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "collectives",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>": "other",
    "never_seen_before": "other",
}


@pytest.mark.parametrize(("name", "expected"), KERNELS.items(), ids=lambda value: value[:40])
def test_kernels_are_known_by_their_names(name, expected):
    assert likely_class(name) == expected
    assert is_gemm(name) == (expected == "base GEMM")
    assert expected in CLASSES


def test_work_that_overlaps_counts_once():
    spans = [(0.0, 1000.0), (500.0, 2000.0), (600.0, 700.0), (5000.0, 5500.0)]
    work = [Work("k", start, end, None) for start, end in spans]
    assert exclusive_ms(work) == [1.0, 1.0, 0.0, 0.5]
    assert exclusive_ms(work[::-1]) == [0.5, 0.0, 1.0, 1.0]


def event(cat, name, ts, dur, tid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 7, "tid": tid, "args": args}


def test_a_kernel_is_led_back_to_the_ranges_around_its_launch():
    trace = trace_of(
        [
            event("user_annotation", "label", 0, 100),
            event("cpu_op", "aten::linear", 10, 50, **{"External id": 3}),
            event("cpu_op", "aten::mm", 20, 30, **{"External id": 4, "Input Dims": [[2, 3], [3, 4]]}),
            event("cpu_op", "aten::relu", 20, 30, tid=2),
            event("cuda_runtime", "cudaLaunchKernel", 30, 5, correlation=11),
            event("cuda_driver", "cuLaunchKernelEx", 70, 5, correlation=12),
            event("kernel", "nvjet", 500, 10, tid=99, correlation=11),
            event("kernel", "_rope_kernel", 520, 10, tid=99, correlation=12),
            event("kernel", "of an operator", 540, 10, tid=99, correlation=13, **{"External id": 3}),
            event("kernel", "of nobody", 560, 10, tid=99, correlation=14),
            event("gpu_user_annotation", "label", 500, 60, tid=99),
        ]
    )
    assert trace.is_gpu
    chains = {piece.name: [one.name for one in piece.by.chain()] if piece.by else None for piece in trace.work}
    assert chains == {
        "nvjet": ["aten::mm", "aten::linear", "label"],
        "_rope_kernel": ["label"],
        "of an operator": ["aten::linear", "label"],
        "of nobody": None,
    }


def test_on_a_cpu_an_operator_has_what_those_within_it_leave():
    trace = trace_of(
        [
            event("cpu_op", "aten::linear", 0, 100),
            event("cpu_op", "aten::mm", 20, 30),
            event("cpu_op", "MyFunctionBackward", 200, 100),
            event("cpu_op", "aten::add", 250, 10),
        ]
    )
    assert not trace.is_gpu
    spans = sorted((piece.name, piece.start, piece.end) for piece in trace.work)
    assert spans == [
        ("aten::add", 250.0, 260.0),
        ("aten::linear", 0.0, 20.0),
        ("aten::linear", 50.0, 100.0),
        ("aten::mm", 20.0, 50.0),
    ]


@pytest.fixture
def tiny_job(tmp_path):
    """Makes a job of the tiny shape on the CPU, whose settings the caller changes."""
    made = []

    def make(**sections) -> Job:
        config = small_config("bundled", write_rows(tmp_path / "rows.jsonl", 60), tmp_path / "run", **sections)
        tokenizer = load_tokenizer(config.model)
        data = build_data(config.data, tokenizer, seed=0)
        shape = shape_config("tiny", len(tokenizer))
        base = random_model(shape, quantization=config.model.quantization, device=torch.device("cpu"))
        made.append(Job(config, base, data, tokenizer.pad_token_id))
        return made[-1]

    yield make
    for job in made:
        job.close()


def test_a_step_on_the_cpu_is_busy_with_known_classes(tiny_job):
    job = tiny_job(model={"quantization": "nf4", "dtype": "bfloat16"})
    with job.stepping() as step:
        step(job.next_window())
        profile = profile_step(step, job.next_window())
    assert profile.device == "cpu"
    assert set(profile.by_class_ms) <= set(CLASSES)
    assert {"base GEMM", "attention", "NF4 dequantisation"} <= set(profile.by_class_ms)
    assert profile.busy_ms == pytest.approx(sum(profile.by_class_ms.values()))
    assert 0 < profile.busy_ms <= profile.step_ms
    assert profile.idle_share == pytest.approx(1 - profile.busy_ms / profile.step_ms)
