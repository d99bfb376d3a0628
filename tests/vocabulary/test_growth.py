import copy
import math
import types

import pytest
import torch
from torch import nn

import pyembed
from pyembed.vocabulary import grow, grow_optimizer

V, D = 50, 33


class Model(nn.Module):
    """A table, a position table, and a head, tied or not."""

    def __init__(self, tied=True, bias=False, rows=V, head_rows=V, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.token, self.position = nn.Embedding(rows, D), nn.Embedding(9, D)
        self.head = nn.Linear(D, head_rows, bias=bias)
        if tied:
            self.head.weight = self.token.weight
        self.to(dtype)

    def forward(self, ids):
        return self.head(torch.tanh(self.token(ids) + self.position(torch.arange(ids.shape[-1]))))


def growing(model, *args, **options):
    return grow(model, *args, **{"tables": ["token"], **options})


IDS = torch.arange(7)[None]


@pytest.mark.parametrize("init", ["mean", "sample"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_old_rows_and_logits_stay(tied, bias, init):
    model = Model(tied, bias)
    before, logits = copy.deepcopy(model), model(IDS)
    random = torch.get_rng_state()
    growth = growing(model, 3, init)
    assert torch.equal(torch.get_rng_state(), random)
    assert (growth.ids, growth.size) == (range(50, 53), 53)
    assert growth.rows == {"token": (50, 53), "head": (50, 53)}
    assert (model.token.num_embeddings, model.head.out_features) == (53, 53)
    assert (model.head.weight is model.token.weight) is tied
    for ours, theirs in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(ours[: len(theirs)], theirs) and ours.requires_grad
    assert torch.allclose(model(IDS)[..., :V], logits, rtol=1e-5, atol=1e-6)
    means = [before.token.weight.double().mean(0), before.head.weight.double().mean(0)]
    for rows, mean in zip((model.token.weight[V:], model.head.weight[V:]), means, strict=True):
        assert (rows - mean).abs().max() < (1e-6 if init == "mean" else 0.02)
        assert len(rows.unique(dim=0)) == (1 if init == "mean" else 3)
    if bias:
        assert torch.allclose(model.head.bias[V:], before.head.bias.mean().expand(3))


def test_sample_has_the_covariance():
    torch.manual_seed(0)
    table = nn.Embedding(200, 4)
    old = (table.weight.detach() @ torch.randn(4, 4) + 3).double()
    table.weight.data.copy_(old)
    grow(table, 20_000, "sample")
    drawn = table.weight.detach()[200:].double()
    assert torch.allclose(drawn.mean(0), old.mean(0), atol=1e-3)
    expected = 1e-5 * old.T.cov()
    assert (drawn.T.cov() - expected).abs().max() < 0.04 * expected.abs().max()


def test_sampled_rows_differ_in_bf16_and_repeat():
    torch.manual_seed(0)
    table = nn.Embedding(300, 8, dtype=torch.bfloat16)
    table.weight.data += 5  # one step of bf16 is many standard deviations of a draw
    other = copy.deepcopy(table)
    grow(table, 24, "sample")
    assert len(table.weight.unique(dim=0)) == 300 + 24
    grow(other, 24, "sample")
    assert torch.equal(table.weight, other.weight)
    with pytest.raises(ValueError, match="whose rows are all alike"):
        grow(nn.Embedding.from_pretrained(torch.ones(9, 2)), 2, "sample")


def test_only_trained_rows_count():
    table = nn.Embedding(10, 4, padding_idx=2)
    with torch.no_grad():
        table.weight[7] = math.nan
        table.weight[8:] = 1e6
    trained = table.weight.detach()[[0, 1, 3, 4, 5, 6]].mean(0)
    grow(table, 1, size=8, untrained=[7])
    assert torch.allclose(table.weight[8], trained) and table.num_embeddings == 10


def test_texts_start_from_their_pieces():
    pytest.importorskip("tiktoken")
    torch.manual_seed(0)
    table = nn.Embedding(50257, 3, dtype=torch.bfloat16)
    growth = grow(table, texts=["<|tool|>", " pyembed"], encoding="gpt2")
    encoding = pyembed.data.get_encoding("gpt2")
    for id, text in zip(growth.ids, ["<|tool|>", " pyembed"], strict=True):
        expected = table.weight[encoding.encode(text)].double().mean(0)
        assert torch.equal(table.weight[id], expected.bfloat16())


def test_texts_by_a_tokenizer_of_another_kind():
    class Tokenizer:  # as those of transformers
        def __len__(self):
            return 5

        def encode(self, text, add_special_tokens=True):
            return [0, *map(int, text)] if add_special_tokens else [int(c) for c in text]

    table = nn.Embedding(5, 2)
    grow(table, texts=["12", "344"], encoding=Tokenizer())
    assert torch.allclose(table.weight[5:], torch.stack([table.weight[[1, 2]].mean(0), table.weight[[3, 4, 4]].mean(0)]))
    with pytest.raises(ValueError, match=r"texts: expected texts of one or more tokens under 7, got '' of \[\]"):
        grow(table, texts=[""], encoding=Tokenizer())
    with pytest.raises(ValueError, match=r"got '8' of \[8\]"):
        grow(table, texts=["8"], encoding=Tokenizer())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_padding_has_no_probability(tied, bias):
    model = Model(tied, bias)
    logits = model(IDS)
    growth = growing(model, 2, multiple_of=16)
    assert growth.rows["head"] == (50, 64) and growth.size == 52
    padded = model(IDS)
    assert padded.shape[-1] == 64 and torch.isneginf(padded[..., 52:]).all() and padded[..., :52].isfinite().all()
    assert torch.allclose(padded[..., :50], logits, rtol=1e-5, atol=1e-6)
    assert (padded.softmax(-1)[..., 52:] == 0).all()
    padded.flatten(0, 1).logsumexp(-1).sum().backward()
    assert all(p.grad.isfinite().all() and (p.grad[52:] == 0).all() for p in model.head.parameters())
    # Padding is filled before rows are added, and gone when it is full.
    growth = growing(model, 12, "sample")
    assert growth.ids == range(52, 64) and growth.rows["head"] == (64, 64)
    assert model(IDS).isfinite().all() and (model.head.bias is None) is not bias
    assert set(model.state_dict()) == set(Model(tied, bias).state_dict())


def test_padding_is_hidden_again_after_loading():
    model = Model(tied=False)
    growing(model, 1, multiple_of=8)
    other = Model(False, rows=56, head_rows=56)
    other.load_state_dict(model.state_dict())
    growing(other, size=51)
    assert torch.equal(other(IDS), model(IDS))
    growing(model, 1)  # the size is remembered
    assert torch.isneginf(model(IDS)[..., 52:]).all() and model(IDS)[..., :52].isfinite().all()


def test_table_and_head_of_other_rows():
    model = Model(tied=False, rows=60, head_rows=50)
    with pytest.raises(ValueError, match=r"size: expected the number of ids in use .* \[50, 60\] rows"):
        grow(model, 2, tables=["token"], heads=["head"])
    growth = grow(model, 2, tables=["token"], heads=["head"], size=48)
    assert growth.rows == {"token": (60, 60), "head": (50, 50)} and growth.ids == range(48, 50)
    growth = grow(model, 3, tables=["token"], heads=["head"])
    assert growth.rows == {"token": (60, 60), "head": (50, 53)} and growth.ids == range(50, 53)


class Several(nn.Module):
    """An encoder and a decoder: one table in three modules, a table of its own, and buffers."""

    def __init__(self):
        super().__init__()
        self.shared, self.encoder, self.decoder = (nn.Embedding(V, D) for _ in range(3))
        self.encoder.weight = self.decoder.weight = self.shared.weight
        self.other = nn.Embedding(V, 8)
        self.head = nn.Linear(D, V, bias=False)
        self.head.weight = self.shared.weight
        self.register_buffer("final_logits_bias", torch.zeros(1, V))


def test_several_tables():
    model = Several()
    with pytest.raises(ValueError, match=r"expected one nn.Embedding, got shared, encoder, decoder, other"):
        grow(model, 1)
    growth = grow(model, 1, tables=["shared", "other"])
    assert set(growth.rows) == {"shared", "encoder", "decoder", "other", "head"}
    assert model.encoder.weight is model.decoder.weight is model.shared.weight is model.head.weight
    assert model.other.weight.shape == (51, 8) and model.final_logits_bias.shape == (1, 51)


@pytest.mark.parametrize("plan", ["auto", "table"])
def test_front_end_follows(plan):
    torch.manual_seed(0)
    front = pyembed.EmbeddingQKV(V, 32, 2, max_length=8).eval()
    front.build_table()
    with torch.no_grad(), pyembed.plan(plan):
        old = front(IDS)
        growth = grow(front, 2)
        assert growth.rows == {"token": (50, 52)}
        for ours, theirs in zip(front(IDS), old, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        new = front(torch.tensor([[50, 51]]))
    assert torch.equal(new.hidden, front.token.weight[50:] + front.position.weight[None, :2])


def test_gradients_follow():
    table = nn.Embedding(5, 2)
    table.weight.grad = torch.randn(5, 2)
    grad = table.weight.grad.clone()
    grow(table, 2)
    assert torch.equal(table.weight.grad, torch.cat([grad, torch.zeros(2, 2)]))


class Odd(nn.Module):
    def __init__(self, weight, name="kept"):
        super().__init__()
        setattr(self, name, weight)


def outside(model):
    model.elsewhere = [Odd(model.token.weight)]  # no submodule


def hooked(model):
    model.token.weight.register_hook(lambda grad: grad)


REFUSED = {
    "a negative number": (lambda m: None, dict(new=-1), ValueError, "new: expected 0 or more, got -1"),
    "no number": (lambda m: None, dict(new=1.5), TypeError, "new: expected an integer, got 1.5"),
    "another init": (lambda m: None, dict(new=1, init="zeros"), ValueError, "init: expected 'mean' or 'sample', got 'zeros'"),
    "no multiple": (lambda m: None, dict(new=1, multiple_of=0), ValueError, "multiple_of: expected 1 or more, got 0"),
    "too many in use": (lambda m: None, dict(new=1, size=51), ValueError, "size: expected 1 to 50, got 51"),
    "no id": (lambda m: None, dict(new=1, untrained=[50]), ValueError, "untrained: expected 0 to 49, got 50"),
    "no row": (lambda m: None, dict(new=1, untrained=range(50)), ValueError, "expected fewer than all ids in use"),
    "a text twice": (lambda m: None, dict(texts=["a", "b", "a"]), ValueError, "got 'a' twice"),
    "one text": (lambda m: None, dict(texts="abc"), TypeError, "texts: expected a list of str"),
    "another count": (lambda m: None, dict(new=3, texts=["a", "b"]), ValueError, "new: expected 0 or the number of texts, 2"),
    "an encoding that does not fit": (
        lambda m: None, dict(texts=["a"]), ValueError, "encoding: expected one of at most 50 tokens, .* got one of 50,257",
    ),
    "a module that cannot follow": (
        lambda m: setattr(m, "odd", Odd(m.token.weight)), dict(new=1), ValueError, r"token.weight is shared by odd \(Odd\)",
    ),
    "another module with a weight": (
        lambda m: setattr(m, "odd", Odd(m.token.weight, "weight")), dict(new=1), ValueError, r"token.weight is shared by odd",
    ),
    "a module outside": (outside, dict(new=1), ValueError, r"shared by a module outside of it \(Odd\)"),
    "a hook": (hooked, dict(new=1), ValueError, "expected weights without hooks, got token"),
    "a parametrization": (
        lambda m: nn.utils.parametrize.register_parametrization(m.token, "weight", nn.Identity()), dict(new=1), ValueError,
        "computed",
    ),
    "a name of nothing": (lambda m: None, dict(new=1, tables=["tokens"]), ValueError, "tables: expected names of the model's"),
    "no table": (lambda m: None, dict(new=1, tables=["head"]), TypeError, "tables: expected nn.Embedding, got Linear head"),
    "several": (lambda m: None, dict(new=1, tables=None), ValueError, "got token, position: name those of tokens"),
    "two heads": (
        lambda m: (m.untie(), setattr(m, "top", nn.Linear(D, V))), dict(new=1), ValueError, "expected one head, got head, top",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_as_it_was(case):
    change, options, error, message = REFUSED[case]
    model = Model()
    model.untie = lambda: setattr(model.head, "weight", nn.Parameter(model.head.weight.detach().clone()))
    change(model)
    before = dict(model.named_parameters(remove_duplicate=False))
    values = {name: p.detach().clone() for name, p in before.items()}
    with pytest.raises(error, match=message):
        growing(model, **options)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is before[name] and torch.equal(after[name], values[name]) for name in before)
    assert after.keys() == before.keys()
    assert (model.token.num_embeddings, model.head.out_features) == (V, V)


def test_unknown_tensors_of_the_vocabulary_are_refused():
    model = nn.Sequential(nn.Embedding(V, D))
    model.register_buffer("counts", torch.zeros(V))
    with pytest.raises(ValueError, match=r"Sequential.counts \(50,\) has as many elements as a table has rows"):
        grow(model, 1)
    grow(model, 1, tables=["0"])
    assert model[0].num_embeddings == 51


def test_fused_models_are_refused(monkeypatch):
    monkeypatch.setattr("pyembed.vocabulary.tables.is_site", lambda module: isinstance(module, nn.Embedding))
    with pytest.raises(ValueError, match="expected one that is not fused, got one whose token is"):
        growing(Model(), 1)


def test_memory_error_leaves_the_model(monkeypatch):
    model = Model(tied=False)
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}

    def fails(old, tensor, size, made=[]):  # noqa: B006
        made.append(old)
        if len(made) == 2:
            raise torch.OutOfMemoryError("no more")
        return real(old, tensor, size)

    from pyembed.vocabulary import growth

    real = growth._like
    monkeypatch.setattr(growth, "_like", fails)
    with pytest.raises(torch.OutOfMemoryError):
        growing(model, 1)
    assert all(p is before[name][0] and torch.equal(p, before[name][1]) for name, p in model.named_parameters())


def test_an_error_while_it_is_put_in_place_is_taken_back(monkeypatch):
    from pyembed.vocabulary import growth

    model = Model(tied=False)
    before = {name: p for name, p in model.named_parameters()}
    buffers = dict(model.head._parameters)

    def fails(*_):
        def set_():
            raise KeyboardInterrupt

        return [set_]

    monkeypatch.setattr(growth, "_sizes", fails)
    with pytest.raises(KeyboardInterrupt):
        growing(model, 1, multiple_of=64)
    assert all(p is before[name] for name, p in model.named_parameters())
    assert model.head._parameters == buffers and not model.head._buffers and model.token.num_embeddings == V


def test_configurations_follow():
    """As of transformers, by which it makes a model that it loads, and counts logits."""
    model = Model(tied=False)
    model.config = types.SimpleNamespace(vocab_size=V, decoder_vocab_size=V, other_vocab_size=7)
    model.get_input_embeddings, model.get_output_embeddings = lambda: model.token, lambda: model.head
    model.token.vocab_size = V
    grow(model, 2, multiple_of=16)
    expected = dict(vocab_size=64, decoder_vocab_size=64, other_vocab_size=7, unpadded_vocab_size=52)
    assert vars(model.config) == expected and model.token.vocab_size == 64
    assert grow(model, 1).ids == range(52, 53) and model.config.unpadded_vocab_size == 53
    grow(model, 11)
    assert model.config.unpadded_vocab_size is None and model.config.vocab_size == 64


# Models of transformers


def tiny(family):
    import transformers

    if family == "tied GPT-2":
        options = dict(n_embd=D - 1, n_layer=1, n_head=2, n_positions=40)
        config = transformers.GPT2Config(vocab_size=61, bos_token_id=0, eos_token_id=0, **options)
        return transformers.GPT2LMHeadModel(config).eval()
    options = dict(hidden_size=D - 1, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    config = transformers.LlamaConfig(vocab_size=61, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False, **options)
    return transformers.LlamaForCausalLM(config).eval()


def several_modules(family):
    """A model of an encoder and a decoder, or with a bias that two modules hold."""
    import transformers

    ids = dict(pad_token_id=0, bos_token_id=0, eos_token_id=1)
    if family == "BERT":
        options = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40)
        return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=99, **options, pad_token_id=0)).eval()
    ids |= dict(decoder_start_token_id=0)
    if family == "T5":
        options = dict(d_model=32, d_kv=16, d_ff=40, num_layers=1, num_heads=2)
        return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=99, **options, **ids)).eval()
    options = dict(d_model=32, max_position_embeddings=20, forced_eos_token_id=1)
    options |= {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 2))}
    if family == "BART":
        return transformers.BartForConditionalGeneration(transformers.BartConfig(vocab_size=99, **options, **ids)).eval()
    return transformers.MarianMTModel(transformers.MarianConfig(vocab_size=99, decoder_vocab_size=99, **options, **ids)).eval()


