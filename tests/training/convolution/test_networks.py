"""Networks of all kinds: right by the kernels or as torch runs them, or refused in a sentence."""

import copy
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import lossprune
from lossprune.kernels.compiler import compiler_available
from lossprune.pruning import PruningError
from lossprune.training.convolution.kernel import library
from tests.training.convolution.oracle import (
    close,
    compared,
    drawn,
    masked,
    random_mask,
    same_state,
)

pytestmark = pytest.mark.skipif(not compiler_available(), reason="no C compiler here")

BY_ITSELF = "layers change their layout each by itself: "


class Network(nn.Module):
    """Modules, and a function of the inputs and them."""

    def __init__(self, function: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.function = nn.ModuleList(layers), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.layers)


class Branching(nn.Module):
    """Its code looks at the values of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.other = nn.Conv2d(6, 4, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.one(x))
        return self.other(F.relu(x) if x.mean() < 100 else x)


def tied(*layers: nn.Module) -> list[nn.Module]:
    """The same weight in the first layer and the last."""
    layers[-1].weight = layers[0].weight
    return list(layers)


def after(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 1), layer, nn.ReLU(), nn.Conv2d(4, 2, 1))


def twice(x: Tensor, one: nn.Module, other: nn.Module) -> Tensor:
    return one(F.relu(other(torch.tanh(one(x)))))


def as_torch(name: str, why: str = "") -> list[str]:
    return [f"{name} runs as torch runs it" + (f": {why}" if why else "")]


IMAGES, FEATURES, TOKENS = (18, 3, 7, 6), (18, 6), (3, 4, 6)


def reading(x: Tensor, one: nn.Module, other: nn.Module) -> Tensor:
    """What code of a network may read of a layer."""
    y = F.conv2d(F.relu(one(x)), other.weight, other.bias, padding=one.padding)
    return y * one.weight.mean() + one.weight.shape[1] + other.out_channels + other.kernel_size[1]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "one convolution": (
        lambda: nn.Conv2d(3, 4, 3), IMAGES, [BY_ITSELF + "the network is one layer"]
    ),
    "one linear layer": (
        lambda: nn.Linear(6, 4), FEATURES, [BY_ITSELF + "the network is one layer"]
    ),
    "one image": (lambda: after(nn.Conv2d(3, 4, 3)), (3, 7, 6), []),
    "no image": (lambda: after(nn.Conv2d(3, 4, 3)), (0, 3, 7, 6), []),
    "tokens": (lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)), TOKENS, []),
    "a row of numbers": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), (6,), []),
    "features of maps": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), IMAGES, []),
    "control flow": (
        Branching, IMAGES,
        [BY_ITSELF + "the code of Branching could not be followed (its code branches on the value "
         "of a tensor)"],
    ),
    "called twice": (
        lambda: Network(twice, nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)), IMAGES, []
    ),
    "one module, two names": (
        lambda: nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1)] * 2, nn.ReLU()), IMAGES, []
    ),
    "tied weights": (
        lambda: nn.Sequential(*tied(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3))), IMAGES, []
    ),
    "tied with what torch runs": (
        lambda: nn.Sequential(*tied(
            nn.Conv2d(3, 3, 3, padding="same"), nn.ReLU(), nn.Conv2d(3, 3, 3, padding="same")
        )), IMAGES,
        [*as_torch("0", "its padding is 'same'"), *as_torch("2", "its padding is 'same'")],
    ),
    "tied over both": (
        lambda: nn.Sequential(*tied(
            nn.Conv2d(3, 3, 3, padding="same"), nn.ReLU(), nn.Conv2d(3, 3, 3)
        )), IMAGES, as_torch("0", "its padding is 'same'"),
    ),
    "whose code reads weights": (
        lambda: Network(reading, nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), IMAGES,
        as_torch("conv2d"),
    ),
    "padding 'same'": (
        lambda: after(nn.Conv2d(3, 4, 3, padding="same")), IMAGES,
        as_torch("1", "its padding is 'same'"),
    ),
    "padding of another mode": (
        lambda: after(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")), IMAGES,
        as_torch("1", "its padding is of 'circular'"),
    ),
    "transposed": (
        lambda: after(nn.ConvTranspose2d(3, 4, 3)), IMAGES,
        as_torch("1", "it is a ConvTranspose2d"),
    ),
    "one dimension": (
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)),
        (18, 3, 6), as_torch("0", "it is a Conv1d"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    build, shape, notes = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build()
    model = compared(network, random_mask(network, 0.5), drawn(*shape))
    assert model.notes == notes


def doubled(_: nn.Module, __: object, output: Tensor) -> Tensor:
    return 2 * output


def doubled_backwards(_: nn.Module, inputs: tuple[Tensor, ...], __: object) -> tuple[Tensor, ...]:
    return tuple(2 * gradient for gradient in inputs)


HOOKED = BY_ITSELF + "the network has hooks"
HOOKS: dict[str, tuple[Callable[[nn.Module], object], list[str]]] = {
    "of a layer": (
        lambda network: network[0].register_forward_hook(doubled), as_torch("0", "it has hooks")
    ),
    "of an activation": (lambda network: network[1].register_forward_hook(doubled), as_torch("1")),
    "of the network": (lambda network: network.register_forward_hook(doubled), [HOOKED]),
    "backwards of a layer": (
        lambda network: network[3].register_full_backward_hook(doubled_backwards),
        [*as_torch("3", "it has hooks"), HOOKED],
    ),
    "backwards of an activation": (
        lambda network: network[1].register_full_backward_hook(doubled_backwards), [HOOKED]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOOKS)
def test_hooks(name):
    register, notes = HOOKS[name]
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1)
    network = nn.Sequential(*layers)
    register(network)
    model = compared(network, random_mask(network, 0.5), drawn(*IMAGES))
    assert model.notes == notes


def test_parametrisations_of_other_layers_are_written_back():
    torch.manual_seed(0)
    network = nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Conv2d(4, 2, 1))
    mask = {"2.weight": torch.arange(8).view(2, 4, 1, 1) % 3 == 0}
    model = compared(network, mask, drawn(*IMAGES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    x = drawn(*IMAGES)
    close(model(x), copy.deepcopy(model.write_back_()).double()(x.double()), "outputs")


def test_weights_with_channels_last():
    torch.manual_seed(0)
    network = after(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
    mask = random_mask(network, 0.5)
    x = drawn(*IMAGES).to(memory_format=torch.channels_last)
    model = compared(network, mask, x)
    expected = masked(network, mask)
    model.write_back_()
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter.double(), expected.get_parameter(name))


class Words(nn.Module):
    """An embedding that the last layer shares, one that is pruned too, and arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, 6), nn.Embedding(4, 6)
        self.hidden = nn.Linear(6, 6)
        self.out = nn.Linear(6, 9, bias=False)
        self.out.weight = self.words.weight

    def forward(self, words: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        x = self.hidden(self.words(words) + self.places.weight[: words.shape[1]])
        return {"logits": self.out(torch.tanh(x if scale is None else x * scale))}


@pytest.mark.parametrize("kind", ["tensor", "tuple", "mapping", "two"])
def test_words(kind):
    torch.manual_seed(0)
    network = Words()
    mask = random_mask(network, 0.5)
    words, scale = torch.arange(8).view(2, 4), drawn(2, 4, 1)
    example = {
        "tensor": words,
        "tuple": (words,),
        "mapping": {"words": words},
        "two": {"words": words, "scale": scale},
    }[kind]
    model, dense = lossprune.sparse(network, mask, example), masked(network, mask)
    assert model.notes[:2] == [
        "words runs as torch runs it: it is a Embedding",
        "places runs as torch runs it: it is a Embedding",
    ]
    given = {"words": words, "scale": scale} if kind == "two" else {"words": words}
    exact = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    out, expected = model(**given)["logits"], dense(**exact)["logits"]
    close(out, expected, "logits")
    out.square().sum().backward()
    expected.square().sum().backward()
    same_state(model, dense)
    assert model.network.words.parametrizations.weight.original is model.network.out.values or (
        model.network.out.parametrizations.weight.original
        is model.network.words.parametrizations.weight.original
    )


def network_and_mask() -> tuple[nn.Module, dict[str, Tensor]]:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Conv2d(4, 2, 1)
    )
    return network, dict(random_mask(network, 0.5))


