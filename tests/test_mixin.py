"""Three ways to a model that can be pruned, all equal in what they can do."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    AlbertForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMultipleChoice,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    T5ForConditionalGeneration,
    ViTForImageClassification,
    pipeline,
)

import hf_prune
from hf_prune import (
    AutoPrunedModel,
    AutoPrunedModelForCausalLM,
    AutoPrunedModelForSequenceClassification,
    MaskStore,
    PrunedModelMixin,
    PruningConfig,
    prunable,
    prune,
)
from hf_prune.auto import load_native
from hf_prune.errors import ConfigError, DataError, MaskError, PlanError
from hf_prune.mixin import pruned_class
from hf_prune.saving_mixin import dense_class
from tests import models
from tests.models import assert_unchanged, snapshot, tiny_batches


class PrunedBert(PrunedModelMixin, BertForSequenceClassification):
    """Own classes, one per kind of model."""


class PrunedGPT2(PrunedModelMixin, GPT2LMHeadModel):
    """Conv1D and a tied head."""


class PrunedLlama(PrunedModelMixin, LlamaForCausalLM):
    """Tied here."""


class PrunedT5(PrunedModelMixin, T5ForConditionalGeneration):
    """One embedding for encoder, decoder and head."""


class PrunedAlbert(PrunedModelMixin, AlbertForSequenceClassification):
    """Shared layers."""


class PrunedViT(PrunedModelMixin, ViTForImageClassification):
    """Checkpoints of other names than its parameters."""


class PrunedNeoX(PrunedModelMixin, GPTNeoXForCausalLM):
    """Renamed by the name of its class."""


class PrunedSegformer(PrunedModelMixin, SegformerForSemanticSegmentation):
    """Renamed by the name of its class."""


KINDS: dict[str, tuple[Any, str, type]] = {
    "bert": (models.tiny_bert, "SequenceClassification", PrunedBert),
    "gpt2": (models.tiny_gpt2, "CausalLM", PrunedGPT2),
    "llama": (lambda: models.tiny_llama(tie_word_embeddings=True), "CausalLM", PrunedLlama),
    "t5": (models.tiny_t5, "Seq2SeqLM", PrunedT5),
    "albert": (models.tiny_albert, "SequenceClassification", PrunedAlbert),
    "vit": (models.tiny_vit, "ImageClassification", PrunedViT),
}
METHODS = (
    "plan",
    "prune",
    "masks",
    "pruning_config",
    "apply_masks",
    "make_permanent",
    "discard_masks",
    "sparsity_report",
    "save_pretrained",
    "from_pretrained",
)


def auto(task: str) -> Any:
    return getattr(hf_prune, f"AutoPrunedModelFor{task}" if task else "AutoPrunedModel")


def plain_auto(task: str) -> Any:
    return getattr(transformers, f"AutoModelFor{task}")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    batch = tiny_batches(model)[0]
    if not model.config.is_encoder_decoder:
        del batch["labels"]
    return model.eval()(**batch).logits


def same_masks(model: Any, other: Any) -> bool:
    return model.masks.keys() == other.masks.keys() and all(
        torch.equal(mask, other.masks[name]) for name, mask in model.masks.items()
    )


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory) -> tuple[str, Path, str, Any]:
    """Name, folder with the dense checkpoint, task and own class."""
    make, task, own = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    make().save_pretrained(folder)
    return request.param, folder, task, own


@pytest.fixture(scope="module")
def three(kind, tmp_path_factory) -> list[tuple[Any, Path]]:
    """The same model in all three ways, pruned by half, each with the folder where it was saved."""
    name, dense, task, own = kind
    ways = [
        auto(task).from_pretrained(dense),
        prunable(plain_auto(task).from_pretrained(dense)),
        own.from_pretrained(dense),
    ]
    folders = [tmp_path_factory.mktemp(f"{name}-{way}") for way in ("auto", "prunable", "own")]
    for model, folder in zip(ways, folders, strict=True):
        model.prune(0.5).save_pretrained(folder)
    return list(zip(ways, folders, strict=True))


# --- all ways are equal ----------------------------------------------------------------------------


def test_same_masks_and_weights(three):
    first = three[0][0]
    assert first.sparsity_report().target_sparsity == pytest.approx(0.5, abs=0.01)
    for model, _ in three[1:]:
        assert same_masks(model, first)
        assert_unchanged(model, snapshot(first))


def test_same_methods(three):
    for model, _ in three:
        assert isinstance(model, PrunedModelMixin)
        assert all(hasattr(model, name) for name in METHODS)
        assert model.pruning_config == PruningConfig(sparsity=0.5)


def test_same_files(three):
    contents = [{p.name: p.read_bytes() for p in folder.iterdir()} for _, folder in three]
    assert all(len(content.pop("pruning_masks.safetensors")) > 100 for content in contents)  # its header has no order
    assert contents[0].keys() >= {"config.json", "model.safetensors"}
    assert contents[1] == contents[0]
    assert contents[2] == contents[0]


def test_files_are_those_of_the_dense_class(kind, three):
    _, dense, _, _ = kind
    architectures = json.loads((dense / "config.json").read_text())["architectures"]
    assert architectures[0].startswith(("Bert", "GPT2", "Llama", "T5", "Albert", "ViT"))
    for _, folder in three:
        assert json.loads((folder / "config.json").read_text())["architectures"] == architectures
        saved, expected = load_file(folder / "model.safetensors"), load_file(dense / "model.safetensors")
        assert {name: tensor.shape for name, tensor in saved.items()} == {n: t.shape for n, t in expected.items()}


def test_plain_auto_class_gives_identical_logits(kind, three):
    _, _, task, _ = kind
    for model, folder in three:
        plain, info = plain_auto(task).from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert not isinstance(plain, PrunedModelMixin)
        assert torch.equal(logits(plain), logits(model))


def test_every_way_loads_what_the_others_saved(kind, three):
    _, _, task, own = kind
    for model, folder in three:
        for loader in (auto(task), own):
            loaded, info = loader.from_pretrained(folder, output_loading_info=True)
            assert not info["missing_keys"]
            assert not info["unexpected_keys"]
            assert loaded.pruning_config == model.pruning_config
            assert same_masks(loaded, model)
            assert_unchanged(loaded, snapshot(model))


def test_ties_are_kept(kind, three):
    name = kind[0]
    for model, folder in three:
        loaded = auto(kind[2]).from_pretrained(folder)
        for one in (model, loaded):
            head, embedding = one.get_output_embeddings(), one.get_input_embeddings()
            assert (head is not None and head.weight is getattr(embedding, "weight", None)) == (
                name in ("gpt2", "llama", "t5")
            )


FRESH = """
import json, sys, warnings
warnings.simplefilter("error")
sys.modules["hf_prune"] = None  # importing it would fail
import torch, transformers
from safetensors.torch import save_file
from tests.models import tiny_batches

