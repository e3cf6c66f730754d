"""Every call of compat.flashinfer beside FlashInfer's own, on the same tensors; needs it installed, and a GPU.

What FlashInfer would have to compile, and may not because of FLASHINFER_DISABLE_JIT, is skipped with that reason.
"""

from __future__ import annotations

import numpy as np
import pytest

from cupyattn.compat import flashinfer as ours

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 128
TOLERANCE = {"float16": 4e-3, "bfloat16": 3e-2}  # of outputs of the size of standard normal values
LENGTHS, QUERIES = [33, 1, 200, 17], [3, 1, 30, 17]


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("flashinfer")


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def of_theirs(call):
    """What FlashInfer's call gives, or a skip where it is not compiled."""
    try:
        return call()
    except RuntimeError as error:
        if type(error).__name__ == "MissingJITCacheError":
            pytest.skip(f"FlashInfer: {str(error).splitlines()[0][:120]}")
        raise
    except FileNotFoundError as error:  # a package without the sources that it would compile
        if str(error.filename).endswith(".jinja"):
            pytest.skip(f"FlashInfer: {error.strerror}: {error.filename.rpartition('/')[2]}")
        raise


def compare(got, expected, dtype="float16", lse=2e-3, scale=1.0):
    """Outputs, or pairs of an output and an lse to base 2, of both."""
    pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    for i, (one, other) in enumerate(pairs):
        assert one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
        assert one.is_contiguous() == other.is_contiguous()
        one, other = one.double().cpu().numpy(), other.double().cpu().numpy()
        allowed = lse if i else scale * TOLERANCE[dtype]
        near = np.isclose(one, other, rtol=1e-3, atol=allowed) | (one == other)
        assert near.all(), f"result {i}: off by up to {np.nanmax(np.abs(one - other)[~near])}"


