"""Which weights count, under which names, and what cannot be pruned."""

import contextlib
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

import lossprune
from lossprune.pruning import PruningError
from lossprune.pruning.curvature.examples import device_of


def names(model: nn.Module) -> list[str]:
    return list(lossprune.Mask.dense(model))


class Experts(nn.Module):
    """As ``transformers`` has them: a matrix for each expert, in one parameter."""

    def __init__(self, count=3):
        super().__init__()
        self.num_experts = count
        self.gate_up_proj = nn.Parameter(torch.randn(count, 8, 4))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(count, 8))
        self.down_proj = nn.Parameter(torch.randn(count, 4, 4))
        self.scale = nn.Parameter(torch.ones(count, 4, 1))


class Tables(nn.Module):
    """Positions, tokens, biases and scales, as vision and language transformers have them."""

    def __init__(self):
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.positions = nn.Parameter(torch.zeros(1, 5, 4))
        self.latents = nn.Parameter(torch.zeros(3, 4))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(25, 2))
        self.logit_scale = nn.Parameter(torch.zeros(2, 1, 1))
        self.relative = nn.Parameter(torch.zeros(2, 5, 4))
        self.layer_scale = nn.Parameter(torch.ones(4))


def test_weights_in_products_only():
    model = nn.Sequential(
        nn.Embedding(5, 4),
        nn.Conv1d(1, 2, 3),
        nn.Conv2d(1, 2, 3),
        nn.Conv3d(1, 2, 3),
        nn.ConvTranspose2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.LayerNorm(4),
        nn.PReLU(),
        nn.Linear(4, 2),
        nn.Bilinear(2, 2, 2),
        nn.LSTM(2, 2, proj_size=1, bidirectional=True),
        nn.GRUCell(2, 2),
        nn.MultiheadAttention(4, 2, add_bias_kv=True),
        nn.MultiheadAttention(4, 2, kdim=3, vdim=2),
        Experts(),
        Tables(),
    )
    lstm = [f"10.weight_{part}_l0{end}" for end in ("", "_reverse") for part in ("ih", "hh", "hr")]
    assert names(model) == [
        "1.weight", "2.weight", "3.weight", "4.weight", "8.weight", "9.weight", *lstm,
        "11.weight_ih", "11.weight_hh",
        "12.in_proj_weight", "12.out_proj.weight",
        "13.q_proj_weight", "13.k_proj_weight", "13.v_proj_weight", "13.out_proj.weight",
        "14.gate_up_proj", "14.down_proj",
    ]  # fmt: skip


def test_a_layer_itself():
    assert names(nn.Linear(2, 3)) == ["weight"]


def test_subclasses_of_layers_count():
    class Scaled(nn.Linear):
        pass

    assert names(nn.Sequential(Scaled(2, 2))) == ["0.weight"]


def test_shared_weights_appear_once_under_their_first_name():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(4, 3)
            self.a = nn.Linear(3, 4)
            self.b = self.a
            self.c = nn.Linear(3, 4)
            self.c.weight = self.embed.weight

    model = Shared()
    assert sorted(names(model)) == ["a.weight", "embed.weight"]
    assert set(names(model)) <= dict(model.named_parameters()).keys()


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.ReLU()), nn.Sequential(nn.LayerNorm(4), nn.Embedding(3, 4)), nn.Module()],
)
def test_network_without_prunable_layers(model):
    for call in (
        lambda: lossprune.prune(model, "MP", sparsity=0.5),
        lambda: lossprune.measure(model, [(torch.zeros(1, 4), torch.zeros(1).long())]),
        lambda: lossprune.Mask.dense(model),
    ):
        with pytest.raises(PruningError, match=f"{type(model).__name__} has nothing to prune"):
            call()


@pytest.mark.parametrize(
    "parametrise",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        lambda layer: torch_prune.l1_unstructured(layer, "weight", 2),
        nn.utils.spectral_norm,
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "torch's pruning", "old spectral_norm"],
)
@pytest.mark.parametrize("criterion", ["MP", "QM"])
def test_weights_computed_from_other_parameters(parametrise, criterion):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    parametrise(model[1])
    batch = (torch.randn(4, 3), torch.arange(4) % 3)
    with pytest.raises(PruningError, match=r"'1\.weight' is computed from other parameters"):
        lossprune.prune(model, criterion, sparsity=0.5, data=[batch])


