"""How compiled graphs write to caches that are views: what PyTorch's own way gets wrong goes by a copy.

PyTorch makes an operator that writes to its arguments one that returns them, and on the way describes a view by its
place in the storage. It takes that for the place in the tensor that the view was made of. So a view made in the graph
is looked for elsewhere if that tensor is a view itself (a slice in all versions so far, any other before 2.13), or if
its place is not a number yet (in 2.13). And where both caches are parts of one storage, that is copied from its
beginning, which before 2.13 is taken to be the view's (pytorch/pytorch#139628).
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

_MISPLACES_ALL_VIEWS = torch.__version__ < "2.13"


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
        storage = torch._from_functional_tensor(tensor.elem).untyped_storage()._cdata
        root = (tensor if base is None else base)._cdata
        misplaced = roots.get(storage, root) != root
        if base is not None:
            known = all(type(one) is int for one in (*tensor.shape, *tensor.stride(), tensor.storage_offset()))
            is_slice = base.stride() == tensor.stride()
            misplaced |= not known or (base.storage_offset() != 0 and (_MISPLACES_ALL_VIEWS or is_slice))
        if misplaced:
            found.append(name)
        else:
            roots[storage] = root
    return found
