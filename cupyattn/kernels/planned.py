"""Launches that cost the host little more than the driver's own calls: what `DecodePlan` and `PrefillPlan` run on CUDA.

A RawKernel looks at its arguments anew in every call. Here the kernels' arguments stay in memory, one copy for each
thread, and only addresses that have changed are looked at and written into them.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache, partial
from operator import attrgetter, itemgetter
from types import ModuleType
from typing import Any, NamedTuple
from weakref import ref

import numpy as np

from ..arrays import View, contiguous_strides, numpy_dtype, torch_stream
from ..streams import refuse_foreign_stream
from .launch import KEPT_MAPS, make_context
from .launches import Launch, launches
from .operands import Operands
from .tensor_map import MAP_BYTES
from .workspace import Workspace, keep_if_captured

Addresses = Sequence[int]
"""Of the arrays that are read, in the order of a plan's roles; 0 for an array that there is not."""

Check = Callable[[Addresses, int], None]
"""(addresses, address of out): raises where these do not fit."""

_MARK = 0x5EED << 48  # and a few behind it: nothing else in an argument is like these

_Form = tuple[tuple[int, ...], tuple[int, ...], np.dtype, int]
"""Shape, strides in bytes, dtype and device, as a CuPy array has them."""


class Bound(NamedTuple):
    """The launches of a planned call on one stream and on arrays at known addresses, which can be made again."""

    launch: Callable[[], None]
    stream: int
    memory: Any  # of their arguments: nothing of it is written again


