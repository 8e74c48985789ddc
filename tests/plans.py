"""What tests ask of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import yeam
from yeam.errors import ConfigError, UserError, YeamError
from yeam.planning.jobs import Job, Plan


def yaml(tmp_path: Path, text: str, **models: Path) -> Path:
    """A recipe file; `$name` stands for a model's path."""
    for name, folder in models.items():
        text = text.replace(f"${name}", str(folder))
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def jobs(plan: Plan) -> dict[str, Job]:
    return {job.name: job for job in plan.jobs}


def refuses(config: Any, *words: str, error: type[YeamError] = ConfigError, **options: Any) -> str:
    """Planning raises an error of just this class, with these words and a way out; returns the message."""
    with pytest.raises(YeamError) as caught:
        yeam.plan(config, **options)
    text = str(caught.value)
    assert type(caught.value) is error, text
    fixable = caught.value.remedy or "did you mean" in text or "is not usable: " in text
    assert fixable or not isinstance(caught.value, UserError), text
    assert all(word in text for word in words), text
    return text
