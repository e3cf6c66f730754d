"""`cupyattn demo`: requests cut from real text, served from a paged KV cache, every attention output checked."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from ..attention import append_kv, attention_varlen
from ..decode_plan import DecodePlan
from ..explain import explain
from ..rotary import apply_rotary
from .device import Device, Precision, array_module, device_label, dtype_of, synchronize, to_host
from .model import Array, Config, Decoder, sampling_noise
from .oracle import Check, Rows, check_layer, compared, worst_of
from .progress import progress_bars
from .serving import serve_arrivals, show_serving

SHORTEST_PROMPT, LONGEST_PROMPT = 16, 640
COMMON_PREFIX = 200


@dataclass(slots=True)
class Report:
    """What the demo measured. Times in seconds; errors are absolute, on attention outputs."""

    device: str
    dtype: str
    requests: int
    prompt_tokens: int
    generated_tokens: int
    prefill_seconds: float
    decode_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    block_size: int
    blocks_used: int
    blocks_held: int
    prefill_kernel: str
    decode_kernel: str
    decode_workspace_bytes: int
    checked_outputs: int
    largest_error: float
    tolerance: float
    repeatable: bool
    sample_prompt: str
    sample_answer: str

    @property
    def passed(self) -> bool:
        return self.largest_error <= self.tolerance and self.repeatable


class BlockPool:
    """A paged KV cache, (layers, num_blocks, block_size, kv_heads, head_dim) for keys and values, and its free list."""

    def __init__(self, xp: ModuleType, config: Config, num_blocks: int, block_size: int, dtype: np.dtype) -> None:
        shape = (config.layers, num_blocks, block_size, config.kv_heads, config.head_dim)
        self.k, self.v = xp.zeros(shape, dtype), xp.zeros(shape, dtype)
        self.block_size, self.held = block_size, num_blocks
        # Shuffled, so that a kernel which takes neighbours in a sequence for neighbours in memory is caught.
        self.free = np.random.default_rng(0).permutation(num_blocks).tolist()

    @property
    def used(self) -> int:
        return self.held - len(self.free)

    def grow(self, blocks: list[int], tokens: int) -> bool:
        """Take blocks from the free list until `blocks` has room for `tokens`; says whether any was taken."""
        missing = -(-tokens // self.block_size) - len(blocks)
        for _ in range(missing):
            blocks.append(self.free.pop())
        return missing > 0


@dataclass(slots=True)
class Trace:
    """What attention was given and gave, layer by layer: host copies of (q, k, v, out), one entry per call.

    q and k are as the model has them, not yet rotated.
    """

    calls: dict[int, list[tuple[np.ndarray, ...]]] = field(default_factory=dict)
    prefill_kernel: str = ""
    plan: DecodePlan | None = None

    def record(self, layer: int, *arrays: Array) -> None:
        self.calls.setdefault(layer, []).append(tuple(to_host(x) for x in arrays))


@dataclass(slots=True)
class Served:
    """One pass over all requests: tokens (requests, new_tokens), times in seconds, blocks taken at the end."""

    tokens: np.ndarray
    prefill_seconds: float
    decode_seconds: float
    blocks_used: int


def demo(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILES", help="Text to cut requests from.", show_default="a text that ships with cupyattn"
        ),
    ] = None,
    device: Annotated[
        Device, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, or auto: the GPU if there is one.")
    ] = Device.auto,
    requests: Annotated[
        int, typer.Option("--requests", min=1, metavar="N", help="How many requests are served together.")
    ] = 16,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", min=1, metavar="N", help="Bytes generated for each request.")
    ] = 64,
    block_size: Annotated[
        int, typer.Option("--block-size", min=1, metavar="N", help="Tokens held by one cache block.")
    ] = 16,
    dtype: Annotated[
        Precision,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help="float16, bfloat16, float32, or auto: float32 on a CPU, bfloat16 or float16 on a GPU.",
        ),
    ] = Precision.auto,
    seed: Annotated[
        int, typer.Option("--seed", min=0, metavar="N", help="Seed of the weights, the cuts and the sampling.")
    ] = 0,
    arriving: Annotated[
        bool,
        typer.Option(
            "--serve",
            help="Requests arrive over time, begin alike, and compete for too few blocks: batched anew in each step, "
            "preempted, resumed.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Serve text from a paged KV cache: packed prefill, paged decode, every attention output checked.

    The model is a small byte-level decoder with random weights, so what it writes is noise; the attention is real.

    Exit code 1 means that an output was further from a float64 oracle than its dtype allows.
    """
    xp = array_module(device)
    texts = read_texts(paths)
    prompts = cut_requests(texts, requests, seed)
    options = new_tokens, block_size, dtype_of(dtype, xp), seed
    if arriving:
        report = serve_arrivals(xp, begin_alike(prompts, texts), *options)
    else:
        report = run(xp, prompts, *options)
    if as_json:
        typer.echo(json.dumps(asdict(report) | {"passed": report.passed}, indent=2))
    elif arriving:
        show_serving(report)
    else:
        show(report, own_text=bool(paths))
    if not report.passed:
        raise typer.Exit(1)


