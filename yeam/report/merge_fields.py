"""What a page needs of yeam_report.json, checked: the file may have been damaged, or be somebody else's."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


class _Facts(BaseModel):
    model_config = ConfigDict(strict=True)

    update_norms: list[float] = []
    agreement: float = 0.0
    base_norm: float = 0.0
    moved: float = 0.0
    scale: float | None = None


class _Tensor(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str
    shape: list[int]
    dtype: str
    role: str
    layer: int | None
    method: str
    sources: list[str]
    base: str | None = None
    norm: float | None = None
    update: _Facts | None = None
    parts: list[_Facts] = []


class _Totals(BaseModel):
    model_config = ConfigDict(strict=True)

    parameters: int = 0
    tensors: int = 0
    bytes: int = 0
    relative_change: float | None = None
    mean_agreement: float | None = None


class _Report(BaseModel):
    model_config = ConfigDict(strict=True)

    method: str
    models: list[str]
    tensors: list[_Tensor]
    totals: _Totals | None = None
    seconds: float | None = None


def misfit(report: dict[str, Any]) -> str | None:
    """Where the content of a yeam_report.json is not that of a merge's, and why (`tensors.3.norm: …`); None where it is."""
    try:
        _Report.model_validate(report)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return None
