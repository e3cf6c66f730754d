"""Plans for chips that need not be present."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import CAUSAL, FULL, make_problem, make_step

from cupyattn.plan import (
    COUNTER_BYTES,
    DECODE_BATCH,
    DEVICES,
    HOPPER_SECTION,
    HOPPER_TILES,
    KERNELS,
    STATIC_SHARED,
    HopperTile,
    effective_window,
    plan,
    prefix_kernel,
    warmup_variants,
)


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("head_dim", range(1, 257, 5))
def test_every_head_dim_has_a_tile_that_fits(arch, head_dim):
    device = DEVICES[arch]
    for shaped in ({}, {"softcap": 20.0}, {"alibi": "heads"}):
        made = plan(make_problem(head_dim, **shaped), device)
        assert made.kernel in KERNELS
        assert made.shared_bytes <= device.shared_per_block


def test_float32_never_takes_the_tensor_cores():
    made = plan(make_problem(64, dtype="float32"), DEVICES["90a"])
    assert made.kernel == "forward_simt"
    with pytest.raises(ValueError, match="kernel: got 'forward_sm80', expected .*round float32"):
        plan(make_problem(64, dtype="float32"), DEVICES["90a"], "forward_sm80")


@pytest.mark.parametrize(
    ("arch", "dtype", "kernel"),
    [
        ("70", "float16", "forward_simt"),
        ("75", "float16", "forward_sm80"),
        ("75", "bfloat16", "forward_simt"),
        ("80", "bfloat16", "forward_sm80"),
        ("90a", "float16", "forward_sm90"),
        ("90a", "bfloat16", "forward_sm90"),
        ("100a", "bfloat16", "forward_sm80"),
        ("120a", "float16", "forward_sm80"),
    ],
)
def test_kernel_of_a_chip(arch, dtype, kernel):
    assert plan(make_problem(128, dtype=dtype), DEVICES[arch]).kernel == kernel


def test_unknown_kernel_and_ancient_chip_are_refused():
    with pytest.raises(ValueError, match="kernel: got 'fast', expected 'auto'"):
        plan(make_problem(64), DEVICES["90a"], "fast")
    with pytest.raises(ValueError, match="device: got .*sm_61.* expected compute capability 7.0"):
        plan(make_problem(64), dataclasses.replace(DEVICES["70"], arch="61"))


def test_decode_packs_the_group_and_prefill_does_not():
    step = make_problem(128, packed_q=False, seqlen_q=1, total_q=64)
    forward = plan(step, DEVICES["90a"], "forward_sm80")
    assert forward.group == 4
    assert forward.grid == 64 * 8
    assert plan(step, DEVICES["90a"]).group == 4
    assert plan(make_problem(128), DEVICES["90a"]).group == 1


def test_few_rows_take_small_tiles():
    few = make_problem(128, batch=1, seqlen_q=512, total_q=512, num_heads=8, num_kv_heads=8)
    few = dataclasses.replace(few, cache=dataclasses.replace(few.cache, rows=512))  # too few keys to share out
    assert plan(few, DEVICES["80"]).tile_rows == 64
    assert plan(make_problem(128), DEVICES["80"]).tile_rows == 128


def test_sides_of_the_window_that_hide_nothing_are_dropped():
    assert effective_window(make_problem(64, window=(10_000, 5))) == (-1, 5)
    assert effective_window(make_problem(64, window=(4, 4095))) == (4, -1)
    assert effective_window(make_problem(64, seqlen_q=1, total_q=64, window=CAUSAL)) == FULL
    assert effective_window(make_problem(64, window=CAUSAL)) == CAUSAL


@pytest.mark.parametrize("arch", ["80", "90a"])
@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 700), min_size=1, max_size=40),
    heads=st.sampled_from([(8, 8), (8, 2), (12, 1), (12, 4)]),
)
def test_the_grid_of_packed_queries_covers_every_split_of_the_rows(arch, lengths, heads):
    """It is made from the total alone, but any lengths of that total must find a block, or a turn of one, for each
    tile."""
    num_heads, num_kv_heads = heads
    total = sum(lengths) + 17  # rows behind the last sequence count as one more
    problem = make_problem(
        64, "packed", batch=len(lengths), total_q=total, seqlen_q=total, num_heads=num_heads, num_kv_heads=num_kv_heads
    )
    made = plan(problem, DEVICES[arch])
    tiles = sum(-(-length * made.group // made.tile_rows) for length in [*lengths, 17])
    assert max(made.grid, made.total_tiles) >= tiles * (num_kv_heads if made.group > 1 else num_heads)


def test_plans_are_equal_for_equal_problems():
    assert plan(make_problem(96), DEVICES["80"]) == plan(make_problem(96), DEVICES["80"])


@pytest.mark.parametrize(("arch", "forward"), [("80", "forward_sm80"), ("90a", "forward_sm90")])
def test_warmup_covers_prefill_decode_and_append(arch, forward):
    variants = warmup_variants(arch, (128,), ("bfloat16",))
    assert {name for name, _ in variants} == {forward, "decode", "append_kv"}
    assert len(variants) == len(set(variants))
    assert any(dict(defines).get("GROUP") == 4 for _, defines in variants)


def test_a_wrong_hint_never_overflows_the_rows_of_a_packed_group():
    problem = make_problem(64, "packed", total_q=2**29, seqlen_q=1, num_heads=8, num_kv_heads=1)
    assert plan(problem, DEVICES["90a"]).group == 1


def test_a_grid_that_no_launch_can_have_is_refused():
    problem = make_problem(
        64, packed_q=False, batch=2**20, seqlen_q=2**10, total_q=2**30, num_heads=512, num_kv_heads=512
    )
    with pytest.raises(ValueError, match="q: got .* thread blocks, expected at most"):
        plan(problem, DEVICES["90a"])


@pytest.mark.parametrize("arch", [arch for arch, device in DEVICES.items() if device.capability >= 80])
@pytest.mark.parametrize("head_dim", [1, 8, 40, 64, 96, 128, 192, 255, 256])
def test_decode_fits_every_chip(arch, head_dim):
    """Whatever the group, the queries, the cache's dtype and the batch."""
    device = DEVICES[arch]
    for kv_dtype in ("float16", "float8_e5m2"):
        for group in (1, 4, 7, 16, 71):
            for seqlen_q in (1, 3, 16, 200):
                for batch in (1, 9, 300, DECODE_BATCH):
                    step = make_step(head_dim, batch=batch, seqlen_q=seqlen_q, group=group, kv_dtype=kv_dtype)
                    made = plan(step, device, "decode")
                    assert made.kernel == "decode"
                    assert made.shared_bytes <= device.shared_per_block
                    assert made.row_blocks * made.tile_rows >= seqlen_q * group > (made.row_blocks - 1) * made.tile_rows
                    assert made.threads <= 256 and made.grid % made.cluster == 0 and 0 < made.grid
                    assert 4 * made.grid <= COUNTER_BYTES < made.workspace_bytes


