"""A transformer out of nothing but sites, views and flags: a wrong role, layout or flag changes what it computes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from family_models import Saved
from transformers.activations import ACT2FN
from transformers.models.falcon.modeling_falcon import build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention


class Interpreter:
    def __init__(self, model: Saved, **flags: Any) -> None:
        self.config, self.anatomy = model.text, model.anatomy
        self.traits = replace(model.anatomy.traits, **flags)
        self.weights: dict[tuple[Any, ...], list[torch.Tensor]] = {}
        towers = ("vision_tower", "multi_modal_projector")
        for name, tensor in model.tensors.items():
            meaning = self.anatomy.tensors[name]
            if meaning.module in towers:
                continue
            scope = meaning.site.rpartition(".")[0]
            parts = meaning.view.split(tensor) if meaning.view else {meaning.site.rpartition(".")[2]: tensor}
            home = meaning.stack or (meaning.module if meaning.module in ("encoder", "decoder") else "")
            for part, piece in parts.items():
                expert = meaning.expert
                if meaning.view and meaning.view.experts:
                    number, part = part.split(".")
                    expert = int(number)
                key = (home, meaning.layer, f"{scope}.{part}" if scope else part, expert, meaning.role == "bias")
                self.weights.setdefault(key, []).append(piece)
        self.heads = next(self.config[k] for k in ("num_attention_heads", "n_head", "num_heads") if k in self.config)
        self.eps = next(v for k, v in self.config.items() if k.endswith(("norm_eps", "norm_epsilon")) or k == "eps")
        act = next(self.config[k] for k in ("hidden_act", "hidden_activation", "activation_function", "activation",
                                            "dense_act_fn") if self.config.get(k))  # fmt: skip
        self.act = ACT2FN[act]
        self.home: tuple[str, int | None] = ("", None)

    def get(self, site: str, expert: int | None = None, bias: bool = False) -> torch.Tensor | None:
        found = self.weights.get((*self.home, site, expert, bias))
        return None if found is None else found[0] if len(found) == 1 else torch.stack(found)

    def linear(self, x: torch.Tensor, site: str, expert: int | None = None) -> torch.Tensor:
        weight = self.get(site, expert)
        assert weight is not None, (self.home, site)
        return F.linear(x, weight, self.get(site, expert, True))

    def norm(self, x: torch.Tensor, site: str) -> torch.Tensor:
        weight = self.get(site)
        assert weight is not None, (self.home, site)
        if self.traits.norm == "ln":
            x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        x = x * (1 + weight if self.traits.norm == "rms1p" else weight)
        bias = self.get(site, bias=True)
        return x if bias is None else x + bias

    def rotate(self, x: torch.Tensor) -> torch.Tensor:  # [tokens, heads, head_dim]
        n = int(self.traits.rotary * x.shape[-1])
        rope = self.config["rope_parameters"]
        kinds = self.config.get("layer_types")
        theta = rope.get(kinds[self.home[1] or 0] if kinds else "", rope)["rope_theta"]
        angle = torch.arange(len(x))[:, None] * theta ** (-torch.arange(0, n, 2) / n)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        y = x[..., :n]
        a, b = (y[..., : n // 2], y[..., n // 2 :]) if self.traits.rope == "half" else (y[..., ::2], y[..., 1::2])
        turned = (a * cos - b * sin, b * cos + a * sin)
        y = torch.cat(turned, -1) if self.traits.rope == "half" else torch.stack(turned, -1).flatten(-2)
        return torch.cat([y, x[..., n:]], -1)

    def attention(self, x: torch.Tensor, causal: bool, offset: torch.Tensor | float = 0.0, scope: str = "",
                  memory: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
        source = x if memory is None else memory
        q, k, v = self.linear(x, scope + "q"), self.linear(source, scope + "k"), self.linear(source, scope + "v")
        width = q.shape[-1] // self.heads
        if self.traits.qk_norm == "all":
            q, k = self.norm(q, "q_norm"), self.norm(k, "k_norm")
        q, k, v = (y.unflatten(-1, (-1, width)) for y in (q, k, v))
        if self.traits.qk_norm in ("head", "each"):
            assert (self.get("q_norm").dim() == 1) == (self.traits.qk_norm == "head")
            q, k = self.norm(q, "q_norm"), self.norm(k, "k_norm")
        if self.traits.rope != "none":
            q, k = self.rotate(q), self.rotate(k)
        k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], 1) for y in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * self.traits.scalars.get("attention", width**-0.5)
        if cap := self.traits.scalars.get("attention_softcap"):
            scores = cap * torch.tanh(scores / cap)
        if self.traits.position == "alibi":
            ones = torch.ones(1, len(x), dtype=torch.long)
            offset = build_alibi_tensor(ones, self.heads, torch.float64) * width**-0.5
        scores = scores + offset
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -math.inf)
        return self.linear(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1), scope + "o")

    def mlp(self, x: torch.Tensor, scope: str = "", expert: int | None = None) -> torch.Tensor:
        up = self.linear(x, scope + "up", expert)
        up = self.act(self.linear(x, scope + "gate", expert)) * up if self.traits.glu else self.act(up)
        return self.linear(up, scope + "down", expert)

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.get("router") is None:
            return self.mlp(x)
        chances, chosen = self.linear(x, "router").softmax(-1).topk(self.config["num_experts_per_tok"])
        if self.config.get("norm_topk_prob", True):
            chances = chances / chances.sum(-1, keepdim=True)
        out = torch.stack([
            sum(c * self.mlp(row, "expert.", int(e)) for c, e in zip(cs, es)) for row, cs, es in zip(x, chances, chosen)
        ])  # fmt: skip
        if self.get("shared_expert.up") is not None:
            out = out + torch.sigmoid(self.linear(x, "shared_router")) * self.mlp(x, "shared_expert.")
        return out

    def branch(self, x: torch.Tensor, f: Any, name: str) -> torch.Tensor:
        """The residual stream after one branch."""
        place, factor = self.traits.placement, self.traits.scalars.get("residual", 1.0)
        y = f(self.norm(x, f"{name}_norm") if place in ("pre", "sandwich") else x)
        if place in ("sandwich", "post"):
            y = self.norm(y, f"{name}_post_norm")
        x = x + factor * y
        return self.norm(x, f"{name}_post_norm") if place == "post_add" else x

    def layer(
        self, x: torch.Tensor, causal: bool, offset: Any = 0.0, memory: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.traits.parallel:
            y = self.norm(x, "attn_norm")
            z = y if self.get("mlp_norm") is None else self.norm(x, "mlp_norm")
            return x + self.attention(y, causal) + self.feed_forward(z)
        x = self.branch(x, lambda y: self.attention(y, causal, offset), "attn")
        if memory is not None:
            y = self.norm(x, "cross.attn_norm")
            x = x + self.attention(y, False, scope="cross.", memory=memory)
        return self.branch(x, self.feed_forward, "mlp")

    def stack(self, prefix: str, x: torch.Tensor, causal: bool, **more: Any) -> torch.Tensor:
        for number in range(self.anatomy.stacks[prefix].count):
            self.home = (prefix, number)
            x = self.layer(x, causal, **more)
        return x

    def decoder_only(self, ids: torch.Tensor, causal: bool, first_position: int = 0) -> torch.Tensor:
        x = self.get("embedding")[ids] * self.traits.scalars.get("embedding", 1.0)
        if self.traits.position == "learned":
            x = x + self.get("position")[first_position : first_position + len(ids)]
        if self.get("token_type") is not None:
            x = x + self.get("token_type")[0]
        if self.get("embedding_norm") is not None:
            x = self.norm(x, "embedding_norm")
        prefix = next(p for p, s in self.anatomy.stacks.items() if s.module in ("default", "text_decoder"))
        x = self.stack(prefix, x, causal)
        self.home = ("", None)
        return self.head(self.norm(x, "final_norm") if self.get("final_norm") is not None else x)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        if self.get("head_transform") is not None:
            x = self.norm(self.act(self.linear(x, "head_transform")), "head_norm")
        head = self.get("embedding") if self.anatomy.is_tied else self.get("head")
        x = F.linear(x, head, self.get("head", bias=True)) * self.traits.scalars.get("logits", 1.0)
        cap = self.traits.scalars.get("logits_softcap")
        return cap * torch.tanh(x / cap) if cap else x

    def two_sided(self, ids: torch.Tensor, decoder_ids: torch.Tensor) -> torch.Tensor:
        embedding, memory = self.get("embedding"), None
        for side, tokens in (("encoder", ids), ("decoder", decoder_ids)):
            prefix = f"{side}.block"
            self.home = (side, None)
            distance = torch.arange(len(tokens))[None, :] - torch.arange(len(tokens))[:, None]
            buckets = T5Attention._relative_position_bucket(distance, bidirectional=side == "encoder")
            offset = self.get("relative_position")[buckets].permute(2, 0, 1)
            x = self.stack(prefix, embedding[tokens], side == "decoder", offset=offset, memory=memory)
            self.home = (side, None)
            memory = self.norm(x, "final_norm")
        self.home = ("", None)
        return self.head(memory)
