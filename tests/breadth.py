"""Does a merge of ANY architecture load, and compute what a merge done in memory computes?

    python tests/breadth.py [CLASS ...] [--task CAUSAL_LM ...] [--json FILE]

Every model class of transformers that can be made tiny: two perturbed copies are saved, merged by `linear` and on their
origin by `yeam`, and loaded again. Columns: parameters, share of them with a role, linear, yeam, and what went wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import reference
import tiny
import torch
import transformers as tf
from merge_models import Tensors
from merge_models import tensors as stored

import yeam
from yeam.families import describe

SHARE = 0.75  # of the first copy in the average
CLOSE = (
    1e-2  # of an update's length: frames divide by small eigenvalues, in float32 here and in float64 in the reference
)


@dataclass
class Result:
    """What became of one class: `linear` and `yeam` are ``, or why not; `skipped` says why there was nothing to merge."""

    name: str
    model_type: str = ""
    parameters: int = 0
    coverage: float = 0.0
    linear: str = ""
    yeam: str = ""
    forward: str = ""
    skipped: str = ""

    @property
    def ok(self) -> bool:
        return not (self.linear or self.yeam or self.skipped)


class Failed(Exception):
    """One thing that a merge must have and has not."""


def check(name: str, folder: Path) -> Result:
    """Merge tiny models of a class in an empty folder. Never raises."""
    result = Result(name)
    try:
        origin = tiny.build(name)
    except Exception as error:
        result.skipped = _said(error)
        return result
    result.model_type = origin.config.model_type
    result.parameters = sum(parameter.numel() for parameter in origin.parameters())
    try:
        models = {"base": origin, "a": tiny.perturbed(origin, 1), "b": tiny.perturbed(origin, 2)}
        for label, model in models.items():
            model.save_pretrained(folder / label)
        loaded = {label: _load(type(origin), folder / label) for label in models}
    except Exception as error:
        result.skipped = f"transformers cannot save and load it: {_said(error)}"
        return result
    result.coverage = coverage(folder / "a")
    try:
        result.forward = _linear(folder, loaded)
    except Exception as error:
        result.linear = _said(error)
    try:
        _yeam(folder, loaded)
    except Exception as error:
        result.yeam = _said(error)
    return result


def coverage(folder: Path) -> float:
    """The share of a model's parameters whose role is known."""
    tensors = stored(folder)
    config = json.loads((folder / "config.json").read_text())
    anatomy = describe(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    known = sum(tensors[name].numel() for name, meaning in anatomy.tensors.items() if meaning.role != "other")
    return known / sum(tensor.numel() for tensor in tensors.values())


def _load(model_class: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    return model.eval(), {key: sorted(map(str, value)) for key, value in info.items() if value}


def _linear(folder: Path, loaded: Mapping[str, tuple[Any, dict[str, Any]]]) -> str:
    """Weights and logits of the linear merge against an average in memory; returns why there are no logits, or ``."""
    weights = (("a", SHARE), ("b", 1 - SHARE))
    models = [{"model": str(folder / label), "parameters": {"weight": weight}} for label, weight in weights]
    yeam.merge({"merge_method": "linear", "models": models}, folder / "linear")
    model, info = _load(type(loaded["a"][0]), folder / "linear")
    _same_info(info, loaded)
    expected = loaded["a"][0]
    with torch.no_grad():
        for parameter, other in zip(expected.parameters(), loaded["b"][0].parameters(), strict=True):
            if parameter.is_floating_point():
                parameter.mul_(SHARE).add_(other, alpha=1 - SHARE)
    ours, wanted = model.state_dict(), expected.state_dict()
    if ours.keys() != wanted.keys():
        raise Failed(f"the state differs in {sorted(ours.keys() ^ wanted.keys())[:3]}")
    for key, tensor in wanted.items():
        if ours[key].dtype != tensor.dtype or not torch.allclose(ours[key], tensor, 1e-5, 1e-6, equal_nan=True):
            raise Failed(f"{key} is not the average")
    try:
        x, y = logits(expected), logits(model)
    except Exception as error:
        return _said(error)
    if not torch.allclose(x, y, 1e-4, 1e-5, equal_nan=True):
        raise Failed(f"logits differ by {float((x - y).abs().max()):.1e}")
    return "" if bool(x.isfinite().all()) else "logits are not finite in memory either"


def _yeam(folder: Path, loaded: Mapping[str, tuple[Any, dict[str, Any]]]) -> None:
    """The yeam merge loads, is finite, and each of its tensors is what the plain reference makes of the files."""
    models = [{"model": str(folder / label)} for label in ("a", "b")]
    yeam.merge({"merge_method": "yeam", "base_model": str(folder / "base"), "models": models}, folder / "yeam")
    model, info = _load(type(loaded["a"][0]), folder / "yeam")
    _same_info(info, loaded)
    ours, base, a, b = (stored(folder / label) for label in ("yeam", "base", "a", "b"))
    if ours.keys() != a.keys():
        raise Failed(f"the file differs in {sorted(ours.keys() ^ a.keys())[:3]}")
    described = describe(model.config.to_dict(), {key: tuple(x.shape) for key, x in base.items()})
    depth = max((stack.count for stack in described.stacks.values()), default=1)
    for key, x in base.items():
        if not x.is_floating_point() or torch.equal(a[key], x):
            if not torch.equal(ours[key], a[key]):
                raise Failed(f"{key} changed, and no model moved it")
            continue
        delta_Kn, meaning = torch.stack([a[key] - x, b[key] - x]).double(), described.tensors[key]
        if x.dim() == 3 and min(x.shape[-2:]) >= 8:  # a stack of experts: a matrix each
            wanted = torch.stack(
                [
                    reference.merge(m, d_Kn, depth=depth, transposed=meaning.transposed)
                    for m, d_Kn in zip(x.double(), delta_Kn.unbind(1))
                ]
            )
        else:
            wanted = reference.merge(
                x.double(), delta_Kn, depth=depth, transposed=meaning.transposed, embedding=meaning.role == "embedding"
            )
        error = float((ours[key].double() - wanted).norm() / delta_Kn[0].norm().clamp(min=1e-30))
        if not error < CLOSE:
            raise Failed(f"{key} is off the reference by {error:.1e}")
    with contextlib.suppress(Exception):
        before, after = logits(loaded["base"][0]), logits(model)
        if bool(before.isfinite().all()) and not bool(after.isfinite().all()):
            raise Failed("logits are not finite")


def _same_info(info: Mapping[str, Any], loaded: Mapping[str, tuple[Any, dict[str, Any]]]) -> None:
    """Nothing is missing, unexpected or mismatched, but for what transformers misses in its own files."""
    if info != loaded["b"][1]:
        raise Failed(f"from_pretrained: {dict(info)}, its own files: {loaded['b'][1]}")


def logits(model: Any) -> torch.Tensor:
    """Text logits of a fixed sequence. Raises what the model raises."""
    config = model.config
    text = config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None) or tiny.VOCABULARY
    special = {
        v for c in (config, text) for k, v in c.to_dict().items() if k.endswith("token_id") and isinstance(v, int)
    }
    plain = [i for i in range(3, vocabulary) if i not in special]
    codebooks = getattr(config, "num_codebooks", None) or 1
    ids_BT = torch.tensor((plain * 8)[: 32 * codebooks]).view(2 * codebooks, 16)
    inputs = {"input_ids": ids_BT}
    if model.main_input_name in ("input_features", "input_values"):
        inputs = speech(model)
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids_BT
    torch.manual_seed(0)  # for attention that hashes at random
    with torch.no_grad():
        try:
            return model(**inputs).logits.float()
        except (TypeError, ValueError):  # some models do nothing without a picture
            return model(**inputs, pixel_values=picture(model)).logits.float()


def picture(model: Any) -> torch.Tensor:
    """Noise of the size that the model's eyes take."""
    parts = (getattr(model.config, name, None) for name in ("vision_config", "encoder"))
    size = next((part.image_size for part in parts if hasattr(part, "image_size")), 32)
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def speech(model: Any) -> Tensors:
    """Noise of a length that the model takes."""
    noise = torch.Generator().manual_seed(0)
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn(2, 4000, generator=noise)}
    config = model.config
    bins = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", 16)
    length = 2 * getattr(config, "max_source_positions", 32)
    shape = (2, bins, length) if config.model_type == "whisper" else (2, length, bins)
    return {"input_features": torch.randn(shape, generator=noise)}