def test_who_takes_decode():
    def kernel(arch, **changes):
        return plan(make_step(128, **changes), DEVICES[arch]).kernel

    assert kernel("80") == kernel("90a") == "decode"
    assert kernel("90a", seqlen_q=16) == "decode"
    assert kernel("80", seqlen_q=17) == kernel("75") == kernel("80", batch=DECODE_BATCH + 1) == "forward_sm80"
    assert kernel("90a", seqlen_q=17) == kernel("90a", batch=DECODE_BATCH + 1) == "forward_sm90"
    assert kernel("90a", seqlen_q=17, kv_dtype="float8_e4m3fn") == "decode"
    assert kernel("90a", dtype="float32", kv_dtype="float32") == "forward_simt"


def test_what_decode_cannot_take_is_refused():
    with pytest.raises(ValueError, match="kernel: got 'decode', expected 'auto': .* asynchronous copies"):
        plan(make_step(128), DEVICES["75"], "decode")
    with pytest.raises(ValueError, match="kernel: got 'decode', expected 'auto': .* float32"):
        plan(make_step(128, dtype="float32", kv_dtype="float32"), DEVICES["90a"], "decode")
    with pytest.raises(ValueError, match="kv_dtype: got 'float8_e4m3fn', expected a cache of q's dtype"):
        plan(make_step(128, kv_dtype="float8_e4m3fn"), DEVICES["75"])
    with pytest.raises(ValueError, match="kernel: got 'forward_sm80', expected 'auto' or 'decode', which alone reads"):
        plan(make_step(128, kv_dtype="float8_e4m3fn"), DEVICES["90a"], "forward_sm80")


