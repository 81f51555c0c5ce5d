"""Reading a profiler's trace: classes of kernels, busy time, and the way from a kernel back to what it ran for."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from packloop.bench import profile as profiling
from packloop.bench.breakdown import StepBreakdown, average_parts, unknown_kernels
from packloop.bench.cell import _of_plain_step
from packloop.bench.kernel_classes import CLASSES, is_gemm, likely_class
from packloop.bench.labels import NORM_FORWARD, Label
from packloop.bench.profile import busy_share, busy_share_in, profile_step, profile_steps, trace_step
from packloop.bench.results import Ceilings, Profile
from packloop.bench.steps import Lap
from packloop.bench.trace import Work, exclusive_ms, read_trace, trace_of
from packloop.errors import InputError

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


def label(ts, dur, tid=1, **fields):
    return event("user_annotation", str(Label(**fields)), ts, dur, tid)


def launched(name, ts, dur, at, tid=1, cat="cuda_runtime"):
    """A kernel and its launch."""
    number = 1000 * ts + at
    return [
        event(cat, "launch", at, 1, tid, correlation=number),
        event("kernel", name, ts, dur, 99, correlation=number),
    ]


def test_kernels_of_a_gpu_are_told_apart_by_what_launched_them():
    """A step as a GPU's trace shows it: backward on a thread of its own, one layer recomputed, one product joined."""
    mm, engine = "aten::mm", "autograd::engine::evaluate_function: "
    shapes = {"Input Dims": [[100, 80], [80, 64]]}
    events = [
        label(0, 100, what="loss"),
        label(0, 60, what="layer"),
        label(5, 20, what="extended_group_forward", cls="base GEMM", lora_share=0.2),
        event("cpu_op", mm, 10, 10, **shapes),
        *launched("nvjet_joined", 1000, 1000, at=12),
        label(30, 20, what="swiglu_forward", cls="activation", moved_bytes=2_000_000),
        *launched("_swiglu_forward_kernel", 2000, 500, at=40, cat="cuda_driver"),
        label(70, 20, what="linear_cross_entropy", cls="head + loss"),
        event("cpu_op", mm, 75, 10, **{"Input Dims": [[10, 64], [64, 32]]}),
        *launched("nvjet_head", 2500, 100, at=77),
        event("cpu_op", "aten::add", 92, 4, **{"Sequence number": 5, "Fwd thread id": 0}),
        event("cpu_op", engine + "LayerBackward", 200, 200, tid=2, **{"Sequence number": 9, "Fwd thread id": 1}),
        label(210, 50, tid=2, what="layer"),
        event("cpu_op", mm, 215, 10, tid=2, **{"Input Dims": [[100, 64], [64, 64]]}),
        *launched("nvjet_again", 3000, 400, at=218, tid=2),
        label(300, 50, tid=2, what="lora_input_gradient", cls="base GEMM", ranks=16),
        event("cpu_op", "aten::addmm_", 305, 10, tid=2, **{"Input Dims": [[100, 64], [100, 80], [80, 64]]}),
        *launched("nvjet_dx", 3400, 300, at=306, tid=2),
        event("cpu_op", "aten::addmm_", 320, 10, tid=2, **{"Input Dims": [[100, 64], [100, 16], [16, 64]]}),
        *launched("nvjet_adapters", 3700, 50, at=322, tid=2),
        event("kernel", "never launched", 3750, 10, 99),
        label(500, 20, what="optimizer_step", cls="optimizer", moved_bytes=1_000_000),
        *launched("void kOptimizer32bit2State<float, 0>(...)", 4000, 100, at=510),
        event("cpu_op", "aten::norm", 530, 5),
        *launched("void at::native::reduce_kernel<...>", 4100, 20, at=532),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 4200, 10, 99, correlation=1),
    ]
    step = StepBreakdown(trace_of(events))
    ms = {key: pytest.approx(sums.ms) for key, sums in step.parts.items() if sums.ms}
    assert ms == {
        ("forward", "base GEMM"): 0.8,
        ("forward", "LoRA"): 0.2,
        ("forward", "activation"): 0.5,
        ("forward", "head + loss"): 0.1,
        ("recomputation", "base GEMM"): 0.4,
        ("backward", "base GEMM"): 0.3,
        ("backward", "LoRA"): 0.05,
        ("backward", "other"): 0.01,  # in the phase of the kernel before it
        ("update", "optimizer"): 0.12,
        ("update", "copies"): 0.01,
    }
    assert step.busy_ms == pytest.approx(2.49)
    assert step.unattributed_ms == pytest.approx(0.02)
    assert unknown_kernels([step]) == [("never launched", pytest.approx(0.01), 1)]
    kernels = {key: (pytest.approx(tally.ms), tally.count) for key, tally in step.kernels.items()}
    assert len(kernels) == 10
    assert kernels["nvjet_joined", "base GEMM"] == (1.0, 1)
    assert kernels["nvjet_adapters", "LoRA"] == (0.05, 1)
    assert kernels["void at::native::reduce_kernel<...>", "optimizer"] == (0.02, 1)
    products = {key: (pytest.approx(tally.ms), tally.count) for key, tally in step.products.items()}
    assert len(products) == 5
    assert products[mm, "[100, 80] x [80, 64]"] == (1.0, 1)
    assert products["aten::addmm_", "[100, 80] x [80, 64]"] == (0.3, 1)
    parts = {
        (part.phase, part.cls): part
        for part in average_parts([step], Ceilings(gemm_tflops=0.002, copy_tb_per_s=0.01), {"forward": 1.0})
    }
    flop = 2 * 100 * 80 * 64
    assert parts["forward", "base GEMM"].tflop == pytest.approx(flop * 0.8 / 1e12)
    assert parts["forward", "base GEMM"].joined_ms == pytest.approx(0.8)
    assert parts["forward", "base GEMM"].floor_ms == pytest.approx(flop * 0.8 / 2e9 * 1e3)
    assert parts["forward", "activation"].floor_ms == pytest.approx(0.2)
    assert parts["backward", "LoRA"].tflop == pytest.approx(2 * 100 * 16 * 64 / 1e12)
    assert parts["backward", "other"].floor_ms is None
    assert parts["update", "copies"].floor_ms is None


