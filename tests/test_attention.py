"""The plugin `attention`: circuits do not depend on how heads are written; what is read, reported and refused.

Legend: G key/value groups, H query heads of a group, d dimensions of a head, N axes of the residual stream.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import transformers as tf
from hub_server import HubServer, Repository
from huggingface_hub import constants
from plans import refuses
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from typer.testing import CliRunner

import yeam
from yeam.checkpoint.safetensors import SafetensorsCheckpoint
from yeam.families import describe
from yeam.families.configs import dims

tf.utils.logging.set_verbosity_error()
tf.utils.logging.disable_progress_bar()

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PLAIN = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (tf.LlamaConfig, tf.LlamaForCausalLM, {**TEXT, "attention_bias": True, "head_dim": 16}),
    "multi-query": (tf.LlamaConfig, tf.LlamaForCausalLM, {**TEXT, "num_key_value_heads": 1}),
    "interleaved": (tf.CohereConfig, tf.CohereForCausalLM, TEXT),
    "fused, partly rotary": (tf.Phi3Config, tf.Phi3ForCausalLM, {**TEXT, "partial_rotary_factor": 0.5}),
    "fused by head": (tf.GPTNeoXConfig, tf.GPTNeoXForCausalLM, {**PLAIN, "rotary_pct": 0.25, "head_dim": 8}),
    "fused by group": (tf.FalconConfig, tf.FalconForCausalLM, {
        **{key: TEXT[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
        "num_kv_heads": 2, "new_decoder_architecture": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
    "no rotary, transposed": (tf.GPT2Config, tf.GPT2LMHeadModel, {
        "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
        "eos_token_id": 2}),
    "norms": (tf.Qwen3Config, tf.Qwen3ForCausalLM, {**TEXT, "head_dim": 8}),
}  # fmt: skip
EACH = {"norms of each head": (tf.CohereConfig, tf.CohereForCausalLM, {**TEXT, "use_qk_norm": True})}

Tensors = dict[str, torch.Tensor]


def save_family(folder: Path, label: str, *, spread: float = 0.02) -> tuple[Path, Path, Path]:
    """A base of a family and two models that moved away from it, with partly the same update, in float64."""
    kind, model_kind, given = (FAMILIES | EACH)[label]
    torch.manual_seed(0)
    model = model_kind(kind(**given)).double().eval()
    names = {name for name, _ in model.named_parameters()}
    common = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    start = {name: p.detach() + 0.1 * torch.randn_like(p) for name, p in model.named_parameters()}
    folders = []
    for number, own in enumerate((None, 1, 2)):
        if own is not None:
            torch.manual_seed(own)
        moved = {
            n: start[n] + (0 if own is None else spread * (common[n] + 2 * torch.randn_like(start[n]))) for n in names
        }
        model.load_state_dict(moved, strict=False)
        folders.append(folder / ("base", "a", "b")[number])
        model.save_pretrained(folders[-1])
    return tuple(folders)  # type: ignore[return-value]


class InDouble(TorchFunctionMode):
    """Where a model goes to float32 (norms, rotary embedding) it goes to float64."""

    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        double = {torch.float32: torch.float64}
        args = [double.get(x, x) if isinstance(x, torch.dtype) else x for x in args]
        kwargs = {k: double.get(x, x) if isinstance(x, torch.dtype) else x for k, x in (kwargs or {}).items()}
        return function(*args, **kwargs)


@torch.inference_mode()
def logits(folder: Path, label: str) -> torch.Tensor:
    model = FAMILIES[label][1].from_pretrained(folder, dtype=torch.float64).eval()
    ids = torch.arange(3, 27).view(2, 12)
    with InDouble():
        return model(input_ids=ids, use_cache=False).logits


class Turned:
    """One random legal change of coordinates for a family; `write` applies it to any model of the same shape."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        self.anatomy = describe(config, {n: tuple(t.shape) for n, t in load_file(folder / "model.safetensors").items()})
        width, traits = dims(config), self.anatomy.traits
        assert width is not None and traits is not None
        self.d, self.traits = width.head_dim, traits
        self.heads = width.heads
        self.rotary = int(traits.rotary * self.d) if traits.rope != "none" else 0
        self.generator = torch.Generator().manual_seed(5)
        self.of_layer: dict[int, dict[str, torch.Tensor]] = {}

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def _invertible(self, groups: int, size: int) -> torch.Tensor:
        return torch.eye(size) * 1.5 + 0.3 * self._random(groups, size, size)

    def _layer(self, layer: int, groups: int) -> dict[str, torch.Tensor]:
        """inner: what k is multiplied with (q with its inverse transposed), value: the same for v, order: of the heads."""
        if layer not in self.of_layer:
            inner = torch.zeros(groups, self.d, self.d, dtype=torch.float64)
            half = self.rotary // 2
            rigid = self.traits.qk_norm != "none"
            for i in range(half):
                pair = [2 * i, 2 * i + 1] if self.traits.rope == "interleaved" else [i, i + half]
                turn, size = self._random(groups), (0.5 * self._random(groups)).exp()
                matrix = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], 1).view(groups, 2, 2)
                flip = turn.sign()[:, None, None] * torch.eye(2)
                inner[:, torch.tensor(pair)[:, None], torch.tensor(pair)] = (
                    flip.double() if rigid else matrix * size[:, None, None]
                )
            if self.rotary < self.d:
                inner[:, self.rotary :, self.rotary :] = self._invertible(groups, self.d - self.rotary)
            order = self._random(groups, self.heads // groups).argsort(dim=1)
            self.of_layer[layer] = {"inner": inner, "value": self._invertible(groups, self.d), "order": order}
        return self.of_layer[layer]

    def _part(self, site: str, x: torch.Tensor, layer: int) -> torch.Tensor:
        """A part, rows by dimension of a head, in the new coordinates."""
        groups = self.groups[layer]
        change = self._layer(layer, groups)
        shaped = x.reshape(groups, -1, self.d, *x.shape[1:]) if x.dim() > 1 else x.reshape(groups, -1, self.d, 1)
        matrix = {"k": change["inner"], "v": change["value"]}.get(site)
        if matrix is None:
            matrix = torch.linalg.inv(change["inner"] if site == "q" else change["value"]).mT
            shaped = shaped[torch.arange(groups)[:, None], change["order"]]
        return (matrix[:, None] @ shaped).reshape(x.shape)

    def _gain(self, site: str, x: torch.Tensor) -> torch.Tensor:
        """A factor on each plane that k loses and q gains."""
        factor = torch.linspace(0.5, 2.0, self.d // 2, dtype=torch.float64).repeat(2)
        return x * factor if site == "q_norm" else x / factor

    def write(self, source: Path, target: Path) -> Path:
        tensors = load_file(source / "model.safetensors")
        self.groups = {}
        for name, meaning in self.anatomy.tensors.items():
            if meaning.layer is not None and meaning.role in ("k", "qkv"):
                parts = meaning.view.split(tensors[name]) if meaning.view is not None else {"k": tensors[name]}
                self.groups[meaning.layer] = len(parts["k"]) // self.d
        for name, meaning in self.anatomy.tensors.items():
            if meaning.site in ("q_norm", "k_norm"):
                tensors[name] = self._gain(meaning.site, tensors[name])
            if meaning.layer is None or not meaning.roles & {"q", "k", "v", "o", "qkv"}:
                continue
            x, view, layer = tensors[name], meaning.view, meaning.layer
            if meaning.site == "o":
                if meaning.role == "bias":
                    continue
                stored = x if view is not None and view.transposed else x.T
                turned = self._part("o", stored, layer)
                tensors[name] = (turned if view is not None and view.transposed else turned.T).contiguous()
            elif view is not None:
                tensors[name] = view.join({site: self._part(site, part, layer) for site, part in view.split(x).items()})
            else:
                tensors[name] = self._part(meaning.site, x, layer)
        target.mkdir()
        (target / "config.json").write_text((source / "config.json").read_text())
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
        return target


def recipe(base: Path | None, *sources: Path, method: str = "yeam", **options: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        **({"base_model": str(base)} if base is not None else {}),
        "models": [{"model": str(source)} for source in sources],
        "plugins": [{"attention": options}],
    }


@pytest.mark.parametrize("label", FAMILIES)
def test_the_merged_function_does_not_depend_on_coordinates(tmp_path: Path, label: str) -> None:
    """Equal legal changes of base and sources leave the merged model's function as it was, to 1e-8 in float64."""
    folders = save_family(tmp_path, label)
    turned = Turned(folders[0])
    others = [turned.write(folder, tmp_path / f"{folder.name}-turned") for folder in folders]
    expected = logits(folders[1], label)
    assert (logits(others[1], label) - expected).abs().max() < 1e-10 * expected.abs().max()
    before, after = (load_file(f[1] / "model.safetensors") for f in (folders, others))
    assert any((before[name] - after[name]).abs().max() > 0.1 for name in before)
    for heads in ("resolve", "best"):
        report = yeam.merge(recipe(*folders, heads=heads, frames=16), tmp_path / f"plain-{heads}")
        yeam.merge(recipe(*others, heads=heads, frames=16), tmp_path / f"turned-{heads}")
        assert {t["method"] for t in report.tensors if t["role"] in ("q", "k", "v", "o", "qkv")} == {
            "attention_circuit"
        }
        ours, theirs = (logits(tmp_path / f"{kind}-{heads}", label) for kind in ("plain", "turned"))
        assert (ours - theirs).abs().max() < 1e-8 * ours.abs().max()
        assert (ours - expected).abs().max() > 1e-4 * ours.abs().max()


@pytest.mark.parametrize("frames", ["none", 256])
def test_rays_frames_and_length_by_formula(tmp_path: Path, frames: str | int) -> None:
    """Under norms of q and k there is no freedom: q and k are the rays of their planes, but for what is noise q flattened
    head by head and k whole, as long as the law says."""
    base, a, b = save_family(tmp_path, "norms")
    for folder in (a, b):
        short = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
        save_file(short, folder / "model.safetensors", {"format": "pt"})
    yeam.merge({**recipe(base, a, b, frames=frames, softness=2.0), "out_dtype": "float64"}, tmp_path / "out")
    x, *sources = (load_file(folder / "model.safetensors") for folder in (base, a, b))
    out = load_file(tmp_path / "out" / "model.safetensors")
    prefix = "model.layers.1.self_attn."
    q_name, k_name = prefix + "q_proj.weight", prefix + "k_proj.weight"
    dq = torch.stack([source[q_name] - x[q_name] for source in sources]).view(2, 2, 2, 2, 4, 32)  # K G H half plane N
    dk = torch.stack([source[k_name] - x[k_name] for source in sources]).view(2, 2, 1, 2, 4, 32)
    rays = torch.cat([dq, dk.expand_as(dq)], dim=3).permute(1, 2, 4, 5, 0, 3)  # G H plane N K R⁴
    length = rays.norm(dim=-1)
    unit = rays / length[..., None]
    gram = unit @ unit.mT + 2.0 * torch.eye(2)
    point = 3.0 * (torch.linalg.solve(gram, length[..., None]) * unit).sum(-2)
    points = {
        q_name: point[..., :2].permute(0, 1, 4, 2, 3).reshape(x[q_name].shape),
        k_name: point[..., 2:].mean(1).permute(0, 3, 1, 2).reshape(x[k_name].shape),
    }
    for name, point in points.items():
        deltas = torch.stack([source[name] - x[name] for source in sources]).flatten(1)
        norms = deltas.norm(dim=1)
        total = (deltas @ deltas.T).sum() / norms.square().sum()
        alpha = 1 - (total - 1).clamp(0, 1)
        rows = 8 if name == q_name else len(point)  # of what frames see
        met = reference.meet(point, deltas.view(2, *point.shape)) if frames == 256 else point
        total_update = deltas.sum(0)
        departure = point.square().sum() - (total_update @ point.flatten()) ** 2 / total_update.square().sum()
        left = 0.154 * 4.0**-8 * x[name].square().sum()
        rounding = (left * norms.square() / (left + norms.square())).sum()
        noise = (rounding + 2 * (1 + (rows / 32) ** 0.5) ** 2 * departure) / len(point)
        signal = float(1 - rounding / norms.square().sum())
        heads = (point + signal * (met - point)).view(-1, rows, 32)
        values, axes = torch.linalg.eigh(heads @ heads.mT)
        signal = (1 - noise / values).clamp(min=0.01)
        power = (signal / values) ** (alpha / 2) if frames == 256 else torch.ones_like(values)
        flat = axes * power[:, None] @ axes.mT @ heads
        raw = (flat * heads.flatten(1).norm(dim=1)[:, None, None] / flat.flatten(1).norm(dim=1)[:, None, None]).view(
            x[name].shape
        )
        hat = raw / raw.norm() * norms.mean()
        progress = (deltas @ hat.flatten()).sum() / norms.square().sum()
        displacement = norms.max() / x[name].norm()
        shared = total.clamp(min=1)
        beyond = min(0.78 / (2 * displacement) ** 0.4, 2.7)
        region = 0.136 * (beyond * progress) ** 0.5 / displacement
        law = max(1.7 * progress / shared / displacement**0.25, region) ** alpha
        bound = 2.5 * point.norm() / norms.mean()
        count = 2 / (1 + (deltas[0] @ deltas[1] / norms.prod()) ** 2)
        beyond = beyond / count**0.5 if frames == 256 else beyond / count
        further = 1.2 if name == q_name else 1.0  # φ is 1 for two layers
        step = min(law, bound, (further * beyond) ** alpha / progress)
        torch.testing.assert_close(out[name] - x[name], hat * step, rtol=1e-9, atol=1e-12)


def test_one_source_and_mean(tmp_path: Path) -> None:
    """One source gives its attention to the bit, half its strength half its update; `mean` is the mean of the updates."""
    base, a, b = save_family(tmp_path, "llama")
    x, y, z = (load_file(folder / "model.safetensors") for folder in (base, a, b))
    yeam.merge({**recipe(base, a, only=True), "out_dtype": "bfloat16"}, tmp_path / "one")
    one = load_file(tmp_path / "one" / "model.safetensors")
    yeam.merge(recipe(base, a, strength=[0.5, 0.25]), tmp_path / "half")
    half = load_file(tmp_path / "half" / "model.safetensors")
    only_first = [{"filter": "layers.0", "value": 0.5}]
    yeam.merge(recipe(base, a, b, heads="mean", strength=only_first), tmp_path / "mean")
    mean = load_file(tmp_path / "mean" / "model.safetensors")
    yeam.merge(recipe(base, a, a), tmp_path / "same")
    same = load_file(tmp_path / "same" / "model.safetensors")
    for name in x:
        circuits = "self_attn" in name and not name.endswith("o_proj.bias")
        assert torch.equal(one[name], (y if "self_attn" in name else x)[name].bfloat16()), name
        if circuits:
            share = 0.5 if ".0." in name else 0.25
            torch.testing.assert_close(half[name], x[name] + share * (y[name] - x[name]))
            torch.testing.assert_close(
                mean[name], x[name] + (0.25 if ".0." in name else 0.5) * (y[name] + z[name] - 2 * x[name])
            )
            torch.testing.assert_close(same[name], y[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("what", ["outputs", "a key"])
def test_parts_that_are_silent_in_the_base(tmp_path: Path, what: str) -> None:
    """Where the base has no length to balance another by, in float32, the rest of the circuit moves about as far as its sources."""
    folders = save_family(tmp_path, "llama")
    base, *sources = (load_file(folder / "model.safetensors") for folder in folders)
    for name, x in base.items():
        silent = torch.zeros_like(x)
        if what == "outputs" and "o_proj.weight" in name:
            silent = x
        elif what == "a key" and "k_proj" in name:
            silent[:16] = x[:16]
        for tensors in (*sources, base):
            tensors[name] = tensors[name] - silent
    for folder, tensors in zip(folders, (base, *sources)):
        save_file({name: x.float() for name, x in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    yeam.merge(recipe(*folders), tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    for name in (name for name in base if "self_attn" in name):
        lengths = [float((x[name] - base[name]).norm()) for x in sources]
        assert 0.3 < 2 * float((out[name] - base[name]).norm()) / sum(lengths) < 3.5, name


@pytest.mark.parametrize("label", ["llama", "norms", "norms of each head"])
def test_opposites_and_order(tmp_path: Path, label: str) -> None:
    base, a, b = save_family(tmp_path, label)
    x, y = (load_file(folder / "model.safetensors") for folder in (base, a))
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / "config.json").write_text((base / "config.json").read_text())
    save_file({name: 2 * x[name] - y[name] for name in x}, mirror / "model.safetensors")
    yeam.merge(recipe(base, a, mirror), tmp_path / "none")
    yeam.merge(recipe(base, a, b), tmp_path / "ab")
    yeam.merge(recipe(base, b, a), tmp_path / "ba")
    none, ab, ba = (load_file(tmp_path / name / "model.safetensors") for name in ("none", "ab", "ba"))
    for name in x:
        torch.testing.assert_close(none[name], x[name], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ab[name], ba[name], rtol=1e-9, atol=1e-9)
    assert all(not torch.allclose(ab[name], x[name], rtol=1e-3) for name in x if "self_attn" in name)


def test_whole_heads_and_report(tmp_path: Path) -> None:
    """`best` takes each group from the source with the strongest agreeing update; the report says which, and what became of it."""
    base, a, b = save_family(tmp_path, "multi-query")
    x, y, z = (load_file(folder / "model.safetensors") for folder in (base, a, b))
    louder = {n: t + 3 * (t - x[n]) * ("layers.1" in n) for n, t in z.items()}
    save_file(louder, b / "model.safetensors", {"format": "pt"})
    report = yeam.merge(recipe(base, a, b, heads="best"), tmp_path / "best")
    best = load_file(tmp_path / "best" / "model.safetensors")
    wins = {t["layer"]: {h["source"] for h in t["update"]["heads"]} for t in report.tensors if t["role"] in ("q", "o")}
    assert wins[1] == {1} and len(wins[0]) == 1
    for name in x:
        if "self_attn" in name:
            winner = next(iter(wins[int(name.split(".")[2])]))
            assert torch.equal(best[name], (y, louder)[winner][name]), name
    report = yeam.merge(recipe(base, a, b), tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    facts = {t["role"]: t["update"] for t in report.tensors if t["layer"] == 1 and "part" in t.get("update", {})}
    prefix = "model.layers.1.self_attn."

    def norms(tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, o = (tensors[f"{prefix}{part}_proj.weight"] for part in "qkvo")
        q, k = (part.view(-1, 2, 4, 32).square().sum((1, 3)) for part in (q, k))
        o = o.T.reshape(4, 8, 32)
        return (q * k).sum(1).sqrt(), (o.mT @ v).flatten(1).norm(dim=1)

    for role, key, now, then in zip("qo", ("qk", "ov"), norms(out), norms(x)):
        heads = facts[role]["heads"]
        assert [h["head"] for h in heads] == [0, 1, 2, 3] and all(0 <= h["agreement"] <= 1 for h in heads)
        torch.testing.assert_close(torch.tensor([h[key] for h in heads]).double(), now / then, rtol=1e-5, atol=1e-5)
    moved = (out[prefix + "v_proj.weight"] - x[prefix + "v_proj.weight"]).norm()
    assert moved > 0 and facts["v"]["scale"] > 0 and "heads" not in facts["v"]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, set[int]]]]:
    """By model and tensor, the elements that were read."""
    found: dict[str, dict[str, set[int]]] = {}
    plain = SafetensorsCheckpoint.read_into

    def read_into(self: Any, name: str, start: int, stop: int, place: Any) -> bool:
        found.setdefault(Path(self.reference).name, {}).setdefault(name, set()).update(range(start, stop))
        return plain(self, name, start, stop, place)

    monkeypatch.setattr(SafetensorsCheckpoint, "read_into", read_into)
    yield found


@pytest.mark.parametrize("method", ["yeam", "linear", "ties"])
def test_only_attention_is_read(tmp_path: Path, method: str, reads: dict[str, dict[str, set[int]]]) -> None:
    """With `only`, of a source nothing but its attention; everything else of the output is the base's, to the bit."""
    base, a, b = save_family(tmp_path, "llama")
    config = recipe(base, a, b, method=method, only=True)
    if method != "yeam":
        config["parameters"] = {"weight": 0.5}
    yeam.merge(config, tmp_path / "out", memory="1G")
    x, out = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    attention = {name for name in x if "self_attn" in name}
    for source in ("a", "b"):
        assert reads[source].keys() == attention
        nbytes = 8 * sum(len(elements) for elements in reads[source].values())
        assert nbytes == sum(x[name].nbytes for name in attention)
    assert all(torch.equal(out[name], x[name]) for name in x if name not in attention)
    assert not any(torch.equal(out[name], x[name]) for name in attention)
    yeam.merge(recipe(base, a, b, only=True), tmp_path / "yeam")
    other = load_file(tmp_path / "yeam" / "model.safetensors")
    assert all(torch.allclose(out[n], other[n], rtol=1e-9, atol=0) for n in attention if "o_proj.bias" not in n)


def test_only_attention_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a Hub model that hold no attention stay there."""
    base, a, b = save_family(tmp_path, "llama")
    tensors = load_file(a / "model.safetensors")
    names = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    files = {name: names["self_attn" in name] for name in tensors}
    (a / "model.safetensors").unlink()
    for file in names:
        save_file({n: t for n, t in tensors.items() if files[n] == file}, a / file, {"format": "pt"})
    (a / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    server = HubServer({"org/a": Repository(a)}).start()
    try:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "")
        monkeypatch.chdir(tmp_path)
        config = recipe(base, b, only=True)
        config["models"].append({"model": "org/a"})
        yeam.merge(config, tmp_path / "out")
    finally:
        server.stop()
    sizes = {file: (a / file).stat().st_size for file in names}
    assert server.sent["org/a", names[1]] >= sizes[names[1]]
    cached = {path.name for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert cached == {names[1]}


def test_command_line(tmp_path: Path) -> None:
    from yeam.cli.app import app

    base, a, b = save_family(tmp_path, "llama")
    config = {**recipe(base, a, b), "plugins": []}
    (tmp_path / "recipe.json").write_text(json.dumps(config))
    plugins = "plugins=[{attention: {only: true, heads: best}}]"
    words = ["merge", str(tmp_path / "recipe.json"), str(tmp_path / "out"), "--set", plugins, "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    methods = {t["role"]: t["method"] for t in report["tensors"] if t["role"] in ("q", "o", "gate", "norm")}
    assert methods == {"q": "attention_circuit", "o": "attention_circuit", "gate": "copy", "norm": "copy"}


def test_refusals(tmp_path: Path, llama: Callable[..., Path]) -> None:
    base, a = llama("base"), llama("a")
    refuses(recipe(base, a, base, hedas="best"), "'attention'", "hedas", "heads")
    refuses(recipe(base, a, llama("b"), heads="worst"), "heads", "'worst'")
    refuses(recipe(base, a, only="yes"), "only = 'yes'")
    refuses(recipe(base, a, strength="much"), "strength", "'much'")
    refuses(recipe(base, a, strength=[1, None]), "strength")
    refuses(recipe(base, a, softness=0), "softness")
    refuses(recipe(base, a, frames=7), "frames")
    refuses(recipe(None, a, llama("b"), method="linear") | {"parameters": {"weight": 1}}, "names none", "base_model")
    other = llama("other", config={"num_attention_heads": 4, "num_key_value_heads": 2})
    refuses(recipe(base, a, other), "has other heads", str(other))
    odd = {"num_attention_heads": 3}
    refuses(
        recipe(llama("odd", config=odd), llama("odd2", config=odd)), "cannot be read as circuits", "do not fall into"
    )
    unknown = {"model_type": "unheard-of"}
    refuses(recipe(llama("x", config=unknown), llama("y", config=unknown)), "cannot be read as circuits", "positions")
    latent = {
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": torch.ones(8, 16),
        "model.layers.0.self_attn.kv_b_proj.weight": torch.ones(16, 8),
    }
    kind = {"model_type": "deepseek_v3"}
    refuses(recipe(llama("m", change=latent, config=kind), llama("n", change=latent, config=kind)), "multi-head latent")
