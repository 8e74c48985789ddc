"""Move what a small model has learned into a larger relative that was trained on: gains, harm and controls on held-out text.

    python tests/benchmarks/lineage.py [--work FOLDER] [--steps 120] [--seeds 0 1 2] [--domains code prose numbers names]

The host is the tiny family's base (examples/tiny-family) in a larger shape, with noise in what was silent, trained further on an even
mixture of all domains. Each expert's update over the base is then moved into the host by the plugin `scale_up` with its defaults. A
row says how the host's loss on the expert's domain changes, as a share of what the expert itself had gained over the base, and the
change of its loss on all domains together; and the same for controls: a random rotation of the stream, shuffled tokens, the same
lengths in random directions, and the MLPs alone with their neurons in order and in another one.

Seed 0 is the family as it comes with the examples. Any other seed trains a base, four experts (in half as many steps) and a host of
its own, about ten minutes on one core, and keeps them in the folder. The default strength was chosen on `--text choose`, seeds 0 and
2; judged is on other sequences of the same held-out documents (`--text judge`).
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))

import yeam
from yeam.transfer import aligned, matching, relation

REPOSITORY = Path(__file__).parents[2]
FAMILY = REPOSITORY / "examples" / "tiny-family"
SHARE = 0.5  # of the shipped family's training that another seed's gets


def example() -> Any:
    """examples/scale_up.py as a module: it grows and trains the host."""
    spec = importlib.util.spec_from_file_location("scale_up_example", REPOSITORY / "examples" / "scale_up.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def make_family(work: Path, seed: int) -> Path:
    """A folder with the base and the experts of a seed; kept between runs."""
    if not seed:
        return FAMILY / "models"
    train, models = example().tiny_family(), work / f"family-{seed}"
    shipped = FAMILY / "models/base"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shipped)
    todo = [name for name in ("base", *train.DOMAINS) if not (models / name / "generation_config.json").exists()]
    if not todo:
        return models
    streams = {
        domain: train.token_stream(tokenizer, [text for name, text in docs.items() if not train.is_held_out(name)])
        for domain, docs in train.documents().items()
    }
    torch.manual_seed(seed)
    for name in todo:
        start = (
            LlamaForCausalLM(LlamaConfig.from_pretrained(shipped)) if name == "base" else train.load(models / "base")
        )
        steps, rate = (train.BASE_STEPS, train.BASE_RATE) if name == "base" else (train.EXPERT_STEPS, train.EXPERT_RATE)
        own = list(streams.values()) if name == "base" else [streams[name]]
        steps = round(SHARE * steps)
        train.save(train.train(start, own, steps, rate, f"{name} {seed}"), tokenizer, models / name)
    return models


def make_host(work: Path, steps: int, seed: int, base: Path) -> Path:
    """The base in a larger shape, trained further; kept between runs."""
    host = work / (f"host-{steps}-{seed}" if seed else f"host-{steps}")
    if not (host / "config.json").exists():
        work.mkdir(parents=True, exist_ok=True)
        example().make_host(work, steps, base=base, seed=seed).rename(host)
    return host


def heldout(which: str) -> dict[str, torch.Tensor]:
    """Sequences of documents that no model has seen: `choose`, those that come with the family, or `judge`, as many others."""
    chosen = {domain: ids.long() for domain, ids in load_file(FAMILY / "heldout.safetensors").items()}
    if which == "choose":
        return chosen
    train, found = example().tiny_family(), {}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(FAMILY / "models/base")
    for domain, docs in train.documents().items():
        names = list(docs)
        random.Random(domain).shuffle(names)
        rest = train.token_stream(tokenizer, [docs[name] for name in names if train.is_held_out(name)])
        rows = rest[: len(rest) // train.LENGTH * train.LENGTH].view(-1, train.LENGTH)
        known = {tuple(row) for row in chosen[domain].tolist()}
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        fresh = [row for row in rows[order] if tuple(row.tolist()) not in known]
        found[domain] = torch.stack(fresh[: train.HELDOUT])
    return found


def losses(folder: Path, text: dict[str, torch.Tensor]) -> dict[str, float]:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loss = example().tiny_family().mean_loss
    return {domain: loss(model, ids) for domain, ids in text.items()}


def moved(host: Path, expert: Path, out: Path, **options: Any) -> Path:
    source = {"model": str(expert), "base": str(expert.with_name("base"))}
    recipe = {"merge_method": "passthrough", "models": [{"model": str(host)}],
              "plugins": [{"scale_up": {"sources": [source], **options}}]}  # fmt: skip
    yeam.merge(recipe, out, overwrite=True)
    return out


def random_rotation(work: Path, host: Path, expert: Path) -> Path:
    """The stream's map replaced by a random one of its kind."""
    real = relation.Relation.maps

    def fake(self: Any) -> Any:
        maps = real.func(self)
        turn = torch.linalg.qr(torch.randn(len(maps.writers_DS), len(maps.writers_DS), dtype=torch.float64)).Q
        return replace(maps, writers_DS=turn @ maps.writers_DS, readers_SD=maps.readers_SD @ turn.T)

    return patched(relation.Relation, "maps", property(fake), lambda: moved(host, expert, work / "out"))


