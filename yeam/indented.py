"""JSON with indentation as `json.dumps(…, indent=…)` writes it, many times as fast: the standard encoder is compiled without it only.

Legend: N bytes of the compact text, B breaks of lines, M bytes of the result.
"""

from __future__ import annotations

import json
from typing import Any


def dumps(value: Any, indent: int, **options: Any) -> str:
    """The text that `json.dumps(value, indent=indent, **options)` gives. Raises what that raises."""
    import numpy as np  # here, because a plan that is only printed needs none of it

    text = json.dumps(value, separators=(",", ": "), **options)
    raw = text.encode()
    plain = raw
    if b"\\" in raw:  # as long, but every quote that is left begins or ends a string
        plain = raw.replace(b"\\\\", b"__").replace(b'\\"', b"__")
    text_N, plain_N = np.frombuffer(raw, np.uint8), np.frombuffer(plain, np.uint8)
    steps = np.zeros(256, np.int8)  # what a byte outside of strings does to the depth
    steps[list(b"{[")], steps[list(b"}]")] = 1, -1
    breaks = steps != 0  # bytes that a break may stand beside
    breaks[ord(",")] = True
    quoted_N = np.cumsum(plain_N == ord('"'), dtype=np.uint8) & 1
    at_B = np.flatnonzero(breaks[plain_N] & (quoted_N == 0))
    step_B = steps[plain_N[at_B]]
    depth_B = np.cumsum(step_B, dtype=np.int64)
    opens_B, closes_B = step_B > 0, step_B < 0
    empty_B = opens_B[:-1] & closes_B[1:] & (at_B[1:] == at_B[:-1] + 1)
    kept_B = ~(np.append(empty_B, False) | np.append(False, empty_B)) if len(at_B) else opens_B
    # a break stands before what closes and after all else, and as deep as things are from there on
    before_B = (at_B + ~closes_B)[kept_B]
    length_B = 1 + indent * depth_B[kept_B]
    end_B = before_B + np.cumsum(length_B)
    size = len(raw) + int(length_B.sum())
    edge_M = np.zeros(size + 1, np.int8)
    edge_M[end_B - length_B] = 1
    edge_M[end_B] -= 1
    is_break_M = np.cumsum(edge_M[:-1], dtype=np.int8).view(bool)
    found_M = np.full(size, ord(" "), np.uint8)
    found_M[~is_break_M] = text_N
    found_M[end_B - length_B] = ord("\n")
    return found_M.tobytes().decode()