def test_few_units_are_merged_in_clusters_only_where_chips_have_them():
    few = make_step(128, batch=1, rows=1024)
    assert plan(few, DEVICES["90a"]).cluster > 1
    assert plan(few, DEVICES["80"]).cluster == 1
    assert plan(make_step(128), DEVICES["90a"]).cluster == 1


def test_decode_shares_out_whole_units_where_there_are_enough():
    """Side by side as many kv heads as leave a unit to each worker; not many of these go without."""
    device = DEVICES["90a"]
    for batch, heads, grid in ((16, 1, 128), (32, 2, 128), (64, 4, 128), (128, 8, 128), (256, 8, 128), (17, 1, 132)):
        made = plan(make_step(128, batch=batch), device)
        defines = dict(made.defines)
        assert (defines["HEAD_TEAMS"], defines["HEAD_TEAMS"] * defines["KEY_TEAMS"], made.grid) == (heads, 8, grid)
    for kv_heads, group, batch, seqlen_q in ((8, 1, 64, 1), (8, 4, 64, 3), (8, 1, 130, 1), (6, 2, 150, 2)):
        step = make_step(64, batch=batch, group=group, seqlen_q=seqlen_q)  # as in tests/test_decode.py
        step = dataclasses.replace(step, num_heads=kv_heads * group, num_kv_heads=kv_heads)
        assert dict(plan(step, device).defines)["HEAD_TEAMS"] > 1
    for arch, device in DEVICES.items():
        if device.capability >= 80:
            for batch in range(1, 70):  # and never so few that a chip stands still
                made = plan(make_step(64, batch=batch), device)
                assert made.grid >= device.multiprocessors * 7 // 8 - 8, (arch, batch)


def test_a_single_sequence_is_cut_by_constants():
    """Every unit in as many shares, of which no length need be known; not where the caller says how many."""
    shares = {rows: dict(plan(make_step(128, batch=1, rows=rows), DEVICES["90a"]).defines)["UNIT_SHARES"]
              for rows in (512, 1024, 2048, 2**20)}  # fmt: skip
    assert shares == {512: 1, 1024: 1, 2048: 16, 2**20: 16}
    growing = [make_step(128, batch=1, group=16, rows=rows) for rows in range(16, 9000, 16)]
    assert len({plan(step, DEVICES["80"]).defines for step in growing}) <= 8
    assert dict(plan(make_step(128, batch=1, num_splits=3), DEVICES["90a"]).defines)["UNIT_SHARES"] == 0
    odd = plan(make_step(128, batch=1, group=1), dataclasses.replace(DEVICES["90a"], multiprocessors=15))
    assert dict(odd.defines)["UNIT_SHARES"] == 0 and odd.grid == 15


