"""What a model of transformers can do, it can do with its front end fused."""

import copy
import pickle

import pytest
import torch
from conftest import full
from families import Own, Packed, V, build, logits, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyembed

MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
GENERATE = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 5},
    "beam": {"num_beams": 2},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "left-padded": {"attention_mask": MASK},
}


@pytest.fixture(autouse=True)
def distinct():
    """Everything that can be fused is, at any size."""
    with pyembed.plan("distinct"):
        yield


@pytest.fixture(params=["GPT2", full("Llama"), full("OPT"), full("GPTNeoX")])
def model(request):
    return build(request.param)


def close(a, b, rtol=1e-4):
    return a.shape == b.shape and bool(((a - b).abs() <= rtol * b.abs().max() + 1e-6).all())


def grads(model, ids, **batch):
    model.zero_grad()
    logits(model, ids, **batch).square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("way", ["greedy", "left-padded", *map(full, ("sampled", "beam", "static cache"))])
def test_generate(model, way):
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "attention_mask": torch.ones_like(MASK), **GENERATE[way]}
    found = []
    for fuses in (False, True):
        if fuses:
            fused = pyembed.fuse(model, tokens(), gradients=False)
        torch.manual_seed(0)
        found.append(model.generate(tokens(), **options))
    assert torch.equal(*found) and fused.calls["fused"] >= 1


def test_hidden_states_and_labels(model):
    ids = tokens()
    want = model(ids, labels=ids, output_hidden_states=True)
    fused = pyembed.fuse(model, ids, gradients=False)
    found = model(ids, labels=ids, output_hidden_states=True)
    assert torch.equal(found.hidden_states[0], want.hidden_states[0]) and len(found.hidden_states) == len(want.hidden_states)
    assert all(map(close, found.hidden_states, want.hidden_states)) and close(found.loss, want.loss)
    assert fused.calls["fused"] == 1
    with torch.inference_mode():
        assert close(model(ids).logits, want.logits) and fused.calls["fused"] == 2


def test_saved_and_copied(model, tmp_path):
    """A copy or a pickle is the model that is not fused."""
    ids, kinds = tokens(), [type(m) for m in model.modules()]
    want = logits(model, ids).detach()
    fused = pyembed.fuse(model, ids, gradients=False)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    model.save_pretrained(tmp_path)
    copies.append(type(model).from_pretrained(tmp_path))
    for twin in copies:
        assert [type(m) for m in twin.modules()] == kinds and torch.equal(logits(twin, ids), want)
        with torch.no_grad():
            next(twin.parameters()).add_(1)  # it is a copy
    fused.calls.clear()
    assert close(logits(model, ids), want) and fused.calls["fused"] == 1


