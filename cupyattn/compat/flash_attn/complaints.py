"""What this library says of an argument, in the words of flash_attn's signature."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ...arrays import refuse

_SCATTERED = re.compile(r"([qkv]): got stride -?\d+ in the last dimension")
_COMPLAINT = re.compile(r"\w+: got ")
_NAME = re.compile(r"\b[a-z]\w*\b")
_NONE: Mapping[str, Any] = {}
_NO_ARGUMENT_HERE = re.compile(r", (?:or|with) (?:layout|kv_dtype|kernel)=.*")


def named(
    names: Mapping[str, str], function: Callable[..., Any], arrays: tuple[Any, ...], options: Mapping[str, Any] = _NONE
) -> Any:
    """function(*arrays, **options), a function of this library whose complaints are to name arguments otherwise.

    q, k and v, by position unless they are options, are copied if their head_dim is not contiguous, as flash_attn does.
    """
    try:
        return function(*arrays, **options)
    except (TypeError, ValueError) as error:
        scattered = _SCATTERED.match(str(error))
        if scattered is None:
            rename(error, names)
            raise
    name = scattered[1]
    if name in options:
        return named(names, function, arrays, {**options, name: _copied(options[name])})
    place = "qkv".index(name)
    return named(names, function, (*arrays[:place], _copied(arrays[place]), *arrays[place + 1 :]), options)


def _copied(array: Any) -> Any:
    return array.contiguous() if hasattr(array, "contiguous") else array.copy()


def rename(error: Exception, names: Mapping[str, str]) -> None:
    """Name arguments in a complaint otherwise, and drop advice to use arguments that flash_attn does not have."""
    message = str(error)
    if _COMPLAINT.match(message):
        message = _NO_ARGUMENT_HERE.sub("", message)
        error.args = (_NAME.sub(lambda found: names.get(found[0], found[0]), message),)


def refuse_dropout(dropout_p: float) -> None:
    """Refuse any dropout."""
    if dropout_p:
        refuse("dropout_p", repr(dropout_p), "0.0: dropout belongs to training, and there is no backward pass")
