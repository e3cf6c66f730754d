"""`cupyattn bench integrations`: what the ways in through PyTorch and JAX cost, and what runs between the kernels.

The host's time of PyTorch's entries beside the plain function on the same tensors, that of a call under `jax.jit`
beside an empty callback, JAX's causal prefill beside cuDNN's there, and how long the GPU rests between the layers of a
decoder's step in a CUDA graph.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from operator import sub
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from rich.console import Console

from ..attention import attention, attention_with_kvcache
from .bench_common import Call, Report, at_full_clock, choose, first_line, host_time, new_figure, show_host
from .bench_decode import Finding
from .tolerance import tolerance_of

CONTENDERS = {"torch": "torch", "jax": "jax"}
HOST_SHAPE = (1, 128, 8, 64)  # as in `bench prefill`: a kernel so short that the host is what takes time
LAYERS, BATCH, SEQLEN, HEADS, KV_HEADS, HEAD_DIM = 32, 8, 8192, 32, 8, 128
PREFILL_SHAPE = (4, 4096, 16, 128)
TORCH_ADDED_US, JAX_ADDED_US, IDLE_SHARE, CUDNN_RATIO = 15.0, 10.0, 0.02, 1.0
REPLAYS = 5
SPELLS = 60


@dataclass(slots=True)
class Measured:
    """Figures as they come in."""

    host_us: dict[str, dict[str, float]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    jax_prefill: dict[str, Any] = field(default_factory=dict)
    graph: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def add(self, what: str, value: float, target: float, *, at_most: bool) -> None:
        met = value <= target if at_most else value >= target
        self.findings.append(Finding(what, value, target, met, at_most))

    def in_turns(self, timed: dict[str, Callable[[], dict[str, float]]]) -> dict[str, list[float]]:
        """Time each in many short spells, one beside the other, as the host's clock can change at any time.

        Returns the medians of the spells at full clock, which the first of them tells; host_us gets the median of
        these, and the highest 90th percentile.
        """
        found: dict[str, list[dict[str, float]]] = {name: [] for name in timed}
        for _ in range(SPELLS):
            for name, time_it in timed.items():
                found[name].append(time_it())
        every = [[spell["median_us"] for spell in spells] for spells in found.values()]
        medians = dict(zip(found, at_full_clock(every[0], *every)[1:], strict=True))
        for name, spells in found.items():
            p90 = max(spell["p90_us"] for spell in spells)
            self.host_us[name] = {"median_us": statistics.median(medians[name]), "p90_us": p90}
            self.host_us[name] |= {"spells": len(spells), "spells_at_full_clock": len(medians[name])}
            self.host_us[name]["spells_us"] = [spell["median_us"] for spell in spells]
        return medians

    def check(self, what: str, error: float) -> None:
        """`error` in units of what is allowed."""
        if not error <= 1.0:
            self.wrong.append(what)


def run(cupy: ModuleType, gpu: str, contenders: str, rounds: int, quick: bool, host: bool, console: Console) -> Report:
    """Measure and show; `host` leaves out prefill and the graph, `quick` makes their shapes small."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or JAX takes most of the memory
    names = choose(contenders, CONTENDERS, console)
    measured = Measured()
    if "jax" in names:  # before PyTorch is loaded, as where JAX is used alone
        time_jax_calls(measured)
    if "torch" in names:
        time_torch_entries(cupy, measured)
    if "jax" in names and not host:
        time_jax_prefill(measured, rounds, (1, 512, 4, 128) if quick else PREFILL_SHAPE, console)
    if "torch" in names and not host:
        time_graph(measured, Step(layers=4, seqlen=1024) if quick else Step())
    show(measured, gpu, console)
    return Report(as_record(measured), measured.wrong, partial(plot, measured))


# --- the host --------------------------------------------------------------------------------------------------------