def shuffled_tokens(work: Path, host: Path, expert: Path) -> Path:
    """Anchors paired at random: the gate should close."""
    real = aligned.shared_rows

    def fake(one: Any, other: Any) -> Any:
        host_rows, source_rows = real(one, other)
        return host_rows, source_rows[torch.randperm(len(source_rows), generator=torch.Generator().manual_seed(1))]

    return patched(aligned, "shared_rows", fake, lambda: moved(host, expert, work / "out"))


def mlp_only(work: Path, host: Path, expert: Path) -> Path:
    """What the next row is to be compared with."""
    return moved(host, expert, work / "out", parts="mlp")


def unpermuted_neurons(work: Path, host: Path, expert: Path) -> Path:
    """MLPs only, the source's neurons in an order of their own, with the gates that the right ones have."""
    real = matching.match_layer

    def fake(source: Any, *others: Any) -> Any:
        found = real(source, *others)
        taken = (found.where.neurons_B >= 0).nonzero()[:, 0]
        order = found.where.neurons_B.clone()
        order[taken] = order[taken][torch.randperm(len(taken), generator=torch.Generator().manual_seed(2))]
        return replace(found, where=replace(found.where, neurons_B=order))

    return patched(matching, "match_layer", fake, lambda: moved(host, expert, work / "out", parts="mlp"))


def random_directions(work: Path, host: Path, expert: Path) -> Path:
    """Every tensor moved as far, in a random direction."""
    out = moved(host, expert, work / "real")
    before, after = load_file(host / "model.safetensors"), load_file(out / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name, values in after.items():
        length = (values.float() - before[name].float()).norm()
        noise = torch.randn(values.shape, generator=generator)
        after[name] = (before[name].float() + noise / noise.norm() * length).to(values.dtype)
    save_file(after, out / "model.safetensors", {"format": "pt"})
    return out


def patched(owner: Any, name: str, value: Any, action: Callable[[], Path]) -> Path:
    original = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        return action()
    finally:
        setattr(owner, name, original)


def measure(work: Path, seed: int, text: dict[str, torch.Tensor], options: argparse.Namespace) -> None:
    """The table of one seed."""
    family = make_family(work, seed)
    host = make_host(work, options.steps, seed, family / "base")
    before, base = losses(host, text), losses(family / "base", text)
    own = {domain: base[domain] - losses(family / domain, {domain: text[domain]})[domain] for domain in options.domains}
    print(f"seed {seed}, host:", " ".join(f"{domain} {value:.4f}" for domain, value in before.items()))
    print("experts' own gains:", " ".join(f"{domain} {value:.4f}" for domain, value in own.items()))
    more = {key: float(value) for key, _, value in (item.partition("=") for item in options.set)}
    rows: dict[str, Callable[[Path], Path]] = {"scale_up": lambda expert: moved(host, expert, work / "out", **more)}
    if not options.no_controls:
        for control in (random_rotation, shuffled_tokens, random_directions, mlp_only, unpermuted_neurons):
            rows[control.__name__.replace("_", " ")] = lambda expert, control=control: control(work, host, expert)
    print(f"{'':20s}" + "".join(f"{domain:>20s}" for domain in options.domains))
    for label, make in rows.items():
        cells = []
        for domain in options.domains:
            after = losses(make(family / domain), text)
            everything = sum(after.values()) / sum(before.values()) - 1
            cells.append(f"{(before[domain] - after[domain]) / own[domain]:+.3f} ({100 * everything:+.2f} %)")
        print(f"{label:20s}" + "".join(f"{cell:>20s}" for cell in cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("lineage-work"))
    parser.add_argument("--steps", type=int, default=120, help="of training the host")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--domains", nargs="+", default=["code", "prose", "numbers", "names"])
    parser.add_argument("--text", choices=("judge", "choose"), default="judge")
    parser.add_argument("--no-controls", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="options of the plugin")
    options = parser.parse_args()
    text = heldout(options.text)
    for seed in options.seeds:
        measure(options.work.resolve(), seed, text, options)


if __name__ == "__main__":
    main()
