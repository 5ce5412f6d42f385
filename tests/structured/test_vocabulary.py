"""Vocabulary pruning: texts are split as before, models compute the same, and what plain transformers loads agrees."""

import copy
import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as cores
from transformers import (
    AutoModel,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertTokenizer,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaTokenizer,
)

from hf_prune import AutoPrunedModelForSequenceClassification, MaskStore, prune, trim_vocabulary
from hf_prune.cli.main import main
from hf_prune.errors import ArchitectureError, ConfigError, DataError, PlanError
from hf_prune.structured.vocabulary.tokenizer import all_tokens, piece_finder, tokenizer_json, used_tokens
from tests import models

CORPUS = [
    "the film is a charming and often affecting journey",
    "unflinchingly bleak and desperate",
    "it allows us to hope that the director is poised to embark on a major career",
    "the acting, costumes, music and sound are all astounding -- naïve café!",
    "a  smile on  your face",
    "",
]
OTHERS = [
    "quantum electrodynamics requires renormalization of divergent integrals",
    "the parliament adjourned its budget committee hearings until wednesday",
    "photosynthesis converts sunlight into chemical energy in chloroplasts",
    "goalkeepers and midfielders trained vigorously before the championship",
    "Zürich's tramways were extended 1,234 metres in 1987 – über alles",
]
STRANGE = ["snow ☃ man", "żółw quantum", "日本", "Film!"]  # partly of characters that no tokenizer here has seen


def trained(core, trainer, pre):
    tokenizer = Tokenizer(core)
    tokenizer.pre_tokenizer = pre
    tokenizer.train_from_iterator(CORPUS + OTHERS, trainer)
    return json.loads(tokenizer.to_str())["model"]


def bert_tokenizer():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=260, special_tokens=special, show_progress=False)
    model = trained(cores.WordPiece(unk_token="[UNK]"), trainer, pre_tokenizers.BertPreTokenizer())
    return BertTokenizer(vocab=model["vocab"])


def byte_level(special=()):
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(special),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    model = trained(cores.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False))
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def gpt2_tokenizer():
    return GPT2Tokenizer(*byte_level())  # its only special token is added, as the last one


def roberta_tokenizer():
    return RobertaTokenizer(*byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]))


def qwen_tokenizer():
    """A tokenizer.json without a class of its own, whose special tokens are added and put around texts."""
    vocab, merges = byte_level()
    core = Tokenizer(cores.BPE(vocab, merges, ignore_merges=True))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|begin|>", "<|end|>", "<|pad|>"])
    begin = core.token_to_id("<|begin|>")
    template = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", begin)])
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|pad|>"
    )


def unigram(special):
    trainer = trainers.UnigramTrainer(
        vocab_size=230, special_tokens=special, unk_token="<unk>", show_progress=False, n_sub_iterations=1
    )
    model = trained(cores.Unigram(), trainer, pre_tokenizers.Metaspace())
    return [tuple(entry) for entry in model["vocab"]]


def t5_tokenizer():
    return T5Tokenizer(vocab=unigram(["<pad>", "</s>", "<unk>"]), extra_ids=3)


def xlmr_tokenizer():
    return XLMRobertaTokenizer(vocab=[*unigram(["<s>", "<pad>", "</s>", "<unk>"]), ("<mask>", 0.0)])


def llama_tokenizer():
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    model = trained(cores.BPE(unk_token="<unk>", byte_fallback=True), trainer, pre_tokenizers.Metaspace())
    return LlamaTokenizer(model["vocab"], [tuple(pair) for pair in model["merges"]])


def special_ids(tokenizer):
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    return {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}


ENCODER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
ENCODER |= {"max_position_embeddings": 90}


def bart(size, **ids):
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 90}
    ids |= {"decoder_start_token_id": ids["eos_token_id"], "forced_eos_token_id": ids["eos_token_id"]}
    return BartForConditionalGeneration(BartConfig(vocab_size=size, d_model=16, **layers, **heads, **ids))


