"""How far an attention output may be from the exact one."""

from __future__ import annotations

import ml_dtypes
import numpy as np


def tolerance_of(v: np.ndarray) -> float:
    """Largest allowed absolute error of an output in v's dtype; v holds the values that were attended to.

    An output is a weighted mean of values, so the largest value sets the scale. Rounding the weights to the dtype costs
    at most half an eps of it, rounding the output the other half; sums in float32 cost some roundings of their own
    (2**-17 is 64 of them).
    """
    return float(np.abs(v.astype(np.float64)).max()) * (float(ml_dtypes.finfo(v.dtype).eps) + 2.0**-17)
