"""``lossprune prune FOLDER``: as the call, from the shell."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import lossprune

TEXTS = """
import torch

def batches():
    tokens = torch.arange(96).view(8, 12) * 7 % 30
    return [{"input_ids": part, "labels": part} for part in tokens.split(3)]
"""


@pytest.fixture
def dense(command, tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30, n_positions=12, n_embd=8, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "dense")
    (tmp_path / "folders_texts.py").write_text(TEXTS)
    return "dense"


def test_what_is_written_is_what_the_call_gives(command, dense, tmp_path):
    flags = "--criterion SparseGPT --sparsity .5 --data folders_texts:batches --exclude *attn*"
    answer = command("prune", dense, *flags.split(), "--device", "cpu", "--out", "pruned")
    assert answer.status == 0, answer.err
    assert "all" in answer.out
    assert "512" in answer.out
    pruned = GPT2LMHeadModel.from_pretrained(tmp_path / "pruned")
    tokens = torch.arange(96).view(8, 12) * 7 % 30
    data = [{"input_ids": part, "labels": part} for part in tokens.split(3)]
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "dense")
    result = lossprune.prune_by_block(model, "SparseGPT", sparsity=0.5, data=data, exclude="*attn*")
    result.apply_(model)
    for name, value in model.state_dict().items():
        assert torch.equal(pruned.state_dict()[name], value), name
    record = json.loads((tmp_path / "pruned" / "record.json").read_text())
    assert record["removed"] == result.mask.removed == 512


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--sparsity .5", "criterion 'QM' looks at the whole network"),
        ("--sparsity .5 --criterion Wanda", "criterion 'Wanda' needs data"),
        ("--sparsity .5 --criterion MP --stages 3", "--stages is not for a folder, whose network"),
        ("--sparsity .5 --criterion MP --out dense", "holds something: give a new or empty"),
    ],
)
def test_what_does_not_do_is_told(command, dense, flags, said):
    answer = command("prune", dense, *flags.split())
    assert answer.status == 2
    assert said in answer.err


def test_sparsegpt_is_for_folders(command, tmp_path):
    answer = command("prune", "mine:build", "--criterion", "SparseGPT", "--sparsity", ".5")
    assert answer.status == 2
    assert "--criterion SparseGPT goes block by block: give a folder" in answer.err
