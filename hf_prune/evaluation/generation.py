"""Judge a language model by what it writes: greedy continuations of prompts, against those of the dense model."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from hf_prune.errors import ConfigError, DataError
from hf_prune.evaluation.data.classification import context_length
from hf_prune.evaluation.generation_result import Generation, GenerationComparison, Sample
from hf_prune.evaluation.likelihood import check_causal, token_logits
from hf_prune.evaluation.prompts import Prompt, find_prompts
from hf_prune.evaluation.statistics import check_confidence, standard_error_of, student_t
from hf_prune.planning.checks import check_positive
from hf_prune.pruning.mask_store import warn_regrown
from hf_prune.utils.forward import device_of, eval_mode, generates
from hf_prune.utils.progress import Bar

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 32, 32, 48
_GRAM = 4  # tokens of the runs that are counted
_SAMPLES = 3


def evaluate_generation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Any],
    *,
    prompts: int = PROMPTS,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int | None = None,
    chat: bool | None = None,
    batch_size: int = 8,
    source: str = "",
    split: str = "",
    progress: bool | str | None = None,
) -> Generation:
    """Let a causal language model continue prompts, the likeliest token each time, and measure how much it repeats.

    Perplexity and multiple choice score the model on text that somebody else wrote. Pruning without training harms what
    the model writes itself much earlier (arXiv:2510.22228, arXiv:2603.24652): each token follows from the ones before
    it, so errors add up, and the text turns into repetitions. :func:`compare_generation` compares two models.

    A prompt is the first half of a line of the texts, drawn at random among lines of at least 16 tokens. Prompts of
    one length are continued together, so nothing is padded. Of the model's ``generation_config`` only the special
    tokens are used: no penalty of repetitions, no suppressed tokens.

    Args:
        model: A causal language model that can generate.
        tokenizer: Its tokenizer.
        texts: Texts that the model was not pruned on; or conversations, lists of messages with ``role`` and
            ``content``, of which all before the last answer is the prompt.
        prompts: How many prompts, at most; all if there are fewer.
        prompt_tokens: The most tokens of a prompt that is the beginning of a line.
        new_tokens: The most tokens to write after each, fewer if the model ends its text. By default 48, or half of the
            model's context.
        chat: Put prompts into the tokenizer's chat template, as messages of a user. None: if it has one. Conversations
            always are.
        batch_size: Prompts continued at once.
        source: Where the texts came from, for the record.
        split: Their split, for the record.
        progress: Show a progress bar on a terminal; a string is its title.

    Returns:
        What was written, and the share of distinct 4-grams in texts that have any.

    Raises:
        ConfigError: If a setting is out of range, or prompt and text are longer than the model's context.
        DataError: If no line is long enough for a prompt, there is no chat template where one is needed, or the model
            is not a causal language model or gives numbers that are not finite.

    Example:
        >>> print(evaluate_generation(model, tokenizer, load_texts("wiki.test.raw")))  # doctest: +SKIP
        85.1 ± 2.9 % distinct 4-grams (greedy, 48 tokens after each of 32 prompts, data 1f0e6e1a3a2ffb0c)
    """
    for name, value in (("prompts", prompts), ("prompt_tokens", prompt_tokens), ("batch_size", batch_size)):
        check_positive(name, value)
    warn_regrown(model, "what writes is not the model that save_pretrained() writes, in which they are zero")
    if not generates(model):
        raise DataError(f"{type(model).__name__} does not continue texts: load one with AutoModelForCausalLM")
    context = context_length(model)
    new_tokens, room = _new_tokens(model, new_tokens, context)
    start = time.perf_counter()
    chosen = find_prompts(texts, tokenizer, prompts, min(prompt_tokens, room), room, chat)
    rows = _continued(model, tokenizer, chosen, new_tokens, batch_size, progress)
    shares = [share for row in rows if (share := distinct_share(row)) is not None]
    digest = hashlib.sha256(repr([prompt.tokens for prompt in chosen]).encode())
    return Generation(
        distinct=math.fsum(shares) / len(shares) if shares else None,
        standard_error=standard_error_of(shares, [1] * len(shares)),
        n=len(rows),
        short=len(rows) - len(shares),
        mean_tokens=sum(map(len, rows)) / len(rows),
        new_tokens=new_tokens,
        prompt_tokens=prompt_tokens,
        chat=chosen[0].chat,
        prompts=tuple(prompt.text for prompt in chosen),
        texts=tuple(str(tokenizer.decode(list(row), skip_special_tokens=True)) for row in rows),
        tokens=tuple(rows),
        split=split,
        source=source,
        data_fingerprint=digest.hexdigest()[:16],
        seconds=time.perf_counter() - start,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        batch_size=batch_size,
    )


def compare_generation(dense: Generation, pruned: Generation, *, confidence: float = 0.95) -> GenerationComparison:
    """Compare what two models write after the same prompts: how long it is the same, and who repeats himself more.

    Where two texts part, nothing is wrong yet: the second likeliest token may be as good. Many prompts that part at
    once, a low F1 and fewer distinct 4-grams together are the signs of a damaged model; the samples show it.

    Args:
        dense: Result of the dense model.
        pruned: Result of the pruned model on the same prompts.
        confidence: Of the two-sided interval of the change in distinct 4-grams, between 0 and 1.

    Raises:
        ConfigError: If ``confidence`` is not between 0 and 1.
        DataError: If the two are not on the same prompts.

    Example:
        >>> print(compare_generation(dense, pruned).summary())  # doctest: +SKIP
        greedy text: 4.1 ± 0.7 of 48 tokens equal until they part (0 of 32 texts wholly), token F1 0.322 ± 0.021, ...
    """
    check_confidence(confidence)
    for name in ("n", "new_tokens", "chat", "data_fingerprint"):
        if (a := getattr(dense, name)) != (b := getattr(pruned, name)):
            raise DataError(f"the results are of different prompts ({name} {a} and {b}): evaluate both in the same way")
    pairs = list(zip(dense.tokens, pruned.tokens, strict=True))
    equal = [_equal_tokens(a, b) for a, b in pairs]
    f1 = [_token_f1(a, b) for a, b in pairs]
    shares = [(distinct_share(a), distinct_share(b)) for a, b in pairs]
    changes = [b - a for a, b in shares if a is not None and b is not None]
    ones, n = [1] * len(pairs), len(pairs)
    change = math.fsum(changes) / len(changes) if changes else None
    error = standard_error_of(changes, [1] * len(changes))
    half = None if error is None else student_t(confidence, len(changes) - 1) * error
    ranked = sorted(range(n), key=lambda i: (equal[i], i))
    shown = dict.fromkeys(ranked[round(k * (n - 1) / (_SAMPLES - 1))] for k in range(_SAMPLES))
    return GenerationComparison(
        equal_tokens=sum(equal) / n,
        equal_tokens_standard_error=standard_error_of(equal, ones),
        identical=sum(a == b for a, b in pairs),
        token_f1=math.fsum(f1) / n,
        token_f1_standard_error=standard_error_of(f1, ones),
        dense_distinct=dense.distinct,
        pruned_distinct=pruned.distinct,
        distinct_change=change,
        interval=None if half is None or change is None else (change - half, change + half),
        dense_short=dense.short,
        pruned_short=pruned.short,
        dense_tokens=dense.mean_tokens,
        pruned_tokens=pruned.mean_tokens,
        n=n,
        new_tokens=dense.new_tokens,
        confidence=confidence,
        samples=tuple(Sample(dense.prompts[i], dense.texts[i], pruned.texts[i], equal[i]) for i in shown),
    )


def distinct_share(tokens: Sequence[int]) -> float | None:
    """The share of runs of four tokens that occur for the first time; None for fewer than four tokens."""
    grams = [tuple(tokens[i : i + _GRAM]) for i in range(len(tokens) - _GRAM + 1)]
    return len(set(grams)) / len(grams) if grams else None


def _new_tokens(model: Any, wanted: int | None, context: int | None) -> tuple[int, int]:
    """How many tokens are written, and how many a prompt may have."""
    if wanted is None:
        wanted = NEW_TOKENS if context is None else min(NEW_TOKENS, context // 2)
    check_positive("new_tokens", wanted)
    if context is None:
        return wanted, 1 << 30
    if wanted >= context:
        raise ConfigError(
            f"new_tokens is {wanted}: {type(model).__name__} has only {context} positions, for prompt and text together"
        )
    return wanted, context - wanted


def _continued(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    new_tokens: int,
    batch_size: int,
    progress: bool | str | None,
) -> list[tuple[int, ...]]:
    """The tokens written after each prompt, up to and with the one that ends the text."""
    settings, ends = _greedy(model, tokenizer, new_tokens)
    by_length = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_length[len(prompt.tokens)].append(i)
    parts = [
        same[start : start + batch_size] for same in by_length.values() for start in range(0, len(same), batch_size)
    ]
    rows: list[tuple[int, ...]] = [()] * len(prompts)
    title = progress if isinstance(progress, str) else "Writing"
    with eval_mode(model), _own_settings_unused(model), torch.inference_mode():
        first = torch.tensor(prompts[0].tokens)
        check_causal(model, first)
        if not bool(torch.isfinite(token_logits(model, first[None])).all()):
            raise DataError(f"{type(model).__name__} gives logits that are not finite: its weights are damaged")
        for part in Bar(parts, desc=title, progress=progress):
            ids = torch.tensor([prompts[i].tokens for i in part], device=device_of(model))  # (batch, seq)
            try:
                written = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            except (RuntimeError, ValueError, TypeError, AttributeError) as error:
                raise DataError(f"{type(model).__name__} cannot continue a text: {error}") from error
            for i, row in zip(part, written[:, ids.shape[1] :].tolist(), strict=True):
                end = next((place for place, token in enumerate(row) if token in ends), len(row))
                rows[i] = tuple(row[: end + 1])
    return rows


@contextmanager
def _own_settings_unused(model: Any) -> Iterator[None]:
    """Only the special tokens of the model's ``generation_config``: generate() takes all else that is unset from it."""
    from transformers import GenerationConfig

    own = model.generation_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(**{name: getattr(own, name, None) for name in names})
    try:
        yield
    finally:
        model.generation_config = own


def _greedy(model: Any, tokenizer: Any, new_tokens: int) -> tuple[GenerationConfig, set[int]]:
    """Settings that take the likeliest token, whatever the model's own are; and the tokens that end a text."""
    from transformers import GenerationConfig

    found: set[int] = set()
    for token in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        found |= set(token if isinstance(token, list) else [] if token is None else [token])
    pad = tokenizer.pad_token_id
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=0,
        use_cache=True,
        eos_token_id=sorted(found) or None,
        pad_token_id=pad if pad is not None else min(found, default=0),
    )
    return settings, found


def _equal_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _token_f1(one: Sequence[int], other: Sequence[int]) -> float:
    common = sum((Counter(one) & Counter(other)).values())
    return 2 * common / (len(one) + len(other))