@pytest.mark.parametrize("exclude", [None, "1"])
def test_a_computed_weight_is_looked_at_without_changing_the_network(exclude):
    model = nn.Sequential(nn.Linear(3, 3), parametrizations.spectral_norm(nn.Linear(3, 3)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with contextlib.suppress(PruningError):
        lossprune.prune(model, "MP", sparsity=0.5, exclude=exclude)
    assert model[1].parametrizations.weight.training
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_lazy_layers_wait_for_their_first_batch():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(PruningError, match=r"'0\.weight' not initialised yet"):
        lossprune.prune(model, "MP", sparsity=0.5)
    model(torch.zeros(1, 2))
    assert lossprune.prune(model, "MP", sparsity=0.5).mask.removed == 3


def test_parameters_on_several_devices():
    weights = [torch.ones(2), torch.ones(2, device="meta")]  # the other device of every machine
    with pytest.raises(PruningError, match="one device, got cpu, meta"):
        device_of(weights)


class Attention(nn.Module):
    """With projections as layers, and a table that is learnt beside them."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(6, 6)
        self.out = nn.Linear(6, 6)
        self.distances = nn.Parameter(torch.zeros(3, 3))


class Network(nn.Module):
    """Of everything a bit; the first and last layer are ``stem`` and ``head``."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 6)
        self.stem = nn.Conv1d(6, 6, 3, padding=1)
        self.blocks = nn.ModuleList(Attention() for _ in range(11))
        self.norm = nn.LayerNorm((4, 6))
        self.lstm = nn.LSTM(6, 6)
        self.up = nn.ConvTranspose1d(6, 6, 3)
        self.gate = nn.Parameter(torch.ones(6, 2))
        self.head = nn.Linear(6, 5)


BLOCKS = [f"blocks.{i}.{part}.weight" for i in range(11) for part in ("query", "out")]
LSTM = ["lstm.weight_ih_l0", "lstm.weight_hh_l0"]
MIDDLE = [*BLOCKS, *LSTM, "up.weight"]
EVERYTHING = ["stem.weight", *MIDDLE, "head.weight"]


def chosen(**choices) -> list[str]:
    return list(lossprune.Mask.dense(Network(), **choices))


class TestChoice:
    @pytest.mark.parametrize(
        ("parameters", "expected"),
        [
            (None, EVERYTHING),
            ("*", EVERYTHING),
            ("head.weight", ["head.weight"]),
            ("head", ["head.weight"]),
            ("blocks.1", ["blocks.1.query.weight", "blocks.1.out.weight"]),
            ("blocks.1*", [name for name in BLOCKS if name.startswith("blocks.1")]),
            ("blocks.?.out*", [f"blocks.{i}.out.weight" for i in range(10)]),
            (["head", "stem"], ["stem.weight", "head.weight"]),
            (nn.Conv1d, ["stem.weight"]),
            (nn.Linear, [*BLOCKS, "head.weight"]),
            (Attention, BLOCKS),
            ((nn.Conv1d, "head"), ["stem.weight", "head.weight"]),
            (lambda name, parameter, module: parameter.numel() == 30, ["head.weight"]),
            (lambda name, parameter, module: isinstance(module, nn.Conv1d), ["stem.weight"]),
            (lambda name, parameter, module: name.endswith("7.out.weight"), [BLOCKS[15]]),
            ("first", ["stem.weight"]),
            ("last", ["head.weight"]),
            ("gate", ["gate"]),
            ("lstm.weight_hh_l0", ["lstm.weight_hh_l0"]),
            ("blocks.2.distances", ["blocks.2.distances"]),
            (nn.LSTM, LSTM),
            ("lstm*", LSTM),
            ([nn.ConvTranspose1d, nn.Conv1d], ["stem.weight", "up.weight"]),
        ],
    )
    def test_parameters(self, parameters, expected):
        assert chosen(parameters=parameters) == expected

    @pytest.mark.parametrize(
        ("exclude", "expected"),
        [
            ("first and last", MIDDLE),
            (("first", "last"), MIDDLE),
            ("first", EVERYTHING[1:]),
            ("last", EVERYTHING[:-1]),
            (Attention, ["stem.weight", *LSTM, "up.weight", "head.weight"]),
            (nn.LSTM, ["stem.weight", *BLOCKS, "up.weight", "head.weight"]),
            ("*.query.weight", ["stem.weight", *BLOCKS[1::2], *MIDDLE[22:], "head.weight"]),
            (lambda name, *_: "out" in name, ["stem.weight", *BLOCKS[::2], *EVERYTHING[23:]]),
            ((), EVERYTHING),
        ],
    )  # fmt: skip
    def test_exclude(self, exclude, expected):
        assert chosen(exclude=exclude) == expected

    def test_both(self):
        assert chosen(parameters="blocks.*", exclude="*.out.weight") == BLOCKS[::2]
        # The ends are the network's, not those of what is chosen.
        assert chosen(parameters=["blocks.3", "head"], exclude="first and last") == BLOCKS[6:8]
        assert chosen(parameters=[nn.LSTM], exclude="lstm.weight_hh_l0") == ["lstm.weight_ih_l0"]

    def test_a_module_itself(self):
        model = Network()
        mask = lossprune.Mask.dense(model, parameters=[model.blocks[3], model.head])
        assert list(mask) == [*BLOCKS[6:8], "head.weight"]

    def test_ends_that_share_a_weight(self):
        model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3), nn.Linear(3, 4), nn.Linear(3, 4))
        model[3].weight = model[0].weight
        assert names(model) == ["1.weight", "2.weight", "0.weight"]
        mask = lossprune.Mask.dense(model, exclude="first and last")
        assert list(mask) == ["2.weight"]
        for spelling in ("0.weight", "3.weight", "3"):
            assert list(lossprune.Mask.dense(model, parameters=spelling)) == ["0.weight"]

    def test_names_without_what_wraps_the_network(self):
        model = nn.Sequential()
        model.add_module("module", Network())
        assert list(lossprune.Mask.dense(model, parameters="head.*")) == ["module.head.weight"]
        assert list(lossprune.Mask.dense(model, exclude=["stem", "blocks.*"])) == [
            f"module.{name}" for name in EVERYTHING[23:]
        ]

    def test_only_what_is_chosen_must_be_an_ordinary_parameter(self):
        model = nn.Sequential(nn.Linear(3, 3), parametrizations.weight_norm(nn.Linear(3, 3)))
        assert list(lossprune.Mask.dense(model, exclude="last")) == ["0.weight"]
        assert list(lossprune.Mask.dense(model, parameters="0")) == ["0.weight"]
        with pytest.raises(PruningError, match=r"'1\.weight' is computed .* or exclude it"):
            lossprune.Mask.dense(model, parameters="1.weight")
        lazy = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3))
        assert list(lossprune.Mask.dense(lazy, exclude="first")) == ["1.weight"]
        for choices in ({}, {"parameters": lambda name, parameter, module: True}):
            with pytest.raises(PruningError, match=r"'0\.weight' not initialised yet"):
                lossprune.Mask.dense(lazy, **choices)

    @pytest.mark.parametrize(
        ("choices", "message"),
        [
            ({"parameters": "haed.weight"}, "'haed.weight' .*did you mean 'head.weight'"),
            (
                {"parameters": "classifier"},
                "that can be pruned; there are: stem.weight, ",
            ),
            ({"exclude": "heed"}, "exclude='heed' .*did you mean 'head'"),
            ({"parameters": "head.bias"}, "only head.bias .biases, norm.* are kept"),
            ({"parameters": ["head", "norm*"]}, "'norm.' .*only norm.weight, norm.bias"),
            ({"parameters": "embed"}, "only embed.weight"),
            ({"parameters": "embed.weight"}, "only embed.weight"),
            ({"parameters": "gat*"}, "only gate: name them in f"),
            ({"parameters": "x"}, "blocks.4.query.weight and 17 more"),
            ({"parameters": nn.Conv2d}, "parameters=Conv2d chooses no weight .*there are: stem"),
            ({"parameters": nn.Embedding}, "parameters=Embedding chooses no weight"),
            ({"exclude": nn.GRU}, "exclude=GRU chooses no weight"),
            ({"parameters": lambda *_: False}, "chooses no weight"),
            ({"parameters": []}, "chooses nothing"),
            ({"exclude": "*"}, "leaves none of the 27 parameters"),
            ({"parameters": 3}, "must be names, patterns, types of modules or functions .* got 3"),
            ({"exclude": ["head", None]}, "exclude must be names, .* got None"),
        ],
    )
    def test_what_matches_nothing(self, choices, message):
        with pytest.raises(ValueError, match=message):
            chosen(**choices)


