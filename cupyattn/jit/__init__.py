"""From CUDA C to a loaded kernel: `sources` flattens, `compile` runs NVRTC, `cache` keeps cubins, `module` loads them.

Importing this package imports neither CuPy nor NVRTC. Only `module.load` needs a GPU: everything before it also
works for an architecture that is not present.
"""

from .module import Kernel, arch_of, load

__all__ = ["Kernel", "arch_of", "load"]