for folder, task in json.loads(sys.argv[1]):
    model = getattr(transformers, f"AutoModelFor{task}").from_pretrained(folder).eval()
    with torch.no_grad():
        batch = tiny_batches(model)[0]
        if not model.config.is_encoder_decoder:
            del batch["labels"]
        save_file({"logits": model(**batch).logits.contiguous()}, f"{folder}/logits.safetensors")
"""


def test_a_process_without_hf_prune_loads_every_kind(tmp_path, fresh_process):
    expected, jobs = {}, []
    for name, (make, task, own) in KINDS.items():
        model = own.from_pretrained(None, config=(dense := make()).config, state_dict=dense.state_dict()).prune(0.5)
        model.save_pretrained(tmp_path / name)
        expected[name] = logits(model)
        jobs.append([str(tmp_path / name), task])
    done = fresh_process.run(FRESH, json.dumps(jobs))
    assert done.returncode == 0, done.stderr
    for name, values in expected.items():
        assert torch.equal(load_file(tmp_path / name / "logits.safetensors")["logits"], values)


@pytest.mark.filterwarnings("ignore:.* stay dense, the largest:UserWarning")  # convolutions of Segformer
@pytest.mark.parametrize("own", [PrunedNeoX, PrunedSegformer])
def test_own_class_whose_weights_are_renamed_by_class_name(tmp_path, own):
    """transformers looks such renamings up by the class's name; without them a head would be random."""
    if own is PrunedNeoX:
        values = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config: Any = GPTNeoXConfig(**values, intermediate_size=32)
    else:
        sizes = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16]}
        more = {"patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
        config = SegformerConfig(**sizes, **more, decoder_hidden_size=8)
    model = own(config).prune(0.5)
    model.save_pretrained(tmp_path)
    loaded, info = own.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_unchanged(loaded, snapshot(model))


SMALL = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("task", "native"),
    [
        ("TokenClassification", BertForTokenClassification),
        ("QuestionAnswering", BertForQuestionAnswering),
        ("MultipleChoice", BertForMultipleChoice),
        ("PreTraining", BertForPreTraining),
        ("", BertModel),
    ],
)
def test_other_tasks(tmp_path, task, native):
    native(BertConfig(**SMALL)).save_pretrained(tmp_path / "dense")
    model = auto(task).from_pretrained(tmp_path / "dense").prune(0.5)
    assert isinstance(model, native)
    assert isinstance(model, PrunedModelMixin)
    model.save_pretrained(tmp_path / "pruned")
    assert same_masks(auto(task).from_pretrained(tmp_path / "pruned"), model)
    assert_unchanged(native.from_pretrained(tmp_path / "pruned"), snapshot(model))


