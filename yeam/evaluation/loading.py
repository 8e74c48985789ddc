"""Models in memory: loaded whole where they fit, else by accelerate with layers that stay on the disk until they are needed."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yeam.arguments import check_dtype
from yeam.checkpoint.folder import listed
from yeam.engine.memory import available_bytes
from yeam.errors import CheckpointError, UserError, YeamError
from yeam.evaluation.folders import Source

if TYPE_CHECKING:
    import torch

_SHARE = 0.8  # of the free memory is for weights; the rest for activations and logits
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_TOO_LONG = 10**9  # tokenizers without a limit say 10**30


@dataclass(frozen=True)
class Placement:
    """Where weights go: onto `device`, or what fits into `limits` (bytes by device, accelerate's max_memory) and the rest on disk."""

    device: torch.device
    dtype: torch.dtype
    limits: dict[int | str, int] | None = None

    @property
    def offloaded(self) -> bool:
        return self.limits is not None


@dataclass
class Loaded:
    """A model that is ready to run, its tokenizer (None where the folder has none) and how many positions it has."""

    source: Source
    model: Any
    tokenizer: Any
    positions: int | None
    placement: Placement
    keep: str | None

    @property
    def label(self) -> str:
        return self.source.label

    @property
    def vocabulary(self) -> int | None:
        """Rows of the head, or what the config says; None where neither is known."""
        head = self.model.get_output_embeddings()
        if head is not None and hasattr(head, "weight"):
            return int(head.weight.shape[0])
        size = getattr(self.model.config.get_text_config(), "vocab_size", None)
        return size if isinstance(size, int) else None


@contextmanager
def quiet() -> Iterator[None]:
    """No bars, hints or warnings of transformers on the user's terminal; errors come as exceptions."""
    from logging import ERROR, getLogger

    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    other = getLogger("accelerate")
    level = other.level
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    other.setLevel(ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        other.setLevel(level)
        if bars:
            logging.enable_progress_bar()


def place(sources: Sequence[Source], dtype: str, device: str, memory: int | None) -> list[Placement]:
    """Where each model goes so that together their weights stay within `memory` bytes (default: 80 % of what is free).

    dtype: `auto` (float32 on the CPU, as stored elsewhere), or a name such as `bfloat16`. Raises UserError for an unknown device or
    dtype, and where weights must stay on the disk but accelerate is not installed.
    """
    import torch

    from yeam.engine.device import choose_device

    chosen = torch.device(str(choose_device(device)))
    dtypes = [_dtype(dtype, source, chosen) for source in sources]
    sizes = [sum(info.numel for info in source.weights) * d.itemsize for source, d in zip(sources, dtypes)]
    host = int(available_bytes() * _SHARE)
    if memory is not None:
        room = memory
    elif chosen.type == "cuda":
        room = int(torch.cuda.mem_get_info(chosen)[0] * _SHARE)
    else:
        room = host
    if sum(sizes) <= room:
        return [Placement(chosen, d) for d in dtypes]
    if find_spec("accelerate") is None:
        need = f"{sum(sizes) / 2**30:.1f} GiB of weights do not fit into {room / 2**30:.1f} GiB"
        raise UserError(
            f"{need}, and leaving layers on the disk needs accelerate", "pip install 'yeam[eval]', or raise --memory"
        )
    placements = []
    for size, d in zip(sizes, dtypes):
        share = room * size // sum(sizes)
        if chosen.type == "cuda":
            limits: dict[int | str, int] = {chosen.index or 0: share, "cpu": host * size // sum(sizes)}
        else:
            limits = {"cpu": share}
        placements.append(Placement(chosen, d, limits))
    return placements


def _dtype(name: str, source: Source, device: torch.device) -> torch.dtype:
    import torch

    check_dtype(name)
    if name != "auto":
        dtype = getattr(torch, name.removeprefix("torch."))
        assert isinstance(dtype, torch.dtype)
        return dtype
    if device.type == "cpu" or not source.weights:
        return torch.float32
    stored = max(source.weights, key=lambda info: info.numel).storage.torch
    return stored if stored in (torch.float32, torch.bfloat16, torch.float16) else torch.float32


def load(source: Source, placement: Placement, scratch: str, *, trust_remote_code: bool = False) -> Loaded:
    """The causal language model of a folder, in evaluation mode. `scratch`: a folder for weights that cannot be read in place.

    Raises CheckpointError where transformers cannot load it, or where the folder lacks weights that the model needs.
    """
    from transformers import AutoModelForCausalLM

    model, info = load_with_info(
        AutoModelForCausalLM, source.folder, source.label, placement, scratch, trust_remote_code=trust_remote_code
    )
    return ready(source, model, info, placement, trust_remote_code)


def ready(
    source: Source,
    model: Any,
    info: Mapping[str, Any],
    placement: Placement,
    trust_remote_code: bool,
    tokenizer: Any = None,
) -> Loaded:
    """What transformers has made of a source, with its tokenizer, which is read unless it is given.

    info: names of weights that are missing or of another shape, as `from_pretrained` tells them; then raises CheckpointError. So does a
    model of masked tokens, which transformers would run as a causal one without a mask.
    """
    named = [str(name) for name in model.config.architectures or []]
    if any(name.endswith("ForMaskedLM") for name in named) and not getattr(model.config, "is_decoder", False):
        raise CheckpointError(
            f"{source.label}: is a {named[0]}, which sees the tokens that it would have to predict",
            "evaluate a model that predicts the next token",
        )
    missing = [*info["missing_keys"], *(str(key[0]) for key in info.get("mismatched_keys") or ())]
    if missing:
        raise CheckpointError(
            f"{source.label}: weights are missing that the model needs, or have other shapes: {listed(missing)}",
            "use a complete model: transformers would make them up",
        )
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return Loaded(
        source,
        model,
        load_tokenizer(source, trust_remote_code) if tokenizer is None else tokenizer,
        positions if isinstance(positions, int) and 0 < positions < _TOO_LONG else None,
        placement,
        next((k for k in ("logits_to_keep", "num_logits_to_keep") if k in _arguments(model)), None),
    )


def load_with_info(
    cls: Any, folder: Path, label: str, placement: Placement, scratch: str, *, trust_remote_code: bool = False
) -> tuple[Any, dict[str, Any]]:
    """(model, loading info) of `cls.from_pretrained(folder)`; CheckpointError where transformers refuses it.

    The info names weights that are missing, left over or of another shape (`missing_keys`, `unexpected_keys`, `mismatched_keys`).
    """
    options: dict[str, Any] = {}
    if placement.offloaded:
        options = {"device_map": "auto", "max_memory": placement.limits, "offload_folder": scratch}
    with quiet(), explained(label):
        model, info = cls.from_pretrained(
            folder,
            dtype=placement.dtype,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the loading info, by name
            **options,
        )
        if not placement.offloaded:
            model = model.to(placement.device)
        return model.eval(), info


@contextmanager
def explained(label: str) -> Iterator[None]:
    """Turn what transformers raises while loading into one message with a remedy."""
    try:
        yield
    except (YeamError, KeyboardInterrupt):
        raise
    except Exception as error:
        text = str(error)
        if "trust_remote_code" in text:
            raise CheckpointError(
                f"{label}: needs Python code that its repository brings, which is not run unless you say so",
                "read that code, then pass --trust-remote-code if you trust it",
            ) from error
        if "Unrecognized configuration class" in text:
            raise CheckpointError(
                f"{label}: is no causal language model that transformers knows",
                "evaluate a model that predicts the next token",
            ) from error
        first = re.split(r"\n\s*\n|\n", text.strip())[0][:300] if text.strip() else type(error).__name__
        raise CheckpointError(
            f"{label}: transformers cannot load it: {type(error).__name__}: {first}",
            "check the model's files, or upgrade transformers",
        ) from error


def load_tokenizer(source: Source, trust_remote_code: bool) -> Any:
    """The tokenizer of a folder, None where it has none. Raises CheckpointError where transformers cannot load it."""
    from transformers import AutoTokenizer

    if not any((source.folder / name).exists() for name in _TOKENIZERS):
        return None
    with quiet(), explained(f"{source.label} (its tokenizer)"):
        return AutoTokenizer.from_pretrained(source.folder, local_files_only=True, trust_remote_code=trust_remote_code)


def architecture(config: Mapping[str, Any]) -> Any:
    """The class that loads a model with this config.json: the one it names, if transformers has it, else by its kind."""
    import transformers

    named = config.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    cls = getattr(transformers, name, None) if name.isidentifier() else None
    if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
        return cls
    return transformers.AutoModelForCausalLM if "CausalLM" in name or "LMHead" in name else transformers.AutoModel


def _arguments(model: Any) -> set[str]:
    return set(inspect.signature(type(model).forward).parameters)
