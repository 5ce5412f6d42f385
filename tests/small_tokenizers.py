"""Small tokenizers of the kinds that language models have, trained on a few sentences."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

TEXTS = [
    *["Once upon a time, in 1984, they said: it isn't what they'd have said in their time"] * 8,
    *["hen then hens ten when the hen"] * 8,
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
CHAT = "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"


def byte_level(kind: str = "gpt-2", size: int = 300, texts: list[str] = TEXTS) -> PreTrainedTokenizerFast:
    """A byte-level BPE that splits texts as some model does: ``gpt-2``, ``smollm``, ``llama-bpe`` or ``qwen2``."""
    pattern = {"llama-bpe": LLAMA3, "qwen2": LLAMA3.replace("{1,3}", "")}.get(kind)
    core = Tokenizer(BPE(ignore_merges=kind == "llama-bpe"))
    bytes_as_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    steps: list[Any] = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    steps += [pre_tokenizers.Digits(individual_digits=True)] if kind == "smollm" else []
    core.pre_tokenizer = pre_tokenizers.Sequence([*steps, bytes_as_letters]) if steps else bytes_as_letters
    core.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(texts, BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|end|>", chat_template=CHAT
    )


def sentencepiece(size: int = 330, *, first: bool = True, every_way: bool = True) -> PreTrainedTokenizerFast:
    """A BPE with bytes for what it does not know, as transformers makes them of sentencepiece's.

    Args:
        size: Tokens.
        first: Put ``<s>`` in front of a text.
        every_way: Have a merge for each way to put a token together, as these have.
    """
    trained = Tokenizer(BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(TEXTS, BpeTrainer(vocab_size=size - 259))
    ranks = dict(sorted(trained.get_vocab().items(), key=lambda item: item[1]))
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>"])}
    for token in (*(f"<0x{byte:02X}>" for byte in range(256)), *ranks):
        vocabulary.setdefault(token, len(vocabulary))
    merges = [(token[:cut], token[cut:]) for token in ranks for cut in range(1, len(token))]
    merges = [pair for pair in merges if pair[0] in ranks and pair[1] in ranks]
    if not every_way:
        merges = [pair for number, pair in enumerate(merges) if "".join(pair) != "".join(merges[number - 1])]
    core = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = trained.normalizer
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    if first:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
