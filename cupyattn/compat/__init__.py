"""Front doors: the names and arguments of other attention libraries over this one, each in a module of its own.

Code that can be edited imports `cupyattn.compat.flash_attn` instead of `flash_attn`; for code that cannot there is
`install_as`. `python -m cupyattn.compat.table` says, argument by argument, what is the same here and what is not.
"""

from __future__ import annotations

from .install import Installed, install_as

__all__ = ["Installed", "install_as"]
