"""What limits a run, which setting to change, and by how much that should help, worked out from its profile.

Every figure is a bound: what a setting would save at most, of the step's time as measured, if nothing else changed.
"""

from __future__ import annotations

from dataclasses import dataclass

from packloop.bench import kernel_classes as classes
from packloop.bench.breakdown import RECOMPUTATION, Part
from packloop.bench.results import Record
from packloop.config import RunConfig
from packloop.engine.planner.policy import count_layers

# A setting that would save less than this share of the step is not worth naming.
WORTHWHILE = 0.02


@dataclass(frozen=True)
class Situation:
    """What the advice is made from. config: resolved; times: of an average step.

    attention_ms: of the fastest backend measured, with RoPE, all layers, recomputation included. free_gib: memory left
    under the budget at the peak; None where memory is not the question. *_gib of a layer: what it takes not to
    recompute it, to keep its weights dequantised, to keep its products' inputs; None where unknown. paged_gib:
    optimizer state in managed memory. rebuilt_ms: of norms made again in backward.
    """

    config: RunConfig
    num_layers: int
    parts: list[Part]
    step_ms: float
    idle_ms: float
    slot_tokens: float
    real_tokens: float
    rebuilt_ms: float = 0.0
    is_gpu: bool = True
    fastest_attention: str | None = None
    attention_ms: float | None = None
    gemm_tflops: float | None = None
    why_not_fused: str | None = None
    free_gib: float | None = None
    recomputed_gib: float | None = None
    cached_gib: float | None = None
    inputs_gib: float | None = None
    paged_gib: float = 0.0

    def ms(self, *wanted: str, phase: str | None = None) -> float:
        return sum(part.ms for part in self.parts if part.cls in wanted and phase in (None, part.phase))

    def above_floor_ms(self, *wanted: str) -> float:
        """How far those classes lie above their floors; where there is none, all of it."""
        return sum(max(0.0, part.ms - (part.floor_ms or 0.0)) for part in self.parts if part.cls in wanted)

    @property
    def is_fused(self) -> bool:
        return self.config.kernels.layer == "fused"

    @property
    def recomputed_layers(self) -> int:
        return _count(self.config.train.gradient_checkpointing, self.num_layers)


class Candidate(Record):
    """A setting and what it would save at most, in milliseconds of an average step.

    limit: what takes the time now; how: how saves_ms was worked out; needs: memory, or what else it changes.
    """

    setting: str
    saves_ms: float
    saves_share: float
    limit: str
    how: str
    needs: str = ""


class Advice(Record):
    """sentence: what limits the run and what to change; candidates: every setting looked at, the best first."""

    sentence: str
    candidates: list[Candidate]


def advise(situation: Situation) -> Advice:
    """The advice for a run, from its profile alone."""
    makers = (
        _recomputation,
        _dequantisation,
        _idle,
        _attention,
        _padding,
        _stock_layers,
        _kept_inputs,
        _optimizer,
        _collectives,
    )
    candidates = [candidate for make in makers if (candidate := make(situation)) is not None]
    candidates.sort(key=lambda candidate: -candidate.saves_ms)
    best = candidates[0] if candidates else None
    if best is None or best.saves_share < WORTHWHILE:
        return Advice(sentence=_nothing_to_gain(situation, best), candidates=candidates)
    needs = f"; it needs {best.needs}" if best.needs else ""
    faster = 1 / (1 - min(best.saves_share, 0.99))
    largest = max(classes.CLASSES, key=situation.ms)
    sentence = (
        f"The largest part of this run is {largest}, {_share(situation, situation.ms(largest))}; what a setting can "
        f"change most is {best.limit}: set {best.setting}, which saves at most {best.saves_share:.0%} of the "
        f"step, {faster:.2f} times the rate ({best.how}){needs}."
    )
    return Advice(sentence=sentence, candidates=candidates)


def _count(setting: str | int, num_layers: int) -> int:
    """Layers by a setting; stock layers leave some at `auto`, which is none of them."""
    return count_layers("none" if setting == "auto" else setting, num_layers)


def _candidate(situation: Situation, setting: str, saves_ms: float, limit: str, how: str, needs: str = "") -> Candidate:
    return Candidate(
        setting=setting,
        saves_ms=saves_ms,
        saves_share=saves_ms / situation.step_ms,
        limit=limit,
        how=how,
        needs=needs,
    )


def _share(situation: Situation, ms: float) -> str:
    return f"{ms / situation.step_ms:.0%} of the step"


