"""Tiny models from their configs, every weight non-zero, so that zeros can be counted literally.

The same seed gives the same weights; nothing is downloaded, and the global random state stays as it was.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

if TYPE_CHECKING:
    from hf_prune.pruning.mask_store import MaskStore

VOCAB = 48


def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter small random values, none of them zero and hardly two alike, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator).mul_(0.05)
            parameter.copy_(values.add_(values.sign().mul_(1e-4)).masked_fill_(values == 0, 1e-3))
    return model


def _build(make: Callable[[], Any], seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
    return fill(model, seed).eval()


def _bert_config(**settings: Any) -> BertConfig:
    return BertConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 24,
            **settings,
        }
    )


def tiny_bert(seed: int = 0, **settings: Any) -> BertForSequenceClassification:
    """Encoder with a classification head of two labels: 14 Linear weights."""
    return _build(lambda: BertForSequenceClassification(_bert_config(**settings)), seed)


def tiny_bert_mlm(seed: int = 0, **settings: Any) -> BertForMaskedLM:
    """Encoder whose output embedding is tied to the input embedding."""
    return _build(lambda: BertForMaskedLM(_bert_config(**settings)), seed)


def tiny_distilbert(seed: int = 0, **settings: Any) -> DistilBertForSequenceClassification:
    """DistilBERT classifier."""
    values = {"vocab_size": VOCAB, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}
    values |= {"max_position_embeddings": 24, **settings}
    return _build(lambda: DistilBertForSequenceClassification(DistilBertConfig(**values)), seed)


def tiny_gpt2(seed: int = 0, **settings: Any) -> GPT2LMHeadModel:
    """Decoder of Conv1D modules, whose weights are (in, out), with a tied lm_head."""
    values = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24}
    values |= {"bos_token_id": 0, "eos_token_id": 0, **settings}
    return _build(lambda: GPT2LMHeadModel(GPT2Config(**values)), seed)


def tiny_albert(seed: int = 0, **settings: Any) -> AlbertForSequenceClassification:
    """One block of weights that is run three times."""
    values = {"vocab_size": VOCAB, "embedding_size": 8, "hidden_size": 16, "num_hidden_layers": 3}
    values |= {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 24, **settings}
    return _build(lambda: AlbertForSequenceClassification(AlbertConfig(**values)), seed)


def tiny_llama(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """Decoder without biases, with grouped key and value heads and an lm_head of its own."""
    values = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 24}
    return _build(lambda: LlamaForCausalLM(LlamaConfig(**{**values, **settings})), seed)


def _seq2seq_settings(settings: dict[str, Any]) -> dict[str, Any]:
    values = {"vocab_size": VOCAB, "d_model": 16, "max_position_embeddings": 24, "pad_token_id": 3}
    sizes = (("layers", 1), ("ffn_dim", 24), ("attention_heads", 2))
    values |= {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in sizes}
    return {**values, "decoder_start_token_id": 3, "eos_token_id": 0, **settings}


def tiny_bart(seed: int = 0, **settings: Any) -> BartForConditionalGeneration:
    """Encoder and decoder with learned positions, whose numbers are made on the device of their embedding."""
    return _build(lambda: BartForConditionalGeneration(BartConfig(**_seq2seq_settings(settings))), seed)


def tiny_marian(seed: int = 0, **settings: Any) -> MarianMTModel:
    """Encoder and decoder with sinusoidal positions: parameters that are computed, and not saved."""
    model: Any = _build(lambda: MarianMTModel(MarianConfig(**_seq2seq_settings(settings))), seed)
    for part in (model.model.encoder, model.model.decoder):
        part.embed_positions.weight.data = part.embed_positions.create_weight()
    return model


def tiny_t5(seed: int = 0, **settings: Any) -> T5ForConditionalGeneration:
    """Encoder and decoder that share one embedding."""
    values = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    values |= {"decoder_start_token_id": 0, **settings}
    return _build(lambda: T5ForConditionalGeneration(T5Config(**values)), seed)


def tiny_resnet(seed: int = 0, **settings: Any) -> ResNetForImageClassification:
    """Image classifier of 2-d convolutions, with batch-norm buffers."""
    values = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    values |= {"num_labels": 3, **settings}
    return _build(lambda: ResNetForImageClassification(ResNetConfig(**values)), seed)


class ConvNet(nn.Module):
    """Conv1d, grouped and plain Conv2d, and a Linear: every layout of a convolution, no Hugging Face around it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(4, 8, 3)
        self.conv2d = nn.Conv2d(8, 6, (2, 3))
        self.grouped = nn.Conv2d(6, 12, 1, groups=3)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 4, length) -> (batch, 4)."""
        x = self.conv1d(x).unsqueeze(2).expand(-1, -1, 4, -1)  # (batch, 8, 4, length - 2)
        return self.fc(self.grouped(self.conv2d(x)).mean((2, 3)))  # (batch, 12) -> (batch, 4)


def conv_net(seed: int = 0) -> ConvNet:
    """A :class:`ConvNet`."""
    return _build(ConvNet, seed)


class MLP(nn.Module):
    """Two Linear layers and a loss, as small as a model can be that calibration accepts."""

    def __init__(self, inputs: int = 8, hidden: int = 12, labels: int = 3) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, labels)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        """(batch, inputs) -> logits (batch, labels), and the loss where labels are given."""
        logits = self.fc2(torch.relu(self.fc1(x)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


def mlp(seed: int = 0, inputs: int = 8, hidden: int = 12, labels: int = 3) -> MLP:
    """An :class:`MLP`."""
    return _build(lambda: MLP(inputs, hidden, labels), seed)


class TiedLinears(nn.Module):
    """Two Linear layers with one weight between them, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        """(batch, 8) -> logits (batch, 2), and the loss where labels are given."""
        logits = self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