@pytest.mark.parametrize("name", [name for name in hf_prune.__all__ if name.startswith("AutoPruned")])
def test_every_auto_class_has_its_counterpart(name):
    cls = getattr(hf_prune, name)
    assert issubclass(cls, AutoPrunedModel)
    assert cls.__name__ == name
    assert cls.__module__ == "hf_prune.auto"
    assert cls._auto_class == name.replace("AutoPruned", "Auto")
    assert hasattr(transformers, cls._auto_class)
    with pytest.raises(TypeError, match=rf"{name} is not instantiated: use from_pretrained\(\) or from_config\(\)"):
        cls()


def test_auto_from_config():
    model = AutoPrunedModelForSequenceClassification.from_config(BertConfig(**SMALL))
    assert type(model).__name__ == "BertForSequenceClassification"
    assert model.prune(0.5).sparsity_report().target_sparsity == pytest.approx(0.5, abs=0.01)


def test_auto_with_loading_info(tmp_path):
    models.tiny_bert().save_pretrained(tmp_path)
    model, info = AutoPrunedModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, PrunedModelMixin)
    assert not info["missing_keys"]


def test_pipelines(tmp_path):
    model = prunable(models.tiny_classifier()).prune(0.5)
    tokenizer = models.tiny_tokenizer()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    sentences = ["w1 w2 w3", "w4", "w5 w6 w7 w8"]
    in_memory = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")(sentences)
    from_disk = pipeline("text-classification", model=str(tmp_path), device="cpu")(sentences)
    assert in_memory == from_disk
    inputs = tokenizer(sentences, return_tensors="pt", padding=True)
    scores = model(**inputs).logits.softmax(-1)
    assert [r["label"] for r in from_disk] == [f"LABEL_{i}" for i in scores.argmax(-1).tolist()]
    assert [r["score"] for r in from_disk] == pytest.approx(scores.amax(-1).tolist(), abs=1e-5)


# --- prunable --------------------------------------------------------------------------------------


def test_prunable_is_in_place_and_keeps_the_name():
    model = models.tiny_bert()
    before = snapshot(model)
    assert prunable(model) is model
    assert type(model) is not BertForSequenceClassification
    assert isinstance(model, BertForSequenceClassification)
    assert type(model).__name__ == "BertForSequenceClassification"
    assert type(model).__module__ == BertForSequenceClassification.__module__
    assert type(model).__doc__ == BertForSequenceClassification.__doc__
    assert_unchanged(model, before)


def test_prunable_twice_and_of_an_own_class_changes_nothing():
    model = prunable(models.tiny_bert())
    kind = type(model)
    assert type(prunable(model)) is kind
    own = PrunedBert(BertConfig(**SMALL))
    assert type(prunable(own)) is PrunedBert
    assert pruned_class(BertForSequenceClassification) is kind
    assert dense_class(kind) is BertForSequenceClassification
    assert dense_class(PrunedBert) is BertForSequenceClassification


