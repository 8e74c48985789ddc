"""Sizes in bytes as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

from yeam.errors import ConfigError

_PREFIXES = "KMGT"
UNITS: dict[str, int] = {
    **{f"{letter}B": 1000**power for power, letter in enumerate(_PREFIXES, 1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate(_PREFIXES, 1)},
    **{letter: 1024**power for power, letter in enumerate(_PREFIXES, 1)},
}
_BY_LOWER_NAME = {name.lower(): factor for name, factor in UNITS.items()}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", re.ASCII)


def parse_size(value: int | float | str) -> int:
    """Bytes, at least 1, from a whole number or from text such as `5GB`, `500 MB`, `2GiB`, `1.5G`, `1048576`.

    KB, MB, GB, TB count in thousands; KiB, MiB, GiB, TiB and the bare letters K, M, G, T in 1024s; upper and lower case
    are the same; no unit means bytes. A fraction of a byte is rounded down. A lone `B` is refused, because some tools
    read it as a billion. Raises ConfigError.
    """
    remedy = "write a number of bytes, or a number with one of " + ", ".join(UNITS)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ConfigError(f"{value!r} is not a size", remedy)
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        factor = (_BY_LOWER_NAME.get(match[2].lower()) if match[2] else 1) if match else None
        if match is None or factor is None:
            raise ConfigError(f"{value!r} is not a size", remedy)
        size = int(Fraction(match[1]) * factor)
    elif isinstance(value, float) and not value.is_integer():
        raise ConfigError(f"{value!r} is not a whole number of bytes", remedy)
    else:
        size = int(value)
    if size < 1:
        raise ConfigError(f"{value!r} is not a size: it must be at least one byte", remedy)
    return size
