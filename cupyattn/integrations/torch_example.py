"""A model of Llama's shape with random weights, served: `python -m cupyattn.integrations.torch_example`.

Prompts of different lengths are read packed, one behind the other, and their keys and values go into a cache. Then
every step appends one token to each sequence and attends in one launch a layer; on a GPU it is a CUDA graph that is
replayed. The tokens are compared with what the same weights say under PyTorch's own attention, without a cache. With
--transformers Hugging Face's LlamaForCausalLM generates instead, with these kernels as its attention.

The model is Llama's (Touvron et al. 2023, arXiv:2302.13971) with grouped heads (Ainslie et al. 2023, arXiv:2305.13245).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import append_kv, apply_rotary
from .torch import attention_varlen, attention_with_kvcache, register_with_transformers

PROMPTS = (37, 5, 120, 64)  # tokens of each


@dataclass(frozen=True, slots=True)
class Shape:
    """The model's sizes."""

    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    inner: int = 1024  # of a layer's feed-forward half
    vocabulary: int = 1000
    positions: int = 1024

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q, k, v), each (…, heads, head_dim) without rotary embedding -> (…, heads, head_dim)."""


class Layer(nn.Module):
    """Attention and a gated feed-forward half, each behind a normalisation and beside a shortcut."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = [shape.heads, shape.kv_heads, shape.kv_heads]
        self.head_dim = shape.head_dim
        self.before, self.between = nn.RMSNorm(shape.width), nn.RMSNorm(shape.width)
        self.qkv = nn.Linear(shape.width, sum(self.heads) * shape.head_dim, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        self.gate_up = nn.Linear(shape.width, 2 * shape.inner, bias=False)
        self.down = nn.Linear(shape.inner, shape.width, bias=False)

    def forward(self, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """x: (…, width)."""
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=-2)
        x = x + self.out(attend(q, k, v).flatten(-2))
        gate, up = self.gate_up(self.between(x)).chunk(2, dim=-1)
        return x + self.down(functional.silu(gate) * up)


class Model(nn.Module):
    """Tokens of any shape in, logits of as many out; how they attend to one another is the caller's business."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.last = nn.RMSNorm(shape.width)
        self.logits = nn.Linear(shape.width, shape.vocabulary, bias=False)
        frequencies = 10000.0 ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = torch.arange(shape.positions)[:, None] * frequencies
        self.rotary = {"cos": angles.cos(), "sin": angles.sin()}  # float32, whatever the weights are

    def forward(self, tokens: Tensor, attend: Attend) -> Tensor:
        x = self.embedding(tokens)
        for index, layer in enumerate(self.layers):
            x = layer(x, lambda q, k, v, index=index: attend(index, q, k, v))
        return self.logits(self.last(x))


class Server:
    """One batch of sequences with a cache: `prefill` once, then `step` for every token."""

    def __init__(self, model: Model, batch: int, capacity: int) -> None:
        shape, weight = model.shape, model.logits.weight
        self.model = model
        size = shape.layers, 2, batch, capacity, shape.kv_heads, shape.head_dim
        self.caches = torch.zeros(size, dtype=weight.dtype, device=weight.device)
        self.rotary = {name: table.to(weight.device) for name, table in model.rotary.items()}
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=weight.device)
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=weight.device)  # the last of each sequence

    def prefill(self, prompts: Sequence[Tensor]) -> Tensor:
        """Read all prompts, (tokens,) each; returns the token that follows each, (batch,)."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ends = functional.pad(lengths.cumsum(0), (1, 0)).to(self.lengths)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = (apply_rotary(x, **self.rotary, interleaved=False, cu_seqlens=ends) for x in (q, k))
            append_kv(*self.caches[layer], k, v, cu_seqlens_new=ends)
            return attention_varlen(q, k, v, ends, causal=True)

        logits = self.model(torch.cat(list(prompts)), attend)
        self.lengths.copy_(lengths)
        self.tokens.copy_(logits[ends[1:].long() - 1].argmax(-1))
        return self.tokens

    def step(self) -> None:
        """Read the last token of each sequence and put the one that follows in its place. Nothing is waited for."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            tables = {f"rotary_{name}": table for name, table in self.rotary.items()} | {"rotary_interleaved": False}
            new = {"k": k[:, None], "v": v[:, None], "cache_seqlens": self.lengths}
            return attention_with_kvcache(q[:, None], *self.caches[layer], **new, **tables, causal=True)[:, 0]

        self.tokens.copy_(self.model(self.tokens, attend).argmax(-1))
        self.lengths += 1

    def captured_step(self) -> Callable[[], None]:
        """`step` as a CUDA graph; on the CPU itself. What runs before the capture is undone."""
        if not self.tokens.is_cuda:
            return self.step
        held = self.tokens.clone(), self.lengths.clone()
        self.step()  # compiles, which a capture must not
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        self.tokens.copy_(held[0])
        self.lengths.copy_(held[1])
        return graph.replay


def reference_logits(model: Model, tokens: Tensor) -> Tensor:
    """Logits (tokens, vocabulary) of a whole sequence by PyTorch's own attention, without a cache."""
    cos, sin = (table[: len(tokens), None].to(tokens.device) for table in (model.rotary["cos"], model.rotary["sin"]))

    def rotate(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (rotate(q), rotate(k), v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    return model(tokens, attend)


@torch.no_grad()
def serve(shape: Shape, device: str, dtype: torch.dtype, steps: int) -> tuple[list[Tensor], float, float]:
    """Prompts with what followed them, seconds of a step, and how far a token's logit was below the best at most."""
    torch.manual_seed(0)
    model = Model(shape).to(device=device, dtype=dtype).eval()
    prompts = [torch.randint(shape.vocabulary, (length,), device=device) for length in PROMPTS]
    server = Server(model, len(prompts), max(PROMPTS) + steps)
    followed = [server.prefill(prompts).clone()]
    step = server.captured_step()
    started = time.perf_counter()
    for _ in range(steps - 1):
        step()
        followed.append(server.tokens.clone())
    tokens = torch.stack(followed, dim=1)
    tokens.sum().item()  # waits for the device
    seconds = (time.perf_counter() - started) / max(1, steps - 1)
    sequences = [torch.cat(pair) for pair in zip(prompts, tokens, strict=True)]
    shortfall = 0.0
    for prompt, sequence in zip(prompts, sequences, strict=True):
        logits = reference_logits(model, sequence[:-1])[len(prompt) - 1 :].float()
        chosen = logits.gather(1, sequence[len(prompt) :, None])[:, 0]
        shortfall = max(shortfall, float((logits.max(dim=1).values - chosen).max()))
    return sequences, seconds, shortfall


@torch.no_grad()
def generate_with_transformers(shape: Shape, device: str, dtype: torch.dtype, steps: int) -> Tensor:
    """What LlamaForCausalLM with random weights generates on these kernels, (batch, tokens); prompts are padded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).to(device=device, dtype=dtype).eval()
    model.set_attn_implementation(register_with_transformers())
    longest = max(PROMPTS)
    mask = torch.arange(longest, device=device) >= longest - torch.tensor(PROMPTS, device=device)[:, None]
    prompts = torch.randint(1, shape.vocabulary, mask.shape, device=device) * mask
    return model.generate(prompts, attention_mask=mask.long(), max_new_tokens=steps, do_sample=False)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Serve a randomly initialised model of Llama's shape.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=32, help="tokens that follow each prompt")
    parser.add_argument("--layers", type=int, default=Shape.__dataclass_fields__["layers"].default)
    parser.add_argument("--transformers", action="store_true", help="Hugging Face's LlamaForCausalLM instead")
    options = parser.parse_args(arguments)
    shape = Shape(layers=options.layers)
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    if options.transformers:
        tokens = generate_with_transformers(shape, options.device, dtype, options.steps)
        print(f"LlamaForCausalLM: {tuple(tokens.shape)} tokens, the first sequence ends {tokens[0, -8:].tolist()}")
        return
    sequences, seconds, shortfall = serve(shape, options.device, dtype, options.steps)
    for length, sequence in zip(PROMPTS, sequences, strict=True):
        print(f"{length:4} tokens, then {sequence[length : length + 8].tolist()} …")
    print(f"{1e3 * seconds:.2f} ms a step of {len(PROMPTS)} sequences and {shape.layers} layers on {options.device}")
    print(f"no token was more than {shortfall:.4f} below the best logit of PyTorch's own attention")


if __name__ == "__main__":
    main()