@pytest.mark.full
@pytest.mark.parametrize("family", ["BERT", "T5", "BART", "Marian"])
def test_models_whose_tables_are_in_several_modules(family, tmp_path):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = several_modules(family)
    batch = {"input_ids": IDS} | ({} if family == "BERT" else {"decoder_input_ids": IDS})
    logits = model(**batch).logits
    growth = grow(model, 3, "sample", multiple_of=16)
    assert set(growth.rows.values()) == {(99, 112)}
    grown = model(**batch).logits
    assert torch.allclose(grown[..., :99], logits, rtol=1e-5, atol=1e-6)
    assert torch.isneginf(grown[..., 102:]).all() and model(**batch, labels=IDS).loss.isfinite()
    model.save_pretrained(tmp_path)
    loaded, notes = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(notes.values())
    grow(loaded.eval())
    assert torch.equal(loaded(**batch).logits, grown)


@pytest.mark.full  # importing transformers takes 3 s
@pytest.mark.parametrize("family", ["tied GPT-2", "untied Llama"])
def test_transformers_models_are_saved_and_loaded(family, tmp_path):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = tiny(family)
    logits = model(IDS).logits
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    logits = model(IDS).logits
    growth = grow(model, 5, "sample", multiple_of=16)
    grow_optimizer(optimizer, growth)
    assert growth.ids == range(61, 66) and set(growth.rows.values()) == {(61, 80)}
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is (family == "tied GPT-2")
    assert (model.config.vocab_size, model.config.unpadded_vocab_size) == (80, 66)
    grown = model(IDS).logits
    assert torch.allclose(grown[..., :61], logits, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded, notes = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(notes.values())
    assert torch.equal(loaded.eval()(IDS).logits[..., :66], grown[..., :66])
    grow(loaded)
    assert torch.equal(loaded(IDS).logits, grown) and torch.isneginf(grown[..., 66:]).all()
    optimizer.zero_grad()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    optimizer.step()
    assert model(IDS, labels=IDS).loss < loss
    assert model.generate(torch.tensor([[65]]), max_new_tokens=2, pad_token_id=0).max() < 66