@pytest.mark.parametrize(("kernel", "most"), [("forward_sm80", 16), ("forward_sm90", 8)])
def test_the_forward_kernel_splits_keys_where_rows_are_few(kernel, most):
    """64 rows of 32/8 heads make 16 tiles. On each of 132 multiprocessors run two blocks of forward_sm80, or one of
    forward_sm90."""

    def splits(rows, keys, **changes):
        problem = make_problem(128, packed_q=False, batch=1, seqlen_q=rows, total_q=rows, window=FULL, **changes)
        problem = dataclasses.replace(problem, cache=dataclasses.replace(problem.cache, rows=keys))
        made = plan(problem, DEVICES["90a"], kernel)
        tiles = made.total_tiles if kernel == "forward_sm90" else made.grid
        assert dict(made.defines)["KV_SPLITS"] == (made.kv_splits > 1) and tiles % made.kv_splits == 0
        assert (made.workspace_bytes > COUNTER_BYTES) == (made.kv_splits > 1)
        assert (made.kv_splits > 1) == any("share the keys of a tile" in reason for reason in made.reasons)
        return made.kv_splits

    assert splits(64, 32768) == splits(64, 2**20) == most  # 16 tiles fill the chip with as many splits
    assert splits(64, 2048) == 4 and splits(64, 1000) == 1
    assert splits(4096, 32768) == 1 and splits(64, 32768, sinks=True) == 1
    assert splits(64, 32768, num_splits=3) == 3 and splits(64, 1000, num_splits=1000) == most
    assert splits(4096, 32768, num_splits=1000) == 1 and splits(512, 32768) == 1  # tiles enough
    assert plan(make_problem(128, "paged", window=FULL), DEVICES["90a"], kernel).kv_splits == 1  # packed by cu_seqlens


def test_who_reads_a_shared_prefix():
    device = DEVICES["90a"]
    assert prefix_kernel(make_step(128, batch=15), device, False) == "decode"
    assert prefix_kernel(make_step(128, batch=16), device, False) == "forward_sm80", "as few queries would go to decode"
    assert prefix_kernel(make_step(128, batch=17), device, False) == "auto", "forward_sm90 where that can"
    assert prefix_kernel(make_step(128), device, True) == "decode"
    assert prefix_kernel(make_step(128, kv_dtype="float8_e4m3fn"), device, False) == "decode"
    assert prefix_kernel(make_step(128), DEVICES["75"], False) == "auto"
    assert prefix_kernel(make_step(128, dtype="float32", kv_dtype="float32"), device, False) == "auto"


def test_places_in_the_line_count_in_32_bits():
    """A table that could hold more tiles than that cuts the line at several tiles."""
    usual = dict(plan(make_step(128), DEVICES["90a"]).defines)["POSITION_TILES"]
    huge = dict(plan(make_step(128, batch=2048, rows=2**30), DEVICES["90a"]).defines)["POSITION_TILES"]
    assert usual == 1
    assert 2048 * 8 * 2**30 / 16 / huge < 2**31
    assert dict(plan(make_step(128, num_splits=3), DEVICES["90a"]).defines)["POSITION_TILES"] == 1


def test_more_query_rows_than_32_bits_count_are_not_decodes():
    with pytest.raises(ValueError, match="kernel: got 'decode', expected 'auto': .* in 32 bits"):
        plan(make_step(128, batch=1, seqlen_q=2**29), DEVICES["90a"], "decode")


# ------------------------------------------------------------------------------------------------------- Hopper

HOPPER = DEVICES["90a"]


