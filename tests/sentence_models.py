"""Tiny models of sentence-transformers with random weights: an encoder that pools, and a cross-encoder."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
from transformers import BertModel

from tests import models


def tiny_encoder(folder: Path, *, prompts: dict[str, str] | None = None, **options: Any) -> SentenceTransformer:
    """BERT, mean pooling and a projection; ``folder`` gets the BERT that it is made from."""
    bert = models.fill(BertModel(models.tiny_bert().config))
    with torch.no_grad():
        bert.embeddings.word_embeddings.weight.mul_(20)  # else all texts are nearly the same
    bert.save_pretrained(folder)
    models.tiny_tokenizer().save_pretrained(folder)
    dense = models.fill(Dense(16, 8, activation_function=torch.nn.Tanh()), 1)
    modules = [Transformer(str(folder)), Pooling(16, "mean"), dense]
    return SentenceTransformer(modules=modules, prompts=prompts, device="cpu", local_files_only=True, **options)


def tiny_cross_encoder(folder: Path) -> CrossEncoder:
    """BERT that reads pairs and gives one score."""
    models.tiny_bert(num_labels=1).save_pretrained(folder)
    models.tiny_tokenizer().save_pretrained(folder)
    return CrossEncoder(str(folder), device="cpu", local_files_only=True)


def texts(n: int = 12, seed: int = 0) -> list[str]:
    """Random sentences of 1 to 8 words that the tokenizer knows."""
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(models.VOCAB - 4)}" for _ in range(rng.randint(1, 8))) for _ in range(n)]


def pairs(n: int = 12, seed: int = 0) -> list[tuple[str, str]]:
    """Random pairs of sentences."""
    return list(zip(texts(n, seed), texts(n, seed + 1), strict=True))
