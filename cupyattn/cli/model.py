"""The demo's language model: a small byte-level decoder with random weights, the same code on NumPy and CuPy.

It knows nothing of caches and positions. `Decoder.forward` hands the queries, keys and values of each layer to a
callback, and that is where the demo puts rotary embedding and paged attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from einops import rearrange

Array = Any  # numpy.ndarray or cupy.ndarray
Attend = Callable[[int, Array, Array, Array], Array]
"""(layer, q, k, v) -> out: q and out are (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim); q and k are
still to be rotated."""

VOCABULARY = 256
TEMPERATURE = 0.8
PRINTABLE = range(32, 127)


@dataclass(frozen=True, slots=True)
class Config:
    """Sizes of the decoder. Query heads share key/value heads in groups (GQA)."""

    layers: int = 2
    width: int = 512
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    hidden: int = 1536
    rope_base: float = 10000.0


class Decoder:
    """RMSNorm, grouped-query attention and SwiGLU; weights are drawn from `seed` and mean nothing.

    The linear layers run in float32. Attention runs in `dtype`: its inputs are rounded to it before the callback.
    """

    def __init__(self, xp: ModuleType, config: Config, dtype: np.dtype, seed: int) -> None:
        self.xp, self.config, self.dtype = xp, config, dtype
        self._linear = _linear(xp)
        rng = np.random.default_rng(seed)

        def weights(inputs: int, outputs: int) -> Array:
            return xp.asarray(rng.standard_normal((inputs, outputs), dtype=np.float32) / np.float32(np.sqrt(inputs)))

        width, hidden = config.width, config.hidden
        kv_width = config.kv_heads * config.head_dim
        self.embedding = xp.asarray(rng.standard_normal((VOCABULARY, width), dtype=np.float32))
        self.layers = [
            {
                "q": weights(width, config.heads * config.head_dim),
                "k": weights(width, kv_width),
                "v": weights(width, kv_width),
                "o": weights(config.heads * config.head_dim, width),
                "gate": weights(width, hidden),
                "up": weights(width, hidden),
                "down": weights(hidden, width),
            }
            for _ in range(config.layers)
        ]
        self.unembedding = weights(width, VOCABULARY)

    def forward(self, tokens: Array, attend: Attend) -> Array:
        """Hidden states (tokens, width), float32, of `tokens` (tokens,)."""
        linear, head_dim = self._linear, self.config.head_dim
        x = self.embedding[tokens]
        for layer, w in enumerate(self.layers):
            h = _rms_norm(x)
            q, k, v = (rearrange(linear(h, w[name]), "t (h d) -> t h d", d=head_dim) for name in "qkv")
            out = attend(layer, *(x.astype(self.dtype) for x in (q, k, v)))
            x = x + linear(rearrange(out.astype(np.float32), "t h d -> t (h d)"), w["o"])
            h = _rms_norm(x)
            x = x + linear(_silu(linear(h, w["gate"]), self.xp) * linear(h, w["up"]), w["down"])
        return _rms_norm(x)

    def logits(self, hidden: Array) -> Array:
        """Next-byte scores (tokens, 256), float32, of hidden states (tokens, width)."""
        return self._linear(hidden, self.unembedding)

    def sample(self, hidden: Array, noise: Array) -> Array:
        """The next byte of each row of hidden, with noise (tokens, 256) of `sampling_noise`."""
        return (self.logits(hidden) / TEMPERATURE + noise).argmax(axis=-1)

    def rotary_tables(self, positions: int) -> tuple[Array, Array]:
        """cos and sin (positions, head_dim / 2), float32: elements i and i + head_dim / 2 turn together."""
        pairs = self.config.head_dim // 2
        angles = np.arange(positions)[:, None] * self.config.rope_base ** (-np.arange(pairs) / pairs)
        return self.xp.asarray(np.cos(angles).astype(np.float32)), self.xp.asarray(np.sin(angles).astype(np.float32))


def sampling_noise(xp: ModuleType, batch: int, steps: int, seed: int) -> Array:
    """Gumbel noise (steps, batch, 256), float32: argmax(logits + noise) samples. Made on the host: the same everywhere.

    Bytes that cannot be printed get -inf and are never sampled.
    """
    noise = np.random.default_rng(seed + 1).gumbel(size=(steps, batch, VOCABULARY)).astype(np.float32)
    noise[..., [byte for byte in range(VOCABULARY) if byte not in PRINTABLE]] = -np.inf
    return xp.asarray(noise)


def _rms_norm(x: Array) -> Array:
    return x / ((x * x).mean(axis=-1, keepdims=True) + np.float32(1e-6)) ** np.float32(0.5)


def _silu(x: Array, xp: ModuleType) -> Array:
    return x / (1 + xp.exp(-x))


def _linear(xp: ModuleType) -> Callable[[Array, Array], Array]:
    """x @ w. CuPy needs cuBLAS for that, half a gigabyte that no extra brings: without it a reduction kernel serves."""
    if xp is not np:
        try:
            from cupy_backends.cuda.libs import cublas  # noqa: F401
        except ImportError:
            dot = xp.ReductionKernel("T x, T w", "T y", "x * w", "a + b", "y = a", "0", "cupyattn_demo_dot")
            return lambda x, w: dot(x[:, None, :], w.T[None, :, :], axis=2)
    return lambda x, w: x @ w
