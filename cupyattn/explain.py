"""Why a call runs as it does: kernel, tile, resources, work, and the time below which no kernel can go."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from .arrays import device_name, view
from .attention import (
    CACHE_NAMES,
    CPU_KERNELS,
    CUDA_KERNELS,
    check_caches,
    check_kernel,
    check_results,
    checking,
    describe_call,
    find_call,
    index_contents,
    lengths,
    rotary_and_scales,
    run_into_views,
    share_cu_seqlens,
    signatures,
    unpack_ragged,
)
from .kernels.operands import Operands
from .plan import DEVICES, Device, plan
from .problem import Problem, check_flag, check_indices, check_uniform, refuse
from .ragged import INT32_MAX, RaggedArray
from .streams import device_of


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What a GPU can do at most: FLOP/s of the tensor cores (16-bit inputs) and of plain float32, bytes/s read."""

    matrix_flops: float
    float_flops: float
    bytes_per_second: float
    source: str


# By compute capability and, where two chips share one, by a part of the device's name.
CEILINGS = (
    ("90", "H200", Ceiling(734e12, 67e12, 4.60e12, "measured on an H200; float32 from the data sheet")),
    ("90", "", Ceiling(989e12, 67e12, 3.35e12, "data sheet, H100 SXM")),
    ("70", "", Ceiling(125e12, 15.7e12, 0.90e12, "data sheet, V100")),
    ("75", "", Ceiling(65e12, 8.1e12, 0.32e12, "data sheet, T4")),
    ("80", "", Ceiling(312e12, 19.5e12, 2.04e12, "data sheet, A100 80 GB")),
    ("86", "", Ceiling(125e12, 31.2e12, 0.60e12, "data sheet, A10")),
    ("89", "", Ceiling(165e12, 82.6e12, 1.01e12, "data sheet, RTX 4090")),
    ("100", "", Ceiling(2250e12, 80e12, 8.0e12, "data sheet, B200")),
    ("120", "", Ceiling(210e12, 105e12, 1.79e12, "data sheet, RTX 5090")),
)


@dataclass(frozen=True, slots=True)
class Explanation:
    """One call, explained. Fields that a backend does not have are None; times in seconds, sizes in bytes."""

    kernel: str
    device: str
    reasons: tuple[str, ...]
    shape: str
    flops: int  # of the products Q K^T and P V, over the (query, key) pairs that no mask hides
    bytes: int  # q, the keys and values that some query sees, out and lse, each counted once
    tile: str | None = None
    grid: int | None = None  # thread blocks
    threads: int | None = None  # of a block
    stages: int | None = None  # buffers of tiles of keys, and of values
    registers: int | None = None  # of a thread, as compiled
    registers_by_role: dict[str, int] | None = None  # of a thread, where warps of different trades trade registers
    spill_bytes: int | None = None  # of a thread
    shared_bytes: int | None = None  # of a block, static and dynamic
    blocks_per_multiprocessor: int | None = None
    occupancy: float | None = None  # warps on a multiprocessor, of the most that it holds
    roofline_seconds: float | None = None
    bound: str | None = None  # "memory" or "compute"
    ceiling: str | None = None  # where the ceilings come from
    measured_seconds: float | None = None  # median, caches cold
    roofline_share: float | None = None  # roofline_seconds over measured_seconds
    defines: dict[str, int] | None = None  # compile-time values

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.kernel} on {self.device}", f"  {self.shape}"]
        lines += [f"  because {reason}" for reason in self.reasons]
        if self.tile is not None:
            spills = f", {counted(self.spill_bytes, 'byte')} spilled" if self.spill_bytes else ", no spills"
            roles = ", ".join(f"{number} {role}" for role, number in (self.registers_by_role or {}).items())
            lines += [
                f"  tile {self.tile}; {counted(self.grid, 'block')} of {counted(self.threads, 'thread')}",
                f"  {counted(self.registers, 'register')} a thread{roles and f' ({roles})'}{spills}",
                f"  {self.shared_bytes / 1024:.1f} KiB shared memory; "
                f"{counted(self.blocks_per_multiprocessor, 'block')} on a multiprocessor, {self.occupancy:.0%} of its "
                "warps",
            ]
        lines.append(f"  work {_si(self.flops, 'FLOP')}, {_si(self.bytes, 'B')} at least through memory")
        if self.roofline_seconds is not None:
            lines.append(f"  roofline {_time(self.roofline_seconds)}, bound by {self.bound} (ceilings: {self.ceiling})")
        if self.measured_seconds is not None:
            lines.append(f"  measured {_time(self.measured_seconds)}, {self.roofline_share:.1%} of that speed")
        return "\n".join(lines)