def t5(size, **ids):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    start = ids["pad_token_id"]
    return T5ForConditionalGeneration(T5Config(vocab_size=size + 7, decoder_start_token_id=start, **sizes, **ids))


def gpt2(size, **ids):
    return GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=2, n_positions=90, **ids))


def encoder(model, config, **settings):
    return lambda size, **ids: model(config(vocab_size=size, **ENCODER, **{**ids, **settings}))


def distilbert(size, **ids):
    sizes = {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 90}
    return DistilBertForMaskedLM(DistilBertConfig(vocab_size=size, **sizes, **ids))


CASES = {
    "bert": (bert_tokenizer, encoder(BertForSequenceClassification, BertConfig)),
    "bert_mlm": (bert_tokenizer, encoder(BertForMaskedLM, BertConfig)),
    "distilbert": (bert_tokenizer, distilbert),
    "electra": (bert_tokenizer, encoder(ElectraForPreTraining, ElectraConfig, embedding_size=8)),
    "gpt2": (gpt2_tokenizer, gpt2),
    "roberta": (roberta_tokenizer, encoder(RobertaForMaskedLM, RobertaConfig)),
    "bart": (roberta_tokenizer, bart),
    "qwen": (qwen_tokenizer, encoder(LlamaForCausalLM, LlamaConfig, tie_word_embeddings=True)),
    "t5": (t5_tokenizer, t5),
    "xlm_roberta": (xlmr_tokenizer, encoder(XLMRobertaForSequenceClassification, XLMRobertaConfig)),
    "llama": (llama_tokenizer, encoder(LlamaForCausalLM, LlamaConfig)),
}
MADE = {}


@pytest.fixture
def make():
    """A model and its tokenizer, made once and copied."""

    def copies(name):
        if name not in MADE:
            build, model = CASES[name]
            tokenizer = build()
            torch.manual_seed(3)
            MADE[name] = models.fill(model(len(tokenizer), **special_ids(tokenizer))).eval(), tokenizer
        return copy.deepcopy(MADE[name][0]), copy.deepcopy(MADE[name][1])

    return copies


@torch.no_grad()
def outputs(model, tokenizer, text):
    """The logits, and what the output layer sees."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    if model.config.is_encoder_decoder:
        found = model(input_ids=ids, decoder_input_ids=ids, output_hidden_states=True)
        return found.logits, found.decoder_hidden_states[-1]
    found = model(input_ids=ids, output_hidden_states=True)
    return found.logits, found.hidden_states[-1]


def aligned(model):
    """Weights as fresh memory has them: read from a file they may lie at odd addresses, where sums run otherwise."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


def not_empty(tokenizer):
    return [text for text in CORPUS if tokenizer(text)["input_ids"]]


