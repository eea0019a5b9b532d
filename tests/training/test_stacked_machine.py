"""Stacks on the machine: how much memory they take, and on a GPU, that they do not wait for it."""

import platform
import subprocess
import sys

import pytest
import torch

from lossprune.training import StackedTraining
from tests.training.stacks import (
    assert_equal_states,
    convolutions,
    make_runs,
    normalised_inside,
    optimizers_of,
    perceptron,
)

MEMORY = """
import re
from pathlib import Path
import torch
from lossprune.data import load
from lossprune.networks import NETWORKS
from lossprune.training import StackedTraining, bytes_per_member, make_optimizer

torch.set_num_threads(1)
digits = load("digits", seed=1)

def seeded(seed):
    return torch.Generator().manual_seed(seed)

def peak(count):
    networks = [
        NETWORKS["MLP"](shape=digits.shape, hidden=(2000, 1000), generator=seeded(number))
        for number in range(count)
    ]
    optimizers = [make_optimizer(it, lr=0.01, l2=0.0) for it in networks]
    masks = [
        {name: torch.zeros(it.shape, dtype=torch.bool) for name, it in network.named_parameters()}
        for network in networks
    ]
    training = StackedTraining(networks, masks, [digits] * count, together=True)
    generators = [seeded(number) for number in range(count)]
    training.train_epoch(optimizers, generators=generators, batch_size=650)
    training.evaluate("valid")
    # Of this program alone: getrusage would begin with the peak of the process that started it.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024, networks[0]

(before, _), (after, network) = peak(2), peak(8)
print((after - before) / 6, bytes_per_member(network, digits, 650))
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="needs Linux's /proc")
@pytest.mark.full("the memory of stacks")
def test_memory_is_bounded_from_above_and_not_far():
    """Of a whole process, from two members to eight, with an order for each."""
    command = [sys.executable, "-c", MEMORY]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    measured, bound = map(float, told.split())
    assert 0.6 * bound < measured <= bound


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("build", [perceptron, convolutions, normalised_inside])
def test_on_cuda_a_recorded_step_is_that_of_the_cpu(digits, build):
    """The step as a CUDA graph, the last part of a batch, a second epoch on the same graph."""
    here = make_runs(lambda seed: build(seed).double())
    there = make_runs(lambda seed: build(seed).double())
    there.networks = [network.cuda() for network in there.networks]
    there.optimizers = optimizers_of(there.networks)
    data = digits.to("cuda")
    one = StackedTraining(here.networks, here.masks, [digits] * 4, together=True)
    other = StackedTraining(there.networks, there.masks, [data] * 4)
    for epoch in range(3):
        found = other.train_epoch(there.optimizers, generators=there.generators(epoch))
        expected = one.train_epoch(here.optimizers, generators=here.generators(epoch))
        assert found == pytest.approx(expected, rel=1e-9)
    one.store(range(4))
    other.store(range(4))
    for network, reference in zip(there.networks, here.networks, strict=True):
        assert_equal_states(network.cpu(), reference, 1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("always")
def test_on_cuda_no_step_waits_for_the_device(digits, recwarn):
    """An epoch of many steps synchronises as often as one of few."""
    data = digits.to("cuda")
    runs = make_runs(lambda seed: perceptron(seed).cuda())
    training = StackedTraining(runs.networks, runs.masks, [data] * 4)
    waits = []
    for batch_size in (600, 600, 10, 10):  # the first of each records the graph
        recwarn.clear()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            training.train_epoch(
                runs.optimizers, generators=runs.generators(0), batch_size=batch_size
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(it.message) for it in recwarn))
    assert waits[1] == waits[3]