class Planned:
    """A prepared call of one or several launches, for arrays of one form.

    Calls must not overlap one another if there is memory, which is theirs alone.
    """

    __slots__ = ("prepared", "memory", "_roles", "_check", "_inputs", "_template", "_launches", "_of_thread", "_kept")
    __slots__ += ("_quick", "_order", "_lock")

    def __init__(
        self,
        prepared: Any,
        memory: Workspace | None,
        operands: Operands,
        roles: tuple[str, ...],
        seen: Operands,
        lse_shape: tuple[int, ...] | None,
        check: Check,
    ) -> None:
        """The device is the current one. `operands` are an example, `roles` the names there of what is read.

        seen: the operands in the forms in which arrays come and go, whose addresses are the same; memory: of
        `launches.workspace_bytes`, None for 0; lse_shape: None if no lse is asked for; check: sees all addresses before
        they are used.
        """
        from cupy_backends.cuda.api import driver

        self.prepared = prepared
        self.memory = memory
        self._roles = roles
        self._check = check
        self._inputs = attrgetter(*roles)
        made = launches(prepared, _marked(operands, roles, lse_shape is not None), memory)
        self._template = _Template(made, len(roles))
        self._launches = []
        for launch in made:
            form = launch.kernel.function.kernel.ptr, launch.grid, 1, 1, launch.threads, 1, 1, launch.shared_bytes
            self._launches.append(partial(driver.launchKernel, *form))
        self._of_thread = threading.local()
        self._lock = threading.Lock()
        self._kept = memory is None
        self._quick = _Quick(seen, self._inputs(seen), lse_shape)
        self._argument()  # a graph may be captured before anything else is run
        _look_closely_after_fork()

    def trust_addresses(self, order: Sequence[tuple[str, ...]], length: int | None) -> None:
        """Check none: all arrays come from an allocator that aligns them and gives no two the same memory.

        order: for `bind`, the names in `Operands` of what each address is for. length: of all sequences, if that is a
        number.
        """
        self._check = _no_check
        self._order = [self._template.targets([*self._roles, "out", "lse"], names) for names in order]
        for word in self._template.length:
            self._template.words[word] = length

    def __call__(self, operands: Operands, stream: int) -> None:
        """Launch on `stream`, a cudaStream_t of the current device. Returns at once."""
        argument = self._argument()
        for i, found in enumerate(self._inputs(operands)):
            argument.put(i, 0 if found is None else found.pointer, _never)
        argument.put_out(operands.out.pointer, _never)
        if operands.lse is not None:
            argument.write(self._template.lse, operands.lse.pointer)
        if operands.uniform_length is not None:
            argument.write(self._template.length, operands.uniform_length)
        self._enqueue(argument, stream)

    def bind(self, addresses: tuple[int, ...], stream: int) -> Bound:
        """The launches for arrays of the planned forms that are known by their addresses alone: see `trust_addresses`.

        They are any thread's, and `launch` makes them.
        """
        argument = _Argument(self._template, [False] * len(self._roles))
        for address, (places, maps) in zip(addresses, self._order, strict=True):
            argument.write(places, address)
            for first, encode in maps:
                argument.write_map(first, encode(address))
        launches = [
            partial(launch, stream, location, 0)
            for launch, location in zip(self._launches, argument.locations, strict=True)
        ]
        return Bound(launches[0] if len(launches) == 1 else partial(self._in_turn, launches), stream, argument)

    def _in_turn(self, launches: Sequence[Callable[[], None]]) -> None:
        """What one leaves in the plan's memory is for the next, and not for another thread's."""
        with self._lock:
            for launch in launches:
                launch()

    def launch(self, bound: Bound, captured: bool) -> None:
        """Launch what `bind` gave. captured: whether its stream is being captured."""
        if not hasattr(self._of_thread, "ready"):
            make_context()
            self._of_thread.ready = True
        try:
            if captured and not self._kept:
                self._kept = keep_if_captured(self.memory, bound.stream)
            bound.launch()
        except Exception as error:
            refuse_foreign_stream(error, self._quick.device)
            raise

    def quick(self, arrays: tuple[Any, ...], length: int, out: Any) -> Any:
        """Launch for CuPy arrays or PyTorch tensors that are in every way as the example was, on the stream of theirs.

        They come in the order of the roles. length is that of all sequences, -1 if an array has them or all rows are in
        use. Returns the result, or None and launches nothing if that is not what came.
        """
        quick = self._quick
        if quick.current_device() != quick.device:
            return None
        if type(arrays[0]) is not quick.kind:
            return self._quick_tensors(arrays, length, out)
        argument = self._argument()
        for array, reference in zip(arrays, argument.references):  # noqa: B905 (a check of the lengths takes its time)
            if reference() is not array or (array is None and reference is not _absent):
                if not self._look(argument, arrays):
                    return None
                break
        if out is not None:
            if argument.out_reference() is not out:
                address = quick.address_of(out, quick.out_form)
                if address is None:
                    return None
                argument.put_out(address, ref(out))
        elif quick.makes_out:
            memory = quick.allocate(quick.out_bytes)
            out = quick.kind(quick.out_form[0], quick.out_form[2], memory)
            argument.put_out(memory.ptr, _never)
        else:
            return None
        if length >= 0:
            argument.write(self._template.length, length)
        stream = quick.current_stream().ptr
        if quick.lse_shape is None:
            self._enqueue(argument, stream)
            return out
        memory = quick.allocate(quick.lse_bytes)
        argument.write(self._template.lse, memory.ptr)
        self._enqueue(argument, stream)
        return out, quick.kind(quick.lse_shape, quick.lse_dtype, memory)

    def _quick_tensors(self, tensors: tuple[Any, ...], length: int, out: Any) -> Any:
        """The same for PyTorch tensors. Each is looked at anew: all of it can change in place but its device."""
        quick, torch = self._quick, sys.modules.get("torch")
        if torch is None or type(tensors[0]) is not torch.Tensor:
            return None
        if quick.of_tensors is None:
            quick.of_tensors = _OfTensors(torch, quick)
        of_tensors, argument = quick.of_tensors, self._argument()
        records = torch.is_grad_enabled()
        if not of_tensors.alike(tensors) and not of_tensors.fit(tensors, records):
            return None
        held = argument.addresses
        for i in of_tensors.places:
            address = tensors[i].data_ptr()
            if not address:  # its memory was given back
                return None
            if address != held[i]:
                argument.put(i, address, _never)
        if out is not None:
            address = of_tensors.address_of(out, of_tensors.out_form, records)
            if address is None:
                return None
            argument.put_out(address, _never)
        elif quick.makes_out:
            out = of_tensors.new_out(tensors[0])
            argument.put_out(out.data_ptr(), _never)
        else:
            return None
        if length >= 0:
            argument.write(self._template.length, length)
        stream = torch_stream(quick.device)
        if quick.lse_shape is None:
            self._enqueue(argument, stream)
            return out
        lse = of_tensors.empty(quick.lse_shape, dtype=torch.float32)
        argument.write(self._template.lse, lse.data_ptr())
        self._enqueue(argument, stream)
        return out, lse

    def _look(self, argument: _Argument, arrays: tuple[Any, ...]) -> bool:
        """Take in the arrays that are not those of the last launch. False if one is not as planned."""
        references, forms = argument.references, self._quick.forms
        for i, array in enumerate(arrays):
            # The reference to an array that is gone gives None too.
            if references[i]() is not array or (array is None and references[i] is not _absent):
                address = self._quick.address_of(array, forms[i])
                if address is None:
                    return False
                argument.put(i, address, ref(array))
        return True

    def _argument(self) -> _Argument:
        """This thread's."""
        try:
            return self._of_thread.argument
        except AttributeError:
            make_context()
            absent = [form is None for form in self._quick.forms]
            self._of_thread.argument = made = _Argument(self._template, absent)
            return made

    def _enqueue(self, argument: _Argument, stream: int) -> None:
        if not argument.checked:
            self._check(argument.addresses, argument.out)
            argument.encode_maps()
            argument.checked = True
        try:
            if stream and not self._kept:
                self._kept = keep_if_captured(self.memory, stream)  # a graph with these launches may outlive the plan
            for launch, location in zip(self._launches, argument.locations):  # noqa: B905 (as above)
                launch(stream, location, 0)
        except Exception as error:
            refuse_foreign_stream(error, self._quick.device)
            raise


