"""The demo's fine-tuning: a plain loop on the CPU, in bf16 if that is faster."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_prune.cli.demo.sentences import Example


@dataclass(frozen=True)
class Recipe:
    """Everything besides the packages that determines what the cache holds; a change gives a new cache folder."""

    heldout_per_label: int = 600
    split_seed: int = 0
    # Checked once on 1,000 sentences cut from the training part (split_examples(train, 500, seed=1)) after training on
    # the other 6,328 in bf16: 83.2 % right. No other setting was tried, and the held-out part was not looked at.
    seed: int = 0
    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    warmup_fraction: float = 0.1
    max_length: int = 96
    freeze_embeddings: bool = True


def train_model(
    sources: Mapping[str, Path], train: Sequence[Example], folder: Path, recipe: Recipe, bf16: bool, progress: bool
) -> None:
    """Fine-tune the encoder on ``train`` and save it with its tokenizer in ``folder``, in fp32."""
    # The caller's random state is put back, and the same seed gives the same model again on the same machine.
    with torch.random.fork_rng(devices=[]), _quiet_transformers():
        torch.manual_seed(recipe.seed)
        model, tokenizer = _load_encoder(sources)
        if recipe.freeze_embeddings:
            model.base_model.embeddings.requires_grad_(False)
        texts = [example.sentence for example in train]
        token_ids = tokenizer(texts, truncation=True, max_length=recipe.max_length)["input_ids"]
        _fit(model, token_ids, [example.label for example in train], recipe, bf16, progress)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Turn off the progress bars of transformers (one per file written), and put the setting back."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _load_encoder(sources: Mapping[str, Path]) -> tuple[Any, Any]:
    """Return a classifier with the encoder's weights and a new head, and the tokenizer.

    The weights are loaded by hand, since ``from_pretrained`` would warn that the head is new, which is intended.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    folder = sources["config.json"].parent
    labels = {0: "NEGATIVE", 1: "POSITIVE"}
    config = AutoConfig.from_pretrained(
        folder,
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
        local_files_only=True,
        trust_remote_code=False,
    )
    model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    weights = load_file(sources["model.safetensors"])
    del weights["embeddings.position_ids"]  # a constant that the file still carries and the model no longer has
    model.base_model.load_state_dict(weights)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # The file asks for sentences cut and padded to 128 tokens, its authors' setting for sentence vectors.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return model, tokenizer


def _fit(
    model: Any,
    token_ids: Sequence[Sequence[int]],
    labels: Sequence[int],
    recipe: Recipe,
    bf16: bool,
    progress: bool,
) -> None:
    """Train with AdamW, a linear warm-up and a linear decay."""
    from tqdm import tqdm

    shuffle = random.Random(recipe.seed)
    epochs = (_batches([len(ids) for ids in token_ids], recipe.batch_size, shuffle) for _ in range(recipe.epochs))
    batches = [batch for epoch in epochs for batch in epoch]
    optimizer = torch.optim.AdamW(_parameter_groups(model, recipe.weight_decay), lr=recipe.learning_rate)
    warmup = max(1, round(recipe.warmup_fraction * len(batches)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (len(batches) - step) / (len(batches) - warmup + 1))
    )
    model.train()
    hidden = None if progress else True  # None: shown on a terminal
    for batch in tqdm(batches, desc="Training the demo model", unit="batch", disable=hidden, leave=False):
        inputs, mask = _pad([token_ids[index] for index in batch], model.config.pad_token_id)
        target = torch.tensor([labels[index] for index in batch])  # (batch,)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = model(input_ids=inputs, attention_mask=mask, labels=target).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def _parameter_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trained parameters into matrices, which decay, and biases and norms, which do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.dim() <= 1], "weight_decay": 0.0},
    ]


def _batches(lengths: Sequence[int], batch_size: int, shuffle: random.Random) -> list[list[int]]:
    """Return one epoch of batches of indices; a batch holds sentences of similar length, so little is padding."""
    order = list(range(len(lengths)))
    shuffle.shuffle(order)
    pool = 32 * batch_size
    # Sorting within pools only, not over all sentences, keeps the make-up of a batch random.
    grouped = [
        index
        for start in range(0, len(order), pool)
        for index in sorted(order[start : start + pool], key=lambda index: lengths[index])
    ]
    batches = [grouped[start : start + batch_size] for start in range(0, len(grouped), batch_size)]
    shuffle.shuffle(batches)
    return batches


def _pad(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token ids and the attention mask of one batch, padded to its longest row."""
    tensors = [torch.tensor(row) for row in rows]
    inputs = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=pad_token_id)  # (batch, seq)
    lengths = torch.tensor([len(row) for row in rows])  # (batch,)
    mask = torch.arange(inputs.shape[1]) < lengths[:, None]  # (batch, seq)
    return inputs, mask.long()


def bf16_is_faster() -> bool:
    """Time one of the encoder's matrix products in bf16 and in fp32.

    A CPU without bf16 instructions computes the right numbers as well, but many times slower than in fp32.
    """

    def fastest(dtype: torch.dtype) -> float:
        hidden, weight = torch.ones(256, 384, dtype=dtype), torch.ones(384, 384, dtype=dtype)
        times = []
        for _ in range(8):
            start = time.perf_counter()
            hidden @ weight
            times.append(time.perf_counter() - start)
        return min(times)

    return fastest(torch.bfloat16) < 0.7 * fastest(torch.float32)