def time_torch_entries(cupy: ModuleType, measured: Measured) -> None:
    """Entries of integrations.torch beside the function itself, on the same tensors."""
    import torch

    from ..integrations import torch as entries

    q, k, v = torch.from_numpy(_normal(3, *HOST_SHAPE)).cuda()
    first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    operator = torch.ops.cupyattn.attention.default
    calls: dict[str, Call] = {
        "attention on torch tensors": partial(attention, q, k, v),
        "integrations.torch.attention": partial(entries.attention, q, k, v),
        "integrations.torch.scaled_dot_product_attention": partial(entries.scaled_dot_product_attention, *first),
        "torch.ops.cupyattn.attention": partial(operator, q, k, v),
        "torch's scaled_dot_product_attention": partial(torch.nn.functional.scaled_dot_product_attention, *first),
    }
    native, *others = calls
    with torch.no_grad():
        expected = calls[native]()
        for name in others[:3]:
            got = calls[name]()
            got = got[0] if isinstance(got, tuple) else got
            got = got.transpose(1, 2) if "dot_product" in name else got
            measured.check(name, float((got - expected).abs().max()) / tolerance_of(v.cpu().numpy()))
        spells = measured.in_turns({name: partial(host_time, cupy, call, calls=200) for name, call in calls.items()})
    for name in others[:3]:
        added = _between(spells[name], spells[native])
        measured.add(f"host time that {name} adds, µs", added, TORCH_ADDED_US, at_most=True)


def time_jax_calls(measured: Measured) -> None:
    """Calls under jax.jit beside callbacks of the same form that do nothing."""
    import jax

    from ..integrations import jax as entries

    q, k, v = map(jax.numpy.asarray, _normal(3, *HOST_SHAPE))
    caches = jax.numpy.asarray(_normal(2, 8, 256, 8, 64))
    step = jax.numpy.asarray(_normal(8, 1, 8, 64))
    lengths = jax.numpy.full(8, 200, np.int32)
    plain = partial(entries.attention, command_buffer=False)  # a graph would spare the callback that is to be timed

    def cached(q: Any, k_cache: Any, v_cache: Any, lengths: Any) -> Any:
        return entries.attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, command_buffer=False)

    forms = {"attention": (plain, (q, k, v)), "attention_with_kvcache": (cached, (step, *caches, lengths))}
    for name, (call, arrays) in forms.items():
        label, empty_label = f"{name} under jax.jit", f"an empty callback of {name}'s form"
        calls = {empty_label: jax.jit(_empty_callback(arrays)), label: jax.jit(call)}
        timed = {
            what: partial(time_of_calls, partial(jitted, *arrays), jax.block_until_ready, batches=5)
            for what, jitted in calls.items()
        }
        spells = measured.in_turns(timed)
        added = _between(spells[label], spells[empty_label])
        measured.add(f"host time that {label} adds to an empty callback, µs", added, JAX_ADDED_US, at_most=True)


def _between(spells: list[float], others: list[float]) -> float:
    """The median of what each spell took longer than the other that was beside it."""
    return statistics.median(map(sub, spells, others))


def _empty_callback(arrays: tuple) -> Callable[..., Any]:
    import jax
    from jax.experimental.buffer_callback import buffer_callback

    def nothing(context: Any, results: Any, *buffers: Any) -> None:
        """What it gives is not looked at."""

    return buffer_callback(nothing, jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype))


def time_of_calls(call: Call, wait: Callable[[Any], Any], batches: int = 40, calls: int = 50) -> dict[str, float]:
    """Microseconds of a call among many of which only the last is waited for: median and 90th percentile of batches.

    Whichever thread it keeps busy. Its kernel must be shorter than that.
    """
    spent = []
    for _ in range(batches + 2):
        wait(call())
        started = time.perf_counter_ns()
        for _ in range(calls):
            made = call()
        wait(made)
        spent.append((time.perf_counter_ns() - started) / 1e3 / calls)
    spent = spent[2:]  # the first batches warm up
    return {"median_us": float(np.median(spent)), "p90_us": float(np.percentile(spent, 90))}


# --- prefill in JAX --------------------------------------------------------------------------------------------------


