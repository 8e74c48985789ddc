"""JSON with indentation, as the standard library writes it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from yeam import indented

ODD = [
    '"',
    "\\",
    '\\"{',
    "[,]",
    "}",
    'a": {',
    "é\n\t",
    "\\\\",
    "",
    {},
    [],
    (),
    [[]],
    {"": {}},
    None,
    True,
    -2.5,
    1e300,
    7,
]


@pytest.mark.parametrize("options", [{}, {"ensure_ascii": False}, {"sort_keys": True}])
@pytest.mark.parametrize("indent", [0, 1, 2])
def test_it_is_what_json_writes(indent: int, options: dict[str, Any]) -> None:
    nested: Any = 1
    for depth in range(30):
        nested = {"deep": [nested, *ODD], str(ODD[depth % len(ODD)]): depth}
    for value in (*ODD, nested, [nested, nested], dict.fromkeys(map(str, ODD), ODD)):
        assert indented.dumps(value, indent, **options) == json.dumps(value, indent=indent, **options)


def test_it_refuses_what_json_refuses() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        indented.dumps([1.0, float("nan")], 1, allow_nan=False)