def test_a_product_of_several_kernels_is_one_product():
    product = event("cpu_op", "aten::mm", 10, 20, **{"Input Dims": [[8, 4], [4, 2]]})
    kernels = [*launched("splitK", 100, 50, at=12), *launched("splitKreduce", 150, 10, at=20)]
    step = StepBreakdown(trace_of([product, *kernels, event("cpu_op", "aten::mm", 40, 5, **product["args"])]))
    ((key, tally),) = step.products.items()
    assert key == ("aten::mm", "[8, 4] x [4, 2]")
    assert (tally.ms, tally.count) == (pytest.approx(0.06), 1)
    assert {name: tally.count for (name, _), tally in step.kernels.items()} == {"splitK": 1, "splitKreduce": 1}


def test_backward_of_stock_code_is_led_back_to_its_forward_by_sequence_number():
    engine = "autograd::engine::evaluate_function: "
    node = {"Sequence number": 7, "Fwd thread id": 1}
    trace = trace_of(
        [
            label(0, 100, what="loss"),
            label(0, 50, what="LlamaRMSNorm", cls="norms", moved_bytes=2, backward_bytes=10_000_000),
            event("cpu_op", "aten::view", 5, 5, **{"Sequence number": 7, "Fwd thread id": 0}),
            event("cpu_op", "aten::mul", 10, 5, **{"Sequence number": 7, "Fwd thread id": 0}),
            label(60, 20, what="Linear", cls="LoRA"),
            event("cpu_op", "aten::view", 62, 5, **{"Sequence number": 8, "Fwd thread id": 0}),
            event("cpu_op", engine + "MulBackward0", 200, 50, tid=2, **node),
            *launched("void at::native::vectorized_elementwise_kernel<4, MulFunctor<float>>", 1000, 30, 210, tid=2),
            event("cpu_op", engine + "torch::autograd::AccumulateGrad", 260, 20, tid=2),
            *launched("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>", 1100, 20, 265, tid=2),
            # A node made in backward by another thread: its number is not the forward pass's.
            event("cpu_op", engine + "Outer", 300, 90, tid=2, **{"Sequence number": 99, "Fwd thread id": 1}),
            event("cpu_op", engine + "Inner", 310, 50, tid=2, **{"Sequence number": 8, "Fwd thread id": 2}),
            *launched("void at::native::elementwise_kernel", 1200, 40, 320, tid=2),
        ]
    )
    step = StepBreakdown(trace)
    ms = {key: pytest.approx(sums.ms) for key, sums in step.parts.items() if sums.ms}
    assert ms == {("backward", "norms"): 0.03, ("backward", "LoRA"): 0.02, ("backward", "other"): 0.04}
    floors = {part.cls: part.floor_ms for part in average_parts([step], Ceilings(gemm_tflops=1, copy_tb_per_s=1), None)}
    assert floors["norms"] == pytest.approx(0.01)