class Data:
    """Random tensors of a batch."""

    def __init__(self, torch, rng, dtype="float16"):
        self.torch, self.dtype = torch, getattr(torch, dtype)
        self.generator = torch.Generator(DEVICE).manual_seed(int(rng.integers(2**31)))
        self.rng = rng

    def normal(self, *shape, dtype=None):
        made = self.torch.randn(shape, device=DEVICE, generator=self.generator)
        return made.to(self.dtype if dtype is None else dtype)

    def ints(self, numbers):
        return self.torch.tensor(np.asarray(numbers), dtype=self.torch.int32, device=DEVICE)

    def starts(self, lengths):
        return self.ints(np.concatenate([[0], np.cumsum(lengths)]))

    def bools(self, count):
        return self.torch.tensor(self.rng.random(count) < 0.5, device=DEVICE)

    def pages(self, lengths, page_size, spare=3):
        """(indptr, indices, last_page_len, pages in the pool) in shuffled pages."""
        counts = -(-np.asarray(lengths) // page_size)
        pool = int(counts.sum()) + spare
        last = np.where(counts > 0, lengths - (counts - 1) * page_size, 0)
        ids = self.rng.permutation(pool)[: counts.sum()]
        return self.starts(counts), self.ints(ids), self.ints(last), pool

    def cache(self, pool, page_size, layout="NHD", form="pair", head_dim=HEAD_DIM):
        rows = (page_size, KV_HEADS) if layout == "NHD" else (KV_HEADS, page_size)
        both = self.normal(pool, 2, *rows, head_dim)
        return both if form == "one" else (both[:, 0].contiguous(), both[:, 1].contiguous())

    def workspace(self):
        return self.torch.zeros(128 << 20, dtype=self.torch.uint8, device=DEVICE)


@pytest.fixture(params=["float16", "bfloat16"])
def data(request, torch, rng):
    made = Data(torch, rng, request.param)
    made.name = request.param
    return made


def planned(module, data, wrapper, arguments, made=(), **options):
    """A wrapper of a module, planned."""
    made = getattr(module, wrapper)(data.workspace(), *made)
    made.plan(*arguments, q_data_type=data.dtype, **options)
    return made


def both(theirs, data, wrapper, arguments, made=(), **options):
    """(ours, theirs), planned alike."""
    given = data, wrapper, arguments, made
    return planned(ours, *given, **options), of_theirs(lambda: planned(theirs, *given, **options))


# ------------------------------------------------------------------------------------------------------------ decode


MASKS = {
    "none": {},
    "window": {"window_left": 9},
    "cap": {"logits_soft_cap": 3.0},
    "scale": {"sm_scale": 0.2},
    "all": {"window_left": 20, "logits_soft_cap": 5.0, "sm_scale": 0.15},
    "alibi": {"pos_encoding_mode": "ALIBI"},
    "rope": {"pos_encoding_mode": "ROPE_LLAMA", "rope_scale": 2.0, "rope_theta": 5e5},
}
DECODE = "BatchDecodeWithPagedKVCacheWrapper"


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("tensor_cores", [False, True])
def test_decode(theirs, data, tensor_cores, masks):
    *table, pool = data.pages(LENGTHS, 16)
    q, cache = data.normal(4, HEADS, HEAD_DIM), data.cache(pool, 16)
    arguments = *table, HEADS, KV_HEADS, HEAD_DIM, 16
    mine, other = both(theirs, data, DECODE, arguments, ("NHD", False, tensor_cores), **MASKS[masks])
    expected = of_theirs(lambda: other.run(q, cache, return_lse=True))
    compare(mine.run(q, cache, return_lse=True), expected, data.name)
    compare(mine.run(q, cache), other.run(q, cache), data.name)


@pytest.mark.parametrize("page_size", [1, 5, 16, 128, 512])
@pytest.mark.parametrize("form", ["pair", "one"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_decode_over_pages_of_any_size(theirs, data, layout, form, page_size):
    *table, pool = data.pages([700, 1, 513], page_size)
    q, cache = data.normal(3, HEADS, HEAD_DIM), data.cache(pool, page_size, layout, form)
    arguments = *table, HEADS, KV_HEADS, HEAD_DIM, page_size
    mine, other = both(theirs, data, DECODE, arguments, (layout,))
    compare(mine.run(q, cache, return_lse=True), of_theirs(lambda: other.run(q, cache, return_lse=True)), data.name)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_decode_with_an_empty_sequence_and_other_head_dims(theirs, data, head_dim):
    *table, pool = data.pages([33, 0, 5], 16)
    q, cache = data.normal(3, HEADS, head_dim), data.cache(pool, 16, head_dim=head_dim)
    mine, other = both(theirs, data, DECODE, (*table, HEADS, KV_HEADS, head_dim, 16))
    expected = of_theirs(lambda: other.run(q, cache, return_lse=True))
    got = mine.run(q, cache, return_lse=True)
    compare(got, expected, data.name)
    assert not got[0][1].any() and (got[1][1] == -np.inf).all()


def test_decode_in_place_and_with_scales(theirs, data):
    *table, pool = data.pages(LENGTHS, 16)
    q, cache = data.normal(4, HEADS, HEAD_DIM), data.cache(pool, 16)
    pair = both(theirs, data, DECODE, (*table, HEADS, KV_HEADS, HEAD_DIM, 16))
    results = []
    for wrapper in pair:
        out, lse = data.torch.empty_like(q), data.torch.empty(4, HEADS, device=DEVICE)
        scales = {"q_scale": 1.5, "k_scale": 0.5, "v_scale": 2.0}
        given = of_theirs(lambda w=wrapper, o=out, s=lse, k=scales: w.run(q, cache, out=o, lse=s, return_lse=True, **k))
        assert given[0] is out and given[1] is lse
        results.append(given)
    compare(*results, data.name, scale=2.0)


@pytest.mark.parametrize("queries", [2, 4])
def test_decode_of_several_queries(theirs, data, queries):
    *table, pool = data.pages([33, 4, 200], 16)
    q, cache = data.normal(3 * queries, HEADS, HEAD_DIM), data.cache(pool, 16)
    arguments = *table, HEADS, KV_HEADS, HEAD_DIM, 16
    mine, other = both(theirs, data, DECODE, arguments, ("NHD", False, True), q_len_per_req=queries)
    compare(mine.run(q, cache, return_lse=True), of_theirs(lambda: other.run(q, cache, return_lse=True)), data.name)


def test_older_calls_of_decode(theirs, data):
    *table, pool = data.pages(LENGTHS, 16)
    q, cache = data.normal(4, HEADS, HEAD_DIM), data.cache(pool, 16)
    results = []
    for module in (ours, theirs):
        wrapper = module.BatchDecodeWithPagedKVCacheWrapper(data.workspace())

        def older(wrapper=wrapper):
            wrapper.begin_forward(*table, HEADS, KV_HEADS, HEAD_DIM, 16, q_data_type=data.dtype)
            found = wrapper.forward_return_lse(q, cache, sm_scale=0.3), wrapper.forward(q, cache, sm_scale=0.3)
            if hasattr(wrapper, "end_forward"):  # later versions have it in prefill alone
                wrapper.end_forward()
            return found

        results.append(of_theirs(older))
    for one, other in zip(*results, strict=True):
        compare(one, other, data.name)


def test_graphs_of_decode(theirs, data):
    """A captured run, after later plans, beside FlashInfer's eager one."""
    lengths = [[1, 1, 1], [33, 200, 17], [5, 100, 64]]
    torch, pool = data.torch, 40
    buffers = [torch.zeros(size, dtype=torch.int32, device=DEVICE) for size in (4, 40, 3)]
    wrapper = ours.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(data.workspace(), *buffers)
    q, out, cache = data.normal(3, HEADS, HEAD_DIM), data.normal(3, HEADS, HEAD_DIM), data.cache(pool, 16)
    graph = None
    for now in lengths:
        *table, used = data.pages(now, 16)
        assert used <= pool
        arguments = *table, HEADS, KV_HEADS, HEAD_DIM, 16
        wrapper.plan(*arguments, q_data_type=data.dtype)
        if graph is None:
            wrapper.run(q, cache, out=out)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                wrapper.run(q, cache, out=out)
        graph.replay()
        other = of_theirs(lambda a=arguments: planned(theirs, data, DECODE, a))
        compare(out, of_theirs(lambda w=other: w.run(q, cache)), data.name)


def test_single_decode(theirs, data):
    for layout in ("NHD", "HND"):
        k, v = (data.normal(77, KV_HEADS, HEAD_DIM) for _ in "kv")
        k, v = (k, v) if layout == "NHD" else (x.transpose(0, 1).contiguous() for x in (k, v))
        q = data.normal(HEADS, HEAD_DIM)
        for options in ({}, {"window_left": 9}, {"logits_soft_cap": 4.0, "sm_scale": 0.2}):
            calls = [
                lambda m=m, k=k, v=v, q=q, o=options, n=layout: m.single_decode_with_kv_cache(
                    q, k, v, n, return_lse=True, **o
                )
                for m in (ours, theirs)
            ]
            compare(calls[0](), of_theirs(calls[1]), data.name)


# ----------------------------------------------------------------------------------------------------------- prefill


PAGED, RAGGED = "BatchPrefillWithPagedKVCacheWrapper", "BatchPrefillWithRaggedKVCacheWrapper"
PREFILL_MASKS = {
    "none": {},
    "causal": {"causal": True},
    "causal window": {"causal": True, "window_left": 5},
    "window": {"window_left": 5},
    "cap": {"causal": True, "logits_soft_cap": 3.0},
    "scale": {"causal": True, "sm_scale": 0.2},
    "alibi": {"causal": True, "pos_encoding_mode": "ALIBI"},
    "rope": {"causal": True, "pos_encoding_mode": "ROPE_LLAMA", "rope_theta": 5e5},
}


@pytest.mark.parametrize("masks", PREFILL_MASKS)
@pytest.mark.parametrize("queries", [QUERIES, [2, 2, 2, 2], [1, 1, 1, 1]], ids=["uneven", "even", "single"])
def test_prefill_over_pages(theirs, data, queries, masks):
    """One sequence has as many queries as keys, and one more of them where they are even: rows without keys."""
    *table, pool = data.pages(LENGTHS, 16)
    q, cache = data.normal(sum(queries), HEADS, HEAD_DIM), data.cache(pool, 16)
    arguments = data.starts(queries), *table, HEADS, KV_HEADS, HEAD_DIM, 16
    mine, other = both(theirs, data, PAGED, arguments, **PREFILL_MASKS[masks])
    compare(mine.run(q, cache, return_lse=True), of_theirs(lambda: other.run(q, cache, return_lse=True)), data.name)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("form", ["pair", "one"])
@pytest.mark.parametrize("page_size", [1, 5, 64])
def test_prefill_over_pages_of_any_size(theirs, data, layout, form, page_size):
    *table, pool = data.pages(LENGTHS, page_size)
    q, cache = data.normal(sum(QUERIES), HEADS, HEAD_DIM), data.cache(pool, page_size, layout, form)
    arguments = data.starts(QUERIES), *table, HEADS, KV_HEADS, HEAD_DIM, page_size
    mine, other = both(theirs, data, PAGED, arguments, (layout,), causal=True)
    compare(mine.run(q, cache, return_lse=True), of_theirs(lambda: other.run(q, cache, return_lse=True)), data.name)


@pytest.mark.parametrize("kernel", ["fa2", "fa3"])
def test_rows_without_keys(theirs, data, kernel):
    """More queries than keys under causal: zeros, and an lse of -inf."""
    *table, pool = data.pages([4, 9, 40], 16)
    q, cache = data.normal(9 + 4 + 50, HEADS, HEAD_DIM), data.cache(pool, 16)
    arguments = data.starts([9, 4, 50]), *table, HEADS, KV_HEADS, HEAD_DIM, 16
    wrapper = theirs.BatchPrefillWithPagedKVCacheWrapper(data.workspace(), backend=kernel)

    def run():
        wrapper.plan(*arguments, causal=True, q_data_type=data.dtype)
        return wrapper.run(q, cache, return_lse=True)

    got = planned(ours, data, PAGED, arguments, causal=True).run(q, cache, return_lse=True)
    compare(got, of_theirs(run), data.name)
    assert not got[0][:5].any() and (got[1][:5] == -np.inf).all() and (got[1][13:23] == -np.inf).all()


@pytest.mark.parametrize("masks", PREFILL_MASKS)
def test_ragged_prefill(theirs, data, masks):
    q = data.normal(sum(QUERIES), HEADS, HEAD_DIM)
    k, v = (data.normal(sum(LENGTHS), KV_HEADS, HEAD_DIM) for _ in "kv")
    arguments = data.starts(QUERIES), data.starts(LENGTHS), HEADS, KV_HEADS, HEAD_DIM
    mine, other = both(theirs, data, RAGGED, arguments, **PREFILL_MASKS[masks])
    compare(mine.run(q, k, v, return_lse=True), of_theirs(lambda: other.run(q, k, v, return_lse=True)), data.name)


@pytest.mark.parametrize("base", ["log2", "ln"])
@pytest.mark.parametrize("layout", ["NH", "HN"])
def test_lse_bases_and_layouts(theirs, data, base, layout):
    *table, pool = data.pages(LENGTHS, 16)
    q, cache = data.normal(sum(QUERIES), HEADS, HEAD_DIM), data.cache(pool, 16)
    arguments = data.starts(QUERIES), *table, HEADS, KV_HEADS, HEAD_DIM, 16
    mine, other = both(theirs, data, PAGED, arguments, causal=True)
    options = {"return_lse": True, "lse_base": base, "lse_layout": layout}
    compare(mine.run(q, cache, **options), of_theirs(lambda: other.run(q, cache, **options)), data.name)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("keys", ["pages", "ragged", "single"])
def test_custom_masks(theirs, data, keys, packed):
    queries, lengths = ([7], [29]) if keys == "single" else (QUERIES, LENGTHS)
    sizes = np.multiply(queries, lengths)
    mask = data.bools(int(sizes.sum()))
    q = data.normal(sum(queries), HEADS, HEAD_DIM)
    *table, pool = data.pages(lengths, 16)
    cache, rows = data.cache(pool, 16), [data.normal(sum(lengths), KV_HEADS, HEAD_DIM) for _ in "kv"]
    results = []
    for module in (ours, theirs):

        def run(module=module):
            given = {"custom_mask": mask}
            if packed:
                bits, _ = module.segment_packbits(mask, data.starts(sizes), bitorder="little")
                given = {"packed_custom_mask": bits}
            if keys == "single":
                given = {"packed_custom_mask": bits} if packed else {"custom_mask": mask.reshape(7, 29)}
                return module.single_prefill_with_kv_cache(q, *rows, return_lse=True, **given)
            if keys == "pages":
                arguments = data.starts(queries), *table, HEADS, KV_HEADS, HEAD_DIM, 16
                return planned(module, data, PAGED, arguments, **given).run(q, cache, return_lse=True)
            arguments = data.starts(queries), data.starts(lengths), HEADS, KV_HEADS, HEAD_DIM
            return planned(module, data, RAGGED, arguments, **given).run(q, *rows, return_lse=True)

        results.append(of_theirs(run))
    compare(*results, data.name)


@pytest.mark.parametrize(("queries", "keys"), [(7, 29), (29, 29), (20, 9), (1, 40)])
def test_single_prefill(theirs, data, queries, keys):
    q, (k, v) = data.normal(queries, HEADS, HEAD_DIM), (data.normal(keys, KV_HEADS, HEAD_DIM) for _ in "kv")
    for options in ({}, {"causal": True}, {"causal": True, "window_left": 6}, {"logits_soft_cap": 4.0}):
        calls = [
            lambda m=m, o=options: m.single_prefill_with_kv_cache(q, k, v, return_lse=True, **o) for m in (ours, theirs)
        ]
        compare(calls[0](), of_theirs(calls[1]), data.name)


# ---------------------------------------------------------------------------------------------------------- cascades


def test_merges(theirs, data):
    v, s = data.normal(9, 3, HEADS, HEAD_DIM), 4 * data.normal(9, 3, HEADS, dtype=data.torch.float32)
    s[2, 0] = -np.inf
    parts = [x[:, i].contiguous() for i in range(2) for x in (v, s)]
    compare(ours.merge_state(*parts), of_theirs(lambda: theirs.merge_state(*parts)), data.name)
    compare(ours.merge_states(v, s), of_theirs(lambda: theirs.merge_states(v, s)), data.name)
    for mask in (None, data.bools(9)):
        results = []
        for module in (ours, theirs):
            state = [part.clone() for part in parts]
            of_theirs(lambda m=module, s=state, k=mask: m.merge_state_in_place(*s, k))
            results.append(tuple(state[:2]))
        compare(*results, data.name)


@pytest.mark.parametrize("queries", [[1, 1, 1], [3, 1, 4]], ids=["decode", "append"])
def test_levels(theirs, data, queries):
    shared, own = [64], [33, 5, 100]
    indptr, indices, last, pool = data.pages([*shared, *own], 16)
    first = int(indptr[1])
    tables = [indptr[:2], indptr[1:] - first], [indices[:first], indices[first:]], [last[:1], last[1:]]
    ends = [data.ints([0, sum(queries)]), data.starts(queries)]
    q, cache = data.normal(sum(queries), HEADS, HEAD_DIM), data.cache(pool, 16)
    results = []
    for module in (ours, theirs):

        def run(module=module):
            wrapper = module.MultiLevelCascadeAttentionWrapper(2, data.workspace())
            wrapper.plan(ends, *tables, HEADS, KV_HEADS, HEAD_DIM, 16, causal=True, q_data_type=data.dtype)
            return wrapper.run(q, cache)

        results.append(of_theirs(run))
    compare(*results, data.name, scale=2.0)


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_shared_prefixes(theirs, torch, rng, kind):
    data = Data(torch, rng)  # their prefill has no argument for a dtype
    queries = [1, 1, 1] if kind == "decode" else [3, 1, 4]
    *table, pool = data.pages([33, 5, 100], 16)
    q, cache = data.normal(sum(queries), HEADS, HEAD_DIM), data.cache(pool, 16)
    prefix = [data.normal(77, KV_HEADS, HEAD_DIM) for _ in "kv"]
    results = []
    for module in (ours, theirs):

        def run(module=module):
            sizes = HEADS, KV_HEADS, HEAD_DIM, 16
            if kind == "decode":
                wrapper = module.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(data.workspace())
                wrapper.begin_forward(*table, *sizes)
                return wrapper.forward(q, *prefix, cache)
            wrapper = module.BatchPrefillWithSharedPrefixPagedKVCacheWrapper(data.workspace())
            wrapper.begin_forward(data.starts(queries), *table, *sizes)
            return wrapper.forward(q, *prefix, cache, causal=True)

        results.append(of_theirs(run))
    compare(*results, scale=2.0)


# ------------------------------------------------------------------------------------------- pages, rotation, packing


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_append(theirs, data, layout, page_size):
    lengths, new = [33, 5, 100], [3, 0, 7]
    indptr, indices, last, pool = data.pages(lengths, page_size)
    rows = [data.normal(sum(new), KV_HEADS, HEAD_DIM) for _ in "kv"]
    cache, results = data.cache(pool, page_size, layout), []
    for module in (ours, theirs):
        copies = tuple(x.clone() for x in cache)

        def append(module=module, copies=copies):
            seq_lens = module.get_seq_lens(indptr, last, page_size)
            places = module.get_batch_indices_positions(data.starts(new), seq_lens, sum(new))
            module.append_paged_kv_cache(*rows, *places, copies, indices, indptr, last, layout)
            return seq_lens, *places

        results.append((*of_theirs(append), *copies))
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype and data.torch.equal(one, other)


ROTATIONS = {
    "apply_rope": {"rope_scale": 2.0, "rope_theta": 5e5},
    "apply_llama31_rope": {},
    "apply_rope_pos_ids": {},
    "apply_llama31_rope_pos_ids": {"rope_scale": 4.0},
}


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 64])
@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations(theirs, data, name, rotary_dim, interleave):
    counts = [3, 0, 7, 1]
    q, k = data.normal(11, HEADS, HEAD_DIM), data.normal(11, KV_HEADS, HEAD_DIM)
    where = (data.ints(data.rng.integers(0, 4000, 11)),)
    if not name.endswith("pos_ids"):
        where = data.starts(counts), data.ints([0, 3, 1000, 9])
    options = ROTATIONS[name] | {"rotary_dim": rotary_dim, "interleave": interleave}
    results = [of_theirs(lambda m=m: getattr(m, name)(q, k, *where, **options)) for m in (ours, theirs)]
    for one, other in zip(*results, strict=True):  # their angles are float32
        compare(one, other, data.name, scale=2.0)
    for module in (ours, theirs):
        here = q.clone(), k.clone()
        assert of_theirs(lambda m=module, h=here: getattr(m, f"{name}_inplace")(*h, *where, **options)) is None
        for one, other in zip(here, results[1], strict=True):
            compare(one, other, data.name, scale=2.0)


@pytest.mark.parametrize("is_neox", [True, False])
def test_rotation_by_a_table(theirs, data, is_neox):
    query, key = data.normal(7, HEADS * HEAD_DIM), data.normal(7, KV_HEADS * HEAD_DIM)
    table = data.normal(50, 64, dtype=data.torch.float32)
    where = data.torch.tensor(data.rng.integers(0, 50, 7), device=DEVICE)
    given = where, query, key, HEAD_DIM, table, is_neox
    results = [of_theirs(lambda m=m: m.apply_rope_with_cos_sin_cache(*given)) for m in (ours, theirs)]
    for one, other in zip(*results, strict=True):
        compare(one, other, data.name, scale=2.0)


@pytest.mark.parametrize("order", ["big", "little"])
def test_packing(theirs, torch, rng, order):
    data = Data(torch, rng)
    x, ends = data.bools(1003), data.starts([4, 0, 8, 991])
    assert torch.equal(ours.packbits(x, order), of_theirs(lambda: theirs.packbits(x, order)))
    for one, other in zip(
        ours.segment_packbits(x, ends, order),
        of_theirs(lambda: theirs.segment_packbits(x, ends, order)),
        strict=True,
    ):
        assert one.dtype == other.dtype and torch.equal(one, other)
