"""The published networks: counts, structure, initial values and the sizes they take."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from lossprune.networks import NETWORKS

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT.parent / "shared" / "checkpoints" / "vgg11-cifar10jpeg.safetensors"

# Parameters, and those of them that are weights of convolutions and linear layers.
PUBLISHED = {
    "MLP": (266_610, 266_200),
    "VGG11": (9_750_922, 9_747_136),
    "VGG19": (20_554_826, 20_548_288),
    "VGG11BN": (9_754_718, 9_747_136),
    "VGG19BN": (20_561_374, 20_548_288),
    "PreActResNet18": (11_172_180, 11_164_352),
    "PreActResNet34": (21_280_340, 21_265_088),
    "PreActResNet50": (23_513_172, 23_467_712),
    "PreActResNet101": (42_505_300, 42_407_616),
    # With 1000 classes, as torchvision's documentation lists them; prunable ones are all but two
    # for each channel of a batch norm and the classifier's biases.
    "ResNet18": (11_689_512, 11_689_512 - 2 * 4_800 - 1000),
    "ResNet34": (21_797_672, 21_797_672 - 2 * 8_512 - 1000),
    "ResNet50": (25_557_032, 25_557_032 - 2 * 26_560 - 1000),
    "ResNet101": (44_549_160, 44_549_160 - 2 * 52_672 - 1000),
    "ResNet152": (60_192_808, 60_192_808 - 2 * 75_712 - 1000),
}


def layers(network):
    return [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def random_images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name):
    network = NETWORKS[name]()
    parameters = sum(p.numel() for p in network.parameters())
    prunable = sum(layer.weight.numel() for layer in layers(network))
    assert (parameters, prunable) == PUBLISHED[name]


def test_the_deepest_has_its_blocks():
    # 3 + 8 + 36 + 3 bottlenecks of 3 convolutions, a projection for each of the 4 groups, the stem
    # and the classifier.
    assert len(layers(NETWORKS["PreActResNet152"]())) == 50 * 3 + 4 + 2


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_images_to_logits_and_their_gradients_reach_every_parameter(name):
    shape = (1, 28, 28) if name == "MLP" else (3, 32, 32)
    generator = torch.Generator().manual_seed(1)
    network = NETWORKS[name](shape=shape, classes=10, generator=generator)
    logits = network(random_images(2, *shape))
    assert logits.shape == (2, 10)
    F.cross_entropy(logits, torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("name", ["MLP", "VGG11", "VGG19BN", "PreActResNet50", "ResNet50"])
def test_initial_values_are_kaiming_normal_zero_and_identity(name):
    network = NETWORKS[name](generator=torch.Generator().manual_seed(1))
    for layer in layers(network):
        weight = layer.weight.detach()
        fan_in = weight[0].numel()
        expected = (2 / fan_in) ** 0.5
        # Five standard errors of the mean and of the standard deviation.
        assert weight.mean().abs() < 5 * expected / weight.numel() ** 0.5
        assert abs(weight.std() / expected - 1) < 5 / (2 * weight.numel()) ** 0.5
        # Of a normal distribution, 4.55 % lie beyond two standard deviations; of a uniform, none.
        beyond = (weight.abs() > 2 * expected).double().mean()
        assert abs(beyond - 0.0455) < 5 * (0.0455 / weight.numel()) ** 0.5
        assert layer.bias is None or not layer.bias.any()
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            assert (norm.weight == 1).all()
            assert not norm.bias.any()
            assert not norm.running_mean.any()
            assert (norm.running_var == 1).all()


def test_a_generator_decides_the_weights_and_leaves_the_global_state():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = NETWORKS["VGG11"](generator=torch.Generator().manual_seed(1)).state_dict()
    again = NETWORKS["VGG11"](generator=torch.Generator().manual_seed(1)).state_dict()
    other = NETWORKS["VGG11"](generator=torch.Generator().manual_seed(2)).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["features.0.weight"], other["features.0.weight"])


def test_without_a_generator_the_global_one_decides():
    torch.manual_seed(1)
    network = NETWORKS["MLP"]()
    assert torch.equal(
        network.fc1.weight,
        NETWORKS["MLP"](generator=torch.Generator().manual_seed(1)).fc1.weight,
    )
    assert not torch.equal(network.fc1.weight, NETWORKS["MLP"]().fc1.weight)


def test_mlp_is_affine_maps_with_tanh_between():
    network = NETWORKS["MLP"](generator=torch.Generator().manual_seed(1)).double()
    x = random_images(3, 1, 28, 28).double()
    p = dict(network.named_parameters())
    first = torch.tanh(x.reshape(3, 784) @ p["fc1.weight"].T + p["fc1.bias"])
    second = torch.tanh(first @ p["fc2.weight"].T + p["fc2.bias"])
    expected = second @ p["fc3.weight"].T + p["fc3.bias"]
    torch.testing.assert_close(network(x), expected)


def test_mlp_takes_other_sizes():
    network = NETWORKS["MLP"](shape=(1, 8, 8), classes=3, hidden=())
    assert [tuple(p.shape) for p in network.parameters()] == [(3, 64), (3,)]


def test_preact_resnet_computes_the_published_function():
    network = NETWORKS["PreActResNet18"](generator=torch.Generator().manual_seed(1))
    x = random_images(2, 3, 32, 32)
    network.train()
    network(x)  # Moves the running statistics off their initial values.
    network.eval()
    state = network.state_dict()

    def norm(h, name):
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, var, weight, bias = (state[f"{name}.{key}"][:, None, None] for key in keys)
        return (h - mean) / (var + 1e-5).sqrt() * weight + bias

    h = F.conv2d(x, state["stem.weight"], padding=1)
    for group, stride in enumerate((1, 2, 2, 2)):
        for block in range(2):
            name = f"groups.{group}.{block}"
            step = stride if block == 0 else 1
            a = norm(h, f"{name}.bn1").relu()
            shortcut = state.get(f"{name}.shortcut.weight")
            assert (shortcut is None) == (step == 1)
            h = h if shortcut is None else F.conv2d(a, shortcut, stride=step)
            a = F.conv2d(a, state[f"{name}.conv1.weight"], stride=step, padding=1)
            a = norm(a, f"{name}.bn2").relu()
            h = h + F.conv2d(a, state[f"{name}.conv2.weight"], padding=1)
    h = F.avg_pool2d(norm(h, "bn").relu(), 4)
    expected = norm(F.conv2d(h, state["classifier.weight"]), "bn_outputs").reshape(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)


# Blocks in each layer and convolutions in a block, of table 1 of He et al. (2015).
RESNETS = {"ResNet18": ((2, 2, 2, 2), 2), "ResNet50": ((3, 4, 6, 3), 3)}


@pytest.mark.parametrize("name", RESNETS)
def test_resnet_computes_the_published_function_under_torchvisions_names(name):
    counts, convolutions = RESNETS[name]
    network = NETWORKS[name](classes=7, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        network.train()(random_images(4, 3, 64, 96).double())  # Moves the running statistics.
    used = set()

    def get(key):
        used.add(key)
        return state[key]

    def norm(h, name):
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, var, weight, bias = (get(f"{name}.{key}")[:, None, None] for key in keys)
        return (h - mean) / (var + 1e-5).sqrt() * weight + bias

    state = network.eval().state_dict()
    x = random_images(2, 3, 40, 65).double()
    h = norm(F.conv2d(x, get("conv1.weight"), stride=2, padding=3), "bn1").relu()
    h = F.max_pool2d(h, 3, 2, 1)
    for layer, count in enumerate(counts, start=1):
        for block in range(count):
            at = f"layer{layer}.{block}"
            stride = 2 if layer > 1 and block == 0 else 1
            shortcut = h
            if block == 0 and (layer > 1 or convolutions == 3):
                shortcut = F.conv2d(h, get(f"{at}.downsample.0.weight"), stride=stride)
                shortcut = norm(shortcut, f"{at}.downsample.1")
            for number in range(1, convolutions + 1):
                weight = get(f"{at}.conv{number}.weight")
                # The first 3×3 convolution has the stride.
                step = stride if number == convolutions - 1 else 1
                h = F.conv2d(h, weight, stride=step, padding=weight.shape[2] // 2)
                h = norm(h, f"{at}.bn{number}")
                h = h.relu() if number < convolutions else (h + shortcut).relu()
    expected = h.mean((2, 3)) @ get("fc.weight").T + get("fc.bias")
    with torch.no_grad():
        torch.testing.assert_close(network(x), expected)
    assert used == {key for key in state if not key.endswith("num_batches_tracked")}


def test_vgg_normalises_after_every_layer_and_gives_biases_to_the_last_one_only():
    network = NETWORKS["VGG11BN"]()
    kinds = [type(m).__name__ for m in network.classifier]
    assert kinds == [
        *("Linear", "BatchNorm1d", "ReLU"),
        *("Linear", "BatchNorm1d", "ReLU"),
        *("Linear", "BatchNorm1d"),
    ]
    assert [layer.bias is not None for layer in layers(network)] == [False] * 10 + [True]


@pytest.mark.skipif(not CHECKPOINT.exists(), reason=f"{CHECKPOINT} is not there")
def test_vgg11_takes_the_published_checkpoint():
    network = NETWORKS["VGG11"]()
    state = load_file(CHECKPOINT)
    network.load_state_dict(state, strict=True)
    assert torch.equal(network.features[8].weight, state["features.8.weight"])


@pytest.mark.parametrize(
    ("name", "shape", "classes", "inputs"),
    [
        ("VGG11", (1, 64, 96), 7, 512 * 2 * 3),
        ("VGG19BN", (3, 40, 33), 2, 512),
        ("PreActResNet18", (1, 28, 28), 4, None),
        ("PreActResNet50", (2, 1, 5), 3, None),
    ],
)
def test_other_sizes_and_numbers_of_classes(name, shape, classes, inputs):
    network = NETWORKS[name](shape=shape, classes=classes)
    assert network(random_images(2, *shape)).shape == (2, classes)
    if inputs:
        assert network.classifier[0].in_features == inputs


@pytest.mark.parametrize("name", ["VGG11", "VGG11BN", "VGG19", "VGG19BN"])
def test_vgg_refuses_images_its_poolings_would_leave_nothing_of(name):
    with pytest.raises(ValueError, match=rf"^{name}: shape .* at least 32×32 .* got 8×40$"):
        NETWORKS[name](shape=(3, 8, 40))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (28, 28)}, r"^MLP: shape must be \(channels, height, width\).*got \(28, 28\)$"),
        ({"shape": (1, 0, 28)}, r"got \(1, 0, 28\)$"),
        ({"shape": (1, 2.5, 28)}, r"got \(1, 2.5, 28\)$"),
        ({"classes": 0}, r"^MLP: classes must be .* got 0$"),
        ({"hidden": (300, 0)}, r"^MLP: hidden must be .* got \(300, 0\)$"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NETWORKS["MLP"](**options)


def test_the_table_is_read_without_torch():
    code = (
        "import sys; from lossprune.networks import NETWORKS; "
        "print(len(NETWORKS), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{len(NETWORKS)} False\n"