@pytest.mark.parametrize("window", [FULL, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_hopper_tiles_fit(head_dim, window):
    """Shared memory and registers of a multiprocessor, whatever the width of values."""
    for head_dim_v in (8, 64, 72, 128, 192, 256, head_dim):
        made = plan(make_problem(head_dim, head_dim_v=head_dim_v, window=window), HOPPER, "forward_sm90")
        assert made.shared_bytes + STATIC_SHARED <= HOPPER.shared_per_block
        defines = dict(made.defines)
        loading, computing = defines["PRODUCER_REGISTERS"], defines["CONSUMER_REGISTERS"]
        assert 24 <= loading and computing <= 255 and loading % 8 == computing % 8 == 0
        assert 128 * (loading + defines["CONSUMERS"] * computing) <= 64 << 10
        assert made.threads == 128 * (1 + defines["CONSUMERS"])
        assert -(-head_dim_v // 64) % defines["OUT_BLOCKS"] == 0, "columns leave in equal parts"


def test_a_hopper_tile_counts_its_arrays():
    """Of bfloat16 in blocks of 64 columns, and what aligns them."""
    tile = HopperTile(consumers=2, keys=96, stages=3, query_stages=1, out_columns=128)
    queries, keys, values, out = 2 * 64 * 192, 3 * 96 * 192, 3 * 96 * 128, 2 * 64 * 128
    assert tile.shared_bytes(136, 128) == 2 * (queries + keys + values + out) + 1024
    assert (tile.rows, tile.warps) == (128, 12)
    assert tile.shared_bytes(136, 136) == 2 * (queries + 2 * keys + 2 * 64 * 64) + 1024, "three blocks leave one by one"


def with_cache(problem, **changes):
    return dataclasses.replace(problem, cache=dataclasses.replace(problem.cache, **changes))


HOPPER_OBSTACLES = {
    "its head dimensions are multiples of 8 up to 256": make_problem(100),
    "the copy engine wants rows at multiples of 16 bytes": make_problem(128, alignment=8),
    "the copy engine wants rows at multiples of 16 bytes ": make_problem(128, out_alignment=8),
    "there are no keys": with_cache(make_problem(128), rows=0),
    "there are no keys ": with_cache(make_problem(128), entries=0),
    "the copy engine knows no negative strides": make_problem(128, q_strides=(8, -8, 8)),
    "the copy engine knows no negative strides ": with_cache(make_problem(128), v_strides=(8, 8, -8)),
}


@pytest.mark.parametrize("reason", HOPPER_OBSTACLES)
def test_what_the_hopper_kernel_cannot_take_is_refused_and_falls_back(reason):
    problem, reason = HOPPER_OBSTACLES[reason], reason.strip()
    with pytest.raises(ValueError, match=f"^kernel: got 'forward_sm90', expected 'auto' or another kernel: {reason}$"):
        plan(problem, HOPPER, "forward_sm90")
    made = plan(problem, HOPPER)
    assert made.kernel == "forward_sm80"
    assert made.reasons[0] == f"float16 on sm_90a takes the tensor cores, not forward_sm90: {reason}"


def test_the_hopper_kernel_is_hoppers():
    for arch in ("80", "100a", "120a"):
        with pytest.raises(ValueError, match=f"kernel: got 'forward_sm90', .* sm_{arch} is no Hopper"):
            plan(make_problem(128), DEVICES[arch], "forward_sm90")
    with pytest.raises(ValueError, match="kernel: got 'forward_sm90', .* round float32"):
        plan(make_problem(128, dtype="float32"), HOPPER, "forward_sm90")
    with pytest.raises(ValueError, match="kernel: got 'forward_sm90', .* 'decode', which alone reads FP8 caches"):
        plan(make_step(128, kv_dtype="float8_e5m2"), HOPPER, "forward_sm90")


@pytest.mark.parametrize(
    ("batch", "seqlen", "heads", "tiles", "blocks"),
    [(1, 128, (4, 4), 4, 4), (1, 129, (4, 4), 8, 8), (2, 4096, (32, 8), 2048, 132), (3, 100, (8, 2), 24, 24)],
)
def test_blocks_of_the_hopper_kernel_take_tiles_in_turn(batch, seqlen, heads, tiles, blocks):
    num_heads, num_kv_heads = heads
    rows = {"batch": batch, "seqlen_q": seqlen, "total_q": batch * seqlen, "packed_q": False, "num_splits": 1}
    made = plan(make_problem(128, num_heads=num_heads, num_kv_heads=num_kv_heads, **rows), HOPPER)
    assert (made.total_tiles, made.grid, made.workspace_bytes) == (tiles, blocks, COUNTER_BYTES)
    assert made.reasons[-1] == f"{blocks} blocks stay and take {tiles} tiles in turn"
    none = plan(make_problem(128, packed_q=False, batch=0, total_q=0), HOPPER)
    assert (none.total_tiles, none.grid) == (0, 0)


@pytest.mark.parametrize(("group", "box"), [(1, (1, 64)), (3, (3, 21)), (4, (4, 16)), (64, (64, 1)), (65, (1, 64))])
def test_a_product_takes_whole_groups_of_heads(group, box):
    """Which leaves some of its 64 rows unused where they are no multiple, and packs no group that is larger."""
    few = {"batch": 2, "seqlen_q": 20, "total_q": 40, "packed_q": False}
    made = plan(make_problem(128, num_heads=8 * group, num_kv_heads=8, **few), HOPPER, "forward_sm90")
    assert (made.group, made.query_box) == (box[0], box)
    assert made.tile_rows == dict(made.defines)["TILE_M"] == 2 * box[0] * box[1]


def test_copies_of_keys_lie_within_a_block_of_the_cache():
    def box(problem):
        made = plan(problem, HOPPER, "forward_sm90")
        defines = dict(made.defines)
        assert defines["GATHER"] == (made.key_box == 0) and made.tile_keys == 128
        return made.key_box

    assert box(make_problem(128)) == box(make_problem(128, "packed")) == 128
    paged = make_problem(128, "paged")
    sizes = {size: box(with_cache(paged, block_size=size)) for size in (1, 3, 8, 16, 24, 64, 100, 128, 256)}
    assert sizes == {1: 0, 3: 0, 8: 8, 16: 16, 24: 8, 64: 64, 100: 0, 128: 128, 256: 128}
    assert box(dataclasses.replace(paged, leftpad=True)) == 0, "rows are shifted against the blocks"


def test_sections_of_the_hopper_kernel():
    """Under a mask so many heads side by side that long tiles of one end beside short ones of others, in L2."""
    least, most = HOPPER_SECTION
    for seqlen in (256, 1024, 4096, 16384):
        rows = {"batch": 16384 // seqlen, "seqlen_q": seqlen, "total_q": 16384, "packed_q": False}
        pairs = rows["batch"] * 32
        full, causal = (plan(make_problem(128, window=window, **rows), HOPPER) for window in (FULL, CAUSAL))
        section = causal.pairs_per_section
        assert full.pairs_per_section == 1
        assert min(pairs, least) <= section <= min(pairs, most)
        assert section < 32 or section % 32 == 0, "whole sequences"
        assert plan(make_problem(128, **rows), HOPPER, pairs_per_section=3).pairs_per_section == 3


@pytest.mark.parametrize("tiles", HOPPER_TILES, ids=lambda tiles: str(tiles.head_dim))
def test_hopper_tiles_by_lengths(tiles):
    """Few keys, many keys, many keys and few rows; in one piece, in blocks for boxes, and in blocks of 1."""

    def chosen(seqlen_q, seqlen_k, kind="dense", block_size=16, window=CAUSAL):
        lengths = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "packed_q": False, "total_q": 4 * seqlen_q}
        problem = make_problem(tiles.head_dim, kind, batch=4, window=window, **lengths)
        return tiles.choose(with_cache(problem, block_size=block_size), window != FULL)

    for most, window in ((tiles.many_masked, CAUSAL), (tiles.many_full, FULL)):
        assert chosen(512, 512, window=window) == tiles.few
        if most is not None:
            longest = max(most, tiles.many_queries)
            assert chosen(longest, most, window=window) == tiles.many
            assert chosen(longest, most - 1, window=window) == tiles.few
            assert chosen(longest, most, "paged", window=window) == tiles.paged
            assert chosen(longest, most, "paged", block_size=1, window=window) == tiles.lean
    assert chosen(32, 1 << 16).consumers == 2 and chosen(512, 512, "paged") == tiles.lean


def test_a_hopper_tile_may_be_insisted_on():
    tile = HopperTile(consumers=3, keys=96, stages=2, query_stages=1, out_columns=64)
    made = plan(make_problem(128), HOPPER, tile=tile)
    defines = dict(made.defines)
    assert (made.tile_rows, made.tile_keys, made.stages, made.threads) == (192, 96, 2, 512)
    assert (defines["CONSUMERS"], defines["QUERY_STAGES"], defines["OUT_BLOCKS"]) == (3, 1, 1)
    assert made.shared_bytes == tile.shared_bytes(128, 128)
