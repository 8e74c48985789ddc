"""What is left out where a process runs one command of YeAM and nothing else, so that no other code can miss it."""

from __future__ import annotations

import sys

_BLAS = "scipy.linalg.cython_blas"

_alone = False


def declare() -> None:
    """This process is such a one."""
    global _alone
    _alone = True


def import_numba() -> None:
    """Import what of numba its compiled functions need, without SciPy's linear algebra where the process is alone.

    numba loads that (a fifth of a merge's start) to see whether it is there, and only functions that multiply matrices use it: they load
    it themselves, and find it.
    """
    if not _alone or _BLAS in sys.modules or "numba.np.arraymath" in sys.modules:
        return
    sys.modules[_BLAS] = None  # type: ignore[assignment]  # an import of it now fails as if it were not installed
    try:
        import numba.np.arraymath  # noqa: F401
    finally:
        sys.modules.pop(_BLAS, None)
