"""Plans: which tensors meet, and the files and bytes that come of them, in every process the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from conftest import Llama, environment, llama_config, llama_tensors, save_model
from huggingface_hub import save_torch_state_dict, split_torch_state_dict_into_shards
from plans import jobs, refuses
from safetensors import safe_open
from safetensors.torch import load_file

import yeam
from yeam.api import plan_costs
from yeam.errors import CheckpointError
from yeam.planning.jobs import Plan


def test_tensors_that_do_not_fit(llama: Llama) -> None:
    a = llama("a")
    norm, up = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"

    def pair(*models: Path, **keys: Any) -> dict[str, Any]:
        return {
            "merge_method": "linear",
            "models": [{"model": str(m)} for m in models],
            "parameters": {"weight": 1},
            **keys,
        }

    refuses(pair(a, llama("less", change={norm: None})), norm, "less", error=CheckpointError)
    refuses(pair(a, llama("more", change={"extra.weight": torch.ones(2)})), "extra.weight", error=CheckpointError)
    refuses(pair(a, llama("wide", change={up: torch.ones(40, 16)})), "[32, 16]", "[40, 16]", error=CheckpointError)
    refuses(pair(a, llama("int", change={up: torch.ones(32, 16).int()})), "F32", "I32", error=CheckpointError)
    bert = save_model(
        a.parent / "bert", {"encoder.layer.0.output.dense.weight": torch.ones(2, 2)}, {"model_type": "bert"}
    )
    refuses(pair(a, bert), "(bert) has no layers like model.layers", "one architecture", error=CheckpointError)
    mistral = llama("mistral", config={"model_type": "mistral"})
    assert any("mistral is a mistral" in note for note in yeam.plan(pair(a, mistral)).notes)
    vocab = llama("vocab", vocab=34)
    refuses(pair(a, vocab), "vocabularies differ", "32 tokens", "34", error=CheckpointError)
    # the config of a base that is no source has to fit, too
    refuses(pair(vocab, base_model=str(a)), "vocabularies differ", error=CheckpointError)


def test_ties(tmp_path: Path, llama: Llama) -> None:
    """Two tied models have no head; beside an untied one the head is written, and config.json no longer ties."""
    tied, too, free = llama("tied", tied=True), llama("too", tied=True), llama("free")

    def plan(*models: Path, **keys: Any) -> Plan:
        return yeam.plan(
            {
                "merge_method": "linear",
                "models": [{"model": str(m)} for m in models],
                "parameters": {"weight": 1},
                **keys,
            }
        )

    both = plan(tied, too)
    assert "lm_head.weight" not in jobs(both) and both.config is not None and both.config["tie_word_embeddings"] is True
    for order in ((tied, free), (free, tied)):
        mixed = plan(*order)
        names = [source.tensor for source in jobs(mixed)["lm_head.weight"].sources]
        assert sorted(names) == ["lm_head.weight", "model.embed_tokens.weight"]
        assert mixed.config is not None and mixed.config["tie_word_embeddings"] is False
        assert len(mixed.jobs) == len({job.name for job in mixed.jobs}) == len(llama_tensors())
    # the filter sees what the tensor becomes, not what it is tied to
    filtered = plan(tied, free, parameters={"weight": [{"filter": "lm_head", "value": 5}, {"value": 1}]})
    assert jobs(filtered)["lm_head.weight"].parameters["weight"] == (5, 5)
    embedding = llama_tensors(sum(b"stored"), tied=True)["model.embed_tokens.weight"]
    stored = llama("stored", tied=True, change={"lm_head.weight": embedding.clone()})
    twice = plan(stored, tied)
    assert "lm_head.weight" not in jobs(twice) and any("lm_head.weight is stored" in note for note in twice.notes)
    assert "model.embed_tokens.weight" in jobs(plan(stored, free)) and "lm_head.weight" in jobs(plan(stored, free))
    # transformers ties only what is equal, so a head with values of its own is a tensor of its own
    apart = llama("apart", tied=True, change={"lm_head.weight": torch.ones(32, 16)})
    for order in ((apart, tied), (tied, apart)):
        mixed = plan(*order)
        assert "lm_head.weight" in jobs(mixed) and any("two tensors" in note for note in mixed.notes)
        assert mixed.config is not None and mixed.config["tie_word_embeddings"] is False


def test_shared_storage(tmp_path: Path) -> None:
    """A head that shares the embedding's storage: one tensor; two where config.json says that they are not tied."""
    weights = llama_tensors(tied=True)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    for tied in (True, False):
        folder = tmp_path / str(tied)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(llama_config(tied=tied)))
        torch.save(weights, folder / "pytorch_model.bin")
        plan = yeam.plan({"merge_method": "passthrough", "models": [{"model": str(folder)}]})
        assert ("lm_head.weight" in jobs(plan)) is not tied
        assert "model.embed_tokens.weight" in jobs(plan)