def test_a_label_is_read_back_from_its_text():
    for one in (
        Label("loss"),
        Label("lora_project", "LoRA", 123, 0, 0.0),
        Label("extended_group_forward", "base GEMM", lora_share=0.015385),
        Label("lora_input_gradient", "base GEMM", ranks=128),
        Label("linear_cross_entropy", "head + loss", 1, 2),
    ):
        assert Label.parse(str(one)) == one
    assert Label.parse("Optimizer.step#AdamW.step") is None


def small_step() -> StepBreakdown:
    """A GPU's step of 2 ms: a joined product of 1 ms, a norm made again in 0.5, and a kernel of nobody's in 0.5."""
    engine = "autograd::engine::evaluate_function: "
    return StepBreakdown(
        trace_of(
            [
                label(0, 50, what="loss"),
                label(0, 20, what="extended_group_forward", cls="base GEMM", lora_share=0.25),
                event("cpu_op", "aten::mm", 5, 10, **{"Input Dims": [[8, 4], [4, 2]]}),
                *launched("nvjet", 1000, 1000, at=6),
                event("cpu_op", engine + "LayerBackward", 100, 50, tid=2),
                label(110, 20, tid=2, what=NORM_FORWARD, cls="norms", moved_bytes=1_000),
                *launched("_rms_norm_kernel", 2000, 500, at=115, tid=2),
                event("kernel", "never launched", 3000, 500, 99),
            ]
        )
    )


def times_ms(step: StepBreakdown) -> list[float]:
    """Every time that a breakdown holds."""
    tallies = [tally.ms for tally in (*step.kernels.values(), *step.products.values())]
    sums = [ms for part in step.parts.values() for ms in (part.ms, part.joined_ms)]
    totals = [*step.by_class_ms().values(), *step.by_phase_ms().values()]
    return [step.busy_ms, step.rebuilt_ms, step.unattributed_ms, *tallies, *sums, *totals]


def test_a_rescaled_step_has_the_same_shares_of_another_busy_time():
    step, before = small_step(), small_step()
    assert step.busy_ms == pytest.approx(2.0)
    assert (step.rebuilt_ms, step.unattributed_ms) == (pytest.approx(0.5), pytest.approx(0.5))
    assert step.parts["forward", "LoRA"].joined_ms == pytest.approx(0.25)
    assert step.products["aten::mm", "[8, 4] x [4, 2]"].ms == pytest.approx(1.0)
    step.rescale(3.0)
    assert times_ms(step) == pytest.approx([1.5 * ms for ms in times_ms(before)])
    assert step.busy_ms == pytest.approx(3.0)
    for key, sums in step.parts.items():
        assert (sums.kernels, sums.flops) == (before.parts[key].kernels, before.parts[key].flops)
        assert [*sums.moved.values()] == [*before.parts[key].moved.values()]
    step.rescale(2.0)
    assert times_ms(step) == pytest.approx(times_ms(before))


