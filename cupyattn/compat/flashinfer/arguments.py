"""What the arguments of FlashInfer's functions may be, and what they mean to this library's."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np

from ...arrays import refuse
from ...problem import FLOAT_DTYPES, FP8_DTYPES, MAX_HEAD_DIM, check_flag
from .library import Array

LAYOUTS = ("NHD", "HND")
POS_ENCODING_MODES = ("NONE", "ROPE_LLAMA", "ALIBI")
# All mean the same here: the kernels are this library's, which chooses by itself.
BACKENDS = ("auto", "fa2", "fa3", "cudnn", "cutlass", "trtllm-gen", "cute-dsl", "cutile")
FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2")
LSE_BASES = ("log2", "ln")
LSE_LAYOUTS = ("NH", "HN")
MAX_PAGE_SIZE = 512
ROPE_THETA = 1e4
_OTHER_NAMES = {"half": "float16", "float": "float32", "e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}


@dataclass(frozen=True, slots=True)
class Options:
    """What `plan` fixes beside the sequences: checked, and in this library's terms."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int
    page_size: int  # 0: keys are ragged
    q_dtype: str
    kv_dtype: str
    causal: bool = False
    pos_encoding_mode: str = "NONE"
    window_left: int = -1
    logits_soft_cap: float = 0.0
    sm_scale: float | None = None
    rope_scale: float = 1.0
    rope_theta: float = ROPE_THETA
    split_kv: bool = True

    @property
    def fp8(self) -> bool:
        return self.kv_dtype in FP8_DTYPES

    @property
    def alibi(self) -> bool:
        return self.pos_encoding_mode == "ALIBI"

    @property
    def rotates(self) -> bool:
        return self.pos_encoding_mode == "ROPE_LLAMA"

    @property
    def masks(self) -> dict[str, Any]:
        """causal, window and softcap of this library's functions."""
        window = (self.window_left, -1) if self.window_left >= 0 else None
        return {"causal": self.causal, "window": window, "softcap": self.logits_soft_cap or None}

    def softmax_scale(self, *factors: float | None) -> float:
        """The softmax scale, times those factors that are given."""
        scale = 1 / math.sqrt(self.head_dim_qk) if self.sm_scale is None else self.sm_scale
        return math.prod((scale, *[factor for factor in factors if factor is not None]))


def make_options(*sizes: Any, **options: Any) -> Options:
    """`Options` of a plan's arguments. Calls are remembered, as an engine plans the same in every step.

    Args:
        sizes: num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size (None for ragged keys), q_data_type,
            kv_data_type and o_data_type, as `plan` has them.
        options: of its other arguments those that `_make_options` takes.

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.
    """
    try:
        return _remembered_options(*sizes, **options)
    except TypeError:  # perhaps only because an argument cannot be hashed
        return _make_options(*sizes, **options)


def _make_options(
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim_qk: int,
    head_dim_vo: int | None,
    page_size: int | None,
    q_data_type: Any,
    kv_data_type: Any,
    o_data_type: Any,
    *,
    causal: bool = False,
    pos_encoding_mode: str = "NONE",
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    disable_split_kv: bool = False,
) -> Options:
    for name, value in (("num_qo_heads", num_qo_heads), ("num_kv_heads", num_kv_heads)):
        check_int(name, value, 1)
    if num_qo_heads % num_kv_heads:
        expected = f"a multiple of num_kv_heads {num_kv_heads}: each key/value head serves as many query heads"
        refuse("num_qo_heads", num_qo_heads, expected)
    check_int("head_dim_qk", head_dim_qk, 1, MAX_HEAD_DIM)
    if head_dim_vo is not None:
        check_int("head_dim_vo", head_dim_vo, 1, MAX_HEAD_DIM)
    if page_size is not None:
        check_int("page_size", page_size, 1, MAX_PAGE_SIZE)
    q_dtype = dtype_name("q_data_type", q_data_type, FLOAT_DTYPES)
    kv_dtype = q_dtype if kv_data_type is None else dtype_name("kv_data_type", kv_data_type, (q_dtype, *FP8_FORMATS))
    if o_data_type is not None:
        dtype_name("o_data_type", o_data_type, (q_dtype,))
    options = Options(
        int(num_qo_heads),
        int(num_kv_heads),
        int(head_dim_qk),
        int(head_dim_qk if head_dim_vo is None else head_dim_vo),
        0 if page_size is None else int(page_size),
        q_dtype,
        kv_dtype,
        check_flag("causal", causal),
        check_choice("pos_encoding_mode", pos_encoding_mode, POS_ENCODING_MODES),
        check_int("window_left", window_left, -1),
        check_number("logits_soft_cap", logits_soft_cap, 0.0, zero=True),
        None if sm_scale is None else check_number("sm_scale", sm_scale, 1.0, negative=True),
        check_number("rope_scale", rope_scale, 1.0),
        check_number("rope_theta", rope_theta, ROPE_THETA),
        not disable_split_kv,
    )
    _check_encoding(options)
    return options


