"""Writes ``fixtures/``: files as this version leaves them on the disk, for later versions to read.

``python -m tests.golden.write_fixtures`` replaces all of them, which is hardly ever right: what users have on their
disks does not change with the code. A new format gets fixtures beside these.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, TrainingArguments

from hf_prune import (
    AutoPrunedModelForSequenceClassification,
    PruningConfig,
    PruningTrainer,
    Schedule,
    compress_checkpoint,
    listen_to_progress,
    prunable,
    prune_stream,
    read_card_data,
    run_sweep,
    write_card,
)
from tests import models
from tests.golden.builders import Sentences, exact_values
from tests.golden.record import of_masks, of_weights

FOLDER = Path(__file__).parent / "fixtures"
EXPECTED = FOLDER / "expected.json"
MODIFIED = 1_700_000_000  # when the files of the stream's source were written, which its journal names
SIZES = {"vocab_size": models.VOCAB, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
CONFIGS: list[dict[str, Any]] = [
    {"sparsity": 0.3},
    {"granularity": "2:4", "criterion": "sparsegpt", "repair": "least_squares", "objective": "loss"},
    {"sparsity": 0.5, "allocation": {"query": 0.8, "key": 0.8}, "exclude_modules": ("classifier",), "seed": 7},
    {"target_params": 0.7, "granularity": ("head", "neuron"), "criterion": "fisher", "round_to": 4},
    {"sparsity": 0.9, "criterion": "movement", "schedule": Schedule("cubic", begin=10, end=0.7, every=50)},
    {"sparsity": 0.8, "polish": {"epochs": 3}, "scope": "global", "target_modules": r".*\.(query|key)"},
]


def tiny_bert(**settings: Any) -> Any:
    """A classifier of a few kilobytes."""
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**{**SIZES, "num_hidden_layers": 1, "max_position_embeddings": 16, **no_dropout, **settings})
    return prunable(exact_values(BertForSequenceClassification(config), bits=10))


def tiny_llama() -> Any:
    """A language model of a few kilobytes."""
    config = LlamaConfig(**SIZES, num_hidden_layers=2, num_key_value_heads=2, max_position_embeddings=16)
    return prunable(exact_values(LlamaForCausalLM(config), bits=7))


def sweep(out: Path) -> Any:
    """The sweep whose results are kept; a second call into the same folder measures nothing anew."""
    model = exact_values(models.tiny_bert().double(), scale=0.75)
    data = Dataset.from_dict(models.tiny_sentences(24))
    return run_sweep(model, models.tiny_tokenizer(), data, sparsities=(0.3, 0.6), out=out, name="tiny")


def training(out: Path, **settings: Any) -> PruningTrainer:
    """The training whose checkpoint is kept."""
    fixed = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 0.05, "save_steps": 4, "seed": 3}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_steps": 4, "optim": "sgd"}
    args = TrainingArguments(output_dir=str(out), **{**fixed, **quiet, **settings})
    schedule = Schedule("cubic", begin=1, end=6, every=1)
    config = PruningConfig(0.75, "movement", target_modules=("query", "dense"), schedule=schedule)
    return PruningTrainer(model=tiny_bert().double(), args=args, train_dataset=Sentences(24), pruning_config=config)


def stream(source: Path, out: Path) -> Any:
    """The run whose interrupted state is kept."""
    return prune_stream(source, 0.5, out, target_modules=("query", "key", "value"))


def tensors_of(model: Any) -> dict[str, Any]:
    """What the tests compare bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    zeros = sum(int((tensor == 0).sum()) for tensor in model.state_dict().values())
    return {"bits": digest.hexdigest(), "zeros": zeros, **of_masks(prunable(model).masks)}