@pytest.mark.parametrize("what", [nn.LSTM(3, 2), nn.GRUCell(3, 2), nn.MultiheadAttention(4, 2)])
def test_ends_of_a_network_without_linear_and_convolution_layers(what):
    model = nn.Sequential(what)
    default = list(lossprune.Mask.dense(model))
    ends = [
        name
        for name in default
        if not isinstance(what, nn.MultiheadAttention) or "out_proj" in name
    ]
    assert list(lossprune.Mask.dense(model, parameters="first")) == ends[:1]
    assert list(lossprune.Mask.dense(model, parameters="last")) == ends[-1:]
    mask = lossprune.prune(model, "MP", sparsity=0.4, scope="uniform").mask
    assert mask[ends[-1]].all()


def test_the_linear_layer_of_transformers_with_inputs_first():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D

    class Projection(conv1d):
        pass

    model = nn.Sequential(Projection(6, 4), nn.Linear(6, 2))
    assert names(model) == ["0.weight", "1.weight"]
    mask = lossprune.prune(model, "MP", pattern="2:4", parameters="0").mask
    assert mask["0.weight"].shape == (4, 6)
    assert (mask["0.weight"].sum(0) == 2).all()  # of the four inputs, at each output


class TestInputs:
    """Which dimension N:M goes along, and how a scope shares among experts."""

    @pytest.mark.parametrize(
        ("layer", "weight", "inputs"),
        [
            (nn.LSTM(4, 2), "weight_ih_l0", 1),
            (nn.GRUCell(4, 4), "weight_hh", 1),
            (nn.MultiheadAttention(4, 2), "in_proj_weight", 1),
            (nn.MultiheadAttention(4, 2, kdim=8), "k_proj_weight", 1),
            (nn.ConvTranspose2d(4, 3, 3), "weight", 0),
            (nn.Bilinear(4, 3, 2), "weight", 1),
        ],
    )
    def test_of_layers(self, layer, weight, inputs):
        kept = lossprune.prune(layer, "MP", pattern="2:4", parameters=weight).mask[weight]
        groups = kept.movedim(inputs, -1).unflatten(-1, (-1, 4)).sum(-1)
        assert (groups == 2).all()

    @pytest.mark.parametrize(("transposed", "inputs"), [(True, 1), (False, 2)])
    def test_of_experts(self, transposed, inputs):
        model = Experts()
        model.is_transposed = transposed
        for kept in lossprune.prune(model, "MP", pattern="2:4").mask.values():
            assert (kept.movedim(inputs, -1).unflatten(-1, (-1, 4)).sum(-1) == 2).all()

    def test_of_experts_that_do_not_say(self):
        message = "which dimension these are is not known .*'gate_up_proj', 'down_proj'"
        with pytest.raises(ValueError, match=message):
            lossprune.prune(Experts(), "MP", pattern="2:4")

    @pytest.mark.parametrize("scope", ["erdos-renyi", "erdos-renyi-kernel"])
    def test_a_scope_takes_experts_for_layers(self, scope):
        """As many go from three matrices in one parameter as from three layers."""
        together = nn.Sequential(Experts(), nn.Linear(4, 4))
        apart = nn.Sequential(
            *(nn.Linear(4, 8) for _ in range(3)), *(nn.Linear(4, 4) for _ in range(4))
        )
        lost = {
            name: kept.numel() - int(kept.sum())
            for model in (together, apart)
            for name, kept in lossprune.prune(model, "MP", sparsity=0.5, scope=scope)
            .mask.items()
        }  # fmt: skip
        of_layers = [lost[f"{number}.weight"] for number in range(3, 6)]
        assert abs(lost["0.down_proj"] - sum(of_layers)) <= 1