def read_texts(paths: list[Path] | None) -> list[bytes]:
    """The contents of `paths`, or of the text that ships with cupyattn. Raises typer.BadParameter for no text."""
    if not paths:
        return [(files("cupyattn") / "data" / "paged_memory.txt").read_bytes()]
    texts = []
    for path in paths:
        try:
            text = path.read_bytes()
        except OSError as error:
            raise typer.BadParameter(f"{path}: got {error.strerror}, expected a readable text file") from None
        if not text.strip():
            raise typer.BadParameter(f"{path}: got an empty file, expected text")
        if b"\0" in text:
            raise typer.BadParameter(f"{path}: got a binary file (it holds zero bytes), expected text")
        texts.append(text)
    return texts


def cut_requests(texts: list[bytes], count: int, seed: int) -> list[bytes]:
    """`count` pieces of the texts in turn, of very different lengths, beginning at the start of a word if possible."""
    rng = np.random.default_rng(seed)
    pieces = []
    for index in range(count):
        text = texts[index % len(texts)]
        length = int(np.exp(rng.uniform(np.log(SHORTEST_PROMPT), np.log(LONGEST_PROMPT))))
        start = int(rng.integers(max(len(text) - length, 0) + 1))
        if start:
            space = text.find(b" ", start - 1, start + SHORTEST_PROMPT)
            start = start if space < 0 else space + 1
        pieces.append(text[start : start + length] or text[:length])
    return pieces


def begin_alike(pieces: list[bytes], texts: list[bytes]) -> list[bytes]:
    """The same pieces behind the beginning of their text, as requests have a system prompt in common."""
    return [texts[index % len(texts)][:COMMON_PREFIX] + piece for index, piece in enumerate(pieces)]


