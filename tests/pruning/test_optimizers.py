"""Removed weights stay 0 under every optimizer that people use, or it is refused."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

import lossprune
from lossprune.pruning import PruningError

schedulefree = pytest.importorskip("schedulefree")
pytorch_optimizer = pytest.importorskip("pytorch_optimizer")

X = torch.linspace(-1, 1, 96).view(12, 8).sin()
LABELS = torch.arange(12) % 4
STEPS = 6  # more than the five after which slow weights move
# Those that cannot be tried here: they take other gradients, or need something that is not there.
UNTRIED = {"SparseAdam", "SpectralSphere", "DeMo", "DistributedMuon", "AliG"}
STILL = {"SaRA", "AdaShift", "TRAC"}  # move no weight within a few steps
OWN = {  # how an optimizer is made that needs more than parameters
    "AdaLOMO": lambda kind, model: kind(model),
    "AdamMini": lambda kind, model: kind(model),
    "LOMO": lambda kind, model: kind(model),
    "BSAM": lambda kind, model: kind(model.parameters(), num_data=12),
    "Ranger21": lambda kind, model: kind(model.parameters(), num_iterations=20, lr=0.1),
    "WSAM": lambda kind, model: kind(model, model.parameters(), torch.optim.SGD, lr=0.1),
    "GSAM": lambda kind, model: kind(
        model.parameters(), torch.optim.SGD(model.parameters(), lr=0.1), model, _Rho()
    ),
}


class _Rho:
    """What GSAM asks of a schedule of its radius."""

    lr = min_lr = max_lr = min_value = max_value = value = 0.05

    def step(self) -> float:
        return 0.05


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6, bias=False), nn.Tanh(), nn.Linear(6, 4, bias=False))


def kinds():
    for package in (torch.optim, schedulefree, pytorch_optimizer):
        for name, kind in sorted(vars(package).items()):
            wraps = package is schedulefree and "Wrapper" in name
            if not inspect.isclass(kind) or not (wraps or issubclass(kind, Optimizer)):
                continue
            if kind is not Optimizer and name not in UNTRIED and not name.startswith("Base"):
                marks = pytest.mark.filterwarnings("ignore")
                yield pytest.param(kind, id=f"{package.__name__}.{name}", marks=marks)


def made(kind, model):
    """Build an optimizer: by its own rule, from parameters, in groups, or around another one."""
    sgd = torch.optim.SGD
    if kind.__name__ in OWN:
        return OWN[kind.__name__](kind, model)
    required = [
        name
        for name, it in inspect.signature(kind).parameters.items()
        if it.default is it.empty and it.kind not in (it.VAR_KEYWORD, it.VAR_POSITIONAL)
    ]
    if required[0] in ("optimizer", "base"):
        return kind(sgd(model.parameters(), lr=0.1, momentum=0.9))
    if "base_optimizer" in required:
        return kind(model.parameters(), sgd, lr=0.1)
    if issubclass(kind, getattr(pytorch_optimizer.optimizer.muon, "MuonBase", ())):
        return kind([{"params": list(model.parameters()), "use_muon": True}])
    if "lr" in required:
        return kind(model.parameters(), lr=0.1)
    return kind(model.parameters())


def step(model, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), LABELS)
        loss.backward(create_graph=type(optimizer).__name__ in ("AdaHessian", "SophiaH"))
        return loss

    if hasattr(optimizer, "train"):
        optimizer.train()
    closure()
    name = type(optimizer).__name__
    if "SAM" in name or "Closure" in name or name == "LBFGS":
        if name == "GSAM":
            optimizer.set_closure(F.cross_entropy, X, LABELS)
            optimizer.step()
        else:
            optimizer.step(closure)
    else:
        optimizer.step()


def left(model, mask):
    weights = dict(model.named_parameters())
    return sum(int(weights[name][~kept].count_nonzero()) for name, kept in mask.items())


@pytest.mark.parametrize("kind", list(kinds()))
def test_matrix(kind):
    """Through steps, evaluation, training again, and a state that is saved and loaded."""
    model = network()
    optimizer = made(kind, model)
    mask = lossprune.prune(model, "MP", sparsity=0.5).mask
    tells = issubclass(kind, Optimizer) and not hasattr(kind, "fused_backward")
    if not tells or kind.__name__ == "SafeFP16Optimizer":
        with pytest.raises(PruningError, match=f"this {kind.__name__} does not: call mask"):
            mask.enforce(model, optimizer)
        return
    mask.enforce(model, optimizer)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(STEPS):
        step(model, optimizer)
        assert not left(model, mask)
    for switch in ("eval", "train", "backup_and_load_cache", "clear_and_load_backup"):
        if hasattr(optimizer, switch):
            getattr(optimizer, switch)()
            assert not left(model, mask), switch
    if kind.__name__ not in STILL:
        for before, after in zip(start, model.parameters(), strict=True):
            assert not torch.equal(before, after)

    other = network()
    other.load_state_dict(model.state_dict())
    again = made(kind, other)
    mask.enforce(other, again)
    again.load_state_dict(optimizer.state_dict())
    if hasattr(again, "eval"):
        again.eval()
    assert not left(other, mask)
    step(other, again)
    assert not left(other, mask)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("kind", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
def test_kept_weights_train_as_they_do_without_a_mask_on_their_own(kind, foreach):
    """A layer whose removed weights cannot matter: its inputs there are 0."""
    inputs = torch.cat([X[:, :4], torch.zeros(12, 4)], 1)
    kept = inputs.any(0).expand(4, 8).clone()
    outcomes = []
    for holds in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(8, 4)
        optimizer = getattr(schedulefree, kind)(layer.parameters(), lr=0.1, foreach=foreach)
        optimizer.train()
        if holds:
            lossprune.Mask({"weight": kept}).enforce(layer, optimizer)
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(layer(inputs), LABELS).backward()
            optimizer.step()
        optimizer.eval()
        outcomes.append(layer.weight.detach()[kept])
    assert torch.equal(*outcomes)


def test_a_training_that_began_before_the_pruning():
    model = network()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.1)
    step(model, optimizer)
    optimizer.eval()
    mask = lossprune.prune(model, "MP", sparsity=0.5).mask
    with mask.enforce(model, optimizer):
        optimizer.train()
        assert not left(model, mask)
        step(model, optimizer)
        optimizer.eval()
        assert not left(model, mask)
    step(model, optimizer)
    assert left(model, mask)


def test_other_weights_that_nobody_knows_are_told_at_the_first_step():
    class Switching(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["other"] = parameter.detach().clone()

        def eval(self): ...
        def train(self): ...

    model = network()
    optimizer = Switching(model.parameters(), lr=0.1)
    lossprune.prune(model, "MP", sparsity=0.5).mask.enforce(model, optimizer)
    with pytest.raises(PruningError, match="this Switching does not say which of its state"):
        step(model, optimizer)


def test_slow_weights_around_a_schedule_free_optimizer():
    model = network()
    optimizer = pytorch_optimizer.Lookahead(pytorch_optimizer.ScheduleFreeAdamW(model.parameters()))
    optimizer.optimizer.train()
    mask = lossprune.prune(model, "MP", sparsity=0.5).mask
    mask.enforce(model, optimizer)
    for _ in range(STEPS):
        step(model, optimizer)
    optimizer.optimizer.eval()
    assert not left(model, mask)
