"""Removed weights are exactly zero after every step, in whatever memory and loop they are."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lossprune
from lossprune.pruning import PruningError

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def half_of(model: nn.Module) -> lossprune.Mask:
    return lossprune.prune(model, "MP", sparsity=0.5).mask


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, 8, generator=generator), torch.arange(12) % 4


def zeros(model: nn.Module, mask: lossprune.Mask) -> bool:
    """Exactly +0.0 wherever removed, and trained elsewhere."""
    weights = dict(model.named_parameters())
    return all(
        not weights[name][~kept].any()
        and not torch.signbit(weights[name][~kept]).any()
        and weights[name][kept].all()
        for name, kept in mask.items()
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    inputs, labels = batch(seed)
    optimizer.zero_grad()
    F.cross_entropy(model(inputs.to(next(model.parameters()).dtype)), labels).backward()
    optimizer.step()


class TestBits:
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(
        dtype=st.sampled_from(DTYPES),
        shape=st.lists(st.integers(0, 7), min_size=1, max_size=4),
        seed=st.integers(0, 1000),
        transposed=st.booleans(),
    )
    def test_removed_bits_are_zero_and_all_others_as_they_were(
        self, dtype, shape, seed, transposed
    ):
        """Any bit pattern, so NaN of any payload, infinities, −0 and subnormals too."""
        generator = torch.Generator().manual_seed(seed)
        size = torch.empty(0, dtype=dtype).element_size()
        raw = torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=generator)
        weight = raw.view(dtype).squeeze(-1)
        if transposed:
            weight = weight.transpose(0, -1)
        kept = torch.rand(weight.shape, generator=generator) < 0.5
        module = nn.Module()
        module.weight = nn.Parameter(weight)
        before = raw.clone().view(dtype).squeeze(-1)
        before = before.transpose(0, -1) if transposed else before
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
        optimizer = torch.optim.SGD(module.parameters())

        lossprune.Mask({"weight": kept}).enforce(module, optimizer)

        now = module.weight.detach().view(integers)
        assert not now[~kept].any()
        assert torch.equal(now[kept], before.view(integers)[kept])

    def test_complex128_has_no_integer_of_its_size(self):
        module = nn.Module()
        module.weight = nn.Parameter(torch.tensor([1 + 2j, torch.nan], dtype=torch.complex128))
        mask = lossprune.Mask({"weight": torch.tensor([True, False])})
        mask.enforce(module, torch.optim.SGD(module.parameters()))
        assert module.weight.tolist() == [1 + 2j, 0]

    def test_channels_last(self):
        torch.manual_seed(0)
        layer = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        mask = lossprune.prune(layer, "MP", sparsity=0.5).mask
        optimizer = torch.optim.AdamW(layer.parameters())
        mask.enforce(layer, optimizer)
        for _ in range(3):
            layer(torch.randn(2, 3, 5, 5)).square().mean().backward()
            optimizer.step()
            assert zeros(layer, mask)
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)


class TestMemory:
    """The same parameter, moved under the enforcement."""

    def test_another_dtype(self):
        model = network()
        mask = half_of(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        mask.enforce(model, optimizer)
        for dtype in (torch.float64, torch.bfloat16, torch.float32):
            model.to(dtype)
            step(model, optimizer)
            assert model[0].weight.dtype == dtype
            assert zeros(model, mask)

    def test_other_memory_under_the_same_parameter(self):
        model = network()
        mask = half_of(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        mask.enforce(model, optimizer)
        model[0].weight.data = torch.ones(16, 8)
        step(model, optimizer)
        assert zeros(model, mask)
        assert (model[0].weight == 0).sum() == mask["0.weight"].logical_not().sum()

    def test_a_dense_checkpoint_is_held_from_the_next_step_on_or_at_once_by_apply(self):
        model = network()
        dense = copy.deepcopy(model.state_dict())
        mask = half_of(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        mask.enforce(model, optimizer)
        model.load_state_dict(dense)
        assert not zeros(model, mask)
        step(model, optimizer)
        assert zeros(model, mask)
        model.load_state_dict(dense)
        assert zeros(mask.apply_(model), mask)

    def test_autograd_still_sees_that_a_saved_weight_was_changed(self):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        output = model(batch()[0]).sum()
        half_of(model).enforce(model, optimizer)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.backward()


class TestOptimizers:
    def test_of_another_model_is_refused(self):
        optimizer = torch.optim.AdamW(network().parameters())
        model = network()
        before = copy.deepcopy(model.state_dict())
        mask = half_of(model)
        with pytest.raises(PruningError, match="this AdamW holds none of the 2 masked ones"):
            mask.enforce(model, optimizer)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_several_each_with_a_part(self):
        model = network()
        mask = half_of(model)
        optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model[::2]]
        for optimizer in optimizers:
            mask.enforce(model, optimizer)
        for number in range(4):
            F.cross_entropy(model(batch()[0]), batch()[1]).backward()
            optimizers[number % 2].step()
            assert zeros(model, mask)

    def test_a_copy_is_free(self):
        model = network()
        mask = half_of(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        mask.enforce(model, optimizer)
        other, free = copy.deepcopy((model, optimizer))
        step(other, free)
        assert not zeros(other, mask)
        mask.enforce(other, free)
        step(other, free)
        assert zeros(other, mask)

    def test_the_wrapper_of_lightning(self):
        wrapper = pytest.importorskip("pytorch_lightning.core.optimizer").LightningOptimizer
        model = network()
        mask = half_of(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        mask.enforce(model, wrapper(optimizer))
        step(model, optimizer)
        assert zeros(model, mask)

    def test_the_wrapper_of_accelerate(self):
        accelerate = pytest.importorskip("accelerate")
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = network()
        mask = half_of(model)
        wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        with mask.enforce(wrapped, optimizer):
            for number in range(4):
                with accelerator.accumulate(wrapped):
                    loss = F.cross_entropy(wrapped(batch(number)[0]), batch()[1])
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                assert zeros(model, mask)


class TestLoops:
    @pytest.mark.parametrize("kind", ["SGD", "AdamW"])
    @pytest.mark.parametrize("form", ["fused", "foreach"])
    def test_accumulation_clipping_and_a_scaler_that_skips(self, kind, form):
        model = network()
        mask = half_of(model)
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01, **{form: True})
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        mask.enforce(model, optimizer)
        for number in range(8):
            inputs, labels = batch(number)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(inputs), labels)
            scaler.scale(loss).backward()
            if number % 2:
                if number == 5:
                    model[0].weight.grad[0, 0] = torch.inf
                before = copy.deepcopy(model.state_dict())
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                assert zeros(model, mask)
                same = torch.equal(before["0.weight"], model[0].weight)
                assert same == (number == 5)
        assert scaler.get_scale() == 512.0

    @pytest.mark.parametrize("compiled_step", [False, True])
    def test_compiled(self, compiled_step):
        """The graph is compiled by another back end in ``examples/compiled.py``."""
        model = network()
        mask = half_of(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True)
        compiled = torch.compile(model, backend="eager")
        mask.enforce(compiled, optimizer)
        step = torch.compile(optimizer.step, backend="eager") if compiled_step else optimizer.step
        for number in range(4):
            optimizer.zero_grad()
            F.cross_entropy(compiled(batch(number)[0]), batch()[1]).backward()
            step()
            assert zeros(model, mask)

    def test_two_processes_hold_the_same_weights(self, tmp_path):
        script = tmp_path / "two.py"
        script.write_text(TWO_PROCESSES)
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [sys.executable, *launch, str(script)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("6 steps, zeros in each, equal everywhere") == 2
        assert done.stdout.count("sharded (DTensor): prune before fully_shard; Mask.apply_") == 16
        assert done.stdout.count("sharded: zeros in each step, trained as whole") == 4
        assert done.stdout.count("tensor parallel: removed") == 2
        assert done.stdout.count("(16, 8) is divided by _S(0, 2), as by fully_shard over") == 2
        assert done.stdout.count("sharded after write_torch_pruning_: trained as whole, 0") == 2
        assert done.stdout.count("sharded after write_parametrizations_: trained as whole, 0") == 2


TWO_PROCESSES = """
import copy, os, sys
import torch, lossprune
from lossprune import pruning
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch import nn
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
torch.manual_seed(0)
network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
mask = lossprune.prune(network, "MP", sparsity=0.5).mask
model = DistributedDataParallel(network)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
mask.enforce(model, optimizer)
torch.manual_seed(dist.get_rank())
good = 0
for _ in range(6):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(torch.randn(12, 8)), torch.arange(12) % 4).backward()
    optimizer.step()
    weights = dict(network.named_parameters())
    good += all(not weights[n][~k].any() and weights[n][k].all() for n, k in mask.items())