def test_a_step_without_work_stays_so_when_it_is_rescaled():
    step = StepBreakdown(trace_of([]))
    step.rescale(3.0)
    assert step.busy_ms == 0.0


# As a trace without operators has them: two kernels beside each other, a copy, and what is no work of the GPU.
KERNELS_ALONE = [
    event("kernel", "nvjet", 1000, 4000, 99, correlation=1),
    event("kernel", "_rope_kernel", 3000, 3000, 98, correlation=2),
    event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 8000, 1000, 99, correlation=3),
    event("cuda_runtime", "cudaLaunchKernel", 500, 900, correlation=1),
    event("overhead", "Activity Buffer Request", 0, 9000),
]


def test_the_busy_share_of_a_step_counts_what_runs_beside_each_other_once():
    assert busy_share_in(trace_of(KERNELS_ALONE), 10.0) == pytest.approx(0.6)
    assert busy_share_in(trace_of(KERNELS_ALONE[::-1]), 6.0) == pytest.approx(1.0)
    assert busy_share_in(trace_of(KERNELS_ALONE), 5.9) == 1.0  # the clocks of events and of the trace differ a little


@pytest.mark.parametrize("events", [[], KERNELS_ALONE[3:], [event("cpu_op", "aten::mm", 0, 900)]])
def test_a_trace_without_kernels_has_no_busy_share(events):
    with pytest.raises(InputError, match=r"^torch\.profiler recorded no kernel of the GPU"):
        busy_share_in(trace_of(events), 10.0)


def lap(ms: float) -> Lap:
    return Lap(ms, real_tokens=1, slot_tokens=1, label_tokens=1, loss=0.0)


@pytest.fixture
def recorded(monkeypatch):
    """Puts a Chrome trace of these events in place of what torch.profiler records; returns what it was asked for."""

    def record(events: list[dict]) -> list[dict]:
        asked = []

        class Profiler:
            def __init__(self, **options):
                asked.append(options)

            def __enter__(self):
                return self

            def __exit__(self, *_error):
                pass

            def export_chrome_trace(self, path: str) -> None:
                with open(path, "w", encoding="utf-8") as file:
                    json.dump({"traceEvents": [{"ph": "M", "name": "process_name"}, *events]}, file)

        monkeypatch.setattr(profiling, "profile", Profiler)
        return asked

    return record


def test_the_busy_share_is_that_of_the_step_under_a_trace_of_kernels_alone(recorded):
    asked = recorded(KERNELS_ALONE)
    taken = []
    assert busy_share(lambda micros: taken.append(micros) or lap(12.0), ["a window"]) == pytest.approx(0.5)
    assert taken == [["a window"]]
    assert asked == [{"activities": [torch.profiler.ProfilerActivity.CUDA]}]


def test_a_recording_without_kernels_is_an_error_and_no_share_of_zero(recorded, monkeypatch, tmp_path):
    recorded([event("cpu_op", "aten::mm", 0, 900)])
    with pytest.raises(InputError, match="recorded no kernel of the GPU"):
        busy_share(lambda _micros: lap(12.0), [])
    trace_step(lambda _micros: lap(12.0), [], tmp_path / "trace.json")  # on a CPU it has none
    assert not read_trace(tmp_path / "trace.json").is_gpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(profiling, "synchronize", lambda: None)
    with pytest.raises(InputError, match="recorded no kernel of the GPU"):
        trace_step(lambda _micros: lap(12.0), [], tmp_path / "trace.json")


