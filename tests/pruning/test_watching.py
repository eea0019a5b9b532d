"""What a person hears of a pruning while it goes: progress, stages, how long, whether it knows."""

import os
import pty
import sys
import time
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn

import lossprune
from lossprune.progress import OneLine
from lossprune.pruning import LongPruningWarning

TRAINED = ("MP", "LM", "QM", "OBD", "EF-OBD", "Wanda")


def network(wide=6):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, wide), nn.Tanh(), nn.Linear(wide, 3))


def data(count=9):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 4, generator=generator)
    return [(inputs, inputs[:, :3].argmax(1))]


class Slow(nn.Module):
    """A network that takes its time."""

    def __init__(self, seconds):
        super().__init__()
        self.network, self.seconds = network(), seconds

    def forward(self, inputs):
        time.sleep(self.seconds)
        return self.network(inputs)


class TestOnStage:
    def test_gets_mask_and_record_of_every_stage(self):
        seen = []
        result = lossprune.prune(
            network(), "QM", sparsity=0.8, data=data(), stages=4,
            on_stage=lambda mask, record: seen.append((mask, record)),
        )  # fmt: skip
        expected = lossprune.prune_by_stage(network(), "QM", sparsity=0.8, data=data(), stages=4)
        assert [mask for mask, _ in seen] == [mask for mask, _ in expected]
        assert tuple(record for _, record in seen) == result.stages

    def test_ends_the_pruning_by_what_it_raises(self):
        seen = []

        def on_stage(mask, record):
            seen.append(record.stage)
            if record.stage == 2:
                raise KeyError("enough")

        with pytest.raises(KeyError, match="enough"):
            lossprune.prune(network(), "MP", sparsity=0.8, stages=5, on_stage=on_stage)
        assert seen == [1, 2]

    @pytest.mark.parametrize(("name", "value"), [("on_stage", 3), ("progress", "yes")])
    def test_that_is_none(self, name, value):
        with pytest.raises(ValueError, match=f"{name} must be .* got {value!r}"):
            lossprune.prune(network(), "MP", sparsity=0.5, **{name: value})


class TestProgress:
    @pytest.mark.parametrize("progress", [None, False, True])
    def test_without_a_terminal_only_where_it_is_asked_for(self, progress, capsys):
        result = lossprune.prune(
            network(), "QM", sparsity=0.8, data=data(), stages=2, progress=progress
        )
        out, err = capsys.readouterr()
        assert out == ""
        expected = [
            f"stage {stage.stage}/2: loss {stage.loss_after:.4g}, {stage.loss_before:.4g} before, "
            f"sparsity {stage.sparsity:.4f}"
            for stage in result.stages
        ]
        assert err.splitlines() == (expected if progress else [])

    @pytest.mark.parametrize("memory", [1, None])
    @pytest.mark.parametrize("estimator", ["exact", "tolerance", "monte-carlo:1"])
    def test_counts_the_examples_of_each_measurement(self, memory, estimator):
        class Heard:
            def __init__(self):
                self.advances = []

            def advance(self, what, done, total, text=""):
                self.advances.append((what, done, total))

            def close(self, what):
                self.advances.append((what, 0, 0))

        heard = Heard()
        stages = lossprune.prune_by_stage(
            network(), "QM", sparsity=0.8, data=data(), examples=7, stages=2, progress=heard,
            memory=memory, estimator=estimator,
        )  # fmt: skip
        next(stages)
        assert {what for what, _, _ in heard.advances} == {"example"}
        *counts, end = [(done, total) for _, done, total in heard.advances]
        assert end == (0, 0)
        assert {total for _, total in counts} == {7}
        done = [done for done, _ in counts]
        # What is measured, and then the loss of what is left.
        assert done.count(0) == done.count(7) == 2
        assert all(after > before or after == 0 for before, after in pairwise(done))
        if memory == 1 and estimator == "exact":
            assert done == [*range(8), *range(8)]

    def test_below_a_notebooks_cell_in_one_line_that_stays(self, capsys):
        line = OneLine()
        line.advance("stage", 0, 2)
        line.advance("example", 3, 7)
        time.sleep(0.3)  # it is written four times a second
        line.advance("example", 4, 7)
        line.close("example")
        line.advance("stage", 1, 2, "loss 1.5, 1.4 before")
        line.end()
        begun, within, ended = capsys.readouterr().err.split("\r")
        assert begun.split() == ["stage", "─" * 24, "0/2"]
        assert within.split() == ["stage", "─" * 24, "0/2,", "example", "4/7"]
        assert ended.startswith("stage  ━━━━━━━━━━━━────────────  1/2  0 s left")
        assert ended.rstrip(" ").endswith("loss 1.5, 1.4 before\n")

    def test_on_a_terminal_once_it_has_taken_a_while(self):
        """In a process with a terminal: nothing of what is quick, then bars, none left."""
        script = (
            "import lossprune, torch\n"
            "from tests.pruning.test_watching import Slow, data, network\n"
            "lossprune.prune(network(), 'MP', sparsity=0.5, stages=3)\n"
            "print('quick')\n"
            "lossprune.prune(Slow(0.35), 'LM', sparsity=0.5, data=data(), stages=3)\n"
            "print('slow')\n"
        )
        pid, terminal = pty.fork()
        if pid == 0:
            os.environ.update(TERM="xterm", COLUMNS="80", LINES="24")
            os.execv(sys.executable, [sys.executable, "-W", "ignore", "-c", script])
        seen = b""
        while True:
            try:
                part = os.read(terminal, 4096)
            except OSError:
                break
            if not part:
                break
            seen += part
        os.close(terminal)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, seen.decode()
        quick, slow = seen.decode().split("quick\r\n")
        assert quick == ""
        bars, _, after = slow.partition("slow")
        assert "stage" in bars
        assert "example" in bars
        assert "/3" in bars
        assert " left" in bars
        assert "loss 1." in bars
        assert after == "\r\n"