def _nothing_to_gain(situation: Situation, best: Candidate | None) -> str:
    gemms = [part for part in situation.parts if part.cls == classes.BASE_GEMM]
    gemm_ms = sum(part.ms for part in gemms)
    left = f"the best, {best.setting}, saves at most {best.saves_share:.1%}" if best else "none was found"
    if gemm_ms == 0.0 or gemm_ms < max(situation.ms(cls) for cls in classes.CLASSES):
        cls = max(classes.CLASSES, key=situation.ms)
        return (
            f"What limits this run is {cls}, {_share(situation, situation.ms(cls))}, and no setting is worth changing "
            f"for speed: {left}."
        )
    floors = [part.floor_ms for part in gemms if part.floor_ms is not None]
    rate = f" at {sum(floors) / gemm_ms:.0%} of the rate measured for them alone" if floors else ""
    tflops = f" ({situation.gemm_tflops:,.0f} TFLOP/s)" if floors and situation.gemm_tflops else ""
    return (
        f"This run is bound by the base's matrix products, {_share(situation, gemm_ms)}{rate}{tflops}, and no setting "
        f"is worth changing for speed: {left}."
    )


def _recomputation(situation: Situation) -> Candidate | None:
    layers = situation.recomputed_layers
    phase_ms = sum(part.ms for part in situation.parts if part.phase == RECOMPUTATION)
    if layers == 0 or phase_ms == 0.0:
        return None
    limit = f"recomputation, {_share(situation, phase_ms)}"
    saves_ms, how = phase_ms, f"its {phase_ms:,.1f} ms"
    # A fused layer dequantises once for recomputation and backward; backward would then do it.
    if situation.is_fused and (kept_ms := situation.ms(classes.DEQUANTISATION, phase=RECOMPUTATION)) > 0:
        saves_ms -= kept_ms
        how += f" less {kept_ms:,.1f} ms of dequantisation that the backward pass would do instead"
    whole = "train.gradient_checkpointing=none"
    if situation.free_gib is None or situation.recomputed_gib is None:
        return _candidate(situation, whole, saves_ms, limit, how)
    needed = layers * situation.recomputed_gib
    memory = f"{needed:.1f} GiB and {max(situation.free_gib, 0.0):.1f} GiB are left"
    if needed <= situation.free_gib:
        return _candidate(situation, whole, saves_ms, limit, how, memory)
    freed = max(0, int(situation.free_gib / situation.recomputed_gib))
    train = situation.config.train
    batch = train.per_device_train_batch_size
    smaller = max(
        (b for b in range(1, batch) if batch % b == 0 and needed * b / batch <= situation.free_gib), default=None
    )
    if smaller is not None:
        setting = (
            f"train.per_device_train_batch_size={smaller} "
            f"train.gradient_accumulation_steps={train.gradient_accumulation_steps * batch // smaller} {whole}"
        )
        needs = f"{needed * smaller / batch:.1f} GiB with the smaller micro-batch and {situation.free_gib:.1f} are left"
        return _candidate(situation, setting, saves_ms, limit, how, needs)
    if freed == 0:
        return None
    setting = f"train.gradient_checkpointing={layers - freed}"
    how += f", for {freed} of {layers} layers"
    needs = f"{freed * situation.recomputed_gib:.1f} GiB of the {situation.free_gib:.1f} left, all {needed:.1f}"
    return _candidate(situation, setting, saves_ms * freed / layers, limit, how, needs)


def _dequantisation(situation: Situation) -> Candidate | None:
    ms = situation.ms(classes.DEQUANTISATION)
    cached = _count(situation.config.kernels.dequant_cache, situation.num_layers)
    left = situation.num_layers - cached
    if not situation.is_fused or ms == 0.0 or left == 0:
        return None
    limit = f"NF4 dequantisation, {_share(situation, ms)}"
    how = f"its {ms:,.1f} ms"
    if situation.free_gib is None or not situation.cached_gib:
        return _candidate(situation, "kernels.dequant_cache=all", ms, limit, how)
    fits = min(left, max(0, int(situation.free_gib / situation.cached_gib)))
    if fits == 0:
        return None
    setting = "kernels.dequant_cache=" + ("all" if fits == left else str(cached + fits))
    how += "" if fits == left else f", for {fits} of {left} layers"
    needs = f"{fits * situation.cached_gib:.1f} GiB of the {situation.free_gib:.1f} left"
    return _candidate(situation, setting, ms * fits / left, limit, how, needs)


