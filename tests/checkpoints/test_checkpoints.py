"""Folders of save_pretrained, pruned block by block: as the network in memory is, to the bit."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lossprune

TOKENS = torch.arange(96).view(8, 12) * 7 % 30
TEXTS = [{"input_ids": part, "labels": part} for part in TOKENS.split(3)]


def gpt2():
    """Its head is its embedding."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30, n_positions=12, n_embd=8, n_layer=3, n_head=2)
    return GPT2LMHeadModel(config).eval()


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=12,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize("criterion", ["MP", "Wanda", "SparseGPT"])
def test_what_is_written_is_what_a_pruning_in_memory_gives(build, criterion, tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "dense", max_shard_size="4KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 2
    (tmp_path / "dense" / "tokens.txt").write_text("a b c")
    settings = {"sparsity": 0.6, "data": TEXTS}
    model = type(model).from_pretrained(tmp_path / "dense")
    found = lossprune.prune_checkpoint(
        tmp_path / "dense", tmp_path / "pruned", criterion, **settings
    )
    expected = lossprune.prune_by_block(model, criterion, **settings)
    pruned, said = type(model).from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not any(said.values())
    wanted = expected.apply_(copy.deepcopy(model)).state_dict()
    assert pruned.state_dict().keys() == wanted.keys()
    for name, value in pruned.state_dict().items():
        assert value.dtype == wanted[name].dtype
        assert torch.equal(value, wanted[name]), name
    masks = {}
    for path in (tmp_path / "pruned").glob("mask-*.safetensors"):
        masks |= lossprune.Mask.load(path)
    assert lossprune.Mask(masks) == expected.mask
    assert found.removed == expected.mask.removed == round(0.6 * found.total)
    record = json.loads((tmp_path / "pruned" / "record.json").read_text())
    assert (record["removed"], record["prunable"]) == (found.removed, found.total)
    assert "lm_head.weight" in record["skipped"] or build is gpt2
    assert (tmp_path / "pruned" / "tokens.txt").read_text() == "a b c"
    if criterion == "MP":
        assert pruned.generate(TOKENS[:1, :4], max_new_tokens=2).shape == (1, 6)


def test_blocks_lie_in_files_of_their_own(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    lossprune.prune_checkpoint(tmp_path / "dense", tmp_path / "pruned", "MP", pattern="2:4")
    for part in (2, 3, 4):
        with safe_open(tmp_path / "pruned" / f"model-{part:05}-of-00004.safetensors", "pt") as file:
            assert {name.split(".")[2] for name in file.keys()} == {str(part - 2)}  # noqa: SIM118
            kept = file.get_tensor(f"model.layers.{part - 2}.mlp.up_proj.weight") != 0
            assert (kept.unflatten(1, (-1, 4)).sum(-1) == 2).all()


@pytest.fixture
def dense(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def refused(message, source, folder, **settings):
    with pytest.raises(ValueError, match=message):
        lossprune.prune_checkpoint(source, folder, "MP", **{"sparsity": 0.5, **settings})


def test_folders_that_will_not_do(dense, tmp_path):
    refused("has no config.json", tmp_path, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    refused("holds something: give a new or empty folder", dense, tmp_path / "full")
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "architectures": ["Mine"]}))
    refused("is of Mine, which transformers .* does not have", dense, tmp_path / "out")
    (dense / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    refused(r"lacks 'model.layers.3.*of LlamaForCausalLM", dense, tmp_path / "out")
    (dense / "model.safetensors").write_bytes(b"\x80\x04pickled")
    refused("model.safetensors is not readable", dense, tmp_path / "out")
    (dense / "model.safetensors").unlink()
    refused("has no model.safetensors: only safetensors are read", dense, tmp_path / "out")
    index = {"weight_map": {"a": "../model.safetensors"}}
    (dense / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("has no weight_map of files beside it", dense, tmp_path / "out")
    assert not (tmp_path / "out").exists()