def test_exact_curvature_that_will_take_long_is_foretold():
    """At 0.3 s an example, by the first five seconds of it."""
    settings = {"sparsity": 0.5, "data": data(2000), "memory": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error", LongPruningWarning)
        with pytest.raises(LongPruningWarning) as told:
            lossprune.prune(Slow(0.3), "QM", **settings)
    sentence = str(told.value)
    assert sentence.startswith(
        "the exact curvature, 2 backward passes for each of 2,000 examples in each of 14 stages, "
        "will take about 2 h "
    )
    assert "; about 1 h " in sentence
    assert "with examples=1000, " in sentence
    assert sentence.endswith(" min with stages=5")
    assert "monte-carlo" not in sentence  # which would take more passes


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(0.2)
        return gradient


class ManyClasses(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 1001)

    def forward(self, inputs):
        return SlowBackward.apply(self.fc(inputs))


def test_it_is_foretold_before_the_first_example_is_done():
    """Of 1,000 passes of 0.2 s, after the first five seconds of them."""
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error", LongPruningWarning)
        with pytest.raises(LongPruningWarning) as told:
            lossprune.prune(ManyClasses(), "QM", sparsity=0.5, data=data(20), memory=1)
    assert time.perf_counter() - began < 60  # an example takes 200 s
    assert "1,000 backward passes for each of 20 examples in each of 14 stages" in str(told.value)
    assert "with estimator='monte-carlo' (10 passes)" in str(told.value)


class TestGuessing:
    @pytest.mark.parametrize("criterion", lossprune.CRITERIA)
    def test_is_asked_about_where_the_criterion_is_for_trained_networks(self, criterion):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            result = lossprune.prune(network(), criterion, sparsity=0.5, data=data(300), stages=2)
        if criterion not in TRAINED:
            assert not told
            return
        (warning,) = told
        assert warning.filename == __file__
        loss = result.stages[0].loss_before
        assert str(warning.message) == (
            f"the network's loss before pruning is {loss:.4g}, and that of guessing among 3 "
            "classes 1.099: is it trained, and are its weights loaded?"
        )

    @pytest.mark.parametrize(
        "other",
        [
            {"data": None},
            {"start": lossprune.Mask.dense(network())},
            {"loss": "mse", "data": [(torch.randn(5, 4), torch.randn(5, 3))]},
            {"trained": True},
        ],
        ids=["no data", "pruned before", "another loss", "trained"],
    )
    def test_is_not_asked_about_elsewhere(self, other):
        settings = {"sparsity": 0.5, "data": data(300)} | other
        model = network()
        if settings.pop("trained", False):
            model = nn.Linear(4, 3, bias=False)
            with torch.no_grad():
                model.weight.copy_(torch.eye(3, 4))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lossprune.prune(model, "MP", **settings)