mine = torch.cat([p.detach().flatten() for p in network.parameters()])
other = mine.clone()
dist.broadcast(other, 0)
if torch.equal(mine, other):
    print(f"{good} steps, zeros in each, equal everywhere")

mesh = init_device_mesh("cpu", (2,))
data = [(torch.linspace(-1, 1, 96).view(12, 8), torch.arange(12) % 4)]
sharded = fully_shard(copy.deepcopy(network), mesh=mesh)
for call in [
    lambda: lossprune.Mask.dense(sharded),
    lambda: lossprune.prune(sharded, "MP", sparsity=0.5),
    lambda: lossprune.measure(sharded, data),
    lambda: pruning.write_torch_pruning_(sharded, mask),
    lambda: pruning.write_parametrizations_(sharded, mask),
    lambda: lossprune.compact(sharded, mask),
    lambda: lossprune.deploy(sharded, mask, data[0][0]),
    lambda: lossprune.save_sparse(sharded, mask, "never"),
]:
    try:
        call()
    except lossprune.PruningError as error:
        print(error)


def trained(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0][0]), data[0][1]).backward()
        optimizer.step()
    model(data[0][0])  # torch's pruning computes its weights there
    return model


def full(model):
    return {name: value.full_tensor() for name, value in model.state_dict().items()}