def test_copies_of_the_handle():
    """Also one that the model itself holds."""
    model, ids = build("nanoGPT"), tokens()
    model.handle = pyembed.fuse(model, ids, gradients=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.handle.model is twin and "a copy of a fused model is not fused" in str(twin.handle)
        assert torch.equal(logits(twin, ids), logits(build("nanoGPT"), ids))
        twin.handle.undo()
    assert close(logits(model, ids), logits(build("nanoGPT"), ids)) and model.handle.calls == {"fused": 1}


def test_shallow_copies():
    """Of a model, which shares its modules; of a module, which is another one; of tensors between lookups and projections."""
    model, ids = build("nanoGPT"), tokens()
    want = logits(model, ids)
    fused = pyembed.fuse(model, ids, gradients=False)
    assert close(logits(copy.copy(model), ids), want) and fused.calls == {"fused": 1}
    rows = [model.tok(ids), model.tok.weight[ids]]
    hidden = [x + (model.pos if i == 0 else model.pos.weight.__getitem__)(torch.arange(9)) for i, x in enumerate(rows)]
    with torch.no_grad():
        for ours, theirs in (rows, hidden):
            twin = copy.copy(ours)
            assert type(twin) is torch.Tensor and torch.equal(twin, theirs)
            twin.data.mul_(torch.arange(twin.shape[-1]))  # the copy shares the memory
            theirs.data.mul_(torch.arange(twin.shape[-1]))
        assert close(model.blocks[0](hidden[0]), copy.deepcopy(model.blocks[0])(hidden[1]))
    model.tok = copy.copy(model.tok)
    assert close(logits(model, ids), want) and fused.calls == {"fused": 1}


def test_shared_modules():
    """Two models with the same tables: one is fused; the other runs its own modules."""
    models, ids = [build("nanoGPT"), build("nanoGPT")], tokens()
    models[1].tok, models[1].pos = models[0].tok, models[0].pos
    want = [logits(m, ids) for m in models]
    fused = pyembed.fuse(models[0], ids, gradients=False)
    with pytest.raises(ValueError, match="whose tok is: undo that first"):
        pyembed.fuse(models[1], ids)
    for _ in range(3):
        assert all(close(logits(m, ids), expected) for m, expected in zip(models, want, strict=True))
    assert fused.calls == {"fused": 3}


def test_resized_and_tied(model):
    ids = tokens()
    fused = pyembed.fuse(model, ids, gradients=False)
    model.resize_token_embeddings(V + 7)
    model.tie_weights()
    found = logits(model, ids + 7)
    assert fused.calls["fused"] == 1 and found.shape[-1] == V + 7
    fused.undo()
    assert close(found, logits(model, ids + 7))


def test_two_models():
    models, ids = [build("GPT2"), build("nanoGPT")], tokens()
    want = [logits(m, ids) for m in models]
    with pyembed.fuse(models[0], ids, gradients=False) as one, pyembed.fuse(models[1], ids, gradients=False) as two:
        for m, expected in zip(models, want, strict=True):
            assert close(logits(m, ids), expected)
        assert one.calls == two.calls == {"fused": 1}


@pytest.mark.parametrize("reentrant", [False, full(True)])
def test_checkpointing(reentrant):
    """Of a block, within which the model's own modules run, and with the lookups in it, where all is fused."""

    class Model(Own):
        def forward(self, ids):
            def front(ids):
                x = self.tok(ids) + self.pos(torch.arange(ids.shape[1]))
                return self.blocks[0](x) if self.whole else x

            if self.whole:
                x = checkpoint(front, ids, use_reentrant=reentrant) if self.training else front(ids)
            else:
                x = (
                    checkpoint(self.blocks[0], front(ids), use_reentrant=reentrant)
                    if self.training
                    else self.blocks[0](front(ids))
                )
            return self.head(self.norm(self.blocks[1](x)))

    model = Model(nn.LayerNorm, Packed).train()
    for whole in (False, True):
        if whole and reentrant:
            continue  # without inputs that want a gradient PyTorch refuses it
        model.whole = whole
        want = grads(model, tokens())
        with pyembed.fuse(model, tokens(), gradients=False):
            for _ in range(3):
                assert all(map(close, grads(model, tokens()), want))


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast(model, dtype):
    ids = tokens()
    pyembed.fuse(model, ids, gradients=False)
    with pyembed.plan("auto"), torch.autocast("cpu", dtype):
        found = logits(model, ids)
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", dtype):
        assert torch.equal(found, logits(twin, ids))


def test_functional_call_and_transforms(model):
    ids, parameters = tokens(), {n: p.detach() * 1.1 for n, p in model.named_parameters()}
    twin = copy.deepcopy(model)
    pyembed.fuse(model, ids, gradients=False)

    def loss(parameters, of):
        return torch.func.functional_call(of, parameters, (ids,))[0].square().mean()

    assert close(loss(parameters, model), loss(parameters, twin))
    ours, theirs = (torch.func.grad(loss)(parameters, each) for each in (model, twin))
    assert all(close(ours[n], theirs[n]) for n in theirs)


def test_export(model):
    ids, want = tokens(), logits(model, tokens(), use_cache=False)
    fused = pyembed.fuse(model, ids, gradients=False)
    exported = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
    assert close(exported.module()(ids, use_cache=False)[0], want) and not fused.calls["fused"]


@pytest.mark.parametrize("wraps", [False, True])
def test_a_compiled_block(wraps):
    """Its own modules run, and so do the lookups before it."""
    model = Own(nn.LayerNorm, Packed).eval()
    want = logits(model, tokens())
    fused = pyembed.fuse(model, tokens(), gradients=False)
    torch._dynamo.reset()
    if wraps:
        model.blocks[0] = torch.compile(model.blocks[0], fullgraph=True, backend="aot_eager")
    else:
        model.blocks[0].compile(fullgraph=True, backend="aot_eager")
    assert close(logits(model, tokens()), want) and "blocks.0 is compiled" in str(fused)


@pytest.mark.full
@pytest.mark.parametrize("first", [True, False])
def test_peft(model, first):
    from peft import LoraConfig, get_peft_model

    ids, twin = tokens(), copy.deepcopy(model)
    results = []
    for each, fuses in ((model, True), (twin, False)):
        torch.manual_seed(0)
        if fuses and first:
            fused = pyembed.fuse(each, ids, gradients=False)
        adapted = get_peft_model(each, LoraConfig(r=2, init_lora_weights=False)).eval()
        if fuses and not first:
            fused = pyembed.fuse(adapted, ids)
        results.append((logits(adapted, ids), *grads(adapted, ids)))
    assert all(map(close, *results)) and fused.calls["fused"] > 0, (fused, fused.calls)


@pytest.mark.full
def test_trainer(model, tmp_path):
    """Also with NEFTune, whose hook on the embedding is obeyed."""
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": x, "labels": x} for x in tokens(8, 9)]
    for noise in (None, 5.0):
        losses, start = [], copy.deepcopy(model.state_dict())
        for fuses in (False, True):
            model.load_state_dict(start)
            fused = pyembed.fuse(model, tokens(), gradients=False) if fuses else None
            arguments = {"max_steps": 3, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "logging_steps": 1}
            arguments |= {"neftune_noise_alpha": noise, "save_strategy": "no", "disable_tqdm": True}
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            trainer = Trainer(model, TrainingArguments(str(tmp_path), **arguments), train_dataset=data)
            trainer.train()
            losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
            if fused is not None:
                assert noise or fused.calls["fused"] == 3, fused.calls
                fused.undo()
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_soft_prompts(model):
    """Rows that are looked up alone, for inputs_embeds."""
    ids, twin = tokens(), copy.deepcopy(model)
    pyembed.fuse(model, ids, gradients=False)
    found = []
    for each in (model, twin):
        rows = each.get_input_embeddings()(ids)
        out = each(inputs_embeds=torch.cat([torch.ones(2, 3, rows.shape[-1]), rows], 1)).logits
        found.append((out, *torch.autograd.grad(out.square().sum(), each.get_input_embeddings().weight)))
    assert all(map(close, *found))
