"""Updates from stored numbers, against those of tiles."""

from __future__ import annotations

import pytest
import torch
from held_inputs import HeldInputs, outcome

from yeam.methods import method_named


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["ties", "breadcrumbs_ties", "dare_ties", "dare_linear", "della", "della_linear"])
def test_updates_of_stored_numbers_are_those_of_tiles(name: str, dtype: torch.dtype) -> None:
    """The same bits from numbers as they are stored, in longer tiles, as from tiles of float32."""
    generator = torch.Generator().manual_seed(7)
    rows, columns = 150, 1001
    base = torch.randn(rows, columns, generator=generator).to(dtype)
    sources_KT = (base.float().view(1, -1) + 0.1 * torch.randn(3, rows * columns, generator=generator)).to(dtype)
    method, values = method_named(name), {}
    for parameter in method.parameters.values():
        values[parameter.keyword] = (
            parameter.default * 3 if parameter.per_source and parameter.default else parameter.default
        )
    values |= {"weight": (0.5, 1.0, 0.7), "density": (0.5, 0.3, 1.0)}
    plain = HeldInputs(sources_KT.float(), base.float(), (rows, columns), 4096)
    stored = HeldInputs(sources_KT, base, (rows, columns), 100_000, stored=True)
    stored.dtype, stored.work, stored.exact = torch.float32, "F32", False
    found = [outcome(method, inputs, values) for inputs in (plain, stored)]
    assert torch.equal(*found)
    assert not torch.equal(found[0], base.float().flatten())
