"""The configurations whose results must not change. Only public names are used: what is inside may move."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from torch.nn.utils import prune as torch_prune
from transformers import Trainer, TrainingArguments

from hf_prune import (
    AutoPrunedModelForCausalLM,
    AutoPrunedModelForSequenceClassification,
    Distillation,
    PruningCallback,
    PruningConfig,
    PruningTrainer,
    Schedule,
    adopt_zeros,
    compare,
    compare_perplexity,
    compress_checkpoint,
    decompress_checkpoint,
    evaluate_classification,
    evaluate_perplexity,
    explain_speed,
    find_sparsity,
    find_ticket,
    from_torch_prune,
    keep_sparse,
    merge_lora,
    prunable,
    prune,
    prune_stream,
    run_sweep,
    shrink,
    sparsity_report,
    structure_report,
    text_batches,
    token_windows,
    trim_vocabulary,
)
from tests import models
from tests.golden.builders import Sentences, batches, build, exact_values
from tests.golden.record import of_masks, of_model, of_weights

Case = Callable[[Path], dict[str, Any]]
CASES: dict[str, Case] = {}
LEAST_SQUARES = {"repair": "least_squares"}
UNITS = {"granularity": ("head", "neuron")}

#: Of numbers that are no integers, as a share. Statistics of calibration are float32, also of a float64 model: weights
#: that follow from them differ by up to 2e-5 between processors.
TOLERANCE, TOLERANCE_FLOAT32 = 1e-9, 2e-4
FLOAT32: set[str] = set()
SOLVES = {"fisher", "sparsegpt", "alps"}  # criteria that give the weights that stay new values


def case(name: str, *, float32: bool = False) -> Callable[[Case], Case]:
    """Decorator that adds a case, by a name that says what is special."""

    def add(function: Case) -> Case:
        assert name not in CASES
        CASES[name] = function
        if float32:
            FLOAT32.add(name)
        return function

    return add


# --- pruning at once -----------------------------------------------------------------------------------------------

LABELS = {"taylor", "snip"}
ONE_SHOT: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude, layer": ("bert", {"sparsity": 0.5}),
    "magnitude, row": ("llama", {"sparsity": 0.37, "scope": "row"}),
    "magnitude, global, some modules": (
        "bert",
        {
            "sparsity": 0.6,
            "scope": "global",
            "target_modules": ("query", "dense"),
            "exclude_modules": ("pooler.dense",),
        },
    ),
    "magnitude, erk, Conv1D": ("gpt2", {"sparsity": 0.5, "allocation": "erk"}),
    "magnitude, own shares": ("bert", {"sparsity": 0.3, "allocation": {"query": 0.7, "classifier": 0.0}}),
    "random, layer": ("llama", {"sparsity": 0.5, "criterion": "random", "seed": 3}),
    "random, global": ("gpt2", {"sparsity": 0.4, "criterion": "random", "scope": "global"}),
    "magnitude, 2:4": ("vit", {"granularity": "2:4"}),
    "magnitude, 1:4": ("t5", {"granularity": "1:4"}),
    "magnitude, block": ("bert", {"sparsity": 0.5, "granularity": "block:4x1"}),
    "magnitude, block, global": ("llama", {"sparsity": 0.5, "granularity": "block:2x4", "scope": "global"}),
    "magnitude, row units": ("bert", {"sparsity": 0.25, "granularity": "row"}),
    "magnitude, column units": ("gpt2", {"sparsity": 0.25, "granularity": "column"}),
    "magnitude, channel": ("resnet", {"sparsity": 0.5, "granularity": "channel", "target_modules": ("convolution",)}),
    "taylor, global": ("bert", {"sparsity": 0.5, "criterion": "taylor", "scope": "global"}),
    "taylor, steps": ("llama", {"sparsity": 0.7, "criterion": "taylor", "steps": 3}),
    "snip, Conv1D": ("gpt2", {"sparsity": 0.5, "criterion": "snip"}),
    "snip, 2:4": ("bert", {"criterion": "snip", "granularity": "2:4"}),
    "fisher_diagonal": ("vit", {"sparsity": 0.5, "criterion": "fisher_diagonal"}),
    "fisher, layer": ("bert", {"sparsity": 0.6, "criterion": "fisher"}),
    "fisher, global, steps": ("llama", {"sparsity": 0.6, "criterion": "fisher", "scope": "global", "steps": 2}),
    "fisher, block": ("gpt2", {"sparsity": 0.5, "criterion": "fisher", "granularity": "block:1x4"}),
    "fisher, 2:4, repair": ("bert", {"criterion": "fisher", "granularity": "2:4", **LEAST_SQUARES}),
    "wanda, row": ("llama", {"sparsity": 0.5, "criterion": "wanda", "scope": "row"}),
    "wanda, 2:4, one pass": ("t5", {"criterion": "wanda", "granularity": "2:4", "calibration_order": "one_pass"}),
    "wanda, owl": ("llama", {"sparsity": 0.6, "criterion": "wanda", "scope": "row", "allocation": "owl"}),
    "sparsegpt, layer": ("bert", {"sparsity": 0.5, "criterion": "sparsegpt"}),
    "sparsegpt, 2:4": ("llama", {"criterion": "sparsegpt", "granularity": "2:4"}),
    "sparsegpt, loss": ("t5", {"sparsity": 0.6, "criterion": "sparsegpt", "objective": "loss"}),
    "alps, layer": ("llama", {"sparsity": 0.7, "criterion": "alps"}),
    "alps, row, one pass": (
        "bert",
        {"sparsity": 0.5, "criterion": "alps", "scope": "row", "calibration_order": "one_pass"},
    ),
    "alps, loss, fisher shares, repair": (
        "bert",
        {"sparsity": 0.8, "criterion": "alps", "objective": "loss", "allocation": "fisher", **LEAST_SQUARES},
    ),
    "magnitude, fisher shares": ("gpt2", {"sparsity": 0.6, "allocation": "fisher"}),
    "magnitude, global, repair": ("bert", {"sparsity": 0.6, "scope": "global", **LEAST_SQUARES}),
    "random, repair, loss": ("llama", {"sparsity": 0.5, "criterion": "random", "objective": "loss", **LEAST_SQUARES}),
    "taylor, repair, Conv1D": (
        "gpt2",
        {"sparsity": 0.5, "criterion": "taylor", "exclude_modules": ("mlp.c_proj",), **LEAST_SQUARES},
    ),
    "magnitude, polish": ("bert", {"sparsity": 0.7, "polish": {"epochs": 2, "learning_rate": 1e-3}}),
    "wanda, repair, polish": (
        "llama",
        {"sparsity": 0.7, "criterion": "wanda", "polish": {"epochs": 1, "learning_rate": 1e-3}, **LEAST_SQUARES},
    ),
}
STRUCTURED: dict[str, tuple[str, dict[str, Any]]] = {
    "heads and neurons, magnitude": ("bert", {"sparsity": 0.5, **UNITS}),
    "heads and neurons, random, global": (
        "gpt2",
        {"sparsity": 0.4, "criterion": "random", "scope": "global", "seed": 1, **UNITS},
    ),
    "heads and neurons, taylor": ("t5", {"sparsity": 0.5, "criterion": "taylor", **UNITS}),
    "heads and neurons, fisher, parameters": ("bert", {"target_params": 0.8, "criterion": "fisher", **UNITS}),
    "heads and neurons, fisher, repair, loss": (
        "bert",
        {"target_flops": 0.6, "criterion": "fisher", "workload": {"length": 16}, **UNITS, **LEAST_SQUARES},
    ),
    "heads and neurons, reconstruction, repair": (
        "llama",
        {"target_params": 0.8, "criterion": "reconstruction", **UNITS, **LEAST_SQUARES},
    ),
    "heads and neurons, reconstruction, polish": (
        "vit",
        {"sparsity": 0.5, "criterion": "reconstruction", "polish": {"epochs": 1, "learning_rate": 1e-3}, **UNITS},
    ),
    "neurons in multiples": ("llama", {"sparsity": 0.5, "granularity": "neuron", "round_to": 8}),
    "layers, fisher": ("bert", {"target_params": 0.7, "criterion": "fisher", "granularity": ("layer", "neuron")}),
    "layers, magnitude": ("llama", {"sparsity": 0.5, "granularity": "layer", "scope": "global"}),
}


def _one_shot(kind: str, settings: dict[str, Any], shrinks: bool) -> Case:
    config = PruningConfig(**settings)

    def run(folder: Path) -> dict[str, Any]:
        model = prunable(build(kind))
        needed = batches(kind, labels=config.criterion in LABELS and not shrinks) if config.needs_data else None
        model.prune(config, calibration=needed)
        found = of_model(model)
        if not shrinks:
            return found
        report = structure_report(shrink(model))
        shrunk = {"shrunk": of_model(model), "structure": model.config.pruned_structure, "told": report.to_dict()}
        return {**found, **shrunk}

    return run


for _table, _shrinks in ((ONE_SHOT, False), (STRUCTURED, True)):
    for _name, (_kind, _settings) in _table.items():
        CASES[_name] = _one_shot(_kind, _settings, _shrinks)
        if "repair" in _settings or _settings.get("criterion") in SOLVES:
            FLOAT32.add(_name)


@case("twice, plans, dense weights given back")
def _twice(folder: Path) -> dict[str, Any]:
    model = prunable(build("bert"))
    dense = of_weights(model.state_dict())
    plan = model.plan(0.3, criterion="wanda", scope="row", allocation="erk").to_dict()
    model.prune(0.3, keep_dense=True)
    first = of_masks(model.masks)
    model.prune(0.6, scope="global", criterion="taylor", calibration=batches("bert", labels=True))
    second = of_model(
        model, first=first, plan=plan, report=sparsity_report(model).to_dict(), speed=explain_speed(model)
    )
    assert of_weights(model.discard_masks().state_dict()) == dense
    return second


@case("zeros of other tools")
def _others(folder: Path) -> dict[str, Any]:
    model = build("bert")
    for module in list(model.modules()):
        if isinstance(module, torch.nn.Linear):
            torch_prune.l1_unstructured(module, "weight", amount=0.5)
    from_torch_prune(model)
    found = of_model(model)
    prunable(model).make_permanent()
    report = adopt_zeros(model)
    return {**found, "adopted": of_model(model), "report": str(report)}


@case("shares of bfloat16", float32=True)
def _bfloat16(folder: Path) -> dict[str, Any]:
    model = exact_values(models.tiny_llama().to(torch.bfloat16), bits=6)
    return of_model(prune(model, 0.5, scope="global"))


# --- files ---------------------------------------------------------------------------------------------------------


def _saved(folder: Path, kind: str, dtype: torch.dtype = torch.float64) -> Path:
    prunable(build(kind).to(dtype)).save_pretrained(folder, max_shard_size="8KB")
    return folder


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@case("stream, magnitude, global")
def _stream(folder: Path) -> dict[str, Any]:
    source = _saved(folder / "dense", "bert")
    report = prune_stream(source, 0.6, folder / "out", scope="global")
    model = AutoPrunedModelForSequenceClassification.from_pretrained(folder / "out")
    return of_model(model, report=report.to_dict(), files=_names(folder / "out"))


@case("stream, wanda", float32=True)
def _stream_wanda(folder: Path) -> dict[str, Any]:
    source = _saved(folder / "dense", "llama", torch.float32)
    prune_stream(source, 0.5, folder / "out", criterion="wanda", scope="row", calibration=batches("llama"))
    return of_model(AutoPrunedModelForCausalLM.from_pretrained(folder / "out"), files=_names(folder / "out"))


@case("stream, sparsegpt, 2:4, after an earlier pruning", float32=True)
def _stream_twice(folder: Path) -> dict[str, Any]:
    source = _saved(folder / "dense", "gpt2")
    prune_stream(source, 0.3, folder / "once")
    settings = {"criterion": "sparsegpt", "granularity": "2:4"}
    prune_stream(folder / "once", None, folder / "out", calibration=batches("gpt2"), **settings)
    return of_model(AutoPrunedModelForCausalLM.from_pretrained(folder / "out"))


@case("save, compress, load, decompress")
def _files(folder: Path) -> dict[str, Any]:
    model = prunable(build("bert")).prune(0.7, scope="global").float()
    facts: dict[str, Any] = {}
    model.save_pretrained(folder / "plain")
    for codec, values in (("zstd", "exact"), ("none", "exact"), ("zstd", "int8")):
        small = folder / f"{codec}-{values}"
        compress_checkpoint(folder / "plain", small, codec=codec, values=values)
        decompress_checkpoint(small, folder / "again", overwrite=True)
        again = AutoPrunedModelForSequenceClassification.from_pretrained(folder / "again")
        packed = AutoPrunedModelForSequenceClassification.from_pretrained(small)
        assert of_model(packed) == of_model(again)
        facts[small.name] = {"model": of_model(packed), "files": [_names(small), _names(folder / "again")]}
    model.save_pretrained(folder / "direct", compressed=True, remote_code=True)
    return of_model(model, **facts, direct=_names(folder / "direct"))


@case("shrunk, saved and loaded")
def _shrunk_files(folder: Path) -> dict[str, Any]:
    model = prunable(build("llama")).prune(target_params=0.8, **UNITS).shrink()
    model.save_pretrained(folder / "small")
    again = AutoPrunedModelForCausalLM.from_pretrained(folder / "small", dtype=torch.float64)
    config = json.loads((folder / "small" / "config.json").read_text())
    kept = {name: config[name] for name in ("architectures", "model_type", "pruned_structure", "intermediate_size")}
    return of_model(again, files=_names(folder / "small"), config=kept)


@case("vocabulary")
def _vocabulary(folder: Path) -> dict[str, Any]:
    model = prunable(build("bert")).prune(0.5)
    texts = models.tiny_sentences(8)["sentence"]
    result = trim_vocabulary(model, models.tiny_tokenizer(), texts)
    return of_model(model, told=str(result), tokens=sorted(result.tokenizer.get_vocab().items()))


# --- training ------------------------------------------------------------------------------------------------------

STEPS = 20


def _arguments(folder: Path, **settings: Any) -> TrainingArguments:
    fixed = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "logging_steps": 5}
    quiet = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 3}
    return TrainingArguments(**{"output_dir": str(folder), **fixed, **quiet, **settings})


def _no_dropout() -> Any:
    return build("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def _pruning(**settings: Any) -> PruningConfig:
    schedule = Schedule("cubic", begin=2, end=14, every=3)
    plain = {"sparsity": 0.75, "criterion": "magnitude", "target_modules": ("query", "dense"), "schedule": schedule}
    return PruningConfig(**{**plain, **settings})


TRAINED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "training, magnitude, cubic": ({}, {}),
    "training, movement": ({"criterion": "movement"}, {}),
    "training, soft movement": ({"criterion": "soft_movement"}, {"threshold": 0.3}),
    "training, taylor, 2:4": ({"criterion": "taylor", "granularity": "2:4", "sparsity": None}, {}),
    "training, rigl": ({"schedule": Schedule("rigl", every=2, end=16)}, {}),
    "training, wanda": ({"criterion": "wanda"}, {"calibration": batches("bert")}),
    "training, heads and neurons, movement, shrink": (
        {**UNITS, "sparsity": 0.5, "criterion": "movement", "target_modules": "all-linear"},
        {"shrink_at": 16},
    ),
    "training, distillation": ({}, {"distillation": Distillation(task=0.3, hidden=0.5)}),
}


def _training(settings: dict[str, Any], more: dict[str, Any]) -> Case:
    def run(folder: Path) -> dict[str, Any]:
        model = _no_dropout()
        teacher = {"teacher": copy.deepcopy(model)} if "distillation" in more else {}
        data = {"args": _arguments(folder), "train_dataset": Sentences(), **teacher, **more}
        trainer = PruningTrainer(model=model, pruning_config=_pruning(**settings), **data)
        trainer.train()
        logs = [[entry["loss"], entry["sparsity"]] for entry in trainer.state.log_history if "loss" in entry]
        return of_model(trainer.model, logs=logs)

    return run


for _name, (_settings, _more) in TRAINED.items():
    CASES[_name] = _training(_settings, _more)
    if "distillation" in _more:  # logits are compared in float32
        FLOAT32.add(_name)


@case("training, callback, resumed")
def _resumed(folder: Path) -> dict[str, Any]:
    def train(resume: bool) -> Any:
        callback = PruningCallback(_pruning(criterion="movement"))
        settings = {"save_strategy": "steps", "save_steps": 10, "adam_beta2": 0.99}
        trainer = Trainer(
            _no_dropout(), _arguments(folder, **settings), train_dataset=Sentences(), callbacks=[callback]
        )
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-10") if resume else None)
        return trainer.model

    straight, resumed = of_model(train(False)), of_model(train(True))
    assert straight == resumed
    return {**straight, "files": _names(folder / "checkpoint-10")}


@case("training, an optimizer of one's own")
def _own_loop(folder: Path) -> dict[str, Any]:
    model = prunable(_no_dropout()).prune(0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    keep_sparse(model, optimizer)
    for batch in batches("bert", labels=True) * 3:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return of_model(model)


@case("lottery")
def _lottery(folder: Path) -> dict[str, Any]:
    def make(model: Any) -> Trainer:
        data = {"train_dataset": Sentences(), "eval_dataset": Sentences(12)}
        return PruningTrainer(model=model, args=_arguments(folder, max_steps=5), **data)

    config = PruningConfig(0.75, target_modules=("query", "dense"))
    result = find_ticket(_no_dropout(), make, config, rounds=2, rewind_to=2)
    losses = [each.metrics["eval_loss"] for each in result.rounds]
    return of_model(
        result.model, ticket=of_weights(result.ticket), losses=losses, told=[r.sparsity for r in result.rounds]
    )


@case("LoRA merged")
def _lora(folder: Path) -> dict[str, Any]:
    import peft

    model = prune(_no_dropout(), 0.5)
    settings = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    wrapped = peft.get_peft_model(model, settings)
    exact_values(wrapped.double())
    prune(wrapped, 0.6)
    report = merge_lora(wrapped)
    return of_model(report.model, kept=report.kept, sparsity=report.sparsity)


# --- measuring -----------------------------------------------------------------------------------------------------


def _classifier() -> tuple[Any, Any, Dataset]:
    """A classifier whose answers differ from sentence to sentence, and sentences of which it gets nine in ten."""
    model = exact_values(models.tiny_bert().double(), scale=0.75)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    rows = models.answered_sentences(120, model=model)
    return model, models.tiny_tokenizer(), Dataset.from_dict(rows)


def _point(point: Any) -> dict[str, Any]:
    values = point.to_dict()
    del values["prune_seconds"]
    for name in ("evaluation", "dense"):
        values.get(name, {}).pop("seconds", None)
        values.get(name, {}).pop("distributions", None)  # the last bits differ between machines
    return values


@case("sweep")
def _sweep(folder: Path) -> dict[str, Any]:
    model, tokenizer, data = _classifier()
    texts = text_batches(list(data["sentence"])[:8], tokenizer, batch_size=4)
    settings = {"criteria": ("magnitude", "wanda"), "sparsities": (0.2, 0.6), "calibration": texts}
    result = run_sweep(model, tokenizer, data, out=folder / "out", source="words", **settings)
    told = re.sub(r"\d+\.\d+ s\b", "", str(result))
    return {"points": [_point(point) for point in result.points], "told": told, "files": _names(folder / "out")}


@case("sparsity within a drop")
def _budget(folder: Path) -> dict[str, Any]:
    model, tokenizer, data = _classifier()
    found = find_sparsity(model, tokenizer, data, max_drop=8.0)
    return {"sparsity": found.sparsity, "chosen": _point(found.chosen), "told": str(found)}


@case("evaluations compared")
def _compared(folder: Path) -> dict[str, Any]:
    model, tokenizer, data = _classifier()
    dense = evaluate_classification(model, tokenizer, data)
    pruned = evaluate_classification(prune(model, 0.8), tokenizer, data)
    return {"predictions": pruned.predictions, "told": str(compare(dense, pruned))}


@case("perplexity and windows", float32=True)
def _perplexity(folder: Path) -> dict[str, Any]:
    model, tokenizer = build("llama"), models.tiny_tokenizer()
    texts = models.tiny_sentences(12)["sentence"]
    windows = token_windows(texts, tokenizer, n=4, length=8, batch_size=2, labels=True)
    dense = evaluate_perplexity(model, tokenizer, texts, window=12)
    prune(model, 0.5, criterion="sparsegpt", calibration=windows)
    pruned = evaluate_perplexity(model, tokenizer, texts, window=12)
    both = [dense.perplexity, pruned.perplexity]
    return of_model(model, perplexities=both, told=str(compare_perplexity(dense, pruned)))


# --- the command line ----------------------------------------------------------------------------------------------


def run_command(*words: object) -> str:
    """What ``python -m hf_prune …`` prints; it must not fail."""
    printed, code = io.StringIO(), None
    with mock.patch.object(sys, "argv", ["hf-prune", *map(str, words)]), contextlib.redirect_stdout(printed):
        try:
            runpy.run_module("hf_prune", run_name="__main__")
        except SystemExit as ended:
            code = ended.code
    assert not code, f"{words}: exit code {code}"
    return printed.getvalue()


@case("commands")
def _commands(folder: Path) -> dict[str, Any]:
    model, tokenizer, data = _classifier()
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    (folder / "data").mkdir()
    lines = [f"{row['sentence']}\t{row['label']}" for row in data]
    (folder / "data" / "dev.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    (folder / "data" / "train.tsv").write_text("\n".join(["sentence\tlabel", *lines[:40]]) + "\n")
    out = folder / "out"
    assert "sparsegpt" in run_command("list")
    said = {}
    plan = ["prune", folder / "dense", "--sparsity", "0.4", "--allocation", "erk", "--dry-run", "--json"]
    said["plan"] = json.loads(run_command(*plan))
    words = [
        "--criterion",
        "wanda",
        "--scope",
        "row",
        "--data",
        folder / "data",
        "--calibration-samples",
        "8",
        "--plots",
    ]
    said["prune"] = json.loads(run_command("prune", folder / "dense", "--out", out, *words, "--json"))
    said["prune"].pop("run", None)  # folders and times
    scored = json.loads(
        run_command("evaluate", out, "--against", folder / "dense", "--data", folder / "data", "--json")
    )
    said["scored"] = scored["comparison"]
    small = [
        "prune",
        folder / "dense",
        "--granularity",
        "head,neuron",
        "--target-params",
        "0.8",
        "--out",
        folder / "small",
    ]
    run_command(*small)
    run_command("compress", out, folder / "packed")
    run_command("card", out, "--write")
    run_command("verify", out)
    files = {name: _names(folder / name) for name in ("out", "small", "packed")}
    pruned = AutoPrunedModelForSequenceClassification.from_pretrained(out)
    return of_model(pruned, said=_without_paths(said, folder), files=files)


def _without_paths(value: Any, folder: Path) -> Any:
    text = json.dumps(value).replace(str(folder), "FOLDER")
    return json.loads(text)
