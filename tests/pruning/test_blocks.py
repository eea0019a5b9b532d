"""Block by block, as by hand: each block on what the pruned ones before it give."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lossprune
from lossprune.pruning import PruningError
from lossprune.pruning.reconstruction import reconstruct

TOKENS = torch.arange(96).view(8, 12) * 7 % 30
TEXTS = [{"input_ids": part, "labels": part} for part in TOKENS.split(3)]


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30, n_positions=12, n_embd=8, n_layer=3, n_head=2)
    return GPT2LMHeadModel(config).double().eval()


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=12,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


class Encoder(nn.Module):
    """Tokens, torch's own encoder, a head."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.embed = nn.Embedding(30, 8)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)

    def forward(self, tokens):
        return self.head(self.encoder(self.embed(tokens)).mean(1))


def encoder():
    torch.manual_seed(0)
    return Encoder().double().eval()


PAIRS = [(part, torch.zeros(len(part))) for part in TOKENS.split(5)]
NETWORKS = {
    "gpt2": (gpt2, "transformer.h", TEXTS),
    "llama": (llama, "model.layers", TEXTS),
    "encoder": (encoder, "encoder.layers", PAIRS),
}


def weights_of(block):
    return {
        name: p for name, p in block.named_parameters()
        if p.ndim == 2 and name.endswith("weight")
    }  # fmt: skip


def inputs_of(model, block, run):
    """What each linear layer of a block is given in a whole forward pass, as rows, by hooks."""
    seen, handles = {}, []
    for name, layer in block.named_modules():
        if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D":
            handles.append(
                layer.register_forward_pre_hook(
                    lambda m, args, name=name: seen.setdefault(name, []).append(args[0])
                )
            )
    with torch.no_grad():
        run(model)
    for handle in handles:
        handle.remove()
    return {name: torch.cat([x.flatten(0, -2) for x in parts]) for name, parts in seen.items()}