def _said(error: BaseException) -> str:
    """An error on one line."""
    kind = "" if isinstance(error, Failed) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())[:300]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice about what is done on purpose here."""
    tf.utils.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("classes", nargs="*", help="class names; all by default")
    parser.add_argument("--task", nargs="*", choices=tiny.TASKS, help="only the classes of these tasks")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = args.classes or [name for name, task in tiny.classes().items() if not args.task or task in args.task]
    results: list[Result] = []
    print("| class | type | parameters | roles | linear | yeam | note |\n|---|---|---|---|---|---|---|", flush=True)
    for name in names:
        with quiet(), tempfile.TemporaryDirectory() as folder:
            result = check(name, Path(folder))
        results.append(result)
        print(row(result), flush=True)
        if args.json:
            args.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    merged = [result for result in results if not result.skipped]
    good = sum(result.ok for result in merged)
    print(f"\n{good} of {len(merged)} classes merge; {len(results) - len(merged)} could not be made tiny")
    return 0 if good == len(merged) else 1


def row(result: Result) -> str:
    if result.skipped:
        return f"| {result.name} | {result.model_type} | | | | | not made: {result.skipped} |"
    marks = ["no" if said else "yes" for said in (result.linear, result.yeam)]
    forward = f"no logits compared: {result.forward}" if result.forward else ""
    note = "; ".join(filter(None, (result.linear, result.yeam if result.yeam != result.linear else "", forward)))
    return (
        f"| {result.name} | {result.model_type} | {result.parameters} | {result.coverage:.2f} | {marks[0]} | {marks[1]} "
        f"| {note} |"
    )


if __name__ == "__main__":
    sys.path.insert(0, os.fspath(Path(__file__).parent))
    sys.exit(main())