# --- the same texts, the same outputs --------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_the_same_bit_for_bit(make, name, tmp_path):
    model, tokenizer = make(name)
    texts = not_empty(tokenizer)
    rows, class_ = model.get_input_embeddings().num_embeddings, type(model)
    before = {text: (tokenizer(text)["input_ids"], *outputs(model, tokenizer, text)) for text in texts}
    result = trim_vocabulary(model, tokenizer, CORPUS)
    kept = list(result.ids)
    assert result.model is model
    assert result.tokens_changed == 0
    assert 0 < result.removed == rows - len(kept) == rows - model.config.vocab_size
    assert result.parameters == sum(p.numel() for p in model.parameters()) < result.parameters_before
    model.save_pretrained(tmp_path)
    result.tokenizer.save_pretrained(tmp_path)
    loaded, info = class_.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    AutoModel.from_pretrained(tmp_path)
    for smaller, own in ((model, result.tokenizer), (aligned(loaded), AutoTokenizer.from_pretrained(tmp_path))):
        for text, (ids, logits, hidden) in before.items():
            assert [kept[i] for i in own(text)["input_ids"]] == ids
            assert own.decode(own(text)["input_ids"]) == tokenizer.decode(ids)
            found = outputs(smaller, own, text)
            assert models.same_bits(found[1], hidden)
            if name.startswith(("bert", "electra", "xlm")) and name != "bert_mlm":
                assert models.same_bits(found[0], logits)
            else:  # kernels of another width may add up in another order
                torch.testing.assert_close(found[0], logits[..., kept], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_other_texts_can_still_be_spelled(make, name):
    model, tokenizer = make(name)
    new = trim_vocabulary(model, tokenizer, CORPUS).tokenizer
    for text in [*OTHERS, *STRANGE]:
        ids = new(text)["input_ids"]
        assert max(ids) < model.config.vocab_size
        old = tokenizer(text)["input_ids"]
        assert ids.count(new.unk_token_id) == old.count(tokenizer.unk_token_id)
        if name not in ("t5", "xlm_roberta"):  # whose decoders write unknown characters as such, fused or not
            assert new.decode(ids) == tokenizer.decode(old)


@pytest.mark.parametrize("name", CASES)
def test_ids_that_configs_name_follow_their_tokens(make, name):
    model, tokenizer = make(name)
    old = {key: value for key, value in vars(model.config).items() if key.endswith("_token_id")}
    old_tokens = {key: tokenizer.convert_ids_to_tokens(i) for key, i in old.items() if i is not None and i < 200}
    result = trim_vocabulary(model, tokenizer, CORPUS)
    for key, token in old_tokens.items():
        assert result.tokenizer.convert_ids_to_tokens(getattr(model.config, key)) == token, key
    for key, value in special_ids(tokenizer).items():
        assert getattr(result.tokenizer, key) == getattr(model.config, key) == result.ids[value]
        if model.can_generate() and getattr(model.generation_config, key) is not None:
            assert getattr(model.generation_config, key) == result.ids[value]
    padding = model.get_input_embeddings().padding_idx
    assert padding in (None, result.tokenizer.pad_token_id)


@pytest.mark.parametrize("name", ["bert_mlm", "gpt2", "qwen", "t5", "bart", "roberta"])
def test_ties_and_biases(make, name):
    model, tokenizer = make(name)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied  # or the case is not worth much
    size = len(trim_vocabulary(model, tokenizer, CORPUS).ids)
    output = model.get_output_embeddings()
    assert output.weight is model.get_input_embeddings().weight
    assert (output.out_features, model.get_input_embeddings().num_embeddings) == (size, size)
    lengths = {n: t.shape[-1] for n, t in model.state_dict().items() if n.endswith(("predictions.bias", "logits_bias"))}
    assert set(lengths.values()) <= {size}
    assert bool(lengths) == (name in ("bert_mlm", "bart"))


def test_other_settings_with_ids(make):
    model, tokenizer = make("gpt2")
    end, first, second = tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["Q", "z"])
    model.generation_config.update(
        eos_token_id=[end, first],
        suppress_tokens=[first, -1],
        bad_words_ids=[[first, second]],
        sequence_bias=[[[first, second], -2.0]],
    )
    model.generation_config.forced_decoder_ids = [[1, second]]  # of older checkpoints
    model.config.suppress_tokens = [second]
    ids = trim_vocabulary(model, tokenizer, CORPUS).ids
    settings = model.generation_config
    assert settings.eos_token_id == [ids[end], ids[first]]
    assert settings.suppress_tokens == [ids[first], -1]
    assert settings.bad_words_ids == [[ids[first], ids[second]]]
    assert settings.sequence_bias == [[[ids[first], ids[second]], -2.0]]
    assert settings.forced_decoder_ids == [[1, ids[second]]]
    assert model.config.suppress_tokens == [ids[second]]


def test_generation_says_the_same(make):
    model, tokenizer = make("llama")
    ids = tokenizer("the film", return_tensors="pt")["input_ids"]
    wanted = model.generate(ids, max_new_tokens=5, do_sample=False)
    result = trim_vocabulary(model, tokenizer, CORPUS, keep=wanted.flatten().tolist())
    new = result.tokenizer("the film", return_tensors="pt")["input_ids"]
    found = model.generate(new, max_new_tokens=5, do_sample=False)
    assert [list(result.ids)[i] for i in found[0].tolist()] == wanted[0].tolist()