def tied_linears(seed: int = 0) -> TiedLinears:
    """A :class:`TiedLinears`."""
    return _build(TiedLinears, seed)


#: One builder per shape of transformer; all give a ``PreTrainedModel``.
TRANSFORMERS: dict[str, Callable[..., PreTrainedModel]] = {
    "bert": tiny_bert,
    "bert_mlm": tiny_bert_mlm,
    "distilbert": tiny_distilbert,
    "gpt2": tiny_gpt2,
    "albert": tiny_albert,
    "llama": tiny_llama,
    "t5": tiny_t5,
    "resnet": tiny_resnet,
}


def tiny_batches(model: nn.Module, sizes: tuple[int, ...] = (3, 2), length: int = 6, seed: int = 0) -> list[dict]:
    """Labelled batches that ``model(**batch)`` takes, on the CPU: text, images or vectors, as the model needs."""
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    def batch(size: int) -> dict[str, Tensor]:
        if not isinstance(model, PreTrainedModel):
            linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
            x = torch.randn(size, linears[0].in_features, generator=generator)
            return {"x": x, "labels": integers(linears[-1].out_features, size)}
        if model.main_input_name == "pixel_values":
            pixels = torch.randn(size, 3, 32, 32, generator=generator)
            return {"pixel_values": pixels, "labels": integers(model.config.num_labels, size)}
        ids = integers(VOCAB, size, length)
        per_sequence = "SequenceClassification" in type(model).__name__
        labels = integers(model.config.num_labels, size) if per_sequence else ids.clone()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    return [batch(size) for size in sizes]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, by name, persistent or not."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in every bit: NaN equals NaN, and 0.0 differs from -0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(
        a.detach().contiguous().view(-1).view(torch.uint8), b.detach().contiguous().view(-1).view(torch.uint8)
    )


def assert_same_masks(model: nn.Module, store: MaskStore | None) -> None:
    """The masks, and how they came about, are those of an earlier ``MaskStore.of(model)``."""
    from hf_prune.pruning.mask_store import MaskStore  # a test builds models where hf_prune cannot be imported

    now = MaskStore.of(model)
    assert (now is None) == (store is None)
    if now is not None and store is not None:
        assert now.masks.keys() == store.masks.keys()
        assert all(torch.equal(mask, store.masks[name]) for name, mask in now.masks.items())
        assert (now.config, now.polishes, now.speed) == (store.config, store.polishes, store.speed)