def by_hand(model, blocks, run, prune_one):
    """Prune one block after the other, in the network itself, by whole forward passes."""
    model, kept = copy.deepcopy(model), {}
    for index, block in enumerate(model.get_submodule(blocks)):
        seen = inputs_of(model, block, run)
        for name, weight in weights_of(block).items():
            turned = type(block.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"
            w = weight.detach().T if turned else weight.detach()
            value, mask = prune_one(w.clone(), seen[name.rpartition(".")[0]])
            with torch.no_grad():
                weight.copy_(value.T if turned else value)
            kept[f"{blocks}.{index}.{name}"] = mask.T if turned else mask
    return model, kept


def wanda(weight, x):
    score = weight.abs() * x.norm(dim=0)
    kept = torch.ones_like(weight, dtype=torch.bool)
    kept.scatter_(1, score.argsort(1)[:, : weight.shape[1] // 2], False)
    return weight * kept, kept


def sweep(weight, x):
    return reconstruct(weight, x.T @ x, count=weight.numel() // 2)


def wanda_and_moved(weight, x):
    return reconstruct(weight, x.T @ x, kept=wanda(weight, x)[1])


@pytest.mark.parametrize(
    ("criterion", "compensate", "one"),
    [("Wanda", False, wanda), ("SparseGPT", False, sweep), ("Wanda", True, wanda_and_moved)],
)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_as_by_hand(kind, criterion, compensate, one):
    build, blocks, data = NETWORKS[kind]
    model = build()
    before = copy.deepcopy(model.state_dict())
    result = lossprune.prune_by_block(
        model, criterion, sparsity=0.5, data=data, compensate=compensate
    )
    run = lambda m: [m(batch["input_ids"]) for batch in data]  # noqa: E731
    expected, kept = by_hand(model, blocks, run, one)
    assert result.mask.keys() == kept.keys()
    for name, mask in kept.items():
        assert torch.equal(result.mask[name], mask), name
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert model.config.use_cache
    pruned = result.apply_(copy.deepcopy(model))
    torch.testing.assert_close(pruned(TOKENS).logits, expected(TOKENS).logits)
    assert bool(result.weights) == (criterion == "SparseGPT" or compensate)


def outputs(model):
    with torch.no_grad():
        return model(TOKENS)


def test_the_network_changes_less_where_weights_move():
    build, _, data = NETWORKS["encoder"]
    model = build()
    off = {}
    masks, moves = [("MP", False), ("Wanda", False)], [("MP", True), ("SparseGPT", False)]
    for criterion, compensate in masks + moves:
        settings = {"sparsity": 0.5, "data": data, "compensate": compensate}
        result = lossprune.prune_by_block(model, criterion, **settings)
        assert result.mask.sparsity == 0.5
        assert set(result.skipped) >= {"embed.weight", "head.weight"}
        pruned = result.apply_(copy.deepcopy(model))
        off[criterion, compensate] = float((outputs(pruned) - outputs(model)).norm())
    assert max(off[way] for way in moves) < min(off[way] for way in masks)


@pytest.mark.parametrize("criterion", ["MP", "Wanda", "SparseGPT"])
def test_two_of_four(criterion):
    mask = lossprune.prune_by_block(llama(), criterion, pattern="2:4", data=TEXTS).mask
    for kept in mask.values():
        assert (kept.unflatten(1, (-1, 4)).sum(-1) == 2).all()


@pytest.mark.parametrize(
    ("criterion", "sparsity"), [("MP", 0.37), ("Wanda", 0.61), ("SparseGPT", 0.7)]
)
def test_the_total_is_exact(criterion, sparsity):
    mask = lossprune.prune_by_block(gpt2(), criterion, sparsity=sparsity, data=TEXTS).mask
    assert mask.removed == round(sparsity * mask.total)
    for layer in mask.layers():
        assert abs(layer.removed - sparsity * layer.total) < 1


def test_sixteen_bits_stay_sixteen_bits():
    model = llama().to(torch.bfloat16)
    result = lossprune.prune_by_block(model, "SparseGPT", sparsity=0.5, data=TEXTS)
    result.apply_(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.bfloat16
    assert weight.isfinite().all()
    assert int((weight == 0).sum()) >= weight.numel() // 2


def test_magnitudes_need_no_data():
    mask = lossprune.prune_by_block(gpt2(), "MP", sparsity=0.5).mask
    same = lossprune.prune(
        gpt2(), "MP", sparsity=0.5, parameters="transformer.h", scope="layer"
    ).mask
    assert mask == same


class Apart(nn.Module):
    """Modules side by side, of which none is given what another gave."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(nn.Linear(4, 3)) for _ in range(3))

    def forward(self, x):
        return sum(part(x) for part in self.parts)


X = [(torch.randn(5, 4), torch.arange(5) % 3)]


@pytest.mark.parametrize(
    ("model", "settings", "error", "message"),
    [
        (nn.Linear(4, 3), {}, ValueError, "Linear has no list of modules of one type: blocks="),
        (gpt2(), {"blocks": "h"}, ValueError, "blocks='h' names no module of GPT2LMHeadModel"),
        (gpt2(), {"criterion": "QM"}, ValueError, "looks at the whole network.*SparseGPT, MP"),
        (gpt2(), {"criterion": "Wnda"}, ValueError, "unknown criterion 'Wnda' .did you mean"),
        (gpt2(), {"scope": "global"}, ValueError, "scope 'global' looks at weights of all blocks"),
        (gpt2(), {"sparsity": 1.5}, ValueError, r"sparsity must be a number in \[0, 1\), got 1.5"),
        (gpt2(), {"data": None}, ValueError, "criterion 'Wanda' needs data"),
        (gpt2(), {"damping": -1}, ValueError, "damping must be a number of at least 0, got -1"),
        (gpt2(), {"exclude": "transformer.h"}, ValueError, "none of the weights to prune is in a"),
        (Apart(), {"data": X}, PruningError, r"gives \(5, 3\) where it was given \(5, 4\)"),
    ],
)  # fmt: skip
def test_what_does_not_do_is_told(model, settings, error, message):
    given = {"criterion": "Wanda", "sparsity": 0.5, "data": TEXTS, **settings}
    with pytest.raises(error, match=message):
        lossprune.prune_by_block(model, given.pop("criterion"), **given)
