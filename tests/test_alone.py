"""A command leaves SciPy's linear algebra out when it loads the compiled loops; whoever needs it later finds it."""

import subprocess
import sys

SCRIPT = """
import sys
from yeam import alone
alone.declare()
import numpy as np
from yeam.stored import square
assert square(np.full(4, 0x4000, np.uint16), 0, 4) == 16.0
assert "scipy.linalg" not in sys.modules
from numba import njit
assert njit(lambda a, b: np.dot(a, b))(np.ones(3), np.ones(3)) == 3.0
import scipy.linalg.cython_blas
"""


def test_blas_is_left_out_until_it_is_needed() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)