def forward_hooks(model: nn.Module) -> list[Any]:
    """Hooks of all modules inside a model, but for what guards its masks."""
    from hf_prune.pruning.optimizer_guard import guard_again

    hooks = [hook for m in model.modules() for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    return [hook for hook in hooks if hook is not guard_again]


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Every parameter and buffer has the bits of an earlier :func:`snapshot`."""
    now = snapshot(model)
    assert now.keys() == before.keys()
    assert [name for name in now if not same_bits(now[name], before[name])] == []


def tiny_vit(seed: int = 0, **settings: Any) -> ViTForImageClassification:
    """Image transformer whose checkpoints keep the parameter names of transformers 4."""
    values = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    values |= {"image_size": 32, "patch_size": 16, "num_labels": 3, **settings}
    return _build(lambda: ViTForImageClassification(ViTConfig(**values)), seed)


def tiny_classifier(seed: int = 0, **settings: Any) -> BertForSequenceClassification:
    """A BERT with weights so large that its predictions differ from sentence to sentence; biases are zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(_bert_config(initializer_range=0.5, **settings)).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words ``w0`` to ``w43`` after four special tokens, padded with token 0: fits every text model here."""
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    vocab = [*special.values(), *(f"w{i}" for i in range(VOCAB - len(special)))]
    core = Tokenizer(WordLevel({token: i for i, token in enumerate(vocab)}, unk_token="[UNK]"))
    core.pre_tokenizer = WhitespaceSplit()
    core.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=core, model_input_names=names, model_max_length=24, **special)


def tiny_sentences(n: int = 40, seed: int = 0) -> dict[str, list]:
    """Random sentences of 1 to 12 words with labels 0 and 1."""
    rng = random.Random(seed)
    sentences = [" ".join(f"w{rng.randrange(VOCAB - 4)}" for _ in range(rng.randint(1, 12))) for _ in range(n)]
    return {"sentence": sentences, "label": [rng.randrange(2) for _ in range(n)]}


def answered_sentences(n: int = 40, seed: int = 0, model: nn.Module | None = None) -> dict[str, list]:
    """Sentences of both classes with labels of which a classifier, ``tiny_classifier()`` by default, gets 9 in 10."""
    from datasets import Dataset

    from hf_prune import evaluate_classification

    rows = tiny_sentences(10 * n, seed)
    found = evaluate_classification(model or tiny_classifier(), tiny_tokenizer(), Dataset.from_dict(rows)).predictions
    order = sorted(range(10 * n), key=lambda i: (found[:i].count(found[i]), found[i]))[:n]  # in turns
    labels = [1 - found[i] if place % 20 in (9, 18) else found[i] for place, i in enumerate(order)]
    return {"sentence": [rows["sentence"][i] for i in order], "label": labels}


def save_classifier_and_data(root: Path, seed: int) -> None:
    """A classifier with its tokenizer in ``root/dense``, and labelled sentences in ``root/data``."""
    model = tiny_classifier(seed=seed)
    rows = answered_sentences(40, model=model)
    model.save_pretrained(root / "dense")
    tiny_tokenizer().save_pretrained(root / "dense")
    (root / "data").mkdir()
    lines = [f"{text}\t{label}" for text, label in zip(rows["sentence"], rows["label"], strict=True)]
    (root / "data" / "dev.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")


def tiny_moe(seed: int = 0, **settings: Any) -> SwitchTransformersForConditionalGeneration:
    """Encoder and decoder whose second and only other block has four experts, each a module of Linears."""
    values = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2}
    values |= {"num_heads": 2, "num_experts": 4, "expert_capacity": 64, "router_jitter_noise": 0.0}
    values |= {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "decoder_start_token_id": 0, **settings}
    return _build(lambda: SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**values)), seed)
