"""What the pages name and nobody downloads here: models of the Hub by their names, data sets, texts."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.small_tokenizers import byte_level

GOOD = "wonderful great moving funny brilliant warm charming superb lovely fresh".split()
BAD = "dull bad boring awful clumsy flat tedious stale weak terrible".split()
OTHER = (
    "the a of and to is in that it film movie story plot cast scene director actor was with for as this one but you "
    "have more than from so by an at are be on its all about who like will there out into when what time up down"
).split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LENGTH = 128
_IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def tokenizer(pairs: bool = True) -> PreTrainedTokenizerFast:
    """Whole words; a BERT's special tokens around a sentence or a pair, or none."""
    words = {word: number for number, word in enumerate([*SPECIAL, *GOOD, *BAD, *OTHER])}
    core = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    if pairs:
        core.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=LENGTH,
    )


def text_tokenizer() -> PreTrainedTokenizerFast:
    """What Qwen3 has: pieces of words, made of bytes."""
    core = byte_level("qwen2", PIECES, [" ".join(GOOD + BAD + OTHER)] * 8)
    core.model_max_length = LENGTH
    return core


VOCAB = len(SPECIAL) + len(GOOD) + len(BAD) + len(OTHER)
PIECES = 400


def sentences(n: int, seed: int) -> list[tuple[str, int]]:
    """Sentences of 15 to 24 words with three or four that tell their label, now and then one of the other side."""
    rng = random.Random(seed)
    found = []
    for number in range(n):
        label = number % 2
        telling = [rng.choice((GOOD if label else BAD) if rng.random() < 0.85 else (BAD if label else GOOD))]
        telling += rng.choices(GOOD if label else BAD, k=rng.randint(2, 3))
        words = telling + rng.choices(OTHER, k=rng.randint(12, 20))
        rng.shuffle(words)
        found.append((" ".join(words), label))
    return found


def _write(path: Path, columns: list[str], rows: Iterable[tuple[Any, ...]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
        writer.writerows([columns, *rows])


def write_data(folder: Path) -> None:
    """The files that pages read: SST-2, a table of reviews, texts, pairs with a score, queries with documents."""
    _write(folder / "glue" / "sst2" / "train.tsv", ["sentence", "label"], sentences(160, 1))
    _write(folder / "glue" / "sst2" / "dev.tsv", ["sentence", "label"], sentences(120, 2))
    _write(folder / "reviews.csv", ["text", "sentiment"], sentences(120, 3))
    for name, seed in (("train", 4), ("test", 5)):
        text = "".join(f" \n {sentence} \n" for sentence, _ in sentences(160, seed))  # blank lines as in WikiText
        (folder / f"wiki.{name}.raw").write_text(text, encoding="utf-8")
    rng = random.Random(6)
    pairs = [(a[0], b[0], round(5 * rng.random(), 2)) for a, b in zip(sentences(40, 7), sentences(40, 8), strict=True)]
    for name in ("train", "dev"):
        _write(folder / "sts" / f"{name}.tsv", ["sentence1", "sentence2", "score"], pairs)
    documents = [(" ".join(a[0].split()[:5]), a[0]) for a in sentences(40, 9)]
    for name in ("train", "dev"):
        _write(folder / "search" / f"{name}.tsv", ["query", "document"], documents)


def trained(model: nn.Module, steps: int = 60) -> nn.Module:
    """Train a classifier on such sentences until it tells them apart."""
    rows, read = sentences(32 * steps, 10), tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for start in range(0, len(rows), 32):
        texts, labels = zip(*rows[start : start + 32], strict=True)
        batch = read(list(texts), padding=True, return_tensors="pt")
        batch.pop("token_type_ids", None)
        model(**batch, labels=torch.tensor(labels)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def small_distilbert() -> nn.Module:
    labels = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
    sizes = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": LENGTH}
    return trained(DistilBertForSequenceClassification(DistilBertConfig(vocab_size=VOCAB, **sizes, **labels)))


def _wide_bert() -> nn.Module:
    """So much of its time is in its matrices that removing units from them shows."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 1280}
    return trained(
        BertForSequenceClassification(BertConfig(vocab_size=VOCAB, max_position_embeddings=LENGTH, **sizes)), 40
    )


_DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": LENGTH,
    **_IDS,
}


def _small_qwen() -> nn.Module:
    return Qwen3ForCausalLM(Qwen3Config(**{**_DECODER, "vocab_size": PIECES}))


def _small_mixture() -> nn.Module:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**{**_DECODER, **experts}, shared_expert_intermediate_size=32))


def _small_encoder(folder: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 1024}
    bert = BertModel(BertConfig(vocab_size=VOCAB, max_position_embeddings=LENGTH, **sizes))
    with torch.no_grad():
        bert.embeddings.word_embeddings.weight.mul_(20)  # else all sentences are nearly the same
    bert.save_pretrained(folder / "bert")
    tokenizer().save_pretrained(folder / "bert")
    modules = [Transformer(str(folder / "bert")), Pooling(sizes["hidden_size"], "mean")]
    SentenceTransformer(modules=modules, device="cpu", local_files_only=True).save_pretrained(str(folder / "encoder"))


def models(folder: Path) -> dict[str, dict[str, bytes]]:
    """Repositories of the Hub by their ids: the names of their files and what these hold.

    Args:
        folder: An empty one, in which the models are saved.
    """
    makers: dict[str, tuple[Callable[[], nn.Module], Callable[[], PreTrainedTokenizerFast]]] = {
        "distilbert/distilbert-base-uncased-finetuned-sst-2-english": (small_distilbert, tokenizer),
        "textattack/bert-base-uncased-SST-2": (_wide_bert, tokenizer),
        "Qwen/Qwen3-0.6B": (_small_qwen, text_tokenizer),
        "Qwen/Qwen1.5-MoE-A2.7B": (_small_mixture, partial(tokenizer, False)),
    }
    places = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for repo, (make, read) in makers.items():
            places[repo] = folder / repo
            make().save_pretrained(places[repo])
            read().save_pretrained(places[repo])
        _small_encoder(folder)
    places["sentence-transformers/all-MiniLM-L6-v2"] = folder / "encoder"
    return {
        repo: {file.relative_to(place).as_posix(): file.read_bytes() for file in place.rglob("*") if file.is_file()}
        for repo, place in places.items()
    }
