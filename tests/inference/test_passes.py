"""What a workload runs: a forward pass, or a prefill and decoding with a cache."""

import pytest
import torch

from hf_prune import PlanError
from hf_prune.inference.passes import workload_passes
from hf_prune.inference.speedup import workload_inputs
from hf_prune.structured.costs import flops
from tests.architecture_models import tiny

GENERATION = {"batch_size": 2, "prompt": 5, "new_tokens": 6}


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_decoding_continues_a_prompt_of_half_the_new_tokens_more(model_type):
    model = tiny(model_type)[0].eval()
    inputs = workload_inputs(model, GENERATION)
    assert inputs["input_ids"].shape == (2, 5)
    passes = workload_passes(model, inputs, GENERATION)
    assert {name: one.times for name, one in passes.items()} == {"prefill": 1, "decode": 5}
    prompt = inputs["input_ids"]
    middle = prompt.repeat(1, 3)[:, :8]
    with torch.no_grad():
        expected = model(input_ids=torch.cat([middle, prompt[:, -1:]], 1)).logits[:, -1:]
        for _ in range(2):  # the cache is the same each time
            torch.testing.assert_close(passes["decode"].run().logits, expected)
        torch.testing.assert_close(passes["prefill"].run().logits, model(input_ids=prompt).logits[:, -1:])


def test_operations_of_a_generation_are_those_of_prefill_and_decoding():
    model = tiny("llama")[0].eval()
    inputs = workload_inputs(model, GENERATION)
    whole = flops({"all": model}, inputs, GENERATION)["all"]
    short = flops({"all": model}, inputs, {**GENERATION, "new_tokens": 1})["all"]  # the prefill alone
    tokens = 2 * 5  # of two sequences
    weights = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n)
    attention = (whole - short) / (2 * tokens) - weights
    assert 0 <= attention < 0.5 * weights


def test_only_causal_language_models_generate():
    model = tiny("bert")[0].eval()
    inputs = workload_inputs(model, GENERATION)
    with pytest.raises(PlanError, match="a workload with new_tokens is for causal language models with a cache"):
        workload_passes(model, inputs, GENERATION)


def test_prompt_and_new_tokens_fit_the_positions():
    model = tiny("gpt2")[0]
    most = model.config.n_positions
    with pytest.raises(PlanError, match=f"a workload of length {most + 1} is longer than the {most} positions"):
        workload_inputs(model, {"batch_size": 1, "prompt": most - 3, "new_tokens": 4})
