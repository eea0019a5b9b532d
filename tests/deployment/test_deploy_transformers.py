"""Networks of the transformers library, at small sizes with random weights, deployed."""

import copy

import pytest
import torch

import lossprune
from lossprune.kernels.compiler import compiler_available

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not compiler_available(), reason="no C compiler here")

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
IMAGE = {"image_size": 32, "patch_size": 8, **SMALL}
IDS = torch.arange(21).reshape(3, 7) % 20
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NETWORKS = {
    "ViT": ("ViTForImageClassification", "ViTConfig", {**IMAGE, "num_labels": 3}, IMAGES),
    "CLIP": ("CLIPVisionModel", "CLIPVisionConfig", IMAGE, {"pixel_values": IMAGES}),
    "GPT-2": (
        "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": 20, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 8}, IDS,
    ),
    "BERT": (
        "BertModel", "BertConfig", {"vocab_size": 20, **SMALL},
        {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)},
    ),
    "Llama": (
        "LlamaForCausalLM", "LlamaConfig", {"vocab_size": 20, **SMALL},
        {"input_ids": IDS, "use_cache": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_deployed(name):
    torch.manual_seed(0)
    build, config, options, example = NETWORKS[name]
    network = getattr(transformers, build)(getattr(transformers, config)(**options)).eval()
    mask = lossprune.prune(network, "MP", sparsity=0.9).mask
    masked = mask.apply_(copy.deepcopy(network))
    deployed = lossprune.deploy(network, mask, example, seconds=0.01)
    assert not any("left out" in note for note in deployed.notes)
    with torch.no_grad():
        found, expected = (
            it(**example) if isinstance(example, dict) else it(example) for it in (deployed, masked)
        )
    assert type(found) is type(expected)
    assert found.keys() == expected.keys()
    tensors = [name for name, value in expected.items() if isinstance(value, torch.Tensor)]
    assert tensors
    for name in tensors:
        assert torch.allclose(found[name], expected[name], rtol=0, atol=1e-5)


def test_generating_text_runs_the_deployed_network():
    torch.manual_seed(0)
    build, config, options, _ = NETWORKS["Llama"]
    network = getattr(transformers, build)(getattr(transformers, config)(**options)).eval()
    mask = lossprune.prune(network, "MP", sparsity=0.9).mask
    fast = lossprune.deploy(network, mask, IDS, seconds=0.01)
    calls = []
    fast.network.register_forward_pre_hook(lambda *_: calls.append(1))
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    expected = mask.apply_(network).generate(IDS, **options)
    assert torch.equal(fast.generate(IDS, **options), expected)
    assert len(calls) == 3
    assert (fast.config.vocab_size, fast.device, fast.dtype) == (20, IDS.device, torch.float32)