def test_masks_are_cut_too(make):
    model, tokenizer = make("bert_mlm")
    prune(model, 0.5, target_modules=("decoder", "query"), keep_dense=True)
    store = MaskStore.of(model)
    name = next(n for n in store.masks if "query" not in n)
    masks, dense = store.masks[name].clone(), store.dense[name].clone()
    kept = list(trim_vocabulary(model, tokenizer, CORPUS).ids)
    store = MaskStore.of(model)
    store.check(model)
    assert torch.equal(store.masks[name], masks[kept])
    store.discard(model)
    assert torch.equal(model.get_parameter(name), dense[kept])


# --- which tokens stay -----------------------------------------------------------------------------


def bpe(merges, **settings):
    """BPE over whole texts of a and b and whatever the merges make of them."""
    vocab = {token: i for i, token in enumerate(dict.fromkeys(["a", "b", *(x + y for x, y in merges)]))}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(cores.BPE(vocab, merges, **settings)))


def test_pieces_are_those_on_the_way():
    tokenizer = bpe([("a", "b"), ("b", "a"), ("ab", "a"), ("a", "ba"), ("aba", "b"), ("ab", "ab")])
    values = tokenizer_json(tokenizer)
    tokens, find = all_tokens(values), piece_finder(values)
    assert find([tokens["aba"]]) == {tokens[t] for t in ("a", "b", "ab", "aba")}  # not by way of "ba", made later
    assert find([tokens["abab"]]) == {tokens[t] for t in ("a", "b", "ab", "abab")}  # the pair comes before "aba"
    assert find([]) == set()


def test_pieces_with_marks_of_words():
    core = Tokenizer(cores.BPE({"a": 0, "b</w>": 1, "ab</w>": 2, "b": 3}, [("a", "b</w>")], end_of_word_suffix="</w>"))
    assert piece_finder(json.loads(core.to_str()))([2]) == {0, 1, 2}
    core = Tokenizer(cores.BPE({"a": 0, "##b": 1, "ab": 2, "b": 3}, [("a", "##b")], continuing_subword_prefix="##"))
    assert piece_finder(json.loads(core.to_str()))([2]) == {0, 1, 2}


PAIRS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=10)


@given(pairs=PAIRS, texts=st.lists(st.text("ab", min_size=1, max_size=12), min_size=1, max_size=4))
def test_any_bpe_splits_its_texts_as_before(pairs, texts):
    tokens, merges = ["a", "b"], []
    for x, y in pairs:  # any two tokens so far, in any order, also those that make one that is there already
        merges.append((tokens[x % len(tokens)], tokens[y % len(tokens)]))
        tokens.append("".join(merges[-1]))
    tokenizer = bpe(list(dict.fromkeys(merges)))
    model = models.tiny_llama(vocab_size=50)
    result = trim_vocabulary(model, tokenizer, texts, keep_characters=False)
    for text in texts:
        assert [list(result.ids)[i] for i in result.tokenizer(text)["input_ids"]] == tokenizer(text)["input_ids"]


def test_unigram_keeps_the_price_of_unknown_characters():
    """An unknown character costs 10 more than the least likely piece, and "abx" is cheaper with one if that is gone."""
    pieces = [("<unk>", 0.0), ("a", -15.0), ("bx", -15.0), ("ab", -1.0), ("b", -9.0), ("zz", -20.0), ("yy", -12.0)]
    core = Tokenizer(cores.Unigram(pieces, unk_id=0))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert tokenizer("abx")["input_ids"] == [1, 2]
    result = trim_vocabulary(models.tiny_bert(vocab_size=10), tokenizer, ["abx", "ab"])
    assert list(result.ids) == [0, 1, 2, 3, 4, 5]