def held(model, kind):
    # Trained under the mask, and after how many steps its zeros were exact, and no others.
    optimizer = kind(model.parameters(), lr=0.1)
    mask.enforce(model, optimizer)
    good = 0
    switches = hasattr(optimizer, "eval")
    for _ in range(4):
        if switches:
            optimizer.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0][0]), data[0][1]).backward()
        optimizer.step()
        if switches:
            optimizer.eval()
        now = full(model) if model is not alone else model.state_dict()
        good += all(not now[n][~k].any() and now[n][k].all() for n, k in mask.items())
    return now, good


from schedulefree import AdamWScheduleFree

for kind in (torch.optim.AdamW, AdamWScheduleFree):
    alone = copy.deepcopy(network)
    sharded = fully_shard(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), mesh=mesh)
    for name, value in sharded.state_dict().items():
        whole = distribute_tensor(network.state_dict()[name], mesh, value.placements)
        value.copy_(whole)
    with torch.no_grad():
        sharded(data[0][0])  # which leaves the weights gathered
    mask.apply_(sharded)
    assert not any(full(sharded)[n][~k].any() for n, k in mask.items())
    expected, _ = held(alone, kind)
    now, good = held(sharded, kind)
    if good == 4 and all(torch.allclose(now[n], v, atol=1e-5) for n, v in expected.items()):
        print("sharded: zeros in each step, trained as whole")

mesh_of_both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
plan = {"0": ColwiseParallel()}
parallel = parallelize_module(copy.deepcopy(network), mesh_of_both["tensor"], plan)
with torch.no_grad():
    parallel[0].weight.fill_(1.0)
if torch.equal(mask.apply_(parallel)[0].weight.full_tensor() != 0, mask["0.weight"]):
    print("tensor parallel: removed")
try:
    mask.apply_(fully_shard(parallel, mesh=mesh_of_both["data"]))
except lossprune.PruningError as error:
    print(error)

for write_ in (pruning.write_torch_pruning_, pruning.write_parametrizations_):
    whole = trained(write_(copy.deepcopy(network), mask))
    model = trained(fully_shard(write_(copy.deepcopy(network), mask), mesh=mesh))
    states = whole.state_dict(), model.state_dict()
    same = all(
        torch.allclose(value, states[1][name].full_tensor())
        for name, value in states[0].items()
        if hasattr(states[1][name], "full_tensor")
    )
    model.unshard()
    left = sum(int(model.get_submodule(n[0]).weight[~k].count_nonzero()) for n, k in mask.items())
    print(f"sharded after {write_.__name__}: trained {'as whole' if same else 'apart'}, {left}")
dist.destroy_process_group()
# torch's own threads may want the interpreter while it ends, which then aborts.
sys.stdout.flush()
os._exit(0)
"""