def _idle(situation: Situation) -> Candidate | None:
    if situation.idle_ms <= 0.0:
        return None
    train = situation.config.train
    batch, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    setting = f"train.per_device_train_batch_size={2 * batch}"
    needs = "memory for the larger micro-batch"
    if accumulation % 2 == 0:
        setting += f" train.gradient_accumulation_steps={accumulation // 2}"
    else:
        needs += ", and makes a step twice as large"
    device = "GPU" if situation.is_gpu else "processor"
    limit = f"the host, for which the {device} waits {_share(situation, situation.idle_ms)}"
    how = f"half of {situation.idle_ms:,.1f} ms idle, as the same launches then serve twice the tokens"
    return _candidate(situation, setting, situation.idle_ms / 2, limit, how, needs)


def _attention(situation: Situation) -> Candidate | None:
    current, fastest = situation.config.kernels.attention, situation.fastest_attention
    if fastest is None or situation.attention_ms is None or fastest == current:
        return None
    ms = situation.ms(classes.ATTENTION, classes.ROPE)
    saves_ms = ms - situation.attention_ms
    if saves_ms <= 0:
        return None
    how = (
        f"{ms:,.1f} ms with {current}, RoPE included, and {situation.attention_ms:,.1f} ms measured for {fastest} "
        "alone on the same documents"
    )
    limit = f"attention, {_share(situation, ms)}"
    return _candidate(situation, f"kernels.attention={fastest}", saves_ms, limit, how)


def _padding(situation: Situation) -> Candidate | None:
    padding = 1 - situation.real_tokens / situation.slot_tokens
    if situation.config.data.packing != "none" or padding <= 0:
        return None
    limit = f"padding, {padding:.0%} of all slots"
    how = "slots without a token, each taken to cost what one with a token does"
    return _candidate(situation, "data.packing=bfd", situation.step_ms * padding, limit, how, "fewer steps an epoch")


def _stock_layers(situation: Situation) -> Candidate | None:
    if situation.is_fused or situation.why_not_fused is not None:
        return None
    passes = (classes.LORA, classes.NORMS, classes.ROPE, classes.ACTIVATION, classes.COPIES, classes.OTHER)
    saves_ms = situation.above_floor_ms(*passes)
    limit = f"what lies between the matrix products, {_share(situation, situation.ms(*passes))}"
    how = f"{saves_ms:,.1f} ms by which adapters, norms, RoPE, activation and copies lie above their floors"
    return _candidate(situation, "kernels.layer=fused", saves_ms, limit, how)


def _kept_inputs(situation: Situation) -> Candidate | None:
    possible = situation.num_layers - situation.recomputed_layers
    kept = _count(situation.config.kernels.keep_inputs, situation.num_layers)
    left = possible - kept
    if not situation.is_fused or left <= 0 or situation.rebuilt_ms == 0.0:
        return None
    limit = f"inputs of products that are made again in backward, {_share(situation, situation.rebuilt_ms)}"
    how = f"the {situation.rebuilt_ms:,.1f} ms of norms among backward's kernels"
    if situation.free_gib is None or not situation.inputs_gib:
        return _candidate(situation, "kernels.keep_inputs=all", situation.rebuilt_ms, limit, how)
    fits = min(left, max(0, int(situation.free_gib / situation.inputs_gib)))
    if fits == 0:
        return None
    setting = "kernels.keep_inputs=" + ("all" if fits == left else str(kept + fits))
    needs = f"{fits * situation.inputs_gib:.1f} GiB of the {situation.free_gib:.1f} left"
    return _candidate(situation, setting, situation.rebuilt_ms * fits / left, limit, how, needs)


def _optimizer(situation: Situation) -> Candidate | None:
    if situation.config.train.optim != "paged_adamw_32bit" or not situation.paged_gib:
        return None
    if situation.free_gib is not None and situation.free_gib < situation.paged_gib:
        return None
    ms = situation.ms(classes.OPTIMIZER)
    saves_ms = situation.above_floor_ms(classes.OPTIMIZER)
    how = f"its {ms:,.1f} ms less the {ms - saves_ms:,.1f} that its passes over memory need, if all of that is paging"
    limit = f"the optimizer, {_share(situation, ms)}"
    return _candidate(situation, "train.optim=adamw_32bit", saves_ms, limit, how)


def _collectives(situation: Situation) -> Candidate | None:
    ms = situation.ms(classes.COLLECTIVES)
    if ms == 0.0:
        return None
    setting = f"train.gradient_accumulation_steps={2 * situation.config.train.gradient_accumulation_steps}"
    limit = f"the processes' sum of gradients, {_share(situation, ms)}"
    how = f"half of its {ms:,.1f} ms a token, as it comes once a step"
    return _candidate(situation, setting, ms / 2, limit, how, "a step of twice the size")