class TestSkipped:
    def test_kinds_and_sizes(self):
        model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), Experts(), Tables())
        model.append(parametrizations.weight_norm(nn.Linear(4, 3)))
        model.append(nn.Linear(4, 3))
        result = lossprune.prune(model, "MP", sparsity=0.5, parameters="2")
        assert {name: part.kind for name, part in result.skipped.items()} == {
            "0.weight": "embedding",
            "1.weight": "normalisation",
            "2.scale": "matrix",
            **{f"3.{name}": "matrix" for name, p in model[3].named_parameters() if p.ndim > 1},
            "3.layer_scale": "vector",
            "4.parametrizations.weight.original0": "parametrisation",
            "4.parametrizations.weight.original1": "parametrisation",
            "5.weight": "not chosen",
        }
        assert result.skipped["3.latents"].shape == (3, 4)
        assert result.skipped["3.latents"].size == 12
        total = sum(parameter.numel() for parameter in model.parameters())
        assert result.model_parameters == total
        assert result.model_sparsity == 72 / total

    def test_nothing_is_skipped_of_linear_layers(self):
        result = lossprune.prune(small(), "MP", sparsity=0.5)
        assert not result.skipped
        assert result.model_sparsity == 42 / 99

    def test_considerable_matrices_are_warned_of_with_the_argument_that_takes_them_in(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Module())
        model[1].register_parameter("mix", nn.Parameter(torch.randn(4, 4)))
        with pytest.warns(UserWarning, match=r"^16 numbers in 1\.mix ") as told:
            lossprune.prune(model, "MP", sparsity=0.5)
        (warning,) = told
        assert "parameters=['*', '1.mix'] takes them in" in str(warning.message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            taken = lossprune.prune(model, "MP", sparsity=0.5, parameters=["*", "1.mix"])
            assert list(taken.mask) == ["0.weight", "1.mix"]
            lossprune.prune(model, "MP", sparsity=0.5, parameters="*")

    def test_embeddings_tables_and_few_matrices_are_no_cause(self):
        embedding, positions = nn.Embedding(100, 4), nn.Module()
        positions.register_parameter("positions", nn.Parameter(torch.zeros(1, 50, 4)))
        positions.register_parameter("mix", nn.Parameter(torch.zeros(2, 1)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lossprune.prune(
                nn.Sequential(embedding, positions, nn.Linear(6, 3)), "MP", sparsity=0.5
            )

    def test_many_are_not_all_written_out(self):
        model = nn.Sequential(nn.Linear(2, 2), *(nn.Module() for _ in range(6)))
        for module in model[1:]:
            module.register_parameter("mix", nn.Parameter(torch.randn(2, 2)))
        with pytest.warns(UserWarning, match="4.mix and 2 more .*for n, part in result.skipped"):
            result = lossprune.prune(model, "MP", sparsity=0.5)
        names = [n for n, part in result.skipped.items() if part.kind == "matrix"]
        assert lossprune.Mask.dense(model, parameters=["*", *names]).total == 28


def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(9, 5, generator=generator), torch.arange(9) % 3)]


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)
    ).double()