def test_prunable_adopts_masks_of_the_function():
    model = prune(models.tiny_bert(), 0.5)
    assert prunable(model).masks is not None
    assert MaskStore.of(model).masks == dict(model.masks)
    assert model.pruning_config == PruningConfig(sparsity=0.5)


def test_prunable_of_something_else():
    with pytest.raises(
        TypeError, match=r"found a Linear: expected a transformers PreTrainedModel; unwrap .*hf_prune.prune"
    ):
        prunable(torch.nn.Linear(2, 2))


def test_native_classes_are_untouched():
    prunable(models.tiny_bert())
    assert not issubclass(BertForSequenceClassification, PrunedModelMixin)
    assert not hasattr(BertForSequenceClassification, "prune")
    assert BertForSequenceClassification.is_custom_code() is False
    assert PrunedBert.is_custom_code() is False


# --- methods ---------------------------------------------------------------------------------------


@pytest.fixture
def model() -> Any:
    return prunable(models.tiny_bert())


def test_before_pruning_there_are_no_masks(model):
    before = snapshot(model)
    assert dict(model.masks) == {}
    assert model.pruning_config is None
    for method in (model.apply_masks, model.make_permanent, model.discard_masks):
        assert method() is model
    assert_unchanged(model, before)


def test_plan_changes_nothing(model):
    before = snapshot(model)
    plan = model.plan(0.5, exclude_modules=["classifier"])
    assert plan.config == PruningConfig(sparsity=0.5, exclude_modules=["classifier"])
    assert "classifier" not in str(plan)
    assert_unchanged(model, before)
    assert dict(model.masks) == {}
    assert model.plan().config == PruningConfig()


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        ((0.5,), {"sparsity": 0.4}, ConfigError, r"sparsity is given twice: 0.5 and 0.4"),
        ((1.5,), {}, ConfigError, r"sparsity is 1.5: expected a share from 0 to 1"),
        ((), {"colour": 1}, ConfigError, "unknown setting 'colour'"),
        ((), {"target_modules": ["qery"]}, PlanError, r"unknown module 'qery'.*Did you mean 'query'"),
    ],
)
def test_errors_change_nothing(model, arguments, settings, error, message):
    before = snapshot(model)
    for method in (model.plan, model.prune):
        with pytest.raises(error, match=message):
            method(*arguments, **settings)
    assert_unchanged(model, before)
    assert dict(model.masks) == {}


def test_masks_are_read_only(model):
    model.prune(0.5)
    with pytest.raises(TypeError, match="does not support item assignment"):
        model.masks["x"] = torch.ones(1)
    with pytest.raises(AttributeError):
        model.masks = {}