@cache
def _look_closely_after_fork() -> None:
    """A fork of this process has no CUDA: there all arrays are to go the way on which that is said."""

    def quick(planned: Planned, arrays: tuple[Any, ...], length: int, out: Any) -> None:
        return None

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: setattr(Planned, "quick", quick))


def _marked(operands: Operands, roles: tuple[str, ...], lse: bool) -> Operands:
    """The example with marks for addresses: _MARK + i for roles[i], then out, lse and the length of all sequences."""
    if lse:
        operands = replace(operands, lse=operands.out)  # but for the address nobody looks at it
    marks: dict[str, Any] = {}
    for i, role in enumerate((*roles, "out", "lse")):
        found = getattr(operands, role)
        if found is not None:
            marks[role] = replace(found, pointer=_MARK + i)
    if operands.uniform_length is not None:
        marks["uniform_length"] = _MARK + len(roles) + 2
    return replace(operands, **marks)


_Targets = tuple[list[int], list[tuple[int, Callable[[int], bytes]]]]
"""Where an address stands in the arguments: in which words, and where maps of its array begin and how to make them."""


class _Template:
    """The arguments of all launches one behind the other, and which of their 8-byte words change: those with marks."""

    __slots__ = ("words", "starts", "firsts", "inputs", "out", "lse", "length", "maps")

    def __init__(self, made: list[Launch], roles: int) -> None:
        arguments = [argument for launch in made for argument in launch.arguments]
        sizes = [-(-len(argument) // 8) for argument in arguments]
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.firsts = [sum(len(launch.arguments) for launch in made[:i]) for i in range(len(made))]
        padded = [argument.ljust(8 * size, b"\0") for argument, size in zip(arguments, sizes, strict=True)]
        self.words = words = np.frombuffer(b"".join(padded), np.int64).copy()
        places = [np.flatnonzero(words == _MARK + i).tolist() for i in range(roles + 3)]
        *self.inputs, self.out, self.lse, self.length = places
        for place in places:
            words[place] = 0
        self.maps = []  # (which array: one that is read, or behind these the output; first word; how to make its map)
        for launch, first in zip(made, self.firsts, strict=True):
            for found in launch.maps:
                word = self.starts[first + found.argument] + found.offset // 8
                if found.address >= _MARK:
                    self.maps.append((found.address - _MARK, word, found.encode))
                else:  # an array of the plan's own
                    words[word : word + MAP_BYTES // 8] = np.frombuffer(found.encode(found.address), np.int64)

    def targets(self, roles: Sequence[str], names: Sequence[str]) -> _Targets:
        """Where an array that is all of these stands; roles: of those that are read, then "out" and "lse"."""
        places = [roles.index(name) for name in names]
        words = [word for place in places for word in [*self.inputs, self.out, self.lse][place]]
        return words, [(word, lru_cache(KEPT_MAPS)(encode)) for array, word, encode in self.maps if array in places]


def _no_check(addresses: Addresses, out: int) -> None:
    """Nothing is refused."""


def _never() -> object:
    """In place of a reference to an array: nothing that could come is this."""
    return _never


_absent = type(None)  # in place of a reference where there is no array: NoneType() is None


class _Argument:
    """The kernels' arguments in memory that one thread writes, and which arrays' addresses are in them.

    To look at an array takes half a microsecond, to see that it is the one of the last launch a tenth of that. All that
    can change in a CuPy array is its shape, and then it is still the same memory.
    """

    __slots__ = ("words", "locations", "references", "addresses", "out_reference", "out", "checked")
    __slots__ += ("_template", "_pointers", "_mapped", "_bytes")

    def __init__(self, template: _Template, absent: list[bool]) -> None:
        self.words = (ctypes.c_int64 * len(template.words))(*template.words.tolist())
        self._bytes = memoryview(self.words).cast("B")
        starts = [ctypes.addressof(self.words) + 8 * start for start in template.starts]
        self._pointers = (ctypes.c_void_p * len(starts))(*starts)
        # Where each launch's arguments' addresses are: what the driver asks for.
        self.locations = [ctypes.addressof(self._pointers) + 8 * first for first in template.firsts]
        self.references: list[Callable[[], Any]] = [_absent if missing else _never for missing in absent]
        self.addresses = [0] * len(absent)
        self.out_reference: Callable[[], Any] = _never
        self.out = 0
        self.checked = False
        self._template = template
        self._mapped = [0] * len(template.maps)

    def put(self, i: int, address: int, reference: Callable[[], Any]) -> None:
        """Write the address of the i-th array that is read, and remember the array by a weak reference."""
        if address != self.addresses[i]:
            self.addresses[i] = address
            self.write(self._template.inputs[i], address)
            self.checked = False
        if self.references[i] is not _absent:
            self.references[i] = reference

    def put_out(self, address: int, reference: Callable[[], Any]) -> None:
        """The same for the output."""
        if address != self.out:
            self.out = address
            self.write(self._template.out, address)
            self.checked = False
        self.out_reference = reference

    def write(self, places: list[int], word: int) -> None:
        """Write the same word in all these places."""
        for place in places:
            self.words[place] = word

    def write_map(self, first: int, encoded: bytes) -> None:
        """Write a tensor map; first: its first word."""
        self._bytes[8 * first : 8 * first + MAP_BYTES] = encoded

    def encode_maps(self) -> None:
        """Make the tensor maps of arrays whose addresses have changed."""
        addresses, mapped = self.addresses, self._mapped
        for i, (array, word, encode) in enumerate(self._template.maps):
            address = addresses[array] if array < len(addresses) else self.out
            if address != mapped[i]:
                self.write_map(word, encode(address))
                mapped[i] = address


class _Quick:
    """What `Planned.quick` compares with, and CuPy's functions that it calls."""

    __slots__ = ("device", "kind", "forms", "out_form", "out_bytes", "makes_out", "lse_shape", "lse_bytes", "lse_dtype")
    __slots__ += ("current_device", "current_stream", "allocate", "of_tensors")

    def __init__(self, operands: Operands, inputs: Sequence[View | None], lse_shape: tuple[int, ...] | None) -> None:
        import cupy

        q, out = operands.q, operands.out
        self.device = q.device
        self.kind = cupy.ndarray
        self.current_device = cupy.cuda.runtime.getDevice
        self.current_stream = cupy.cuda.get_current_stream
        self.allocate = cupy.cuda.alloc
        self.of_tensors: _OfTensors | None = None  # once such come
        self.forms = tuple([None if found is None else _form(found) for found in inputs])
        self.out_form = _form(out)
        self.out_bytes = math.prod(out.shape) * numpy_dtype(out.dtype).itemsize
        self.makes_out = out.strides == contiguous_strides(out.shape)
        self.lse_shape = lse_shape
        self.lse_bytes = 4 * math.prod(lse_shape or ())
        self.lse_dtype = np.dtype(np.float32)

    def address_of(self, array: Any, form: _Form | None) -> int | None:
        """The address of a CuPy array of that form, None for anything else."""
        if type(array) is not self.kind or form is None:
            return None
        memory = array.data
        shape, strides, dtype, device = form
        if array.strides != strides and any(
            size > 1 and one != other for size, one, other in zip(shape, array.strides, strides, strict=False)
        ):
            return None
        return memory.ptr if (array.shape, array.dtype, memory.device_id) == (shape, dtype, device) else None


class _OfTensors:
    """The same for PyTorch's tensors.

    To look at a tensor's attributes one by one takes as long as a good part of a launch. PyTorch can compare several
    tensors at once with what others were like, for its compiler: it is told of tensors that have passed the long way.
    """

    __slots__ = ("kind", "forms", "places", "out_form", "empty", "empty_like", "like_q")
    __slots__ += ("_present", "_absent", "_nothing", "_guards", "_compare")

    def __init__(self, torch: ModuleType, quick: _Quick) -> None:
        def of_tensors(form: _Form | None) -> _Form | None:
            if form is None:
                return None
            shape, strides, dtype, device = form
            return shape, tuple([step // dtype.itemsize for step in strides]), getattr(torch, dtype.name, None), device

        self.kind = torch.Tensor
        self.forms = tuple([of_tensors(form) for form in quick.forms])
        self.places = tuple([i for i, form in enumerate(self.forms) if form is not None])
        self.out_form = of_tensors(quick.out_form)
        self.empty = partial(torch.empty, device=torch.device("cuda", quick.device))
        self.empty_like = torch.empty_like
        self.like_q = self.forms[0] == self.out_form
        absent = [i for i, form in enumerate(self.forms) if form is None]
        self._present, self._absent = _picker(self.places), _picker(absent)
        self._nothing = (None,) * len(absent)
        compiler = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
        self._guards = getattr(compiler, "TensorGuards", None)  # private: without it, all go the long way
        self._compare: Callable[..., bool] | None = None

    def alike(self, tensors: tuple[Any, ...]) -> bool:
        """Whether they are in every way but their addresses like the last that `fit`."""
        compare = self._compare
        if compare is None:
            return False
        try:
            if self._absent(tensors) != self._nothing:
                return False
            present = self._present(tensors)
            # The comparison of a nested tensor ends the process: PyTorch's C++ asks it for strides.
            return not any([tensor.is_nested for tensor in present]) and compare(*present)
        except Exception:  # of what is no tensor, or of another version of PyTorch: then all go the long way
            return False

    def fit(self, tensors: tuple[Any, ...], records: bool) -> bool:
        """Whether each is of its form; records: whether gradients are."""
        for tensor, form in zip(tensors, self.forms):  # noqa: B905 (as above)
            if (tensor is not None or form is not None) and self.address_of(tensor, form, records) is None:
                return False
        present = self._present(tensors)
        twice = len({*map(id, present)}) < len(present)  # the comparison wants each tensor once
        if self._guards is None or twice or any([tensor.requires_grad for tensor in present]):
            return True
        try:
            self._compare = self._guards(*present, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        except Exception:  # of another version of PyTorch
            self._guards = None
        return True

    def new_out(self, q: Any) -> Any:
        """A tensor of the output's form."""
        if self.like_q:
            return self.empty_like(q)  # which is contiguous too, and sooner done than to say all of it
        return self.empty(self.out_form[0], dtype=self.out_form[2])

    def address_of(self, tensor: Any, form: _Form | None, records: bool) -> int | None:
        """The address of a tensor of that form, None for anything else; records: whether gradients are."""
        if type(tensor) is not self.kind or form is None or not tensor.is_cuda:
            return None
        shape, strides, dtype, device = form
        try:
            if tensor.shape != shape or tensor.dtype is not dtype or tensor.get_device() != device:
                return None
            if (records and tensor.requires_grad) or tensor.is_neg():
                return None
            found, address = tensor.stride(), tensor.data_ptr()
        except RuntimeError:  # nested tensors, and those inside transformations, have none of these
            return None
        if found != strides and any(
            size > 1 and one != other for size, one, other in zip(shape, found, strides, strict=True)
        ):
            return None
        return address or None  # 0: its memory was given back


def _picker(places: Sequence[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """What stands at these places of a tuple, as another."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple([values[i] for i in places])


def _form(found: View) -> _Form:
    dtype = numpy_dtype(found.dtype)
    return found.shape, tuple([step * dtype.itemsize for step in found.strides]), dtype, found.device
