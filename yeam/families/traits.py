"""How a family computes, beyond what its tensors are: norms, residual order, rotary style, scalars.

Each flag was read from the modeling code of transformers and is checked against it in the tests by running an
interpreter that knows nothing but these flags.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from yeam.families.configs import Config, dims, integer, number, rotary_fraction

Norm = Literal["rms", "rms1p", "ln"]
Placement = Literal["pre", "sandwich", "post", "post_add"]
QKNorm = Literal["none", "head", "each", "all"]
Rope = Literal["none", "half", "interleaved"]
Position = Literal["rope", "learned", "alibi", "relative"]
Attention = Literal["heads", "latent", "mixed"]


@dataclass(frozen=True)
class Traits:
    """Flags of a family, resolved for one config.

    * `norm`: `rms` multiplies by w, `rms1p` by 1 + w, `ln` subtracts the mean (and adds a bias where there is one);
      also the kind of the q/k norms.
    * `placement`: `pre` x + f(norm(x)); `sandwich` x + norm(f(norm(x))); `post` x + norm(f(x)); `post_add`
      norm(x + f(x)).
    * `parallel`: attention and MLP read the same residual. The MLP reads `mlp_norm` if there is one, else `attn_norm`.
    * `qk_norm`: `head` one gain of head_dim shared by the heads; `each` a gain per head, statistics per head; `all`
      one norm over the concatenated heads.
    * `rope`: which dimensions form a plane: i and i + n/2 (`half`) or 2i and 2i + 1 (`interleaved`), over the first
      n = int(`rotary` * head_dim) dimensions of a head.
    * `glu`: down(act(gate(x)) * up(x)), else down(act(up(x))).
    * `scalars`: factors outside the weights, by place: `embedding`, `residual` (on each branch), `attention` (the
      softmax scale; absent: head_dim^-1/2), `logits`; `attention_softcap` and `logits_softcap` c mean c tanh(x / c).
    * `tie`: whether head and embedding are one tensor when config.json does not say.
    * `attention`: `heads` q, k, v, o in every layer; `latent` through low-rank factors (MLA), `mixed` with state-space or
      linear attention in some layers. Rotary style and q/k norms are stated for `heads` only.
    """

    norm: Norm = "rms"
    placement: Placement = "pre"
    parallel: bool = False
    qk_norm: QKNorm = "none"
    position: Position = "rope"
    rope: Rope = "half"
    rotary: float = 1.0
    glu: bool = True
    scalars: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    tie: bool = False
    attention: Attention = "heads"


Rule = Callable[[Config], dict[str, Any]]
"""What a config changes in the flags of its family."""


def partial(default: float) -> Rule:
    return lambda config: {"rotary": rotary_fraction(config, default)}


def scalars(*rules: tuple[str, Callable[[Config], float | None]]) -> Rule:
    """Scalars by name; those for which the rule gives None are left out."""
    return lambda config: {"scalars": {name: x for name, rule in rules if (x := rule(config)) is not None}}


def key(*names: str, default: float | None = None, inverse: bool = False) -> Callable[[Config], float | None]:
    """The number under one of the keys, else the default; `inverse` for factors that the model divides by."""

    def read(config: Config) -> float | None:
        value = number(config, *names)
        if value is None:
            value = default
        return 1.0 / value if inverse and value else value

    return read


def root_hidden(config: Config) -> float | None:
    """Gemma's factor on embeddings: sqrt(hidden_size)."""
    width = dims(config)
    return math.sqrt(width.hidden) if width else None


def query_scale(config: Config) -> float | None:
    """Gemma 2 and 3: the softmax scale is query_pre_attn_scalar^-1/2."""
    return 1 / math.sqrt(number(config, "query_pre_attn_scalar") or 256.0)


def gpt2_attention(config: Config) -> float | None:
    """GPT-2 without `scale_attn_weights` does not scale; the scale by layer index is not a constant, so not here."""
    return 1.0 if config.get("scale_attn_weights") is False else None


def neox(config: Config) -> dict[str, Any]:
    return {"parallel": config.get("use_parallel_residual") is not False, "rotary": rotary_fraction(config, 0.25)}


def stablelm(config: Config) -> dict[str, Any]:
    return {
        "parallel": config.get("use_parallel_residual") is True,
        "qk_norm": "each" if config.get("qk_layernorm") else "none",
        "rotary": rotary_fraction(config, 0.25),
    }


def cohere(config: Config) -> dict[str, Any]:
    return {
        "qk_norm": "each" if config.get("use_qk_norm") else "none",
        "scalars": {"logits": key("logit_scale", default=0.0625)(config)},
    }


def falcon(config: Config) -> dict[str, Any]:
    alibi = config.get("alibi") is True
    return {
        "parallel": config.get("parallel_attn") is not False or config.get("new_decoder_architecture") is True,
        "position": "alibi" if alibi else "rope",
        "rope": "none" if alibi else "half",
    }


def t5(config: Config) -> dict[str, Any]:
    """T5 does not scale attention; where its head is the embedding, the decoder's output is scaled by d_model^-1/2.

    transformers 5 writes that choice as `scale_decoder_outputs`, older versions as `tie_word_embeddings`.
    """
    scaled = config.get("scale_decoder_outputs", config.get("tie_word_embeddings")) is not False
    width = integer(config, ("d_model",))
    logits = {"logits": width**-0.5} if scaled and width else {}
    return {
        "glu": str(config.get("feed_forward_proj", "relu")).startswith("gated"),
        "scalars": {"attention": 1.0, **logits},
    }