def test_apply_masks_after_something_wrote_weights(model):
    model.prune(0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    with pytest.warns(UserWarning, match="they are counted as they are"):
        assert model.sparsity_report().removed == 0
    assert model.apply_masks() is model
    assert model.sparsity_report().target_sparsity == pytest.approx(0.5, abs=0.01)
    assert all(torch.equal(model.get_parameter(n) != 0, mask) for n, mask in model.masks.items())


def test_make_permanent_leaves_the_zeros(model):
    model.prune(0.5)
    before = snapshot(model)
    assert model.make_permanent() is model
    assert_unchanged(model, before)
    assert dict(model.masks) == {}
    assert model.sparsity_report().target_sparsity == pytest.approx(0.5, abs=0.01)


def test_discard_masks_gives_every_bit_back(model):
    with torch.no_grad():
        model.classifier.weight[0, :3] = torch.tensor([-0.0, 1e-40, 0.0])
    before = snapshot(model)
    model.prune(0.3, keep_dense=True).prune(0.6, criterion="random")
    assert model.discard_masks() is model
    assert_unchanged(model, before)
    assert dict(model.masks) == {}


def test_discard_masks_without_the_dense_weights(model):
    model.prune(0.5)
    before = snapshot(model)
    with pytest.raises(MaskError, match=r"dense weights were not kept: pass keep_dense=True to prune"):
        model.discard_masks()
    assert_unchanged(model, before)
    assert len(model.masks) == 14


def test_dense_weights_are_not_saved(model, tmp_path):
    model.prune(0.5, keep_dense=True).save_pretrained(tmp_path)
    loaded = AutoPrunedModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(MaskError, match="were not kept"):
        loaded.discard_masks()


# --- copies ----------------------------------------------------------------------------------------


def _torch_round_trip(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch": _torch_round_trip}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("own", [False, True])
def test_copies_are_whole_and_independent(how, own):
    dense = models.tiny_bert()
    if own:
        model = PrunedBert.from_pretrained(None, config=dense.config, state_dict=dense.state_dict())
    else:
        model = prunable(models.tiny_bert())
    model.prune(0.3, keep_dense=True)
    before, masks = snapshot(model), {name: mask.clone() for name, mask in model.masks.items()}
    other = COPIES[how](model)
    assert type(other) is type(model)
    assert other.pruning_config == model.pruning_config
    assert same_masks(other, model)
    assert torch.equal(logits(other), logits(model))
    other.prune(0.8)
    assert_unchanged(model, before)
    assert all(torch.equal(mask, masks[name]) for name, mask in model.masks.items())
    assert_unchanged(other.discard_masks(), snapshot(models.tiny_bert()))


def test_copies_keep_ties():
    model = prunable(models.tiny_gpt2()).prune(0.5)
    for make in COPIES.values():
        other = make(model)
        assert other.lm_head.weight is other.transformer.wte.weight


def test_pickle_needs_only_the_dense_name():
    """An older or newer process finds the class by the native name; nothing dynamic is in the pickle."""
    data = pickle.dumps(prunable(models.tiny_bert()))
    assert b"modeling_bert" in data
    assert b"pruned_class" not in data


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(model, backend):
    expected = logits(model.prune(0.5))
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    batch = {name: tensor for name, tensor in tiny_batches(model)[0].items() if name != "labels"}
    assert torch.allclose(logits(compiled._orig_mod), expected)
    with torch.no_grad():
        found = compiled(**batch).logits
    assert torch.allclose(found, expected, atol=1e-6)
    model.prune(0.8)  # in place, so the compiled model follows
    with torch.no_grad():
        assert torch.allclose(compiled(**batch).logits, logits(model), atol=1e-6)
    assert not torch.allclose(logits(model), expected, atol=1e-4)


def test_generate(model):
    lm = prunable(models.tiny_gpt2()).prune(0.5)
    ids = torch.tensor([[1, 2, 3]])
    plain = GPT2LMHeadModel(lm.config)
    plain.load_state_dict(lm.state_dict())
    generated = lm.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, plain.eval().generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0))


def test_state_dict_has_the_dense_keys_only(model):
    keys = list(model.state_dict())
    model.prune(0.5, keep_dense=True)
    assert list(model.state_dict()) == keys == list(models.tiny_bert().state_dict())
    assert [n for n, _ in model.named_buffers()] == [n for n, _ in models.tiny_bert().named_buffers()]


# --- load_native -----------------------------------------------------------------------------------


def test_load_native(tmp_path):
    prunable(models.tiny_gpt2()).prune(0.5).save_pretrained(tmp_path)
    loaded = load_native(str(tmp_path))
    assert isinstance(loaded, GPT2LMHeadModel)
    assert isinstance(loaded, PrunedModelMixin)
    assert same_masks(loaded, AutoPrunedModelForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    "architectures",
    [
        None,
        [],
        {},
        [1],
        [None],
        [["x"]],
        *(
            [name]
            for name in (
                "MyOwnModel",
                "",
                "__name__",
                "pipeline",
                "logging",
                "Trainer",
                "BertConfig",
                "BertTokenizer",
                "BertModel\0",
                "PreTrainedModel",
                "BertPreTrainedModel",
                "AutoModel",
                "AutoTokenizer",
                "AutoModelForSeq2SeqLM",
            )
        ),
    ],
)
def test_load_native_of_an_unknown_class(tmp_path, architectures):
    models.tiny_bert().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
    with pytest.raises(DataError, match=r"names the class|is .*, expected a list of names"):
        load_native(str(tmp_path))