_remembered_options = lru_cache(maxsize=1024, typed=True)(_make_options)  # 16.0 is not 16


def _check_encoding(options: Options) -> None:
    """Refuse encodings beside what they do not go with."""
    if options.alibi and options.logits_soft_cap:
        refuse("logits_soft_cap", options.logits_soft_cap, "None or 0 beside pos_encoding_mode='ALIBI'")
    if options.rotates and options.fp8:
        expected = "'NONE' beside FP8 keys: rotate them before they are stored, by apply_rope"
        refuse("pos_encoding_mode", "'ROPE_LLAMA'", expected)
    if options.rotates and options.head_dim_qk % 2:
        refuse("head_dim_qk", options.head_dim_qk, "an even number beside pos_encoding_mode='ROPE_LLAMA'")


def check_int(name: str, value: object, least: int, most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        refuse(name, repr(value), "an int", TypeError)
    if value < least or (most is not None and value > most):
        refuse(name, value, f"{least} to {most}" if most is not None else f"at least {least}")
    return int(value)


def check_number(name: str, value: object, default: float, *, zero: bool = False, negative: bool = False) -> float:
    """A finite number above 0, or what is allowed besides; `default` for None."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        refuse(name, repr(value), "a number or None", TypeError)
    number = float(value)
    if not math.isfinite(number) or (number < 0 and not negative) or (not number and not (zero or negative)):
        kinds = (
            "a finite number" if negative else "0 or a finite number above it" if zero else "a finite number above 0"
        )
        refuse(name, number, kinds)
    return number


def check_choice(name: str, value: object, known: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in known:
        refuse(name, repr(value), " or ".join(map(repr, known)))
    return value


def dtype_name(name: str, dtype: Any, known: tuple[str, ...]) -> str:
    """The name of a dtype that may be a string, a torch.dtype or anything NumPy takes for a dtype."""
    if dtype is None or isinstance(dtype, str) or type(dtype).__module__ == "torch":
        text = str(dtype).removeprefix("torch.")
    else:
        try:
            text = np.dtype(dtype).name
        except TypeError:
            text = repr(dtype)
    text = _OTHER_NAMES.get(text, text)
    if text not in known:
        refuse(name, text, " or ".join(known), TypeError)
    return text


def refuse_given(owner: str, **given: Any) -> None:
    """Refuse arguments of FlashInfer that mean something which is not done here."""
    for name, value in given.items():
        if value is not None and value is not False:
            refuse(name, "a value", f"None: cupyattn's {owner} does not have this", NotImplementedError)


def refuse_unplanned() -> NoReturn:
    refuse("plan", "run before plan", "plan first, which says where the sequences are", RuntimeError)


def split_cache(cache: Array | tuple[Array, Array], layout: str, name: str = "paged_kv_cache") -> tuple[Array, Array]:
    """(k_cache, v_cache), 4-D: views of what came as a pair, or as one array with keys and values along axis 1.

    Without an axis for rows of a page, a page has one row.
    """
    if isinstance(cache, (tuple, list)):
        if len(cache) != 2:
            refuse(name, f"{len(cache)} arrays", "the two of (k_cache, v_cache)")
        keys, values = cache
        if getattr(keys, "ndim", None) == 4 == getattr(values, "ndim", None):
            return keys, values
        return _with_rows(keys, layout, f"{name}[0]"), _with_rows(values, layout, f"{name}[1]")
    ndim = getattr(cache, "ndim", None)
    if ndim not in (4, 5) or cache.shape[1] != 2:
        got = f"shape {tuple(cache.shape)}" if ndim is not None else type(cache).__name__
        refuse(name, got, f"{_form(layout, both=True)}, or a tuple (k_cache, v_cache) of {_form(layout)}")
    keys, values = cache[:, 0], cache[:, 1]
    return (keys, values) if ndim == 5 else (_with_rows(keys, layout, name), _with_rows(values, layout, name))


def _with_rows(cache: Array, layout: str, name: str) -> Array:
    ndim = getattr(cache, "ndim", None)
    if ndim == 4:
        return cache
    if ndim != 3:
        got = f"shape {tuple(cache.shape)}" if ndim is not None else type(cache).__name__
        refuse(name, got, _form(layout))
    return cache[:, None] if layout == "NHD" else cache[:, :, None]


def _form(layout: str, both: bool = False) -> str:
    rows = "page_size, num_kv_heads" if layout == "NHD" else "num_kv_heads, page_size"
    return f"(num_pages, {'2, ' if both else ''}{rows}, head_dim) for kv_layout {layout!r}"
