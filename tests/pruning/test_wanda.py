"""Wanda: |θ| ‖x‖ of every row, against the inputs that hooks see; rows that lose the same share."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import lossprune
from lossprune.pruning import PruningError, prune_by_stage

CLASSES = 3


class Attends(nn.Module):
    """Attention of tokens to others, whose packed projection gets three inputs."""

    def __init__(self):
        super().__init__()
        self.own = nn.MultiheadAttention(8, 2, batch_first=True)
        self.other = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        h, _ = self.own(x, x, x)
        h, _ = self.other(h, x[:, :2], 2 * x[:, :2])
        return self.head(h.mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(self.mix(self.mix(x).tanh()))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 4, 2, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * 36, CLASSES),
    )


NETWORKS = {
    "perceptron": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (6,)),
    "convolutions": (convolutions, (4, 6, 6)),
    "attention": (Attends, (5, 8)),
    "recurrent": (Recurrent, (3, 4)),
    "used twice": (Twice, (6,)),
}


def build(kind):
    torch.manual_seed(0)
    make, shape = NETWORKS[kind]
    return make().double(), torch.randn(20, *shape, dtype=torch.float64)


@torch.no_grad()
def seen_by(model, x):
    """What each layer is given in each of its calls, by hooks."""
    seen = {}
    for name, layer in model.named_modules():
        calls = seen.setdefault(name, [])
        layer.register_forward_hook(lambda m, args, out, calls=calls: calls.append(args))
    model(x)
    return seen


def squares(x):
    return x.reshape(-1, x.shape[-1]).square().sum(0)


def norms(kind, model, x):
    """‖x‖ by definition, for each weight, in its shape."""
    weights = {n: p for n, p in model.named_parameters() if "weight" in n}
    if kind == "recurrent":
        steps = [torch.zeros(20, 6).double()]
        for token in range(2):
            steps.append(model.lstm(x[:, : token + 1])[0][:, -1].detach())
        found = {"lstm.weight_ih_l0": squares(x), "lstm.weight_hh_l0": sum(map(squares, steps))}
        found["head.weight"] = squares(model.lstm(x)[0][:, -1].detach())
        return {n: s.sqrt().expand_as(weights[n]) for n, s in found.items()}
    seen = seen_by(model, x)
    found = {}
    for name, weight in weights.items():
        calls = seen[name.rpartition(".")[0]] if "proj" not in name else None
        if name.endswith("in_proj_weight"):
            q, k, v = seen[name.split(".")[0]][0]
            found[name] = torch.cat([squares(part).expand(8, 8) for part in (q, k, v)])
        elif name.endswith("out_proj.weight"):
            # With an identity for the output, attention gives what the projection is given.
            layer, (q, k, v) = getattr(model, name.split(".")[0]), seen[name.split(".")[0]][0]
            heads, _ = F.multi_head_attention_forward(
                q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), 8, 2,
                layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0,
                torch.eye(8).double(), None,
            )  # fmt: skip
            found[name] = squares(heads.detach())
        elif weight.ndim == 2:
            found[name] = sum(squares(args[0]) for args in calls)
        elif name == "0.weight":
            patches = F.unfold(calls[0][0], 3, padding=1, stride=2)
            each = patches.square().sum((0, 2)).view(2, 1, 2, 3, 3)
            found[name] = each.expand(2, 3, 2, 3, 3).reshape(weight.shape)
        else:
            found[name] = calls[0][0].square().sum((0, 2, 3))[:, None, None, None]
    return {n: s.sqrt().expand_as(weights[n]) for n, s in found.items()}


def kept_rows(rows, count):
    kept = torch.ones_like(rows, dtype=torch.bool)
    return kept.scatter_(1, rows.argsort(1)[:, :count], False)


@pytest.mark.parametrize("kind", NETWORKS)
def test_each_row_loses_its_smallest(kind):
    model, x = build(kind)
    wanted = norms(kind, model, x)
    data = [(part, torch.arange(len(part)) % CLASSES) for part in x.split(7)]
    mask = lossprune.prune(model, "Wanda", sparsity=0.5, data=data).mask
    assert mask.keys() == wanted.keys()
    for name, norm in wanted.items():
        score = model.get_parameter(name).detach().abs() * norm
        turned = score.transpose(0, 1) if kind == "convolutions" and name == "2.weight" else score
        kept = mask[name].transpose(0, 1) if turned is not score else mask[name]
        rows = turned.flatten(1)
        assert torch.equal(kept.flatten(1), kept_rows(rows, rows.shape[1] // 2)), name


def gpt2(dtype=torch.float64):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=30, n_positions=12, n_embd=8, n_layer=2, n_head=2, tie_word_embeddings=False
    )
    return GPT2LMHeadModel(config).to(dtype).eval()


TOKENS = torch.arange(60).view(5, 12) * 7 % 30
BATCHES = [{"input_ids": TOKENS, "labels": TOKENS}]


def test_rows_of_a_transposed_weight_are_its_columns():
    model = gpt2()
    seen = seen_by(model, TOKENS)
    settings = {"data": BATCHES, "loss": "next_token", "exclude": "lm_head"}
    mask = lossprune.prune(model, "Wanda", sparsity=0.75, **settings).mask
    assert len(mask) == 8
    for name, kept in mask.items():
        x = seen[name.removesuffix(".weight")][0][0]
        score = model.get_parameter(name).detach().abs() * squares(x).sqrt()[:, None]
        assert torch.equal(kept.T, kept_rows(score.T, score.shape[0] * 3 // 4)), name


def test_a_group_of_four_keeps_its_largest_two_whatever_the_row():
    model = gpt2()
    settings = {"data": BATCHES, "loss": "next_token", "exclude": "lm_head"}
    mask = lossprune.prune(model, "Wanda", pattern="2:4", **settings).mask
    for kept in mask.values():
        assert (kept.T.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    x = model.transformer.h[0].ln_1(model.transformer.wte(TOKENS) + model.transformer.wpe.weight)
    score = model.transformer.h[0].attn.c_attn.weight * squares(x).sqrt()[:, None]
    groups = score.detach().abs().T.unflatten(1, (-1, 4))
    expected = kept_rows(groups.flatten(0, 1), 2).view(groups.shape).flatten(1).T
    assert torch.equal(mask["transformer.h.0.attn.c_attn.weight"], expected)


def test_a_tied_embedding_is_named_and_can_be_left_out():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30, n_positions=12, n_embd=8, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config)
    with pytest.raises(
        PruningError, match=r"inputs of 'transformer.wte.weight' are not known.*exc"
    ):
        lossprune.prune(model, "Wanda", sparsity=0.5, data=BATCHES, loss="next_token")
    settings = {"data": BATCHES, "loss": "next_token", "exclude": "transformer.wte.weight"}
    assert lossprune.prune(model, "Wanda", sparsity=0.5, **settings).mask.sparsity == 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_squares_of_sixteen_bits_are_summed_in_more(dtype):
    layer = nn.Linear(4, 2, bias=False).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2))
    # Their squares are beyond float16, and their sum of so many loses digits in bfloat16.
    x = torch.tensor([600.0, 310.0, 200.0, 149.0]).repeat(500, 1).to(dtype)
    mask = lossprune.prune(layer, "Wanda", sparsity=0.5, data=[(x, torch.arange(500) % 2)]).mask
    assert mask["weight"].tolist() == [[False, True, True, False]] * 2


@pytest.mark.parametrize("criterion", ["Wanda", "LM"])
def test_rows_lose_alike_in_every_stage_and_the_total_is_exact(criterion):
    model, x = build("convolutions")
    settings = {"data": [(x, torch.arange(20) % CLASSES)], "scope": "row", "stages": 7}
    total = sum(p.numel() for n, p in model.named_parameters() if "weight" in n)
    before = lossprune.Mask.dense(model)
    for mask, record in prune_by_stage(model, criterion, sparsity=0.83, **settings):
        target = lossprune.sparsities("exponential", 0.83, 7)[record.stage - 1]
        assert mask.removed == round(target * total)
        for name, kept in mask.items():
            assert not (kept & ~before[name]).any()
            rows = kept.transpose(0, 1) if name == "2.weight" else kept
            lost = (~rows).flatten(1).sum(1)
            assert lost.max() - lost.min() <= 1
            share = lost.sum() / kept.numel()
            assert abs(float(share) - target) <= 2 / kept.numel()
        before = mask


def test_rows_of_which_a_mask_has_taken_more_wait_for_the_others():
    model = nn.Linear(10, 3, bias=False)
    kept = torch.ones(3, 10, dtype=torch.bool)
    kept[0, :8] = False
    start = lossprune.Mask({"weight": kept})
    mask = lossprune.prune(model, "MP", sparsity=0.5, scope="row", start=start).mask
    assert (~mask["weight"]).sum(1).tolist() in ([8, 4, 3], [8, 3, 4])
    assert mask.removed == 15