def test_characters_can_go(make):
    sizes = {}
    for keep in (True, False):
        model, tokenizer = make("bert")
        sizes[keep] = len(trim_vocabulary(model, tokenizer, CORPUS[:2], keep_characters=keep).ids)
    assert sizes[False] < sizes[True]


def test_rare_tokens_go_and_are_counted(make):
    model, tokenizer = make("bert")
    counts = used_tokens(tokenizer, CORPUS)
    result = trim_vocabulary(model, tokenizer, CORPUS, min_count=2)
    gone = {i: n for i, n in counts.items() if i not in result.ids}
    assert set(gone.values()) == {1}
    assert result.tokens_changed == sum(gone.values()) > 0
    assert "are rarer than min_count" in str(result)


def test_used_tokens_are_counted_without_cutting():
    tokenizer = models.tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(2)
    assert used_tokens(tokenizer, ["w0 w1 w0", "w2 nothing"]) == {4: 2, 5: 1, 6: 1, 1: 1}
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 2


def test_keep_by_token_and_by_id():
    model = models.tiny_bert()
    result = trim_vocabulary(model, models.tiny_tokenizer(), keep=["w7", 9])
    assert list(result.ids) == [0, 1, 2, 3, 9, 11]
    assert "No texts were given" in str(result)


def test_rounding_takes_the_most_frequent_then_the_first():
    texts = ["w5 w5 w5", "w9 w9", "w9 w8 w8", "w7"]
    model = models.tiny_bert()
    result = trim_vocabulary(model, models.tiny_tokenizer(), texts, min_count=3, round_to=4)
    assert list(result.ids) == [0, 1, 2, 3, 9, 11, 12, 13]  # w5 and w9; then w8, seen twice, and w7, seen once
    model = models.tiny_bert()
    assert list(trim_vocabulary(model, models.tiny_tokenizer(), ["w5"], round_to=7).ids) == [0, 1, 2, 3, 4, 5, 9]
    model = models.tiny_bert()
    assert len(trim_vocabulary(model, models.tiny_tokenizer(), texts, round_to=64).ids) == models.VOCAB


def test_rounding_brings_the_pieces_along(make):
    for multiple in (7, 16, 50):
        model, tokenizer = make("gpt2")
        result = trim_vocabulary(model, tokenizer, CORPUS, round_to=multiple)
        assert len(result.ids) % multiple == 0
        find = piece_finder(tokenizer_json(tokenizer))
        assert find(result.ids) == set(result.ids)


def test_positions_that_count_from_the_padding_token_stay(make):
    model, tokenizer = make("roberta")
    padding = model.config.pad_token_id
    trim_vocabulary(model, tokenizer, CORPUS)
    assert model.config.pad_token_id == padding == model.roberta.embeddings.padding_idx


# --- errors, after which the model is as it was ------------------------------------------------------


def refused(error, match, model, tokenizer, *arguments, **settings):
    before, config, text = models.snapshot(model), model.config.to_dict(), tokenizer_text(tokenizer)
    with pytest.raises(error, match=match):
        trim_vocabulary(model, tokenizer, *arguments, **settings)
    models.assert_unchanged(model, before)
    assert model.config.to_dict() == config
    assert tokenizer_text(tokenizer) == text


def tokenizer_text(tokenizer):
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else backend.to_str()


@pytest.mark.parametrize(
    ("error", "match", "settings"),
    [
        (DataError, "no texts and nothing to keep", {}),
        (DataError, "texts is empty", {"texts": []}),
        (DataError, "texts is the string 'w1 w2': expected a list", {"texts": "w1 w2"}),
        (DataError, "keep is the string 'w1'", {"keep": "w1"}),
        (DataError, "a text is 3: expected a string", {"texts": ["w1", 3]}),
        (DataError, "the 2 texts use no token", {"texts": ["", " "]}),
        (PlanError, "keep has 1 that the vocabulary of 48 does not have: 48; expected ids", {"keep": [48]}),
        (PlanError, "does not have: -1", {"keep": [-1]}),
        (PlanError, r"does not have: 'w99'.*\('w43'\)", {"keep": ["w99", "w1"]}),
        (ConfigError, "min_count is 0", {"texts": ["w1"], "min_count": 0}),
        (ConfigError, "round_to is 0", {"texts": ["w1"], "round_to": 0}),
    ],
)
def test_refused_settings(error, match, settings):
    refused(error, match, models.tiny_bert(), models.tiny_tokenizer(), **settings)


