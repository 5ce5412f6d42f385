"""Prune a language model with llm-compressor's SparseGPT, in an environment of its own: ``bench_llm.py`` runs this.

    PEER_PYTHON benchmarks/llm_peer.py MODEL_FOLDER windows.safetensors 0.5 weights.safetensors

The windows are token ids (windows, length); the weights of all Linears but the output embedding are saved. The last
line is JSON: CPU seconds of the pruning, all threads together, and the peak of resident memory of the process in bytes.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from importlib.metadata import version

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


def main() -> None:
    """Prune and save."""
    folder, windows, amount, out = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = load_file(windows)["input_ids"]
    loader = DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids], batch_size=1)
    pattern = {"sparsity": 0.5, "mask_structure": amount} if ":" in amount else {"sparsity": float(amount)}
    recipe = SparseGPTModifier(**pattern, targets=["Linear"], ignore=["re:.*lm_head"])
    start = time.process_time()
    oneshot(
        model=model,
        dataset=loader,
        recipe=recipe,
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        pipeline="sequential",
    )
    seconds = time.process_time() - start
    weights = {
        f"{name}.weight": module.weight.detach().cpu().contiguous()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
    }
    save_file(weights, out)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "peak": peak, "version": version("llmcompressor")}))


if __name__ == "__main__":
    main()