def explain(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    *,
    arch: str | int | float | None = None,
    k: Any = None,
    v: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    rotary_interleaved: bool = True,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    block_table: Any = None,
    layout: str = "NHD",
    kv_dtype: str | None = None,
    k_scale: Any = None,
    v_scale: Any = None,
    num_splits: int | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Any = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    return_lse: bool | str = False,
    out: Any = None,
    kernel: str = "auto",
    check: bool | None = None,
    measure: bool = False,
) -> Explanation:
    """What the call with these arguments would run, without running it unless `measure` says so.

    Takes what `attention`, `attention_varlen` and `attention_with_kvcache` take, the arrays q, k (or k_cache) and v
    (or v_cache) by position: with cu_seqlens_q it is attention_varlen, else with anything of a cache
    attention_with_kvcache. New rows are k= and v=. Compiles the kernel if it is not in the cache yet. Lengths and
    tables are always read and checked, which on a GPU synchronises.

    arch: explain for a chip that need not be present, such as "80", "90a", "sm_90" or 9.0; by default the arrays' own
        device.
    measure: also run the call some dozen times, with cold caches, and say what share of the roofline's speed it has.
        New rows are stored, and `out` is written. Needs arrays on a GPU.
    Raises TypeError or ValueError as the explained call would.

    >>> import numpy as np
    >>> import cupyattn
    >>> q = np.ones((1, 128, 8, 64), np.float16)
    >>> cupyattn.explain(q, q, q, causal=True).kernel
    'numpy'
    """
    only_varlen = {"cu_seqlens_k": cu_seqlens_k, "seqused_k": seqused_k}
    only_varlen |= {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    only_cached = {"k": k, "v": v, "cache_seqlens": cache_seqlens}
    only_cached |= {"cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad}
    only_cached |= {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin}
    only_cached |= {"kv_dtype": kv_dtype, "k_scale": k_scale, "v_scale": v_scale, "num_splits": num_splits}
    varlen = cu_seqlens_q is not None or RaggedArray in (type(q), type(k_cache), type(v_cache))
    cached = not varlen and any(given is not None for given in (*only_cached.values(), block_table))
    for name, given in (only_cached if varlen else only_varlen).items():
        if given is not None and varlen:
            refuse(name, "given together with cu_seqlens_q", "None: attention_varlen does not take it")
        if given is not None:
            refuse(name, "given without cu_seqlens_q", "None: only attention_varlen takes it")
    names = CACHE_NAMES if cached else ("k", "v", "seqused_k")
    if varlen:
        q, k_cache, v_cache, cu_seqlens_q, cu_seqlens_k = unpack_ragged(q, k_cache, v_cache, cu_seqlens_q, cu_seqlens_k)
    arrays = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "seqused_k": seqused_k,
        "block_table": block_table,
        "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "k_new": k,
        "v_new": v,
        "out": out.values if type(out) is RaggedArray else out,
    }
    views = {"out": None}
    views |= {role: view(array, role.removesuffix("_new")) for role, array in arrays.items() if array is not None}
    operands = Operands(view(q, "q"), view(k_cache, names[0]), view(v_cache, names[1]), **views)
    if cached:
        operands.seqused_k, operands.uniform_length = lengths("cache_seqlens", cache_seqlens)
    elif varlen and operands.cu_seqlens_k is None and block_table is None:
        share_cu_seqlens(operands)

    device = None if arch is None else _device_of(arch)
    if check_flag("measure", measure) and device is not None:
        refuse("measure", f"True with arch {arch!r}", "arch None: only a GPU that is here can be measured")
    if measure and operands.q.device < 0:
        refuse("measure", f"True for arrays on {device_name(operands.q.device)}", "arrays on a GPU")
    known, where = (CUDA_KERNELS, f"arrays on {device_name(operands.q.device)}")
    if device is not None:
        where = f"sm_{device.arch}"
    elif operands.q.device < 0:
        known = CPU_KERNELS
    check_kernel(kernel, known, where)
    scales = rotary_and_scales(operands, rotary_cos, rotary_sin, k_scale, v_scale)
    masks = (causal, window, softmax_scale, softcap, return_lse)
    cache_options = (kv_dtype, *scales, rotary_interleaved, 0 if num_splits is None else num_splits)
    options = (*masks, kernel, max_seqlen_q, max_seqlen_k, layout, cache_options)
    problem = describe_call(operands, options, names)
    check_results(operands, "float64" if kernel == "numpy_float64" else problem.dtype, names)
    check_caches(problem, operands)
    checking(check, operands.q.device)
    if operands.uniform_length is not None:
        check_uniform(problem, operands.uniform_length)
    contents = index_contents(operands, problem.batch, names[2])
    check_indices(problem, contents)

    seqlens_q, seqlens_k = _lengths(problem, contents)
    pairs = sum(_visible_pairs(int(m), int(n), problem.window) for m, n in zip(seqlens_q, seqlens_k, strict=True))
    flops = 2 * pairs * problem.num_heads * (problem.head_dim + problem.head_dim_v)
    seen = sum(_keys_seen(int(m), int(n), problem.window) for m, n in zip(seqlens_q, seqlens_k, strict=True))
    moved = _moved_bytes(problem, seen)
    if device is None and operands.q.device >= 0:
        from .kernels.launch import describe_device

        device = describe_device(operands.q.device)
    place = "cpu" if device is None else f"{device.name} (sm_{device.arch})"
    if not problem.batch or not problem.total_q:
        return Explanation("none", place, ("there is no query: nothing is launched",), in_words(problem), flops, moved)
    if device is None:
        name = "numpy" if kernel == "auto" else kernel
        reason = "the arrays are on the CPU: NumPy in blocks, memory linear in the lengths"
        return Explanation(name, place, (reason,), in_words(problem), flops, moved)
    explanation = _explain_launch(problem, device, kernel, flops, moved)
    if not measure:
        return explanation
    seconds = _measure(operands, options, names)
    return replace(explanation, measured_seconds=seconds, roofline_share=explanation.roofline_seconds / seconds)


def _measure(operands: Operands, options: tuple, names: tuple[str, str, str]) -> float:
    """Seconds of this call on the GPU, on the current stream of q's library."""
    import cupy

    from .kernels.launch import on_stream_of
    from .timing import EventTimer

    call = find_call(operands, options, signatures(operands), names)
    with device_of(operands.q), on_stream_of(operands.q):
        return EventTimer(cupy)(lambda: run_into_views(call, operands)) / 1e3


def _device_of(arch: str | int | float) -> Device:
    """The chip that "90", "90a", "sm_90", 90 or 9.0 means."""
    plain = str(arch).lower().removeprefix("sm_").replace(".", "")
    device = DEVICES.get(plain) or DEVICES.get(f"{plain}a")
    if device is None:
        refuse("arch", repr(arch), "one of " + ", ".join(DEVICES))
    return device


def _explain_launch(problem: Problem, device: Device, kernel: str, flops: int, moved: int) -> Explanation:
    from .jit import cache

    made = plan(problem, device, kernel)
    meta = cache.fetch(made.kernel, made.defines, device.arch).meta
    shared = made.shared_bytes + meta["shared_bytes"]
    blocks = _blocks(device, made.threads, meta["registers"], shared)
    defines = dict(made.defines)
    roles = {"loading": "PRODUCER_REGISTERS", "computing": "CONSUMER_REGISTERS"}
    ceiling = _ceiling(device)
    rate = ceiling.float_flops if made.kernel == "forward_simt" else ceiling.matrix_flops
    compute, memory = flops / rate, moved / ceiling.bytes_per_second
    return Explanation(
        kernel=made.kernel,
        device=f"{device.name} (sm_{device.arch})",
        reasons=made.reasons,
        shape=in_words(problem),
        flops=flops,
        bytes=moved,
        tile=f"{counted(made.tile_rows, 'row')} x {counted(made.tile_keys, 'key')}, "
        f"{counted(made.warps, 'warp')}, {counted(made.stages, 'stage')}",
        grid=made.grid,
        threads=made.threads,
        stages=made.stages,
        registers=meta["registers"],
        registers_by_role={role: defines[name] for role, name in roles.items() if name in defines} or None,
        spill_bytes=meta["spill_bytes"],
        shared_bytes=shared,
        blocks_per_multiprocessor=blocks,
        occupancy=blocks * made.threads / _most_threads(device),
        roofline_seconds=max(compute, memory),
        bound="compute" if compute > memory else "memory",
        ceiling=ceiling.source,
        defines=defines,
    )


def _ceiling(device: Device) -> Ceiling:
    """That of the device itself, else of a relative: the same capability, or the same generation."""
    known = [(arch, name, ceiling) for arch, name, ceiling in CEILINGS if int(arch) // 10 == device.capability // 10]
    named = [ceiling for arch, name, ceiling in known if name and name in device.name]
    same = [ceiling for arch, name, ceiling in known if int(arch) == device.capability and not name]
    return (named + same + [ceiling for _, _, ceiling in known])[0]


def _most_threads(device: Device) -> int:
    """Threads that one multiprocessor holds."""
    return {75: 1024, 86: 1536, 89: 1536, 120: 1536}.get(device.capability, 2048)


def _blocks(device: Device, threads: int, registers: int, shared: int) -> int:
    """Blocks that one multiprocessor holds: registers go to warps in units of 256, shared memory has 1 KiB on top."""
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = (64 << 10) // per_warp // (threads // 32)
    by_shared = device.shared_per_multiprocessor // (shared + 1024)
    return min(by_registers, by_shared, _most_threads(device) // threads)


def _lengths(problem: Problem, contents: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Query and visible key lengths of every sequence."""
    if problem.packed_q:
        seqlens_q = np.diff(contents["cu_seqlens_q"]).astype(np.int64)
    else:
        seqlens_q = np.full(problem.batch, problem.seqlen_q, np.int64)
    used = contents.get("seqused_k", contents.get("cache_seqlens"))
    if used is not None:
        seqlens_k = used.astype(np.int64) + problem.seqlen_new
    elif "cu_seqlens_k" in contents:
        seqlens_k = np.diff(contents["cu_seqlens_k"]).astype(np.int64)
    else:
        seqlens_k = np.full(problem.batch, problem.cache.rows, np.int64)
    if "cache_leftpad" in contents:
        seqlens_k = seqlens_k - contents["cache_leftpad"]
    return seqlens_q, seqlens_k


def _visible_pairs(seqlen_q: int, seqlen_k: int, window: tuple[int, int]) -> int:
    """How many (query, key) pairs of one sequence no mask hides."""
    left, right = window
    diagonal = np.arange(seqlen_q, dtype=np.int64) + seqlen_k - seqlen_q
    left, right = min(left, INT32_MAX), min(right, INT32_MAX)
    begin = np.maximum(diagonal - left, 0) if left >= 0 else np.zeros_like(diagonal)
    end = np.minimum(diagonal + right + 1, seqlen_k) if right >= 0 else np.full_like(diagonal, seqlen_k)
    return int(np.maximum(end - begin, 0).sum())


def _keys_seen(seqlen_q: int, seqlen_k: int, window: tuple[int, int]) -> int:
    """How many keys of one sequence some query sees: up to the last, from `left` before the first query's own on."""
    left = window[0]
    if not seqlen_q:
        return 0
    return seqlen_k - max(seqlen_k - seqlen_q - left, 0) if left >= 0 else seqlen_k


def _moved_bytes(problem: Problem, keys: int) -> int:
    rows = problem.total_q * problem.num_heads
    lse = 4 * rows if problem.lse else 0
    columns = problem.head_dim + problem.head_dim_v  # of a key and its value, and of a query and its output
    return columns * (rows * problem.itemsize + keys * problem.num_kv_heads * problem.kv_itemsize) + lse


def in_words(problem: Problem) -> str:
    """A problem's sizes for people: "batch 2, 1 query, dense keys, …"."""
    rows, kind = (problem.total_q, "packed query") if problem.packed_q else (problem.seqlen_q, "query")
    keys = {"dense": "dense", "packed": "packed", "paged": f"paged (blocks of {problem.cache.block_size})"}[
        problem.cache.kind
    ]
    heads = f"{counted(problem.num_heads, 'head')} over {counted(problem.num_kv_heads, 'kv head')}"
    of_values = f" ({problem.head_dim_v} of v)" if problem.head_dim_v != problem.head_dim else ""
    numbers = f"head_dim {problem.head_dim}{of_values}, {problem.dtype}"
    if problem.kv_dtype != problem.dtype:
        numbers += f" over a {problem.kv_dtype} cache"
    return f"batch {problem.batch}, {counted(rows, kind)}, {keys} keys, {heads}, {numbers}"


def counted(number: int, noun: str) -> str:
    """The number and the noun in its number: "1 query", "2 queries"."""
    plural = noun.removesuffix("y") + "ies" if noun.endswith("ry") else noun + "s"
    return f"{number} {noun if number == 1 else plural}"


def _time(seconds: float) -> str:
    if 0 < seconds < 1e-7:
        return "under 0.1 us"
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def _si(value: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} P{unit}"