def write_checkpoints(folder: Path) -> dict[str, Any]:
    """Checkpoints by name, and what they hold."""
    half, dense = tiny_bert().prune(0.5), {"max_shard_size": "2KB"}
    pattern = tiny_llama().to(torch.bfloat16).prune(granularity="2:4")
    shrunk = tiny_bert(num_hidden_layers=2).prune(0.5, granularity=("head", "neuron"), scope="global").shrink()
    plain = {"plain": (half, {}), "shards": (half, dense), "plain-2-4-bf16": (pattern, {}), "shrunk": (shrunk, {})}
    expected = {}
    for name, (model, settings) in plain.items():
        model.save_pretrained(folder / name, **settings)
        expected[name] = tensors_of(model)
    packed: dict[str, tuple[str, dict[str, Any]]] = {
        "packed-zstd": ("plain", {}),
        "packed-raw": ("plain", {"codec": "none"}),
        "packed-int8": ("plain", {"values": "int8"}),
        "packed-2-4-bf16": ("plain-2-4-bf16", {}),
        "packed-2-4-bf16-raw": ("plain-2-4-bf16", {"codec": "none"}),
        "packed-shrunk": ("shrunk", {}),
        "remote-code": ("plain", {"remote_code": True}),
    }
    for name, (source, settings) in packed.items():
        compress_checkpoint(folder / source, folder / name, **settings)
        model = plain[source][0]
        expected[name] = tensors_of(type(model).from_pretrained(folder / name))
        if settings.get("values") != "int8":
            assert expected[name] == expected[source]
    report = half.sparsity_report().to_dict()
    (folder / "plain" / "sparsity_report.json").write_text(json.dumps(report))
    write_card(folder / "plain", read_card_data(folder / "plain", report=report, name="tiny", license="apache-2.0"))
    (folder / "pruned.pickle").write_bytes(pickle.dumps(half))
    expected["pruned.pickle"] = expected["plain"]
    return expected


def write_stream(folder: Path, work: Path) -> dict[str, Any]:
    """What a stream leaves that was interrupted at its second weight."""
    source = work / "source"
    tiny_bert().save_pretrained(source)
    (source / ".hf_prune.json").unlink(missing_ok=True)
    for path in source.iterdir():
        os.utime(path, (MODIFIED, MODIFIED))

    def stop(title: str, done: int, total: int | None) -> None:
        if title == "Pruning" and done == 2:
            raise KeyboardInterrupt

    try:
        with listen_to_progress(stop):
            stream(source, work / "out")
    except KeyboardInterrupt:
        shutil.copytree(source, folder / "stream" / "source")
        shutil.copytree(work / ".out.partial", folder / "stream" / "partial")
    stream(source, work / "out")
    return tensors_of(AutoPrunedModelForSequenceClassification.from_pretrained(work / "out"))


def write_training(folder: Path, work: Path) -> dict[str, Any]:
    """A checkpoint in the middle of a training, and what comes of it."""
    trainer = training(work / "training")
    trainer.train()
    kept = folder / "training" / "checkpoint-4"
    shutil.copytree(work / "training" / "checkpoint-4", kept)
    (kept / "training_args.bin").unlink()
    model = trainer.model
    return {**of_masks(model.masks), **of_weights(model.state_dict())}


def write(folder: Path) -> None:
    """Everything, into an empty folder."""
    expected = write_checkpoints(folder)
    with tempfile.TemporaryDirectory() as work:
        expected["stream"] = write_stream(folder, Path(work))
        expected["training"] = write_training(folder, Path(work))
    result = sweep(folder / "sweep")
    for path in (folder / "sweep").iterdir():
        if path.name != "results.json":
            path.unlink()
    expected["sweep"] = {"told": str(result), "seconds": [point.prune_seconds for point in result.points]}
    texts = [PruningConfig(**settings).to_json() for settings in CONFIGS]
    (folder / "pruning_configs.json").write_text(json.dumps(texts, indent=1) + "\n")
    (folder / EXPECTED.name).write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    """Replace the fixtures once the new ones are complete."""
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary))
        shutil.rmtree(FOLDER, ignore_errors=True)
        shutil.copytree(temporary, FOLDER)


if __name__ == "__main__":
    main()
