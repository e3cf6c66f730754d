"""`cupyattn demo --serve`: requests that come and go, batched anew in every step, on one PagedKVCache.

The loop is that of Orca (Yu et al., OSDI 2022) and vLLM (Kwon et al. 2023, arXiv:2309.06180): a step decodes a token of
each request that has begun to answer and computes a chunk of the prompts of the others. Room is promised to nobody:
where blocks run out, the youngest request is preempted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from types import ModuleType

import numpy as np
from rich.console import Console
from rich.table import Table

from ..attention import append_kv, attention_varlen, attention_with_kvcache
from ..kvcache import OutOfBlocks, PagedKVCache
from ..rotary import apply_rotary
from .device import device_label, to_host
from .model import Array, Config, Decoder, sampling_noise
from .oracle import Rows, check_layer, compared, worst_of
from .progress import progress_bars

CHUNK = 192  # tokens of prompts that one step computes
STEPS_BETWEEN_ARRIVALS = 2.0  # on average
POOL_SHARE = 0.3  # of the blocks that all requests would take together: too few, so that some are preempted
SHOWN_STEPS = 12

Work = list[tuple["Request", int]]  # requests, and how many tokens of each are computed next


@dataclass(slots=True, eq=False)
class Request:
    """A prompt on its way to an answer of `new_tokens` bytes."""

    index: int  # in the order of arrival
    arrival: int  # the step
    prompt: np.ndarray
    new_tokens: int
    seq: int | None = None  # in the cache, or swapped out of it
    computed: int = 0  # tokens of the prompt whose keys and values the cache has
    answer: list[int] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return len(self.answer) == self.new_tokens


@dataclass(slots=True)
class Life:
    """What attention was given and gave for one sequence of the cache: host copies of (q, k, v, out), call by call."""

    prompt: np.ndarray
    prefix: list[tuple[np.ndarray, np.ndarray]]  # keys and values that it found in the cache, for each layer
    calls: list[list[tuple[np.ndarray, ...]]]  # for each layer

    def rows(self, layer: int) -> Rows:
        q, k, v, out = (np.concatenate(arrays) for arrays in zip(*self.calls[layer], strict=True))
        found_k, found_v = self.prefix[layer]
        return Rows(q, np.concatenate([found_k, k]), np.concatenate([found_v, v]), out)


class Trace:
    """The lives of all sequences. It keeps keys and values by what was computed, and never looks into the cache."""

    def __init__(self, config: Config, dtype: np.dtype) -> None:
        self.layers = config.layers
        self.lives: dict[int, Life] = {}
        self._nothing = np.zeros((0, config.kv_heads, config.head_dim), dtype)

    def begin(self, seq: int, prompt: np.ndarray, found: int) -> None:
        """A sequence whose first `found` tokens are in the cache: others that begin alike have computed them."""
        prefix = [(self._nothing, self._nothing)] * self.layers
        if found:
            prefix = next(filter(None, (self._beginning(life, prompt[:found]) for life in self.lives.values())))
        self.lives[seq] = Life(prompt, prefix, [[] for _ in range(self.layers)])

    def record(self, seqs: list[int], counts: list[int], layer: int, *arrays: Array) -> None:
        """One call of attention: arrays (tokens, heads, head_dim), `counts` tokens of each sequence."""
        parts = [np.split(to_host(x), np.cumsum(counts)[:-1]) for x in arrays]
        for seq, *own in zip(seqs, *parts, strict=True):
            self.lives[seq].calls[layer].append(tuple(own))

    def finished_layers(self) -> list[list[Rows]]:
        """For each layer what there is to check: all sequences that computed something."""
        return [[life.rows(layer) for life in self.lives.values() if life.calls[layer]] for layer in range(self.layers)]

    def _beginning(self, life: Life, tokens: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]] | None:
        """Keys and values of these tokens, for each layer, if the life begins with them and got so far."""
        count = len(tokens)
        if not life.calls[0] or not np.array_equal(life.prompt[:count], tokens):
            return None
        rows = [life.rows(layer) for layer in range(self.layers)]
        return [(own.k[:count], own.v[:count]) for own in rows] if len(rows[0].k) >= count else None


@dataclass(frozen=True, slots=True)
class Moment:
    """The state behind a step: numbers of requests, of blocks, and of preemptions up to then."""

    step: int
    running: int
    waiting: int  # swapped out ones among them
    swapped_out: int
    finished: int
    blocks_used: int
    blocks_saved: int  # that there would be more of if nothing were shared
    preemptions: int


@dataclass(frozen=True, slots=True)
class ServingReport:
    """What serving came to. Errors are absolute, on attention outputs."""

    device: str
    dtype: str
    requests: int
    prompt_tokens: int
    generated_tokens: int
    steps: int
    block_size: int
    blocks_held: int
    most_blocks_used: int
    most_blocks_saved: int
    blocks_left: int  # in use when all requests were done
    prompt_tokens_shared: int  # found in the cache when a request was let in, and not computed
    swapped_out: int
    recomputed: int
    checked_outputs: int
    largest_error: float
    tolerance: float
    moments: list[Moment]

    @property
    def passed(self) -> bool:
        return self.largest_error <= self.tolerance and not self.blocks_left


class Server:
    """The scheduler: who waits, who runs, and what a step computes.

    Requests are served in the order in which they came, so that the last of those that run is the youngest, and is
    older than all that wait.

    noise: (new_tokens, requests, 256), of the sampling, on the host; a request's answer does not depend on its company.
    """

    def __init__(self, model: Decoder, cache: PagedKVCache, noise: np.ndarray, positions: int) -> None:
        self.model, self.cache, self.noise = model, cache, noise
        self.cos, self.sin = model.rotary_tables(positions)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.finished: list[Request] = []
        self.trace = Trace(model.config, model.dtype)
        self.moments: list[Moment] = []
        self.shared = self.swapped_out = self.recomputed = 0

    def step(self) -> None:
        self._admit()
        self._decode()
        self._prefill()
        for request in [request for request in self.running if request.finished]:
            self.running.remove(request)
            self.cache.free(request.seq)
            self.finished.append(request)
        self._look()

    # ------------------------------------------------------------------------------------------- who runs

    def _admit(self) -> None:
        while self.waiting and self._has_room(self.waiting[0]):
            request = self.waiting.popleft()
            if request.seq is not None:
                self.cache.swap_in(request.seq)
            else:
                request.seq = self.cache.add(request.prompt)
                request.computed = self.cache.length(request.seq)
                self.shared += request.computed
                self.trace.begin(request.seq, request.prompt, request.computed)
            self.running.append(request)

    def _has_room(self, request: Request) -> bool:
        """For what it has to hold now. What it will hold is not looked at: most of the pool would lie idle."""
        tokens = len(request.prompt) + len(request.answer)
        return not self.running or self.cache.allocator.admits(-(-tokens // self.cache.block_size))

    def _reserve(self, pick: Callable[[], Work]) -> tuple[Work, Array | None]:
        """Room for the next tokens of the requests that `pick` names, and their lengths before, on the device.

        Preempts the youngest request until there is room, so that pick is asked again.
        """
        while work := pick():
            try:
                return work, self.cache.extend([request.seq for request, _ in work], [count for _, count in work])
            except OutOfBlocks:
                if len(self.running) == 1:  # it has the whole pool
                    raise
                self._preempt(self.running.pop())
        return [], None

    def _preempt(self, request: Request) -> None:
        """An answer that has begun moves to host memory. A prompt is computed again, from what is still known of it."""
        if request.answer:
            self.cache.swap_out(request.seq)
            self.swapped_out += 1
        else:
            self.cache.free(request.seq)
            request.seq = None
            self.recomputed += 1
        self.waiting.appendleft(request)

    # ------------------------------------------------------------------------------------ what a step computes

    def _decode(self) -> None:
        """The next token of each request that has begun to answer, in one batch."""
        work, before = self._reserve(lambda: [(request, 1) for request in self.running if request.answer])
        if not work:
            return
        xp, seqs = self.model.xp, [request.seq for request, _ in work]
        table = self.cache.block_table(seqs)
        rotary = dict(rotary_cos=self.cos, rotary_sin=self.sin, rotary_interleaved=False)

        def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
            args = dict(k=k[:, None], v=v[:, None], cache_seqlens=before, block_table=table, causal=True, **rotary)
            out = attention_with_kvcache(q[:, None], self.cache.k[layer], self.cache.v[layer], **args)[:, 0]
            self.trace.record(seqs, [1] * len(seqs), layer, q, k, v, out)
            return out

        last = xp.asarray([request.answer[-1] for request, _ in work])
        self._answer([request for request, _ in work], self.model.forward(last, attend))

    def _prefill(self) -> None:
        """A chunk of the prompts that are not computed yet, packed. Full blocks become known to requests to come."""
        work, before = self._reserve(self._chunk)
        if not work:
            return
        xp, cache = self.model.xp, self.cache
        seqs, counts = [request.seq for request, _ in work], [count for _, count in work]
        ends = np.cumsum([0, *counts])
        table, after, cu_seqlens = cache.block_table(seqs), cache.seqlens(seqs), xp.asarray(ends.astype(np.int32))
        longest = max(map(cache.length, seqs))

        def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
            caches = cache.k[layer], cache.v[layer]
            places = dict(cache_seqlens=before, cu_seqlens_new=cu_seqlens, block_table=table)
            append_kv(*caches, k, v, **places, rotary_cos=self.cos, rotary_sin=self.sin, rotary_interleaved=False)
            out = attention_varlen(
                apply_rotary(q, self.cos, self.sin, offsets=before, cu_seqlens=cu_seqlens, interleaved=False),
                *caches,
                cu_seqlens_q=cu_seqlens,
                seqused_k=after,
                block_table=table,
                max_seqlen_q=max(counts),
                max_seqlen_k=longest,
                causal=True,
            )
            self.trace.record(seqs, counts, layer, q, k, v, out)
            return out

        pieces = [request.prompt[request.computed : request.computed + count] for request, count in work]
        hidden = self.model.forward(xp.asarray(np.concatenate(pieces)), attend)
        for request, count in work:
            request.computed += count
            cache.commit(request.seq, request.prompt[: request.computed])
        whole = [row for row, (request, _) in enumerate(work) if request.computed == len(request.prompt)]
        self._answer([work[row][0] for row in whole], hidden[xp.asarray(ends[1:][whole] - 1)])

    def _chunk(self) -> Work:
        """The prompts of the oldest requests, up to CHUNK tokens in all."""
        work, left = [], CHUNK
        for request in self.running:
            count = min(len(request.prompt) - request.computed, left)
            if count:
                work.append((request, count))
                left -= count
        return work

    def _answer(self, requests: list[Request], hidden: Array) -> None:
        """Sample a token of each request from the last row of its hidden states."""
        if not requests:
            return
        noise = self.noise[[len(request.answer) for request in requests], [request.index for request in requests]]
        tokens = to_host(self.model.sample(hidden, self.model.xp.asarray(noise)))
        for request, token in zip(requests, tokens.tolist(), strict=True):
            request.answer.append(token)

    def _look(self) -> None:
        stats = self.cache.allocator.stats()
        moment = Moment(
            step=len(self.moments) + 1,
            running=len(self.running),
            waiting=len(self.waiting),
            swapped_out=sum(request.seq is not None for request in self.waiting),
            finished=len(self.finished),
            blocks_used=stats.used,
            blocks_saved=stats.references - stats.used,
            preemptions=self.swapped_out + self.recomputed,
        )
        self.moments.append(moment)


def serve_arrivals(
    xp: ModuleType, prompts: Sequence[bytes], new_tokens: int, block_size: int, dtype: np.dtype, seed: int
) -> ServingReport:
    """Serve prompts that arrive a few steps apart, from a pool with room for some of them; check every output."""
    config = Config()
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum([0, *rng.poisson(STEPS_BETWEEN_ARRIVALS, len(prompts) - 1)]).tolist()
    coming = deque(
        Request(index, step, np.frombuffer(prompt, np.uint8).astype(np.int32), new_tokens)
        for index, (step, prompt) in enumerate(zip(arrivals, prompts, strict=True))
    )
    longest = max(map(len, prompts)) + new_tokens
    needed = [-(-(len(prompt) + new_tokens) // block_size) for prompt in prompts]
    cache = PagedKVCache(
        max(max(needed), int(POOL_SHARE * sum(needed))),
        block_size,
        config.kv_heads,
        config.head_dim,
        num_layers=config.layers,
        dtype=dtype.name,
        device=None if xp is np else xp.cuda.Device().id,
    )
    noise = sampling_noise(np, len(prompts), new_tokens, seed)
    server = Server(Decoder(xp, config, dtype, seed), cache, noise, longest)
    with progress_bars() as progress:
        task = progress.add_task("serve", total=len(prompts))
        while coming or server.waiting or server.running:
            while coming and coming[0].arrival <= len(server.moments):
                server.waiting.append(coming.popleft())
            server.step()
            progress.update(task, completed=len(server.finished))
        tables = to_host(server.cos), to_host(server.sin)
        layers = progress.track(server.trace.finished_layers(), description="check against float64")
        checks = [check_layer(sequences, *tables) for sequences in layers]
    worst = worst_of(checks)
    return ServingReport(
        device=device_label(xp),
        dtype=dtype.name,
        requests=len(prompts),
        prompt_tokens=sum(map(len, prompts)),
        generated_tokens=sum(len(request.answer) for request in server.finished),
        steps=len(server.moments),
        block_size=block_size,
        blocks_held=cache.num_blocks,
        most_blocks_used=cache.allocator.stats().peak_used,
        most_blocks_saved=max(moment.blocks_saved for moment in server.moments),
        blocks_left=cache.allocator.num_used,
        prompt_tokens_shared=server.shared,
        swapped_out=server.swapped_out,
        recomputed=server.recomputed,
        checked_outputs=sum(found.outputs for found in checks),
        largest_error=worst.error,
        tolerance=worst.tolerance,
        moments=server.moments,
    )


def show_serving(report: ServingReport) -> None:
    """Print how serving went, what it came to, the verdict and what to do next."""
    console = Console(highlight=False)
    console.print(_course(report))
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column()
    found, size = report.prompt_tokens_shared, f"{report.block_size:,} tokens each"
    judged = "[green]ok[/]" if report.largest_error <= report.tolerance else "[red]too large[/]"
    for name, value in (
        ("requests", f"{report.requests:,} in {report.steps:,} steps"),
        ("prompt tokens", f"{report.prompt_tokens:,}, found in the cache {found:,} times"),
        ("generated tokens", f"{report.generated_tokens:,}"),
        ("blocks in use", f"up to {report.most_blocks_used:,} of {report.blocks_held:,}, {size}"),
        ("saved by sharing", f"up to {report.most_blocks_saved:,} blocks at a time"),
        ("preemptions", f"{report.swapped_out:,} to host memory, {report.recomputed:,} computed again"),
        ("left at the end", f"{report.blocks_left:,} blocks"),
        ("largest error", f"{report.largest_error:.1e}, tolerance {report.tolerance:.1e}, {report.dtype}: {judged}"),
    ):
        table.add_row(name, value)
    console.print(table)
    for line, style in zip(_last_words(report), ("bold", ""), strict=True):
        console.print(f"\n{line}", style=style, markup=False, soft_wrap=True)


def _course(report: ServingReport) -> Table:
    """Some steps, evenly spread, and the last one."""
    table = Table(title=f"cupyattn demo --serve on {report.device}", title_justify="left")
    for name in ("step", "running", "waiting", "swapped out", "finished", "blocks in use", "saved", "preemptions"):
        table.add_column(name, justify="right")
    last = report.steps - 1
    for step in sorted({round(last * part / (SHOWN_STEPS - 1)) for part in range(SHOWN_STEPS)}):
        table.add_row(*(f"{number:,}" for number in astuple(report.moments[step])))
    return table


def _last_words(report: ServingReport) -> tuple[str, str]:
    """The verdict, and what to do next."""
    next_step = "Next: cupyattn doctor looks for the cause on this machine."
    if report.passed:
        next_step = (
            "Next: README.md has this loop in short; notebooks/04_paged_caches.ipynb has pictures of the blocks."
        )
    if report.blocks_left:
        return f"FAIL: {report.blocks_left:,} blocks are in use though no request is left", next_step
    return compared(report.checked_outputs, report.largest_error, report.tolerance), next_step
