"""Gated products against product + SwiGLU pass, on a Hopper GPU. Needs quack-kernels under a .../site-packages path."""

import statistics
import sys
import time

import torch

sys.path.insert(0, ".")
from packloop.kernels import gated, reference
from packloop.kernels.gated import Tile, gated_backward, gated_forward, halves
from packloop.kernels.matmul import matmul
from packloop.kernels.swiglu import swiglu_backward, swiglu_forward

H, I, R_GU, R_D = (int(v) for v in (sys.argv[1] if len(sys.argv) > 1 else "4096,11008,128,64").split(","))
TILES = [Tile(128, 256, False), Tile(256, 128, False), Tile(128, 192, True), Tile(256, 192, False), Tile(128, 128, True)]
print("quack:", gated.why_not_quack(torch.device("cuda")) or "can run", torch.cuda.get_device_name(), H, I, R_GU, R_D)


def random(*shape, scale=1.0):
    return (torch.randn(shape, device="cuda") * scale).bfloat16()


def times(runs, rounds=15, warm_s=1.0):
    start = time.perf_counter()
    while time.perf_counter() - start < warm_s:
        for run in runs.values():
            run()
        torch.cuda.synchronize()
    laps = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            a.record(), run(), run(), b.record()
            laps[name].append((a, b))
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) / 2 for a, b in pairs) for name, pairs in laps.items()}


def worst(found, exact):
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


for T in (12288, 16384):
    x, w = random(T, H + R_GU), random(2 * I + R_GU, H + R_GU, scale=H**-0.5)
    gate_up, hidden = random(T, 2 * I + R_GU), random(T, I + R_D)
    pre, hid, rows = gate_up[:, : 2 * I], hidden[:, :I], w[: 2 * I]
    dy, wd = random(T, H + R_D), random(H + R_D, I + R_D, scale=H**-0.5)
    wd, d_hidden, h2 = wd[:, :I], random(T, I), random(T, I)

    gate, up = pre[:, :I], pre[:, I:]  # not interleaved, for the baseline

    def plain_forward():
        matmul(x, rows.T, out=pre)
        swiglu_forward(gate, up, out=hid)

    def plain_backward():
        matmul(dy, wd, out=d_hidden)
        swiglu_backward(d_hidden, gate, up, d_gate=gate, d_up=up)

    def plain_backward_hidden():
        matmul(dy, wd, out=d_hidden)
        swiglu_backward(d_hidden, gate, up, d_gate=gate, d_up=up, hidden_out=h2)

    forward, backward = {"mm + swiglu": plain_forward}, {"mm + swiglu": plain_backward, "mm + swiglu + h": plain_backward_hidden}
    forward["mm alone"] = lambda: matmul(x, rows.T, out=pre)
    backward["mm alone"] = lambda: matmul(dy, wd, out=d_hidden)
    sample = slice(0, None, max(1, T // 512) | 1)
    exact_pre = x[sample].double() @ rows.double().T
    exact_hid = reference.swiglu(*halves(exact_pre))
    fixed = random(T, 2 * I)
    exact_d = dy[sample].double() @ wd.double()
    exact_grads = reference.swiglu_backward(exact_d, *halves(fixed[sample].double()))
    exact_h2 = reference.swiglu(*halves(fixed[sample].double()))
    stock_d = (dy[sample] @ wd)
    stock = [worst(a, b) for a, b in zip(reference.swiglu_backward(stock_d, *halves(fixed[sample])), exact_grads)]
    print(f"M={T}: torch's own errors, d_gate d_up", *(f"{v:.2e}" for v in stock))
    for tile in TILES:
        try:
            began = time.perf_counter()
            pre.fill_(float("nan")), hid.fill_(float("nan")), h2.fill_(float("nan"))
            gated_forward(x, rows, preact_out=pre, hidden_out=hid, by="quack", tile=tile)
            torch.cuda.synchronize()
            f = worst(pre[sample], exact_pre), worst(hid[sample], exact_hid)
            apart = torch.empty_like(pre)
            pre.copy_(fixed)
            gated_backward(dy, wd, pre, d_preact_out=apart, hidden_out=h2, by="quack", tile=tile)
            gated_backward(dy, wd, pre, d_preact_out=pre, hidden_out=h2, by="quack", tile=tile)
            torch.cuda.synchronize()
            b = [worst(a, e) for a, e in zip(halves(pre[sample]), exact_grads)] + [worst(h2[sample], exact_h2)]
            same = torch.equal(apart, pre)
            for _ in range(5):  # in place must not race
                pre.copy_(fixed)
                gated_backward(dy, wd, pre, d_preact_out=pre, hidden_out=h2, by="quack", tile=tile)
                same = same and torch.equal(apart, pre)
            print(f"M={T} {tuple(tile)} {time.perf_counter() - began:.1f} s; preact, h", *(f"{v:.2e}" for v in f),
                  "; d_gate, d_up, h", *(f"{v:.2e}" for v in b), "; in place equals apart:", same, flush=True)
        except Exception as error:
            print(f"M={T} {tuple(tile)} FAILED {type(error).__name__}: {str(error)[:400]}", flush=True)
            continue
        forward[str(tuple(tile))] = lambda tile=tile: gated_forward(x, rows, preact_out=pre, hidden_out=hid, by="quack", tile=tile)
        backward[str(tuple(tile))] = lambda tile=tile: gated_backward(dy, wd, pre, d_preact_out=pre, hidden_out=h2, by="quack", tile=tile)
    for name, runs in (("forward", forward), ("backward", backward)):
        pre.copy_(fixed)
        for run, ms in times(runs).items():
            pre.copy_(fixed)
            print(f"M={T} {name:8} {run:24} {ms:.3f} ms", flush=True)
    # What the swiglu fallback costs on every other column, under dropout.
    strided = halves(pre)
    found = times({
        "halves": lambda: swiglu_backward(d_hidden, gate, up, d_gate=gate, d_up=up, hidden_out=h2),
        "every other column": lambda: swiglu_backward(d_hidden, *strided, d_gate=strided[0], d_up=strided[1], hidden_out=h2),
    })
    print(f"M={T} swiglu_backward", {name: round(ms, 3) for name, ms in found.items()})
    del exact_pre, exact_hid, exact_d, exact_grads, exact_h2, apart
