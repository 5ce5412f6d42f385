"""What a language model writes: prompts, greedy continuations, repetition, and two models on the same prompts."""

import json
import random

import pytest
import torch

from hf_prune import Generation, compare_generation, evaluate_generation, prune
from hf_prune.errors import ConfigError, DataError
from hf_prune.evaluation.generation import distinct_share
from tests import models
from tests.evaluation.test_perplexity import sharp
from tests.models import VOCAB

TEMPLATE = (
    "{% for m in messages %}{{ '[CLS] ' + m['role'] + ' ' + m['content'] + ' [SEP] ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[CLS]' }}{% endif %}"
)


def lines(n: int = 12, words: int = 18, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(VOCAB - 4)}" for _ in range(words)) for _ in range(n)]


def written(tokens: list[list[int]], **changes) -> Generation:
    """A result with made-up tokens."""
    shares = [share for row in tokens if (share := distinct_share(row)) is not None]
    values = {
        "distinct": sum(shares) / len(shares) if shares else None,
        "standard_error": 0.1,
        "n": len(tokens),
        "short": sum(len(row) < 4 for row in tokens),
        "mean_tokens": sum(map(len, tokens)) / len(tokens),
        "new_tokens": 8,
        "prompt_tokens": 4,
        "chat": False,
        "prompts": [f"prompt {i}" for i in range(len(tokens))],
        "texts": [" ".join(map(str, row)) for row in tokens],
        "tokens": tokens,
        "split": "test",
        "source": "texts",
        "data_fingerprint": "0123456789abcdef",
        "seconds": 1.5,
        "dtype": "float32",
        "batch_size": 2,
    }
    return Generation.from_dict({**values, **changes})


@pytest.mark.parametrize("make", [sharp, models.tiny_gpt2])
def test_takes_the_likeliest_token_each_time_whatever_the_model_prefers(make):
    model, tokenizer = make(), models.tiny_tokenizer()
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.eos_token_id = tokenizer.sep_token_id
    model.train()
    found = evaluate_generation(model, tokenizer, lines(), prompts=5, prompt_tokens=8, new_tokens=6, batch_size=2)
    assert model.training
    assert (found.n, found.new_tokens, found.chat) == (5, 6, False)
    model.eval()
    for prompt, row in zip(found.prompts, found.tokens, strict=True):
        ids = tokenizer(prompt)["input_ids"][:-1]  # the tokenizer ends a text with [SEP]
        assert len(ids) == 8
        for token in row:
            with torch.inference_mode():
                assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
        assert len(row) == 6 or row[-1] == tokenizer.sep_token_id
        assert tokenizer.sep_token_id not in row[:-1]
    assert Generation.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_prompts_are_first_halves_of_long_lines_and_the_first_of_more():
    model, tokenizer = sharp(), models.tiny_tokenizer()
    texts = ["\n".join(["", "w1 w2", *lines(6, 15)]), "\n"]
    more = evaluate_generation(model, tokenizer, texts, new_tokens=2)
    few = evaluate_generation(model, tokenizer, texts, prompts=3, new_tokens=2)
    assert (more.n, few.n) == (6, 3)
    assert set(few.prompts) < set(more.prompts)
    assert [line.startswith(prompt) for line, prompt in zip(lines(6, 15), more.prompts, strict=True)] == [True] * 6
    assert {len(prompt.split()) for prompt in more.prompts} == {7}  # 8 of 17 tokens, [CLS] among them


def test_chat_models_get_messages_of_a_user_and_conversations_their_messages():
    model, tokenizer = sharp(), models.tiny_tokenizer()
    options = {"new_tokens": 3, "prompt_tokens": 6}
    plain = evaluate_generation(model, tokenizer, lines(), **options)
    tokenizer.chat_template = TEMPLATE
    chat = evaluate_generation(model, tokenizer, lines(), **options)
    assert (plain.chat, chat.chat) == (False, True)
    assert evaluate_generation(model, tokenizer, lines(), chat=False, **options).prompts == plain.prompts
    talk = [
        {"role": "user", "content": "w1 w2"},
        {"role": "assistant", "content": "w3"},
        {"role": "user", "content": "w4"},
        {"role": "assistant", "content": "w5 w6"},
    ]
    found = evaluate_generation(model, tokenizer, [talk], **options)
    assert "w4" in found.prompts[0]
    assert "w5" not in found.prompts[0]
    assert found.standard_error is None
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template, which prompts of a chat need"):
        evaluate_generation(model, tokenizer, [talk], **options)
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(DataError, match=r"row 1: .* is not a conversation: expected a list of messages with role"):
        evaluate_generation(model, tokenizer, [[1]], **options)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"the chat template does not take .* \(roles must alternate\): expected"):
        evaluate_generation(model, tokenizer, [talk], **options)


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        (["w1 w2"], {}, DataError, "none of 1 lines makes a prompt: expected lines of at least 16 tokens"),
        (["w1", [{"role": "user", "content": "w1"}]], {}, DataError, "found 2 texts, 1 of them conversations"),
        ([], {}, DataError, "found 0 texts"),
        (None, {"new_tokens": 24}, ConfigError, "new_tokens is 24: LlamaForCausalLM has only 24 positions"),
        (None, {"prompts": 0}, ConfigError, "prompts is 0"),
    ],
)
def test_what_is_refused(texts, options, error, message):
    with pytest.raises(error, match=message):
        evaluate_generation(
            models.tiny_llama(max_position_embeddings=24),
            models.tiny_tokenizer(),
            lines() if texts is None else texts,
            **options,
        )