def time_jax_prefill(measured: Measured, rounds: int, shape: tuple[int, int, int, int], console: Console) -> None:
    """Causal attention in bfloat16 by both implementations, one after the other in each round."""
    import jax

    from ..integrations.jax import dot_product_attention

    numbers = _normal(3, *shape)
    arrays = [jax.numpy.asarray(x, jax.numpy.bfloat16) for x in numbers]
    theirs = partial(jax.nn.dot_product_attention, implementation="cudnn", is_causal=True)
    calls = {"cupyattn": jax.jit(partial(dot_product_attention, is_causal=True)), "cudnn": jax.jit(theirs)}
    batch, seqlen, heads, head_dim = shape
    flops = 2 * batch * heads * seqlen * seqlen * head_dim  # half of 4, as half of the keys are hidden
    measured.jax_prefill = {"shape": list(shape), "dtype": "bfloat16", "causal": True, "flops": flops}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name, jitted in calls.items():
        try:
            out = jax.block_until_ready(jitted(*arrays))
        except Exception as error:  # cuDNN may not be there, which is a result
            measured.jax_prefill[name] = {"refused": first_line(error)}
            console.print(f"refused by {name} in JAX: {first_line(error)}", markup=False, style="dim")
            del times[name]
            continue
        if name == "cupyattn":
            measured.check("dot_product_attention in JAX", _prefill_error(np.asarray(out), *map(np.asarray, arrays)))
    for _ in range(rounds):
        for name in times:
            found = time_of_calls(partial(calls[name], *arrays), jax.block_until_ready, batches=5, calls=20)
            times[name].append(found["median_us"] / 1e3)
    for name, ms in times.items():
        median = statistics.median(ms)
        measured.jax_prefill[name] = {"ms": median, "rounds_ms": ms, "tflops": flops / median / 1e9}
    if len(times) == 2:
        ratio = measured.jax_prefill["cudnn"]["ms"] / measured.jax_prefill["cupyattn"]["ms"]
        what = f"speed of JAX's causal prefill {' × '.join(map(str, shape))}, relative to cuDNN's"
        measured.add(what, ratio, CUDNN_RATIO, at_most=False)


