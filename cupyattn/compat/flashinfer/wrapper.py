"""What the wrappers share: the workspace buffer, the steps of the last plan, and results as FlashInfer has them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ...arrays import numpy_dtype, refuse, view
from ...problem import check_flag
from ...streams import device_of
from .arguments import BACKENDS, LAYOUTS, Options, check_choice, make_options, refuse_given, refuse_unplanned
from .library import Array, library_of
from .lse import check_target, deliver_lse, lse_form, unit
from .steps import Home, Results

Make = Callable[[Options], Any]
"""A step of the planned sequences, from the options."""


class Wrapper:
    """A workspace buffer, and what `plan` left for the runs.

    The kernels of this library bring their own workspace. The buffer says where the wrapper works, on which device and
    with which library's arrays, and must be as large as what the kernels would take of it: on the CPU nothing.
    """

    def __init__(
        self, float_workspace_buffer: Array, kv_layout: str, use_cuda_graph: bool, backend: str, **unsupported: Any
    ) -> None:
        check_choice("kv_layout", kv_layout, LAYOUTS)
        check_choice("backend", backend, BACKENDS)
        refuse_given(type(self).__name__, **unsupported)
        self._kv_layout = kv_layout
        self._use_cuda_graph = bool(use_cuda_graph)
        self._workspace = view(float_workspace_buffer, "float_workspace_buffer")
        library = library_of(self._workspace, "float_workspace_buffer")
        self._home = Home(library, _nbytes(self._workspace))
        self._forget()

    def _forget(self) -> None:
        """As before any plan."""
        self._step: Any = None
        self._options: Options | None = None
        self._make: Make | None = None
        self._shift_of: Callable[[], np.ndarray] | None = None
        self._shifts: dict[bool | str, Array] = {}

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._use_cuda_graph

    def reset_workspace_buffer(self, float_workspace_buffer: Array, int_workspace_buffer: Array) -> None:
        """Take another buffer, of the same library and device. The one for integers is accepted, and not needed."""
        found = view(float_workspace_buffer, "float_workspace_buffer")
        self._home.check_here("float_workspace_buffer", found)
        self._workspace, self._home.workspace_bytes = found, _nbytes(found)

    def end_forward(self) -> None:
        """Of no effect, as in FlashInfer."""

    def _set(self, options: Options, make: Make, shift_of: Callable[[], np.ndarray]) -> None:
        """Take in what plan found out; shift_of gives what FlashInfer's lse is more by under ALiBi, (rows,) tokens."""
        step = make(options)  # before anything changes: a plan that is refused leaves the last one in force
        self._step, self._options, self._make = step, options, make
        self._shift_of, self._shifts = shift_of, {}

    def _again_with(self, dtype: str | None = None, **changed: Any) -> None:
        """Plan the same sequences with other options, as the old `forward` passes them; dtype: of q and keys."""
        if self._options is None:
            refuse_unplanned()
        o = self._options
        sizes = o.num_qo_heads, o.num_kv_heads, o.head_dim_qk, o.head_dim_vo, o.page_size or None
        others = {"causal": o.causal, "disable_split_kv": not o.split_kv} | changed
        options = make_options(*sizes, dtype or o.q_dtype, dtype or o.kv_dtype, None, **others)
        if options != o:
            self._set(options, self._make, self._shift_of)

    def _attend(
        self,
        q: Array,
        k: Array,
        v: Array,
        out: Array | None,
        lse: Array | None,
        return_lse: bool,
        sinks: Array | None,
        q_scale: float | None,
        k_scale: float | Array | None,
        v_scale: float | Array | None,
        lse_base: str = "log2",
        lse_layout: str = "NH",
    ) -> Array | tuple[Array, Array]:
        """Run the step, and bring the lse into its layout if it is asked for."""
        if self._step is None:
            refuse_unplanned()
        if return_lse is not True and not check_flag("return_lse", return_lse):
            return self._step.run(q, k, v, out, False, sinks, q_scale, k_scale, v_scale)[0]
        with self._on_device():
            if lse is not None:
                shape = view(q, "q").shape[:2]
                check_target(lse, shape if lse_layout == "NH" else shape[::-1], self._home.library)
            form = lse_form(lse_base)
            shift = self._lse_shift(form)
            result, found = self._step.run(q, k, v, out, form, sinks, q_scale, k_scale, v_scale)
            return result, deliver_lse(self._home.library, found, lse_layout, lse, shift)

    def _natural(self, q: Array, k: Array, v: Array) -> Results:
        """Output and natural lse (rows, heads), counted as FlashInfer does, for merging."""
        if self._step is None:
            refuse_unplanned()
        shift = self._lse_shift(True)
        out, lse = self._step.run(q, k, v, None, True)
        return out, lse if shift is None else lse + shift

    def _lse_shift(self, form: bool | str) -> Array | None:
        """What an lse of this form is more by in FlashInfer, float32 (rows, heads): nothing but under ALiBi.

        Its bias counts from the sequence's first query, slope * (key - query); this library's from the diagonal, so
        that what all keys of a row lose is different. The output is the same.
        """
        if not self._options.alibi:
            return None
        if self._use_cuda_graph:
            refuse("return_lse", "True beside ALIBI in a wrapper for CUDA graphs", "False, or 'NONE' or 'ROPE_LLAMA'")
        if form not in self._shifts:
            tokens = self._home.library.asarray((self._shift_of() * unit(form)).astype(np.float32))
            self._shifts[form] = tokens[:, None] * self._home.slopes(self._options)
        return self._shifts[form]

    def _on_device(self) -> Any:
        return device_of(self._workspace)


def _nbytes(found: Any) -> int:
    return math.prod(found.shape) * numpy_dtype(found.dtype).itemsize