def test_constants_and_integers(llama: Llama) -> None:
    """Constants come from the first model, or stay away if it has none; integers are copied, and the plan says so."""
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    table = {"hash.table": torch.arange(6, dtype=torch.int64)}
    plain, other = llama("plain", change=table), llama("other", change={**table, **frequencies})

    def plan(*models: Path) -> Plan:
        return yeam.plan(
            {"merge_method": "linear", "models": [{"model": str(m)} for m in models], "parameters": {"weight": 1}}
        )

    without, with_them = plan(plain, other), plan(other, plain)
    assert not set(frequencies) & set(jobs(without)) and any("left out, a constant" in note for note in without.notes)
    assert jobs(with_them)[next(iter(frequencies))].method == jobs(with_them)["hash.table"].method == "copy"
    assert any("hash.table: not of floating-point" in note for note in with_them.notes)
    assert with_them.total_parameters == sum(t.numel() for t in llama_tensors().values())


def ordered(plan: Plan, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {job.name: tensors[job.name] for job in plan.jobs}


def test_files_are_those_of_save_pretrained(tmp_path: Path, llama: Llama) -> None:
    """Shard by shard and byte by byte what huggingface_hub writes for the same tensors in the same order."""
    odd = {
        "z.scalar": torch.tensor(3.0, dtype=torch.float64), "z.int": torch.arange(5, dtype=torch.int16),
        "z.é\n": torch.ones(3), "z.bool": torch.tensor([True, False, True]), "z.none": torch.zeros(0, 4),
        "z.fp8": torch.ones(7).to(torch.float8_e4m3fn),
    }  # fmt: skip
    a = llama("a", dtype=torch.bfloat16, change=odd)
    weights = load_file(a / "model.safetensors")
    for size in (300, 1500, 4000, 10**9):
        recipe = {"merge_method": "passthrough", "models": [{"model": str(a)}]}
        plan = yeam.plan(recipe, shard_size=size)
        out, expected = tmp_path / f"out-{size}", tmp_path / f"hub-{size}"
        yeam.merge(recipe, out, shard_size=size)
        expected.mkdir()
        save_torch_state_dict(ordered(plan, weights), expected, max_shard_size=size, metadata={"format": "pt"})
        files = sorted(path.name for path in expected.glob("*.safetensors"))
        assert sorted(path.name for path in out.glob("*.safetensors")) == files
        for name in files:
            assert (out / name).read_bytes() == (expected / name).read_bytes(), (size, name)
            with safe_open(out / name, "pt") as file:
                assert file.metadata() == {"format": "pt"}
        index = out / "model.safetensors.index.json"
        assert index.exists() is (len(files) > 1)
        split = split_torch_state_dict_into_shards(ordered(plan, weights), max_shard_size=size)
        if len(files) > 1:
            made = json.loads(index.read_text())
            assert made["weight_map"] == split.tensor_to_filename
            assert made["metadata"]["total_size"] == split.metadata["total_size"]
            assert index.read_text() == json.dumps(made, indent=2, sort_keys=True) + "\n"


def test_plain_json_and_costs(llama: Llama) -> None:
    a, b = llama("a", shards=2), llama("b")
    recipe = {"merge_method": "yeam", "base_model": str(a), "models": [{"model": str(b)}], "chat_template": "chatml"}
    plan, costs = plan_costs(recipe, shard_size="3KB")
    plain = plan.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert len(plain["shards"]) > 1 and plain["chat_template"] and plain["config"]["model_type"] == "llama"
    for job, made in zip(plain["jobs"], plan.jobs, strict=True):
        header = json.loads(plain["shards"][job["shard"]]["header"])
        begin, end = header[job["name"]]["data_offsets"]
        assert end - begin == job["end"] - job["begin"] == made.nbytes
        assert (header[job["name"]]["dtype"], header[job["name"]]["shape"]) == (job["dtype"], job["shape"])
        assert job["parameters"] == {
            "frames": 256,
            "lambda_": 1,
            "rounds": None,
            "seed": 0,
            "softness": 32,
            "weight": [1],
        }
    assert sum(shard["nbytes"] - len(shard["header"].encode()) - 8 for shard in plain["shards"]) == plan.total_bytes
    assert costs["read_bytes"] == 2 * plan.total_bytes == sum(costs["read_by_role"].values())
    assert plan.total_bytes < costs["peak_memory"] < 4 << 30


SCRIPT = """
import sys, yeam
plan = yeam.plan(sys.argv[1])
print(plan.hash(), plan.models[plan.donor].label, [job.name for job in plan.jobs][:3])
"""


def test_every_process_makes_the_same_plan(tmp_path: Path, llama: Llama) -> None:
    models = [llama(name) for name in "abc"]
    recipe = {"merge_method": "linear", "models": [{"model": str(m)} for m in models], "parameters": {"weight": 1}}
    path = tmp_path / "r.json"
    path.write_text(json.dumps(recipe))
    lines = set()
    for seed in ("0", "1", "7"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(path)], env=environment(PYTHONHASHSEED=seed), capture_output=True,
            text=True, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines.add(done.stdout)
    assert len(lines) == 1
    hashes = {yeam.plan(recipe).hash()}
    for change in (
        {"dtype": "float16"},
        {"parameters": {"weight": 2}},
        {"chat_template": "chatml"},
        {"models": recipe["models"][::-1]},
    ):
        hashes.add(yeam.plan({**recipe, **change}).hash())
    assert len(hashes) == 5
    before = yeam.plan(recipe).hash()
    save_model(models[0], llama_tensors(seed=99), llama_config())
    assert yeam.plan(recipe).hash() != before