class TestMeasuredAndPruned:
    def test_only_the_chosen_are_measured_and_alike(self, agrees):
        inputs, targets = batches()[0]
        data = [(inputs.double(), targets)]
        everything = lossprune.measure(small(), data)
        some = lossprune.measure(small(), data, exclude="first and last")
        assert list(some.gradient) == list(some.ggn_diagonal) == ["2.weight"]
        assert some.loss == everything.loss
        for what in ("gradient", "ggn_diagonal"):
            assert torch.allclose(
                getattr(some, what)["2.weight"],
                getattr(everything, what)["2.weight"],
                rtol=1e-12,
                atol=0,
            )

    def test_a_mask_reaches_weights_that_are_not_measured(self):
        inputs, targets = batches()[0]
        data = [(inputs.double(), targets)]
        mask = lossprune.prune(small(), "MP", sparsity=0.5).mask
        masked = mask.apply_(small())
        some = lossprune.measure(small(), data, mask=mask, parameters="2.weight")
        expected = lossprune.measure(masked, data, parameters="2.weight")
        assert some.loss == pytest.approx(expected.loss, rel=1e-12)
        assert torch.allclose(some.gradient["2.weight"], expected.gradient["2.weight"], rtol=1e-12)
        for name, message in (("9.weight", "which the network lacks"), ("4.weight", "has shape")):
            wrong = {"2.weight": mask["2.weight"], name: torch.ones(2, 2).bool()}
            with pytest.raises(PruningError, match=message):
                lossprune.measure(small(), data, mask=wrong, parameters="2.weight")

    @pytest.mark.parametrize("criterion", sorted(lossprune.CRITERIA))
    def test_only_the_chosen_are_pruned(self, criterion):
        inputs, targets = batches()[0]
        data = [(inputs.double(), targets)]
        result = lossprune.prune(
            small(), criterion, sparsity=0.75, data=data, stages=3, exclude="first and last", seed=0
        )
        assert list(result.mask) == ["2.weight"]
        assert result.mask.removed == result.stages[-1].removed == 27

    def test_a_start_of_fewer_weights_says_how_to_prune_these(self):
        start = lossprune.prune(small(), "MP", sparsity=0.5, parameters=["0", "4"]).mask
        with pytest.raises(ValueError, match=r"lacks '2\.weight'; parameters=list\(start\)"):
            lossprune.prune(small(), "MP", sparsity=0.75, start=start)
        further = lossprune.prune(
            small(), "MP", sparsity=0.75, start=start, parameters=list(start)
        ).mask  # fmt: skip
        assert list(further) == ["0.weight", "4.weight"]

    def test_a_start_of_other_weights_lists_every_mismatch(self):
        start = lossprune.Mask.dense(small(), parameters=["0", "4"])
        with pytest.raises(ValueError, match=r"lacks '2\.weight'; '0\.weight' .*'4\.weight' is"):
            lossprune.pruning.prune_by_stage(
                small(), "MP", sparsity=0.5, start=start, parameters="2"
            )