@pytest.mark.parametrize(
    "auto", ["AutoModelForSeq2SeqLM", "AutoModelForVideoClassification", "AutoConfig", "AutoProcessor"]
)
def test_load_native_runs_no_code_of_a_checkpoint(tmp_path, monkeypatch, auto):
    """Not even where everything that asks for consent is told yes."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "y")
    models.tiny_bert().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": [auto], "auto_map": {auto: "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    with pytest.raises(DataError, match="expected a transformers model such as BertForSequence"):
        load_native(str(tmp_path))
    assert not asked
    assert not (tmp_path / "ran").exists()


def test_load_native_of_nothing(tmp_path):
    with pytest.raises(DataError, match="nothing"):
        load_native(str(tmp_path / "nothing"))


def test_save_pretrained_takes_its_arguments_in_the_order_of_transformers():
    ours = list(inspect.signature(PrunedModelMixin.save_pretrained).parameters)[:5]
    assert ours == list(inspect.signature(PreTrainedModel.save_pretrained).parameters)[:5]


# --- when the model changes after pruning -------------------------------------------------------------------


def _tiny_bart():
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 16))}
    config = BartConfig(
        vocab_size=models.VOCAB, d_model=16, encoder_attention_heads=2, decoder_attention_heads=2, **sizes
    )
    return models.fill(BartForConditionalGeneration(config))


@pytest.mark.filterwarnings("ignore:Moving the following attributes")  # by transformers, of generation settings
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (models.tiny_llama, "lm_head.weight"),
        (models.tiny_gpt2, "transformer.wte.weight"),
        (models.tiny_t5, "shared.weight"),
        (_tiny_bart, "model.shared.weight"),
    ],
)
@pytest.mark.parametrize("tokens", [models.VOCAB + 5, models.VOCAB - 5])
def test_masks_follow_embeddings_that_are_resized(make, name, tokens, tmp_path):
    """Llama has an output layer of its own here; in the others it is the embedding, which two of them have thrice."""
    model = prunable(make()).prune(0.5, target_modules=".*", keep_dense=True)
    names = set(model.masks)
    old, dense = model.masks[name].clone(), MaskStore.of(model).dense[name].clone()
    rows = min(tokens, models.VOCAB)
    model.resize_token_embeddings(tokens)
    assert set(model.masks) == names
    mask = model.masks[name]
    assert mask.shape == model.get_parameter(name).shape
    assert torch.equal(mask[:rows], old[:rows])
    assert mask[rows:].all()
    new = model.get_parameter(name).detach()[rows:].clone()
    model.save_pretrained(tmp_path)
    again = load_native(str(tmp_path))
    assert torch.equal(again.masks[name], mask)
    assert torch.equal(again.get_parameter(name), model.get_parameter(name))
    model.discard_masks()
    assert torch.equal(model.get_parameter(name)[:rows], dense[:rows])
    assert torch.equal(model.get_parameter(name)[rows:], new)


def test_a_head_that_was_replaced_does_not_lock_the_other_masks(tmp_path):
    model = prunable(models.tiny_bert()).prune(0.5)
    model.classifier = torch.nn.Linear(16, 5)
    model.config.num_labels = 5
    with pytest.raises(MaskError, match=r"drop_masks\('classifier\.weight'\) leaves the other masks"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert model.drop_masks("classifier.weight") is model
    model.save_pretrained(tmp_path / "model")
    again = load_native(str(tmp_path / "model"))
    assert again.masks.keys() == model.masks.keys()
    assert "classifier.weight" not in again.masks
    assert again.classifier.weight.all()


def test_adapters_that_come_later_do_not_lock_the_masks():
    peft = pytest.importorskip("peft", reason="needs peft")
    model = prunable(models.tiny_bert()).prune(0.5)
    masks = list(model.masks.values())
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["query", "value"]))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.keep_sparse(optimizer)
    model(**models.tiny_batches(model)[0]).logits.sum().backward()
    optimizer.step()
    assert sum("base_layer" in name for name in model.masks) == 4
    assert all(torch.equal(now, then) for now, then in zip(model.masks.values(), masks, strict=True))
    assert all(torch.equal(model.get_parameter(name) != 0, mask) for name, mask in model.masks.items())
    adapted = [name for name in model.masks if "base_layer" in name]
    assert model.drop_masks(*adapted).masks.keys().isdisjoint(adapted)
    assert len(model.masks) == len(masks) - 4
