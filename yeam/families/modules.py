"""The modules of a recipe's `modules:` key: which part of a multi-module architecture a tensor belongs to.

Names as published recipes use them: `default` for a plain model; `encoder`, `decoder` and, for what both use, `shared`
in encoder-decoder models (T5, BART, Whisper); `text_decoder`, `vision_tower`, `multi_modal_projector` and `audio_tower`
in models that see or hear (LLaVA-like).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from yeam.families.configs import Config

_VISION = re.compile(r"(^|\.)(vision_\w+|visual|vision|image_encoder|image_tower|vit|vpm)(\.|$)")
_AUDIO = re.compile(r"(^|\.)(audio_(tower|encoder|model)|speech_encoder|audio)(\.|$)")
_PROJECTOR = re.compile(
    r"(^|\.)(multi_modal_projector|mm_projector|multimodal_projector|audio_projector|vision_projector|connector|aligner|"
    r"merger|deepstack_merger_list|mlp1|qformer|resampler|modality_projection|vision_proj|embed_vision|embed_audio|"
    r"image_newline|visual_projection|text_projection)(\.|$)"
)
_SIDE = re.compile(r"(^|\.)(encoder|decoder)(\.|$)")

Kind = Literal["plain", "two-sided", "multimodal"]


class Modules:
    """Decides for each tensor name of one checkpoint."""

    def __init__(self, config: Config, names: Iterable[str], stacks: Iterable[str]) -> None:
        prefixes = tuple(stacks)
        text = [p for p in prefixes if not _tower(p)]
        sides = {found.group(2) for p in text if (found := _SIDE.search(p))}
        self.kind: Kind = "plain"
        if text and any(map(_tower, {word for name in names for word in name.split(".")})):
            self.kind = "multimodal"
        elif sides == {"encoder", "decoder"} or (config.get("is_encoder_decoder") is True and sides):
            self.kind = "two-sided"

    def of(self, name: str) -> str:
        """The module of a tensor."""
        if self.kind == "multimodal":
            if _PROJECTOR.search(name):
                return "multi_modal_projector"
            return _tower(name) or "text_decoder"
        if self.kind == "two-sided":
            found = _SIDE.search(name)
            return found.group(2) if found else "shared"
        return "default"

    def of_stack(self, prefix: str) -> str:
        """The module of a layer stack."""
        return self.of(prefix + ".0.")


def _tower(name: str) -> str:
    if _VISION.search(name):
        return "vision_tower"
    return "audio_tower" if _AUDIO.search(name) else ""