def test_maps_of_other_sizes_than_the_example():
    network, mask = network_and_mask()
    model, dense = lossprune.sparse(network, mask, drawn(2, 3, 4, 4)), masked(network, mask)
    for shape in ((2, 3, 9, 5), (20, 3, 4, 4), (1, 3, 3, 3), (0, 3, 4, 4)):
        close(model(drawn(*shape)), dense(drawn(*shape).double()), str(shape))


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        (torch.zeros(2, 4, 6, 6), "a layer of 3 channels got 4"),
        (torch.zeros(2, 2, 6, 6), "a layer of 3 channels got 2"),
        (torch.zeros(2, 3, 2, 6), "maps of 2×6 are too small for the layer's kernel"),
        (torch.zeros(3, 6, 6), "a batch like the example has 4 dimensions, not 3"),
        (
            torch.zeros(2, 3, 6, 6).double(),
            "sparse training is in float32 on the CPU, not torch.float64 on cpu",
        ),
        (
            torch.zeros(2, 3, 6, 6).byte(),
            "sparse training is in float32 on the CPU, not torch.uint8 on cpu",
        ),
        (
            torch.zeros(2, 3, 6, 6).to("meta"),
            "sparse training is in float32 on the CPU, not torch.float32 on meta",
        ),
    ],
)
def test_batches_that_do_not_fit(batch, sentence):
    network, mask = network_and_mask()
    model = lossprune.sparse(network, mask, torch.zeros(2, 3, 6, 6))
    with pytest.raises(PruningError) as error:
        model(batch)
    assert str(error.value) == sentence