def test_models_that_do_not_write_are_refused():
    with pytest.raises(DataError, match="BertForMaskedLM does not continue texts: load one with AutoModelForCausalLM"):
        evaluate_generation(models.tiny_bert_mlm(), models.tiny_tokenizer(), lines())
    broken = sharp()
    broken.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(DataError, match="gives logits that are not finite"):
        evaluate_generation(broken, models.tiny_tokenizer(), lines())


@pytest.mark.parametrize(
    ("tokens", "share"), [([], None), ([1, 2, 3], None), ([1] * 6, 1 / 3), ([1, 2, 3, 4, 5], 1), ([1, 2] * 4, 2 / 5)]
)
def test_distinct_grams_by_hand(tokens, share):
    assert distinct_share(tokens) == (share if share is None else pytest.approx(share))


def test_comparison_by_hand():
    dense = written([[1, 2, 3, 4], [5, 6, 7, 8, 9], [1, 1, 1, 1, 1]])
    pruned = written([[1, 2, 3, 4], [5, 6, 8, 8, 8], [2, 2, 2, 2, 2]])
    found = compare_generation(dense, pruned)
    assert found.equal_tokens == pytest.approx((4 + 2 + 0) / 3)
    assert found.identical == 1
    assert found.token_f1 == pytest.approx((1 + 3 / 5 + 0) / 3)  # 5, 6 and one 8 of 5 tokens each
    assert found.distinct_change == 0
    assert found.interval == (0, 0)
    assert [sample.prompt for sample in found.samples] == ["prompt 2", "prompt 1", "prompt 0"]
    assert "2.0 ± 1.2 of 8 tokens equal until they part (1 of 3 texts wholly), token F1 0.533 ± 0.291" in str(found)
    assert "dense : 5 6 7 8 9\n  pruned: 5 6 8 8 8\n  same for 2 tokens" in str(found)
    assert found.rows()[0]["n"] == 3
    worse = compare_generation(dense, written([[1] * 8] * 3))
    assert worse.distinct_change == pytest.approx((0.2 - 1 + 0.2 - 1 + 0.2 - 0.5) / 3)
    low, high = worse.interval
    assert low < worse.distinct_change < high


def test_a_model_that_writes_nothing_does_not_repeat_least():
    dense = written([[1, 2, 3, 4, 5], [5, 6, 7, 8, 9]])
    silent = written([[0], [0, 0]])
    assert (silent.distinct, silent.short) == (None, 2)
    assert str(silent).startswith("no 4-grams (greedy, 2 tokens after each of 2 prompts, 2 of the texts too short to")
    found = compare_generation(dense, silent)
    assert (found.pruned_distinct, found.distinct_change, found.interval) == (None, None, None)
    assert (
        "distinct 4-grams 100.0 % -> none (no interval, n = 2 prompts), 5.0 -> 1.5 tokens a text, 0 -> 2 texts"
        in str(found)
    )
    half = compare_generation(dense, written([[1] * 5, [0]]))
    assert (half.pruned_distinct, half.distinct_change) == (0.5, -0.5)


def test_settings_of_the_model_change_nothing():
    model, tokenizer = sharp(), models.tiny_tokenizer()
    plain = evaluate_generation(model, tokenizer, lines(), prompts=3, new_tokens=6)
    likely = {token for row in plain.tokens for token in row}
    for settings in (
        {"suppress_tokens": sorted(likely), "bad_words_ids": [[token] for token in likely]},
        {"forced_eos_token_id": 3, "num_return_sequences": 2, "return_dict_in_generate": True, "max_time": 1e-9},
        {"guidance_scale": 3.0, "encoder_repetition_penalty": 4.0, "stop_strings": ["w"]},
        {"sequence_bias": [[[min(likely)], -1e4]], "exponential_decay_length_penalty": (1, 9.0)},
    ):
        own = model.generation_config = type(model.generation_config)()
        vars(own).update(settings)
        assert evaluate_generation(model, tokenizer, lines(), prompts=3, new_tokens=6).tokens == plain.tokens
        assert model.generation_config is own


def test_different_prompts_are_not_compared():
    one = written([[1], [2]])
    for changes in ({"data_fingerprint": "f"}, {"new_tokens": 9}, {"chat": True}):
        with pytest.raises(DataError, match="the results are of different prompts"):
            compare_generation(one, written([[1], [2]], **changes))
    with pytest.raises(DataError, match="expected n = 3 prompts"):
        written([[1], [2]], n=3)


def test_pruning_everything_is_seen():
    dense, tokenizer = sharp(), models.tiny_tokenizer()
    before = evaluate_generation(dense, tokenizer, lines(), new_tokens=8)
    same = compare_generation(before, evaluate_generation(dense, tokenizer, lines(), new_tokens=8))
    assert (same.token_f1, same.identical) == (1, same.n)
    after = evaluate_generation(prune(dense, 0.95), tokenizer, lines(), new_tokens=8)
    assert compare_generation(before, after).token_f1 < 0.6
