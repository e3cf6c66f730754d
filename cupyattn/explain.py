"""Why a call runs as it does: kernel, tile, resources, work, and the time below which no kernel can go."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .arrays import View, host_array, view
from .plan import DEVICES, Device, plan
from .problem import Problem, check_indices, describe, refuse


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
    bytes: int  # q, the keys and values in use, out and lse, each counted once
    tile: str | None = None
    grid: int | None = None  # thread blocks
    threads: int | None = None  # of a block
    registers: int | None = None  # of a thread
    spill_bytes: int | None = None  # of a thread
    shared_bytes: int | None = None  # of a block, static and dynamic
    blocks_per_multiprocessor: int | None = None
    roofline_seconds: float | None = None
    bound: str | None = None  # "memory" or "compute"
    ceiling: str | None = None  # where the ceilings come from
    defines: dict[str, int] | None = None  # compile-time values

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.kernel} on {self.device}", f"  {self.shape}"]
        lines += [f"  because {reason}" for reason in self.reasons]
        if self.tile is not None:
            spills = f", {self.spill_bytes} bytes spilled" if self.spill_bytes else ", no spills"
            lines += [
                f"  tile {self.tile}; {self.grid} blocks of {self.threads} threads",
                f"  {self.registers} registers a thread{spills}; {self.shared_bytes / 1024:.1f} KiB shared memory; "
                f"{self.blocks_per_multiprocessor} blocks on a multiprocessor",
            ]
        lines.append(f"  work {_si(self.flops, 'FLOP')}, {_si(self.bytes, 'B')} at least through memory")
        if self.roofline_seconds is not None:
            time = f"{self.roofline_seconds * 1e6:.1f} us"
            lines.append(f"  roofline {time}, bound by {self.bound} (ceilings: {self.ceiling})")
        return "\n".join(lines)


def explain(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    kernel: str = "auto",
    arch: str | None = None,
    cache_seqlens: Any = None,
    seqused_k: Any = None,
    **arguments: Any,
) -> Explanation:
    """What the call with these arguments would run, without running it.

    Takes what `attention`, `attention_varlen` and `attention_with_kvcache` take, the arrays q, k (or k_cache) and v
    (or v_cache) by position; which of the three is meant follows from the rest. New rows are k= and v=. Compiles the
    kernel if it is not in the cache yet. Lengths and tables on a GPU are read back, which synchronises.

    arch: explain for a chip that need not be present, such as "80" or "90"; by default the arrays' own device.
    Raises TypeError or ValueError as the explained call would.

    >>> import numpy as np
    >>> import cupyattn
    >>> q = np.ones((1, 128, 8, 64), np.float16)
    >>> cupyattn.explain(q, q, q, causal=True).kernel
    'numpy'
    """
    new_k, new_v = arguments.pop("k", None), arguments.pop("v", None)
    arguments.pop("check", None)  # the contents of index arrays are always read here
    views = {name: arguments.pop(name, None) for name in _ARRAYS}
    views = {name: view(array, name) for name, array in views.items() if array is not None}
    query, keys, values = view(q, "q"), view(k, "k"), view(v, "v")
    if "cu_seqlens_q" in views and "cu_seqlens_k" not in views and "block_table" not in views:
        views["cu_seqlens_k"] = views["cu_seqlens_q"]
    if (new_k is None) != (new_v is None):
        refuse("v" if new_v is None else "k", None, "k and v together")
    seqlen_new = view(new_k, "k").shape[1] if new_k is not None else 0

    used, used_name = (seqused_k, "seqused_k") if cache_seqlens is None else (cache_seqlens, "cache_seqlens")
    lengths: np.ndarray | None = None
    if isinstance(used, (int, np.integer)):
        lengths = np.full(query.shape[:1], used, np.int32)
        views["seqused_k"] = View(None, 0, lengths.shape, (1,), "int32", query.device, query.library, False)
    elif used is not None:
        views["seqused_k"] = view(used, used_name)

    problem = describe(query, keys, values, seqlen_new=seqlen_new, lengths_name=used_name, **views, **arguments)
    contents = {
        name: host_array(found) for name, found in views.items() if found.dtype == "int32" and found.array is not None
    }
    if lengths is not None:
        contents["seqused_k"] = lengths
    if "seqused_k" in contents:
        contents[used_name] = contents.pop("seqused_k")
    check_indices(problem, contents)
    seqlens_q, seqlens_k = _lengths(problem, contents)
    pairs = sum(_visible_pairs(int(m), int(n), problem.window) for m, n in zip(seqlens_q, seqlens_k, strict=True))
    flops = 4 * pairs * problem.num_heads * problem.head_dim
    moved = _moved_bytes(problem, int(seqlens_k.sum()))

    if query.device < 0 and arch is None:
        if kernel not in ("auto", "numpy", "numpy_float64"):
            refuse("kernel", repr(kernel), "'auto', 'numpy' or 'numpy_float64' for arrays on the CPU")
        name = "numpy" if kernel == "auto" else kernel
        reason = "the arrays are on the CPU: NumPy in blocks, memory linear in the lengths"
        return Explanation(name, "cpu", (reason,), _shape(problem), flops, moved)
    if arch is None:
        from .kernels.launch import describe_device

        device = describe_device(query.device)
    else:
        device = DEVICES.get(arch) or DEVICES.get(f"{arch}a")
        if device is None:
            refuse("arch", repr(arch), "one of " + ", ".join(DEVICES))
    return _explain_launch(problem, device, kernel, flops, moved)


_ARRAYS = (
    "cu_seqlens_q",
    "cu_seqlens_k",
    "block_table",
    "cache_batch_idx",
    "cache_leftpad",
    "alibi_slopes",
    "sinks",
    "out",
)


def _explain_launch(problem: Problem, device: Device, kernel: str, flops: int, moved: int) -> Explanation:
    from .jit import cache

    made = plan(problem, device, kernel)
    meta = cache.fetch(made.kernel, made.defines, device.arch).meta
    shared = made.shared_bytes + meta["shared_bytes"]
    ceiling = _ceiling(device)
    rate = ceiling.float_flops if made.kernel == "forward_simt" else ceiling.matrix_flops
    compute, memory = flops / rate, moved / ceiling.bytes_per_second
    return Explanation(
        kernel=made.kernel,
        device=f"{device.name} (sm_{device.arch})",
        reasons=made.reasons,
        shape=_shape(problem),
        flops=flops,
        bytes=moved,
        tile=f"{made.tile_rows} rows x {made.tile_keys} keys, {made.warps} warps, {made.stages} stages",
        grid=made.grid,
        threads=made.threads,
        registers=meta["registers"],
        spill_bytes=meta["spill_bytes"],
        shared_bytes=shared,
        blocks_per_multiprocessor=_occupancy(device, made.threads, meta["registers"], shared),
        roofline_seconds=max(compute, memory),
        bound="compute" if compute > memory else "memory",
        ceiling=ceiling.source,
        defines=dict(made.defines),
    )


def _ceiling(device: Device) -> Ceiling:
    """That of the device itself, else of a relative: the same capability, or the same generation."""
    known = [(arch, name, ceiling) for arch, name, ceiling in CEILINGS if int(arch) // 10 == device.capability // 10]
    named = [ceiling for arch, name, ceiling in known if name and name in device.name]
    same = [ceiling for arch, name, ceiling in known if int(arch) == device.capability and not name]
    return (named + same + [ceiling for _, _, ceiling in known])[0]


def _occupancy(device: Device, threads: int, registers: int, shared: int) -> int:
    """Blocks that one multiprocessor holds: registers go to warps in units of 256, shared memory has 1 KiB on top."""
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = (64 << 10) // per_warp // (threads // 32)
    by_shared = device.shared_per_multiprocessor // (shared + 1024)
    most_threads = {75: 1024, 86: 1536, 89: 1536, 120: 1536}.get(device.capability, 2048)
    return min(by_registers, by_shared, most_threads // threads)


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
    begin = np.maximum(diagonal - left, 0) if left >= 0 else np.zeros_like(diagonal)
    end = np.minimum(diagonal + right + 1, seqlen_k) if right >= 0 else np.full_like(diagonal, seqlen_k)
    return int(np.maximum(end - begin, 0).sum())


def _moved_bytes(problem: Problem, keys: int) -> int:
    rows = problem.total_q * problem.num_heads
    lse = 4 * rows if problem.lse else 0
    return (2 * rows + 2 * keys * problem.num_kv_heads) * problem.head_dim * problem.itemsize + lse


def _shape(problem: Problem) -> str:
    q = f"{problem.total_q} packed queries" if problem.packed_q else f"{problem.seqlen_q} queries"
    keys = {"dense": "dense", "packed": "packed", "paged": f"paged (blocks of {problem.cache.block_size})"}[
        problem.cache.kind
    ]
    heads = f"{problem.num_heads} heads over {problem.num_kv_heads} kv heads"
    return f"batch {problem.batch}, {q}, {keys} keys, {heads}, head_dim {problem.head_dim}, {problem.dtype}"


def _si(value: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} P{unit}"
