"""float32 products through oneDNN: only where it is faster and exact, and the setting comes back."""

from __future__ import annotations

import threading

import pytest
import torch

from hf_prune import prune
from hf_prune.kernels import fast_products as module
from hf_prune.kernels.fast_products import fast_products, onednn_is_faster
from hf_prune.structured.gate_statistics import gate_statistics
from tests import models
from tests.structured.test_prune_units import fake_timings, on_a_machine_where

LARGE = torch.zeros(512, 512)


@pytest.fixture
def faster(monkeypatch):
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)


@pytest.fixture
def measured():
    onednn_is_faster.cache_clear()
    yield
    onednn_is_faster.cache_clear()


def precision_within(tensors):
    with fast_products(tensors):
        return torch.get_float32_matmul_precision()


@pytest.mark.usefixtures("faster")
def test_large_matrices_are_multiplied_by_onednn_and_the_setting_comes_back():
    assert precision_within([torch.zeros(3), LARGE]) == "medium"
    assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(ZeroDivisionError), fast_products([LARGE]):
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize(
    "tensors",
    [[], [torch.zeros(8, 8)], [torch.zeros(1 << 19)], [LARGE.bfloat16()], [LARGE, LARGE.half()], [LARGE.to("meta")]],
)
def test_nothing_changes_without_large_matrices_of_float32(tensors):
    assert precision_within(tensors) == "highest"


@pytest.mark.usefixtures("faster")
def test_what_the_user_has_set_stays():
    torch.set_float32_matmul_precision("high")
    try:
        assert precision_within([LARGE]) == "high"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize(("tokens", "expected"), [(8, "highest"), (256, "medium")])
def test_attention_of_short_texts_is_left_out_forwards_and_backwards(monkeypatch, tokens, expected):
    seen = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def watched(*args, **kwargs):
        seen.append(torch.get_float32_matmul_precision())
        return fused(*args, **kwargs)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", watched)
    q, k, v = (torch.randn(1, 2, tokens, 8, requires_grad=True) for _ in range(3))
    expected_output = fused(q, k, v)
    (expected_gradient,) = torch.autograd.grad(expected_output.sum(), q)
    with fast_products([LARGE]):
        output = torch.nn.functional.scaled_dot_product_attention(query=q, key=k, value=v)
        assert torch.get_float32_matmul_precision() == "medium"
        output.grad_fn.register_prehook(lambda _: seen.append(torch.get_float32_matmul_precision()))
        (gradient,) = torch.autograd.grad(output.sum(), q, retain_graph=True)
        assert torch.get_float32_matmul_precision() == "medium"
    assert seen == [expected] * 2
    assert torch.nn.functional.scaled_dot_product_attention is watched
    torch.testing.assert_close(output, expected_output)
    torch.testing.assert_close(gradient, expected_gradient)
    output.sum().backward()  # of what was computed inside, after it
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.usefixtures("faster")
def test_attention_that_another_thread_is_in_leaves_the_setting():
    entered, ended = threading.Event(), threading.Event()

    def slow(query, *_):
        entered.set()
        assert ended.wait(10)
        return query

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.functional.scaled_dot_product_attention", slow)
        with fast_products([LARGE]):
            inside = torch.nn.functional.scaled_dot_product_attention
            other = threading.Thread(target=inside, args=[torch.zeros(1, 1, 4, 4)] * 3)
            other.start()
            assert entered.wait(10)
        ended.set()
        other.join()
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.usefixtures("faster")
def test_a_speed_up_is_timed_on_products_as_people_will_run_them(monkeypatch):
    seen = set()

    def watched(models, *args, **kwargs):
        fused = torch.nn.functional.scaled_dot_product_attention
        fused(*[torch.zeros(1, 1, 4, 4)] * 3)  # which would leave another setting behind
        seen.add(torch.get_float32_matmul_precision())
        return timings(models, *args, **kwargs)

    def seconds(model):
        return 1e-6 * model.num_parameters()

    on_a_machine_where(monkeypatch, seconds)
    timings = fake_timings(seconds)
    for module_name in ("structured.latency_costs", "inference.speedup"):
        monkeypatch.setattr(f"hf_prune.{module_name}.time_together", watched)
    model = models.tiny_bert()
    workload = {"batch_size": 1, "length": 8}
    settings = {"granularity": ("head", "neuron"), "criterion": "fisher", "repair": "least_squares"}
    inside = []
    monkeypatch.setattr(module, "_LARGE", 1)
    monkeypatch.setattr(
        "hf_prune.structured.choose_units.gate_statistics",
        lambda *args: inside.append(torch.get_float32_matmul_precision()) or gate_statistics(*args),
    )
    prune(model, target_speedup=1.1, workload=workload, calibration=models.tiny_batches(model), **settings)
    assert inside == ["medium"]
    assert seen == {"highest"}
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.usefixtures("faster")
def test_an_attention_that_fails_leaves_the_setting():
    with fast_products([LARGE]):
        with pytest.raises(RuntimeError):
            torch.nn.functional.scaled_dot_product_attention(torch.zeros(1, 2, 8, 8), LARGE, LARGE)
        assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.usefixtures("measured")
def test_it_must_be_faster_and_exact(monkeypatch):
    monkeypatch.setattr(module, "_gain", lambda product: 2.0)
    assert onednn_is_faster() == torch.backends.mkldnn.is_available()  # exact everywhere but with AMX
    monkeypatch.setattr(module, "_gain", lambda product: 1.1)
    onednn_is_faster.cache_clear()
    assert not onednn_is_faster()
    monkeypatch.setattr(module, "_gain", lambda product: 2.0)
    monkeypatch.setattr(module, "_AGREES", 0.0)
    onednn_is_faster.cache_clear()
    assert not onednn_is_faster()
    assert torch.get_float32_matmul_precision() == "highest"


def test_both_are_timed():
    seen = []
    gain = module._gain(lambda: seen.append(torch.get_float32_matmul_precision()))
    assert gain > 0
    assert set(seen) == {"highest", "medium"}


@pytest.mark.usefixtures("faster")
def test_pruning_with_data_uses_it(monkeypatch):
    monkeypatch.setattr(module, "_LARGE", 1)
    seen = []
    model = models.tiny_bert()
    model.bert.register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    prune(model, 0.5, criterion="wanda", calibration=models.tiny_batches(model))
    assert set(seen) == {"medium"}
    assert torch.get_float32_matmul_precision() == "highest"
