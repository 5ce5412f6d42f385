"""One measurement in a process of its own: a job as JSON on standard input, its result as JSON on standard output.

A job names the model (``model``, a folder, or ``random``, an architecture with random weights), the method
(``config``, the fields of a PruningConfig, or ``torch_l1``, a sparsity for ``torch.nn.utils.prune``; neither is the
dense model), the texts to calibrate on, and the labelled texts to score.

``seconds`` is the wall time of ``prune()`` alone. ``extra_mib`` is how far the resident memory rises during it above
what it was when it began, with the model, the tokenised batches and the libraries loaded and one batch run: Linux
only, else null. So the dense model is not in it, and everything that pruning adds is: statistics, what finished
layers put out, masks, and the undo log where it is in memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)
from transformers.utils import logging

import hf_prune
from hf_prune import PruningConfig, evaluate_classification, prune, text_batches
from hf_prune.plan import make_plan

ENCODER = r".*\b(layer|layers|h|block)\.\d+\..*"  # the Linears of the encoder's blocks: no pooler, no classifier
VOCABULARY = 1000  # of models with random weights


def in_own_process(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job in a fresh process, with the library that this process would use.

    Raises:
        SystemExit: If it fails; it has said why on standard error.
    """
    root = str(Path(hf_prune.__file__).parents[1])
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {[root]!r}; import _measure; _measure.main()"]
    done = subprocess.run(
        command, input=json.dumps(job), text=True, stdout=subprocess.PIPE, cwd=Path(__file__).parent, check=False
    )
    if done.returncode:
        raise SystemExit(f"a measurement failed (see above): {job.get('config') or job.get('torch_l1') or 'dense'}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Read a job, run it, print the result."""
    job = json.load(sys.stdin)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(job["threads"])
    if "random" in job:
        model, tokenizer = random_model(**job["random"]), None
        batches = random_batches(**job["random_batches"])
    else:
        tokenizer = AutoTokenizer.from_pretrained(job["model"])
        model = AutoModelForSequenceClassification.from_pretrained(job["model"])
        batches = text_batches(job["calibration"], tokenizer) if job["calibration"] else []
    model.eval()
    result: dict[str, Any] = {}
    if job["config"] is not None or job["torch_l1"] is not None:
        result |= timed(model, job, batches)
    else:
        result |= sizes(model)
    for name, data in job.get("score", {}).items():
        result[name] = score(model, tokenizer, data)
    print(json.dumps(result))


def timed(model: nn.Module, job: dict[str, Any], batches: list[Any]) -> dict[str, Any]:
    """Prune, with the clock and the memory watched."""
    targets = [tensor.target for tensor in make_plan(model, encoder_config()).tensors]
    with torch.no_grad():
        for batch in batches[-1:]:
            model(**batch)
    before, start = memory_from_here(), time.perf_counter()
    if job["torch_l1"] is not None:
        for target in targets:
            module = model.get_submodule(target.module)
            torch_prune.l1_unstructured(module, "weight", job["torch_l1"])
            torch_prune.remove(module, "weight")
    else:
        prune(model, PruningConfig.from_dict(job["config"]), calibration=batches or None)
    seconds = time.perf_counter() - start
    extra = None if before is None else resident("VmHWM") - before
    zeros = sum(int((model.get_parameter(target.name) == 0).sum()) for target in targets)
    return {"seconds": seconds, "extra_mib": extra, "sparsity": zeros / sum(target.size for target in targets)}


def encoder_config() -> PruningConfig:
    """Half of the encoder's Linears by magnitude: only its targets matter."""
    return PruningConfig(0.5, target_modules=ENCODER)


def score(model: Any, tokenizer: Any, data: dict[str, list[Any]]) -> dict[str, Any]:
    """Predictions for sentences, and the right answers."""
    from datasets import Dataset

    found = evaluate_classification(model, tokenizer, Dataset.from_dict(data))
    return {"predictions": list(found.predictions), "labels": list(found.labels)}


def sizes(model: nn.Module) -> dict[str, int]:
    """What the table's header says about the model."""
    plan = make_plan(model, encoder_config())
    linears = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)]
    return {
        "encoder_linears": len(plan.tensors),
        "encoder_weights": plan.target_parameters,
        "linears": len(linears),
        "linear_weights": sum(linears),
        "parameters": plan.total_parameters,
    }


# --- random models, for times only ------------------------------------------------------------------


def random_model(kind: str, layers: int) -> nn.Module:
    """BERT of MiniLM's width, or DistilBERT, with random weights and a small vocabulary."""
    torch.manual_seed(0)
    if kind == "distilbert":
        return DistilBertForSequenceClassification(DistilBertConfig(vocab_size=VOCABULARY, n_layers=layers))
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=384, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=1536
    )
    return BertForSequenceClassification(config)


def random_batches(sentences: int, length: int) -> list[dict[str, torch.Tensor]]:
    """Batches of 32 rows of random token ids, without padding."""
    ids = torch.randint(5, VOCABULARY, (sentences, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(32)]


# --- memory -----------------------------------------------------------------------------------------


def memory_from_here() -> float | None:
    """Let the peak of the resident memory start from here; the resident memory in MiB, None where /proc lacks it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return resident("VmRSS")


def resident(field: str) -> float:
    """A field of /proc/self/status in MiB: VmRSS is the resident memory, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


if __name__ == "__main__":
    main()