class Quantised(torch.Tensor):
    """As quantisation libraries have them: made of other tensors, which it says."""

    def __tensor_flatten__(self):
        return [], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        raise NotImplementedError


OTHER_NUMBERS = {
    "of torch.int8": lambda weight: (50 * weight).to(torch.int8),
    "of torch.uint8": lambda weight: (50 * weight.abs()).to(torch.uint8),
    "of torch.bool": lambda weight: weight > 0,
    "of torch.float8_e4m3fn": lambda weight: weight.to(torch.float8_e4m3fn),
    "of torch.qint8": lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
    "sparse (torch.sparse_coo)": lambda weight: weight.to_sparse(),
    "sparse (torch.sparse_csr)": lambda weight: weight.to_sparse_csr(),
    "a Quantised": lambda weight: weight.as_subclass(Quantised),
}


@pytest.mark.parametrize("what", OTHER_NUMBERS)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_weights_that_are_no_dense_numbers_are_named(what):
    """Codes of a quantised weight would be ranked as if they were the weight."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    weight = OTHER_NUMBERS[what](model[0].weight.detach())
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    for use in (
        lambda: lossprune.prune(model, "MP", sparsity=0.5),
        lambda: lossprune.prune(
            model, "QM", sparsity=0.5, data=[(torch.ones(2, 4), torch.zeros(2).long())]
        ),
        lambda: lossprune.Mask.dense(model),
    ):
        with pytest.raises(PruningError) as raised:
            use()
        assert str(raised.value).startswith(f"'0.weight' is {what}: only dense weights")
        assert "exclude='0.weight'" in str(raised.value)
    mask = lossprune.prune(model, "MP", sparsity=0.5, exclude="0.weight").mask
    assert list(mask) == ["1.weight"]
