"""A tiny GPT-2 loses little when pruned, and fine-tuning wins it back."""

import copy
import importlib.util

import pytest
import torch

import lossprune

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own
MORE = pytest.mark.full("50 % of a GPT-2, and it by LM")
UNIFORM = 4.28  # the loss of a guess among 72 characters: ln 72


@pytest.fixture(scope="module")
def example(root):
    path = root / "examples" / "transformers_trainer.py"
    spec = importlib.util.spec_from_file_location("transformers_trainer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def texts(example):
    training, held_out, vocabulary = example.characters()
    assert vocabulary == 72
    return [torch.stack([row["input_ids"] for row in part]) for part in (training, held_out)]


def train(model, ids, steps, lr, mask=None):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    if mask is not None:
        mask.enforce(model, optimizer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(ids), (32,), generator=generator)
        optimizer.zero_grad()
        model(input_ids=ids[rows], labels=ids[rows]).loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def loss(model, ids) -> float:
    return model(input_ids=ids, labels=ids).loss.item()


@pytest.fixture(scope="module")
def dense(example, texts):
    torch.manual_seed(0)
    return train(example.tiny_gpt2(72, width=32, layers=1), texts[0], steps=150, lr=5e-3)


@pytest.mark.parametrize("sparsity", [pytest.param(0.5, marks=MORE), 0.8])
@pytest.mark.parametrize("criterion", ["MP", "LM", "QM"])
def test_pruned_and_fine_tuned_on_held_out_text(dense, texts, criterion, sparsity):
    training, held_out = texts
    before = loss(dense, held_out)
    assert before < 2.6
    batches = [{"input_ids": rows, "labels": rows} for rows in training[:64].split(16)]
    mask = lossprune.prune(
        dense,
        criterion,
        sparsity=sparsity,
        data=batches,
        stages=3,
        loss="next_token",
        estimator="monte-carlo",
        seed=0,
    ).mask
    assert mask.removed == round(sparsity * mask.total)

    model = mask.apply_(copy.deepcopy(dense))
    pruned = loss(model, held_out)
    train(model, training, steps=20, lr=2e-3, mask=mask)
    tuned = loss(model, held_out)

    assert before < pruned < UNIFORM
    assert tuned < pruned
    weights = dict(model.named_parameters())
    assert sum(int((weights[name] == 0).sum()) for name in mask) == mask.removed


@pytest.mark.parametrize("criterion", [pytest.param("LM", marks=MORE), "QM"])
def test_modelling_the_loss_beats_magnitude_at_80_percent(dense, texts, criterion):
    training, held_out = texts
    batches = [{"input_ids": rows, "labels": rows} for rows in training[:64].split(16)]
    losses = {}
    for name in ("MP", criterion):
        mask = lossprune.prune(
            dense,
            name,
            sparsity=0.8,
            data=batches,
            stages=14,
            loss="next_token",
            estimator="monte-carlo",
            seed=0,
        ).mask
        losses[name] = loss(mask.apply_(copy.deepcopy(dense)), held_out)
    assert losses[criterion] < losses["MP"]