def test_refused_tokenizers(make):
    class Slow:
        all_special_ids = ()

    refused(DataError, "is a Slow without tokenizer.json", models.tiny_bert(), Slow(), ["w1"])
    small = models.tiny_bert(vocab_size=40)
    match = r"ids up to 47, the model's embedding 40 rows.*resize_token_embeddings\(48\)"
    refused(DataError, match, small, models.tiny_tokenizer(), ["w1"])


def test_refused_models(make):
    tokenizer = models.tiny_tokenizer()
    position = models.tiny_bert(max_position_embeddings=48)
    match = r"'bert.embeddings.position_embeddings.weight' of \w+ has the shape \(48, 16\), and the vocabulary 48"
    refused(ArchitectureError, match, position, tokenizer, ["w1"])
    refused(ArchitectureError, "expected a table with a row for each token", models.tiny_vit(), tokenizer, ["w1"])
    two = models.tiny_bert()
    two.config.entity_vocab_size = 7
    refused(ArchitectureError, "entity_vocab_size=7 beside a vocabulary of 48", two, tokenizer, ["w1"])
    output = models.tiny_llama()
    output.lm_head = torch.nn.Linear(16, 40, bias=False)
    refused(ArchitectureError, "has 40 rows, its input embedding 48", output, tokenizer, ["w1"])