def test_features_that_do_not_fit():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    model = lossprune.sparse(network, random_mask(network, 0.5), torch.zeros(2, 3, 4, 4))
    with pytest.raises(PruningError, match=r"^a layer of 16 inputs got 4 channels of 3×2$"):
        model(torch.zeros(2, 3, 5, 4))


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_networks_of_another_precision(kind):
    network, mask = network_and_mask()
    sentence = rf"^sparse training is in float32 on the CPU, but 0\.weight is {kind} on cpu$"
    with pytest.raises(PruningError, match=sentence):
        lossprune.sparse(network.to(kind), mask, torch.zeros(2, 3, 6, 6, dtype=kind))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_networks_on_a_gpu():
    network, mask = network_and_mask()
    with pytest.raises(PruningError, match=r"0\.weight is torch\.float32 on cuda:0$"):
        lossprune.sparse(network.cuda(), mask, torch.zeros(2, 3, 6, 6).cuda())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda mask: mask.update({"4.weight": mask["0.weight"]}), "it names '4.weight'"),
        (
            lambda mask: mask.update({"0.weight": mask["3.weight"]}),
            "its '0.weight' has shape (2, 4, 1, 1)",
        ),
    ],
    ids=["a layer", "a shape"],
)
def test_masks_that_do_not_fit(change, sentence):
    network, mask = network_and_mask()
    change(mask)
    with pytest.raises(PruningError) as error:
        lossprune.sparse(network, mask, torch.zeros(2, 3, 6, 6))
    assert str(error.value).startswith("the mask does not fit Sequential: ")
    assert sentence in str(error.value)


def test_an_example_that_does_not_fit():
    network, mask = network_and_mask()
    with pytest.raises(
        PruningError, match=r"^Sequential does not run on example: RuntimeError: Given"
    ):
        lossprune.sparse(network, mask, torch.zeros(2, 4, 6, 6))


def test_one_sentence_where_there_is_no_compiler(monkeypatch, tmp_path):
    network, mask = network_and_mask()
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("LOSSPRUNE_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ziglang", None)
    library.cache_clear()
    with pytest.raises(PruningError) as error:
        lossprune.sparse(network, mask, torch.zeros(2, 3, 6, 6))
    assert str(error.value) == (
        "sparse training needs a C compiler: no C compiler: set CC to one, "
        'install cc, gcc or clang, or pip install "lossprune[deploy]"'
    )