def run(xp: ModuleType, prompts: list[bytes], new_tokens: int, block_size: int, dtype: np.dtype, seed: int) -> Report:
    """Serve the prompts twice: once to compile, record and check every attention output, once for the clock."""
    config = Config()
    model = Decoder(xp, config, dtype, seed)
    noise = sampling_noise(xp, len(prompts), new_tokens, seed)
    needed = sum(-(-(len(prompt) + new_tokens) // block_size) for prompt in prompts)
    held = needed + needed // 4  # a server keeps some room

    trace = Trace()
    with progress_bars() as progress:

        def one_pass(title: str, recorder: Trace | None) -> Served:
            task = progress.add_task(title, total=new_tokens)
            pool = BlockPool(xp, config, held, block_size, dtype)
            return serve(model, prompts, noise, pool, recorder, lambda: progress.advance(task))

        first = one_pass("first pass", trace)
        lengths = [len(prompt) for prompt in prompts]
        checks = [
            check(calls, lengths, [to_host(table) for table in model.rotary_tables(max(lengths) + new_tokens)])
            for calls in progress.track(trace.calls.values(), description="check against float64")
        ]
        served = one_pass("timed pass", None)
    worst = worst_of(checks)

    prompt_tokens = sum(len(prompt) for prompt in prompts)
    decoded = len(prompts) * (new_tokens - 1)  # prefill gives each request its first token
    shown = int(np.argmin([abs(len(prompt) - 60) for prompt in prompts]))
    return Report(
        device=device_label(xp),
        dtype=dtype.name,
        requests=len(prompts),
        prompt_tokens=prompt_tokens,
        generated_tokens=served.tokens.size,
        prefill_seconds=served.prefill_seconds,
        decode_seconds=served.decode_seconds,
        prefill_tokens_per_second=prompt_tokens / served.prefill_seconds,
        decode_tokens_per_second=decoded / served.decode_seconds if decoded else 0.0,
        block_size=block_size,
        blocks_used=served.blocks_used,
        blocks_held=held,
        prefill_kernel=trace.prefill_kernel,
        decode_kernel="" if trace.plan is None else trace.plan.kernel,
        decode_workspace_bytes=0 if trace.plan is None else trace.plan.workspace_bytes,
        checked_outputs=sum(found.outputs for found in checks),
        largest_error=worst.error,
        tolerance=worst.tolerance,
        repeatable=bool((first.tokens == served.tokens).all()),
        sample_prompt=prompts[shown].decode("utf-8", errors="replace"),
        sample_answer=bytes(served.tokens[shown].tolist()).decode("ascii"),
    )


def serve(
    model: Decoder, prompts: list[bytes], noise: Array, pool: BlockPool, trace: Trace | None, done: Callable[[], None]
) -> Served:
    """Prefill all prompts in one packed batch, then decode one token per request and step, out of `pool`.

    noise is (steps, requests, 256); `done` is called after every step.
    """
    xp, layers_k, layers_v = model.xp, pool.k, pool.v
    steps, batch = noise.shape[:2]
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int32)
    blocks: list[list[int]] = [[] for _ in prompts]
    table = np.full((batch, -(-int(lengths.max() + steps) // pool.block_size)), -1, dtype=np.int32)

    def reserve(tokens: np.ndarray) -> bool:
        changed = [pool.grow(owned, int(count)) for owned, count in zip(blocks, tokens, strict=True)]
        for row, owned in enumerate(blocks):
            table[row, : len(owned)] = owned
        return any(changed)

    # Prefill: prompts lie end to end, cu_seqlens says where each begins, and nothing is padded.
    reserve(lengths)
    cu_seqlens = xp.asarray(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    block_table, cache_seqlens = xp.asarray(table), xp.asarray(lengths)
    longest = int(lengths.max())
    tokens = xp.asarray(np.frombuffer(b"".join(prompts), dtype=np.uint8).astype(np.int32))
    cos, sin = model.rotary_tables(longest + steps)
    rotary = dict(rotary_cos=cos, rotary_sin=sin)

    def prefill(layer: int, q: Array, k: Array, v: Array) -> Array:
        places = dict(cu_seqlens_new=cu_seqlens, block_table=block_table)
        append_kv(layers_k[layer], layers_v[layer], k, v, **places, **rotary, rotary_interleaved=False)
        rotated = apply_rotary(q, cos, sin, cu_seqlens=cu_seqlens, interleaved=False)
        args = dict(
            cu_seqlens_q=cu_seqlens,
            seqused_k=cache_seqlens,
            block_table=block_table,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=True,
        )
        out = attention_varlen(rotated, layers_k[layer], layers_v[layer], **args)
        if trace is not None:
            trace.record(layer, q, k, v, out)
            kernel = trace.prefill_kernel or explain(rotated, layers_k[layer], layers_v[layer], **args).kernel
            trace.prefill_kernel = kernel
        return out

    plan: DecodePlan | None = None  # all steps and layers have arrays of one form

    def decode(layer: int, q: Array, k: Array, v: Array) -> Array:
        nonlocal plan
        q, k, v = (x[:, None] for x in (q, k, v))
        caches = layers_k[layer], layers_v[layer]
        args = dict(k=k, v=v, cache_seqlens=cache_seqlens, block_table=block_table, **rotary)
        if plan is None:
            plan = DecodePlan(q, *caches, **args, rotary_interleaved=False, causal=True)
        out = plan.run(q, *caches, **args)
        if trace is not None:
            trace.record(layer, q[:, 0], k[:, 0], v[:, 0], out[:, 0])
            trace.plan = plan
        return out[:, 0]

    synchronize(xp)
    started = time.perf_counter()
    hidden = model.forward(tokens, prefill)
    generated = [model.sample(hidden[cu_seqlens[1:] - 1], noise[0])]
    synchronize(xp)
    prefilled = time.perf_counter()
    done()

    # Decode: the host knows every length, so it hands out blocks without asking the device.
    for step in range(1, steps):
        if reserve(lengths + 1):
            block_table = xp.asarray(table)
        cache_seqlens = xp.asarray(lengths)
        hidden = model.forward(generated[-1], decode)
        generated.append(model.sample(hidden, noise[step]))
        lengths = lengths + 1
        done()
    answers = to_host(xp.stack(generated, axis=1)).astype(np.uint8)
    return Served(answers, prefilled - started, time.perf_counter() - prefilled, pool.used)


def check(calls: list[tuple[np.ndarray, ...]], lengths: list[int], tables: list[np.ndarray]) -> Check:
    """Check one layer's attention calls, a prefill and then decode steps, against float64.

    Prefill and decode together are one causal attention over all tokens of a request, so a single float64 pass over
    packed rows, which knows nothing of blocks, gives what every call must have given. tables: cos and sin.
    """
    starts = np.cumsum([0, *lengths])

    def own(role: int, row: int) -> np.ndarray:
        prefill, steps = calls[0][role], [call[role] for call in calls[1:]]
        return np.concatenate([prefill[starts[row] : starts[row + 1]], *(step[row : row + 1] for step in steps)])

    sequences = [Rows(*(own(role, row) for role in range(4))) for row in range(len(lengths))]
    return check_layer(sequences, *tables)


def show(report: Report, own_text: bool) -> None:
    """Print the report as a table, what was served, the verdict and what to do next."""
    console = Console(highlight=False)
    table = Table(title=f"cupyattn demo on {report.device}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    decode, kernels = "none: prefill gives each request its first token", f"{report.prefill_kernel} (prefill)"
    step = "none"
    if report.decode_tokens_per_second:
        decode = _pace(report.decode_seconds, report.decode_tokens_per_second)
        kernels += f", {report.decode_kernel} (decode)"
        step = "rotary, append and attention in one call of a DecodePlan"
        step += f", {report.decode_workspace_bytes:,} bytes workspace" if report.decode_workspace_bytes else ""
    size = report.block_size
    judged = "[green]ok[/]" if report.largest_error <= report.tolerance else "[red]too large[/]"
    for name, value in (
        ("requests", f"{report.requests:,}"),
        ("prompt tokens", f"{report.prompt_tokens:,}"),
        ("generated tokens", f"{report.generated_tokens:,}"),
        ("prefill", _pace(report.prefill_seconds, report.prefill_tokens_per_second)),
        ("decode", decode),
        ("KV cache", f"{report.blocks_used:,} of {report.blocks_held:,} blocks in the pool used, {size} tokens each"),
        ("decode step", step),
        ("kernels", f"{kernels}, {report.dtype}"),
        ("largest error", f"{report.largest_error:.1e}, tolerance {report.tolerance:.1e}: {judged}"),
        ("second pass", "[green]the same tokens[/]" if report.repeatable else "[red]other tokens than the first[/]"),
    ):
        table.add_row(name, value)
    console.print(table)
    console.print("One request and its answer (noise: the weights are random, only the attention is real):")
    for text, style in ((" ".join(report.sample_prompt.split()), "bold"), (report.sample_answer, "")):
        console.print(f"  {text!r}", style=style, markup=False)
    for line, style in zip((verdict(report), next_step(report, own_text)), ("bold", ""), strict=True):
        console.print(f"\n{line}", style=style, markup=False, soft_wrap=True)


def verdict(report: Report) -> str:
    """PASS or FAIL, and what was compared with what."""
    if not report.repeatable:
        return "FAIL: the second pass gave other tokens than the first"
    return compared(report.checked_outputs, report.largest_error, report.tolerance)


def next_step(report: Report, own_text: bool) -> str:
    """What to do after the demo."""
    if not report.passed:
        return "Next: cupyattn doctor looks for the cause on this machine."
    if not own_text:
        return "Next: cupyattn demo FILE serves your own text, cupyattn demo --serve requests that come and go."
    return "Next: README.md has first examples in Python; cupyattn explain shows what a call runs, and why."


def _pace(seconds: float, tokens_per_second: float) -> str:
    """Three digits: the rest is noise."""
    milliseconds = float(f"{seconds * 1e3:.3g}")
    return f"{milliseconds:,g} ms, {float(f'{tokens_per_second:.3g}'):,.0f} tokens/s"
