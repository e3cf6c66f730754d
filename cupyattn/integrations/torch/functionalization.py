"""How compiled graphs write to caches that are views: what PyTorch's own way gets wrong goes by a copy.

PyTorch makes an operator that writes to its arguments one that returns them. On the way it notes where in its storage a
view lies that was made in the graph, and makes it again there from the tensor that it is a view of. That goes wrong

1. if that tensor is itself a part of something larger, as where `a, b = pair` and the pair came in as `pool[1]`. The
   place in the storage is taken for one in the pair: always for slices and before PyTorch 2.13, else if the pair was
   written to before;
2. if the place is not known while PyTorch compiles, under dynamic shapes (in 2.13 it is taken for 0);
3. for a view to another dtype, which is taken for no view.

Of arguments that are parts of one storage and came in so, one is copied, from the storage's beginning: before 2.13 from
as far behind the view (pytorch/pytorch#139628), else correctly, but with all that lies before it.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode

_steps_of_view = getattr(torch._C._functionalization, "get_view_meta_sequence", lambda tensor: ())


def define_copies(library: torch.library.Library) -> Callable[[Tensor], Tensor]:
    """An operator that copies. A clone is left out by PyTorch, which then writes to a view again."""
    library.define("copy_of(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("copy_of", Tensor.clone, "CompositeExplicitAutograd")
    torch.library.register_fake("cupyattn::copy_of", torch.empty_like, lib=library)
    return torch.ops.cupyattn.copy_of.default


def copy_misplaced_views(operator: Any, writes: tuple[str, ...], copy_of: Callable[[Tensor], Tensor]) -> None:
    """Have the operator write to copies of such arguments, and these back, wherever PyTorch makes it return them."""
    signature = inspect.Signature(
        [inspect.Parameter(found.name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for found in operator._schema.arguments]
    )

    def functional(mode: FunctionalTensorMode, *values: Any, **more: Any) -> Any:
        given = signature.bind_partial(*values, **more).arguments
        written = {name: given[name] for name in writes}
        copied = _misplaced(written)
        if not copied:
            return mode.__torch_dispatch__(operator, (), values, more)
        if get_proxy_mode() is not None:  # PyTorch first goes through a call without making a graph
            warnings.warn(_advice(copied), stacklevel=2)
        with mode:
            copies = {name: copy_of(written[name]) for name in copied}
            results = operator(**given | copies)
            for name, copy in copies.items():
                written[name].copy_(copy)
        return results

    operator.py_impl(FunctionalTensorMode)(functional)


def _advice(names: list[str]) -> str:
    return (
        f"{' and '.join(names)}: a view that PyTorch's compiler would misplace. Each call of what is compiled copies it"
        " there and back, under dynamic shapes also what it is a view of. To spare that, pass tensors of their own or "
        "views taken outside, of one tensor for keys and one for values; or compile with dynamic=False"
    )


def _misplaced(written: dict[str, FunctionalTensor]) -> list[str]:
    found: list[str] = []
    roots: dict[int, int] = {}  # of each storage, what its views so far were made of
    for name, tensor in written.items():
        base = tensor._inference_mode_base if torch.is_inference_mode_enabled() else tensor._base
        root = (tensor if base is None else base)._cdata
        storage = torch._from_functional_tensor(tensor.elem).untyped_storage()._cdata
        misplaced = roots.get(storage, root) != root
        if base is None:
            misplaced |= bool(_steps_of_view(tensor.elem))  # to another dtype: PyTorch takes it for no view
        else:
            numbers = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
            misplaced |= base.storage_offset() != 0 or any(type(number) is not int for number in numbers)
        if misplaced:
            found.append(name)
        else:
            roots[storage] = root
    return found