def test_refused_where_positions_would_move():
    vocab = {"<s>": 0, "a": 2, "<pad>": 3, "<unk>": 4}  # nothing has the id 1
    core = Tokenizer(cores.WordLevel(vocab, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    model = RobertaForMaskedLM(RobertaConfig(vocab_size=20, pad_token_id=3, **ENCODER))
    refused(ArchitectureError, "counts positions from its padding token, id 3, and token 1", model, tokenizer, ["a"])


def test_refused_where_a_text_would_be_split_differently():
    """A word that was unknown because its longest beginning led nowhere is known without that beginning."""
    vocab = {"[UNK]": 0, "abc": 1, "ab": 2, "##cd": 3, "a": 4, "x": 5}
    core = Tokenizer(cores.WordPiece(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    texts = ["abcd x", "ab", "x"]
    match = r"'abcd x' would be split differently: \['\[UNK\]', 'x'\] became \['ab', '##cd', 'x'\] at token 0"
    refused(DataError, match, models.tiny_bert(vocab_size=10), tokenizer, texts, keep=["##cd"])
    result = trim_vocabulary(models.tiny_bert(vocab_size=10), tokenizer, texts, keep=["##cd", "abc"])
    assert result.tokens_changed == 0


# --- the command ----------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys):
    def run(*arguments, code=0):
        with pytest.raises(SystemExit) as ended:
            main(["trim-vocab", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert ended.value.code == code, err
        return err if code else out

    return run


@pytest.fixture
def folder(tmp_path, make):
    model, tokenizer = make("bert")
    prune(model, 0.5)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "vocab.txt").write_text("of the old tokenizer\n")
    (tmp_path / "model" / "preprocessor_config.json").write_text("{}")
    (tmp_path / "data").mkdir()
    rows = "\n".join(["sentence\tlabel", *(f"{text}\t0" for text in CORPUS if text)])
    (tmp_path / "data" / "train.tsv").write_text(rows + "\n", encoding="utf-8")
    (tmp_path / "more.txt").write_text(OTHERS[0])
    return tmp_path


def test_command(run, folder):
    out = run(folder / "model", "--texts", folder / "data", "--texts", folder / "more.txt", "--out", folder / "small")
    assert "0 of " in out
    assert "tokens of 6 texts become different" in out
    assert "the model gets smaller, but hardly faster." in out
    assert out.endswith(f"Saved in {folder / 'small'}.\n")
    small = aligned(AutoPrunedModelForSequenceClassification.from_pretrained(folder / "small"))
    tokenizer, old = (AutoTokenizer.from_pretrained(folder / name) for name in ("small", "model"))
    report = json.loads((folder / "small" / "vocabulary_report.json").read_text())
    assert report["vocabulary"] == small.config.vocab_size == len(tokenizer) == len(report["kept_ids"])
    assert report["vocabulary"] % 8 == 0
    dense = aligned(AutoPrunedModelForSequenceClassification.from_pretrained(folder / "model"))
    for text in [*filter(None, CORPUS), OTHERS[0]]:
        assert models.same_bits(outputs(small, tokenizer, text)[0], outputs(dense, old, text)[0])
    assert small.masks.keys() == dense.masks.keys()
    assert not (folder / "small" / "vocab.txt").exists()
    assert (folder / "small" / "preprocessor_config.json").exists()
    assert not list(folder.glob(".*"))


def test_command_over_another_model_leaves_no_old_vocabulary(run, folder):
    shutil.copytree(folder / "model", folder / "other")
    arguments = [folder / "model", "--texts", folder / "data", "--out", folder / "other"]
    assert "which hf-prune trim-vocab did not write: name a new" in run(*arguments, code=1)
    run(*arguments, "--overwrite")
    assert not (folder / "other" / "vocab.txt").exists()
    size = AutoModel.from_pretrained(folder / "other").config.vocab_size
    assert len(AutoTokenizer.from_pretrained(folder / "other")) == size


def test_command_dry_run_json_and_keep(run, folder):
    before = sorted(folder.rglob("*"))
    (folder / "keep").write_text("##m\n[MASK]\n")
    values = json.loads(run(folder / "model", "--keep-tokens", folder / "keep", "--dry-run", "--json"))
    assert sorted(folder.rglob("*")) == sorted([*before, folder / "keep"])
    assert values["texts"] == 0
    assert values["vocabulary"] + values["removed"] == values["vocabulary_before"]
    assert "Nothing was written." in run(folder / "model", "--texts", folder / "data", "--dry-run")


def test_command_errors(run, folder):
    assert "no --out" in run(folder / "model", "--texts", folder / "data", code=1)
    assert "neither --texts nor --keep-tokens" in run(folder / "model", "--dry-run", code=1)
    assert "no such" in run(folder / "model", "--texts", folder / "nowhere", "--dry-run", code=1)
    (folder / "keep").write_bytes(b"\xff\xfe")
    assert "is not a text file" in run(folder / "model", "--keep-tokens", folder / "keep", "--dry-run", code=1)
    (folder / "keep").write_text("no-such-token\n")
    out = folder / "small"
    assert "'no-such-token'" in run(folder / "model", "--keep-tokens", folder / "keep", "--out", out, code=1)
    assert not out.exists()
    (folder / "model" / "tokenizer.json").unlink()
    (folder / "model" / "vocab.txt").unlink()
    assert "has no tokenizer" in run(folder / "model", "--texts", folder / "data", "--dry-run", code=1)


def test_speed_is_said_as_it_is(make):
    lines = {}
    for name in ("bert", "gpt2"):
        model, tokenizer = make(name)
        lines[name] = str(trim_vocabulary(model, tokenizer, CORPUS)).splitlines()[-1]
    assert lines["bert"].endswith("hardly faster.")
    model, tokenizer = make("gpt2")
    rows, width = model.lm_head.weight.shape
    multiplied = sum(p.numel() for p in model.parameters() if p.dim() > 1) - model.transformer.wpe.weight.numel()
    result = trim_vocabulary(model, tokenizer, CORPUS)  # whose embedding is tied to its output layer
    assert result.saved_products == pytest.approx(result.removed * width / multiplied)
    assert rows == result.vocabulary_before
    assert lines["gpt2"].endswith(f"a token takes {100 * result.saved_products:.1f} % fewer products.")