@pytest.fixture
def on_gpu(monkeypatch):
    """Steps as on a GPU: `small_step` under the labelled trace, which slows it to 20 ms, and three quarters busy."""
    monkeypatch.setattr(profiling, "trace_step", lambda step, micros, _path: (step(micros) and lap(20.0), small_step()))
    monkeypatch.setattr(profiling, "busy_share", lambda step, micros: step(micros) and 0.75)


def test_a_profile_is_the_busy_share_of_the_step_and_the_labelled_traces_classes(on_gpu):
    taken = []

    def step(micros):
        taken.append(micros)
        return lap(8.0)

    alone, timed = profile_step(step, ["a"]), profile_step(step, ["b"], step_ms=8.0)
    assert taken == [["a"], ["a"], ["b"], ["b"]]
    for found, step_ms in ((alone, 20.0), (timed, 8.0)):
        assert (found.device, found.step_ms, found.idle_share) == ("gpu", step_ms, pytest.approx(0.25))
        assert found.busy_ms == pytest.approx(0.75 * step_ms)
        assert sum(found.by_class_ms.values()) == sum(found.by_phase_ms.values()) == pytest.approx(found.busy_ms)
        assert found.by_class_ms["norms"] == pytest.approx(0.25 * found.busy_ms)


def test_each_window_is_timed_then_traced_with_labels_then_without(on_gpu, monkeypatch, tmp_path):
    """Each timed step's own milliseconds are what its window's traces are brought to."""
    monkeypatch.setattr(profiling, "reset_peak", lambda: None)
    steps, num_fetched = [], 0

    def step(micros):
        steps.append(micros[0].number)
        return lap(10.0 + len(steps))

    class Stepping:
        def __enter__(self):
            return step

        def __exit__(self, *_error):
            pass

    def next_window():
        nonlocal num_fetched
        num_fetched += 1
        batch = SimpleNamespace(num_slots=90 + 2 * num_fetched)
        return [SimpleNamespace(number=num_fetched, layout=f"layout {num_fetched}", batch=batch)]

    job = SimpleNamespace(stepping=lambda _options: Stepping(), next_window=next_window)
    taken = profile_steps(job, {}, steps=2, warmup=1, trace=tmp_path / "trace.json")
    assert steps == [1, 2, 3, 2, 3, 2, 3]
    assert num_fetched == len(steps)
    assert [one.ms for one in taken.laps] == [12.0, 13.0]
    assert [one.ms for one in taken.traced_laps] == [20.0, 20.0]
    assert [breakdown.busy_ms for breakdown in taken.breakdowns] == pytest.approx([9.0, 9.75])
    assert (taken.step_ms, taken.busy_ms) == (12.5, pytest.approx(9.375))
    assert (taken.layouts, taken.num_slots) == (["layout 2", "layout 3"], 96)


def test_a_cells_profile_is_of_the_timed_steps():
    """A GPU's shares of the step; a CPU's times of operators, which the profiler does not stretch."""
    times = {"by_class_ms": {"base GEMM": 12.0, "norms": 4.0}, "by_phase_ms": {"forward": 6.0, "backward": 10.0}}
    found = Profile(device="gpu", step_ms=20.0, busy_ms=16.0, idle_share=0.2, **times)
    scaled = {"by_class_ms": {"base GEMM": 6.0, "norms": 2.0}, "by_phase_ms": {"forward": 3.0, "backward": 5.0}}
    assert _of_plain_step(found, 10.0) == Profile(device="gpu", step_ms=10.0, busy_ms=8.0, idle_share=0.2, **scaled)
    found = found.model_copy(update={"device": "cpu"})
    assert _of_plain_step(found, 40.0) == found.model_copy(update={"step_ms": 40.0, "idle_share": 0.6})
    assert _of_plain_step(found, 10.0) == found.model_copy(update={"step_ms": 16.0, "idle_share": 0.0})
