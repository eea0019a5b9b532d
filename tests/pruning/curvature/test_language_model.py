"""A small GPT-2 of transformers from batches as its tokenizers and collators make them."""

import copy

import pytest
import torch
from torch.nn import functional as F

import lossprune

transformers = pytest.importorskip("transformers")

N, TOKENS, VOCABULARY = 5, 4, 7
TIED = "transformer.wte.weight"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=6, n_embd=8, n_layer=1, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # as initialised, all tokens are nearly as likely
    return model


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (N, TOKENS), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, 2:] = 0
    mask[3, 3:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def each(batch):
    return [
        (
            (),
            {key: batch[key][n : n + 1] for key in ("input_ids", "attention_mask")},
            batch["labels"][n],
        )
        for n in range(N)
    ]


def next_token(logits, labels):
    return F.cross_entropy(logits[:-1], labels[1:], reduction="sum")


@pytest.mark.parametrize("estimator", ["exact", "tolerance:0"])
@pytest.mark.parametrize("memory", [1, None])
def test_statistics(model, batch, estimator, memory, matches):
    if estimator != "exact" and memory:
        pytest.skip("the memory of one is enough")
    statistics = lossprune.measure(
        model, [batch], loss="next_token", exclude=TIED, estimator=estimator, memory=memory
    )
    assert len(statistics.ggn_diagonal) == 4
    count = int((batch["labels"][:, 1:] != -100).sum())
    matches(statistics, model, each(batch), next_token, count)
    assert statistics.loss == pytest.approx(float(model(**batch).loss.detach()), rel=1e-6)


def test_gradient_checkpointing_as_transformers_switches_it_on(model, batch):
    settings = {"loss": "next_token", "exclude": TIED}
    expected = lossprune.measure(model, [batch], **settings)
    network = copy.deepcopy(model).train()
    network.gradient_checkpointing_enable()
    found = lossprune.measure(network, [batch], **settings)
    assert found.loss == expected.loss
    for name, tensor in expected.ggn_diagonal.items():
        assert torch.equal(found.ggn_diagonal[name], tensor)


def test_monte_carlo_comes_near(model, batch):
    settings = {"loss": "next_token", "exclude": TIED, "gradient": False}
    exact = lossprune.measure(model, [batch], **settings).ggn_diagonal
    drawn = lossprune.measure(
        model, [batch], **settings, estimator="monte-carlo:600",
        generator=torch.Generator().manual_seed(0),
    ).ggn_diagonal  # fmt: skip
    for name, h in exact.items():
        assert float((drawn[name] - h).abs().max()) < 0.2 * float(h.max()), name


def test_a_head_that_is_the_embedding(model, batch, matches):
    statistics = lossprune.measure(model, [batch], loss="next_token")
    assert TIED in statistics.ggn_diagonal
    count = int((batch["labels"][:, 1:] != -100).sum())
    matches(statistics, model, each(batch), next_token, count)


@pytest.mark.parametrize("criterion", lossprune.CRITERIA)
def test_every_criterion_end_to_end(model, batch, criterion):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = lossprune.prune(
        model, criterion, sparsity=0.6, data=[batch], examples=4, stages=2, loss="next_token",
        exclude=TIED,
    )  # fmt: skip
    assert result.mask.sparsity == pytest.approx(0.6, abs=1e-3)
    assert TIED not in result.mask
    first = {key: value[:4] for key, value in batch.items()}
    expected = float(model(**first).loss.detach())
    assert result.stages[0].loss_before == pytest.approx(expected, rel=1e-6)
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_classification_from_a_dict(batch, matches):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=6, max_position_embeddings=8, num_labels=3,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).double().eval()
    data = {**batch, "labels": torch.arange(N) % 3}
    statistics = lossprune.measure(model, [data])
    matches(statistics, model, each(data), F.cross_entropy, N, tolerance=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_sixteen_bits_are_summed_in_float32(dtype):
    """Of so many chunks, sums of as few bits would stand still long before the last."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    model.to(dtype)
    x, y = torch.randn(1, 2, 3).to(dtype), torch.tensor([[0, 2]])
    few, many = (
        lossprune.measure(
            model, [(x.expand(n, -1, -1), y.expand(n, -1))], loss="token_cross_entropy", memory=1
        )
        for n in (2, 300)
    )
    assert many.loss == pytest.approx(few.loss, rel=1e-6)
    for found in ("gradient", "ggn_diagonal"):
        for name, total in getattr(many, found).items():
            assert total.dtype == torch.float32
            # 300 sums of one number, each to 2⁻²⁴; of 8 bits the sum would stop at 256 of them.
            torch.testing.assert_close(total, getattr(few, found)[name], rtol=3e-5, atol=1e-9)
