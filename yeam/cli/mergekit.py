"""The flags of `mergekit-yaml`, for those who come from there: what takes their place, or why nothing has to."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

_NOTHING = "leave it out: "
_STREAMED = _NOTHING + "weights are streamed, and --memory SIZE bounds what is held"
_PLACED = _NOTHING + "every tensor is written at its place, by several threads, as safetensors"
_ADAPTERS = _NOTHING + "adapters are applied while streaming, without a copy on disk"
_UNTRUSTED = _NOTHING + "no code of a model is run"
_CORES = "all processors that the process may use are used: `taskset -c 0-3 yeam merge …` allows four"

FLAGS = {
    "--cuda": "write --device cuda",
    "--no-cuda": "write --device cpu",
    "--out-shard-size": "write --shard-size SIZE, such as 5GB",
    "--random-seed": "write --set parameters.seed=N",
    "--low-cpu-memory": _STREAMED,
    "--read-to-gpu": _STREAMED,
    "--gpu-rich": _STREAMED,
    "--multi-gpu": "write torchrun --nproc-per-node N -m yeam merge …",
    "--lazy-unpickle": _NOTHING + ".bin files are memory-mapped, and no code in them is ever run",
    "--lora-merge-cache": _ADAPTERS,
    "--lora-merge-dtype": _ADAPTERS,
    "--transformers-cache": "set HF_HOME to choose where downloads go",
    "--copy-tokenizer": _NOTHING + "the tokenizer is always copied",
    "--no-copy-tokenizer": "the tokenizer is always copied",
    "--write-model-card": _NOTHING + "a model card is always written",
    "--no-write-model-card": "a model card is always written",
    "--trust-remote-code": _UNTRUSTED,
    "--allow-crimes": _NOTHING
    + "models fit if their tensors do, and config.json comes from base_model or the first model",
    "--clone-tensors": _PLACED,
    "--async-write": _PLACED,
    "--write-threads": _PLACED,
    "--safe-serialization": _PLACED,
    "--num-threads": _CORES,
    "-j": _CORES,
    "--verbose": _NOTHING + "--debug shows the traceback of an error",
    "-v": _NOTHING + "--debug shows the traceback of an error",
}


class KnowsMergekit(TyperCommand):
    """A command that answers a flag of mergekit's with what to write here."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as usual, unless a word is one of `FLAGS`: that is a usage error with the answer."""
        for word in args:
            if word == "--":
                break
            flag = word.partition("=")[0]
            answer = FLAGS.get(flag) or FLAGS.get(flag.replace("--no-", "--", 1))
            if answer is not None:
                ctx.fail(f"{flag} is an option of mergekit: {answer}")
        return super().parse_args(ctx, args)