def _prefill_error(out: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> float:
    """Error of the last queries of one head against float64, in units of the tolerance."""
    b, h = q.shape[0] - 1, q.shape[2] - 1
    rows, head = slice(b, b + 1), slice(h, h + 1)
    exact = attention(q[rows, -64:, head], k[rows, :, head], v[rows, :, head], causal=True, kernel="numpy_float64")
    return float(np.abs(out[rows, -64:, head].astype(np.float64) - exact).max()) / tolerance_of(v[rows, :, head])


# --- a decoder's step in a CUDA graph --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """One new token for each sequence, through the attention of all layers, in bfloat16."""

    layers: int = LAYERS
    batch: int = BATCH
    seqlen: int = SEQLEN
    heads: int = HEADS
    kv_heads: int = KV_HEADS
    head_dim: int = HEAD_DIM

    @property
    def cache_bytes(self) -> int:
        """Of one layer's keys and values."""
        return 2 * self.batch * self.seqlen * self.kv_heads * self.head_dim * 2


def time_graph(measured: Measured, step: Step) -> None:
    """The step's graph: how long a replay takes, and how much of that no kernel runs."""
    import torch

    replay, error = captured_step(torch, step)
    measured.check("the step in a CUDA graph", error)
    traces = [kernel_times(torch, replay) for _ in range(REPLAYS)]
    shares = [idle_share(trace) for trace in traces]
    busy = statistics.median(sum(stop - start for start, stop in trace) for trace in traces)
    idle = statistics.median(shares)
    replay_us = 1e3 * replay_ms(torch, replay)
    measured.graph = asdict(step) | {
        "kernels": len(traces[0]),
        "idle_share": idle,
        "idle_shares": shares,
        "busy_us": busy,
        "replay_us": replay_us,
        "tb_per_s": step.layers * step.cache_bytes / replay_us / 1e6,
    }
    what = f"share of a step of {step.layers} layers in which the GPU is idle between kernels"
    measured.add(what, idle, IDLE_SHARE, at_most=True)


def captured_step(torch: ModuleType, step: Step) -> tuple[Call, float]:
    """A replay of the graph, and the error of its results in units of the tolerance.

    Each layer has a cache of its own, as far as memory allows, and appends to it. One plan serves all of them.
    """
    from ..decode_plan import DecodePlan

    make = partial(torch.randn, dtype=torch.bfloat16, device="cuda")
    room = int(0.8 * torch.cuda.mem_get_info()[0] // step.cache_bytes)
    own = max(1, min(step.layers, room))
    caches = make(own, 2, step.batch, step.seqlen, step.kv_heads, step.head_dim)
    q = make(step.batch, 1, step.heads, step.head_dim)
    k, v = make(2, step.batch, 1, step.kv_heads, step.head_dim)
    lengths = torch.full((step.batch,), step.seqlen - 1, dtype=torch.int32, device="cuda")
    outs = make(step.layers, *q.shape)
    given = {"k": k, "v": v, "cache_seqlens": lengths}
    with torch.no_grad():
        plan = DecodePlan(q, *caches[0], **given, causal=True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for layer in range(step.layers):
                plan.run(q, *caches[layer % own], **given, out=outs[layer])
    graph.replay()
    torch.cuda.synchronize()
    b, head, layer = step.batch - 1, step.kv_heads - 1, step.layers - 1
    group = step.heads // step.kv_heads
    keys, values = (_to_numpy(part[b : b + 1, :, head : head + 1]) for part in caches[layer % own])
    queries, got = (_to_numpy(x[b : b + 1, :, head * group :]) for x in (q, outs[layer]))
    exact = attention_with_kvcache(queries, keys, values, kernel="numpy_float64")
    return graph.replay, float(np.abs(got.astype(np.float64) - exact).max()) / tolerance_of(values)


def kernel_times(torch: ModuleType, call: Call) -> list[tuple[float, float]]:
    """When each kernel of a call began and ended, in microseconds, as PyTorch's profiler traces it."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        call()
        torch.cuda.synchronize()
    ranges = [event.time_range for event in traced.events() if event.device_type == DeviceType.CUDA]
    return sorted((each.start, each.end) for each in ranges)


def idle_share(ranges: Iterable[tuple[float, float]]) -> float:
    """The part of the time from the first beginning to the last end that no range covers."""
    ranges = sorted(ranges)
    if not ranges:
        return math.nan
    begin = until = ranges[0][0]
    idle = 0.0
    for start, stop in ranges:
        idle += max(0.0, start - until)
        until = max(until, stop)
    return idle / (until - begin) if until > begin else math.nan


def replay_ms(torch: ModuleType, call: Call, times: int = 20) -> float:
    """Milliseconds of a call, by events around as many of them."""
    call()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / times


# --- reporting -------------------------------------------------------------------------------------------------------


def show(measured: Measured, gpu: str, console: Console) -> None:
    """All figures, and which of them miss their targets."""
    console.print(f"Through PyTorch and JAX on {gpu}", markup=False, highlight=False)
    show_host(measured.host_us, console)
    for name, line in measured.jax_prefill.items():
        if isinstance(line, dict) and "ms" in line:
            console.print(f"JAX's causal prefill by {name}: {line['ms']:.3f} ms, {line['tflops']:.0f} TFLOP/s")
    if measured.graph:
        graph = measured.graph
        console.print(
            f"a step of {graph['layers']} layers, {graph['batch']} × {graph['seqlen']}: {graph['replay_us']:.0f} µs a "
            f"replay, kernels {graph['busy_us']:.0f} µs of it, {graph['tb_per_s']:.2f} TB/s",
            highlight=False,
        )
    for finding in measured.findings:
        console.print(str(finding), style="green" if finding.met else "red", highlight=False)


def as_record(measured: Measured) -> dict[str, Any]:
    """All that was measured, ready for JSON."""
    return {
        "kind": "integrations",
        "host": {"shape": list(HOST_SHAPE), "dtype": "float16", **measured.host_us},
        "jax_prefill": measured.jax_prefill,
        "graph": measured.graph,
        "findings": [asdict(finding) for finding in measured.findings],
        "wrong": measured.wrong,
    }


def plot(measured: Measured, path: Path, gpu: str) -> None:
    """The host's time of each call."""
    figure = new_figure(9, 1 + 0.4 * len(measured.host_us))
    axis = figure.subplots()
    names = list(reversed(measured.host_us))
    axis.barh(names, [measured.host_us[name]["median_us"] for name in names])
    axis.set(xlabel="µs of the host", title=f"Through PyTorch and JAX, {gpu}")
    axis.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=120)


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float16)


def _to_numpy(tensor: Any) -> np.ndarray:
    """A bfloat16 tensor as NumPy's array of that dtype."""
    import ml_dtypes
    import torch

    return tensor.contiguous().view(torch.int16).cpu().numpy().view(ml_dtypes.bfloat16)
