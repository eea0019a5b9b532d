"""The stage loop: counts, nesting, records, resuming, data, and what it refuses."""

import dataclasses
import inspect
import json
import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lossprune
from lossprune.pruning import PruningError, prune_by_stage
from lossprune.pruning.settings import Pruning


def network(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5), nn.Tanh(),
        nn.Linear(5, 3),
    ).to(dtype)  # fmt: skip


def pool(examples: int = 20, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(examples, 2, 6, dtype=dtype, generator=generator), torch.arange(examples) % 3


N = 2 * 4 * 3 + 16 * 5 + 5 * 3  # 119


class Fresh:
    """Data that are other examples at every stage."""

    def __init__(self, completed: int = 0) -> None:
        self.stage = completed

    def __iter__(self):
        inputs, targets = pool()
        inputs = inputs.roll(self.stage, 0) + 0.1 * self.stage
        self.stage += 1
        yield inputs[:13], targets[:13]
        yield inputs[13:], targets[13:]


def mean_loss(model, batches, mask) -> float:
    """Independent of the library: a masked copy, evaluated."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, kept in mask.items():
        weights[name][~kept] = 0.0
    model.eval()
    total = examples = 0
    with torch.no_grad():
        for inputs, targets in batches:
            logits = torch.func.functional_call(model, weights, (inputs,))
            total += float(F.cross_entropy(logits, targets, reduction="sum"))
            examples += len(targets)
    return total / examples


class TestCounts:
    @pytest.mark.parametrize("criterion", ["MP", "LM", "QM", "OBD"])
    @pytest.mark.parametrize("schedule", ["exponential", "linear"])
    @pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.956, 0.99])
    def test_every_stage_removes_exactly_as_many_as_the_schedule_says(
        self, criterion, schedule, sparsity
    ):
        stages = prune_by_stage(
            network(), criterion, sparsity=sparsity, data=[pool()], stages=7, schedule=schedule
        )
        targets = lossprune.sparsities(schedule, sparsity, 7)
        seen = list(stages)
        assert len(seen) == 7
        for number, ((mask, record), target) in enumerate(zip(seen, targets, strict=True), start=1):
            assert record.stage == number
            assert mask.total == N
            assert record.removed == mask.removed == round(target * N)
            assert record.sparsity == mask.sparsity == round(target * N) / N
            assert sum(int((~kept).sum()) for kept in mask.values()) == mask.removed

    @pytest.mark.parametrize("criterion", ["LM", "QM", "OBD"])
    def test_masks_are_nested(self, criterion):
        masks = [
            mask
            for mask, _ in prune_by_stage(
                network(), criterion, sparsity=0.9, data=Fresh(), stages=9
            )
        ]
        for before, after in pairwise(masks):
            assert not any((after[name] & ~before[name]).any() for name in before)

    @pytest.mark.parametrize("criterion", lossprune.CRITERIA)
    def test_models_of_the_loss_take_several_stages_where_none_are_asked_for(self, criterion):
        expected = {"LM": 14, "QM": 14, "OBD": 14, "EF-OBD": 14, "SynFlow": 100}.get(criterion, 1)
        settings = {"sparsity": 0.5, "data": [pool()]}
        stages = list(prune_by_stage(network(), criterion, **settings))
        assert [record.removed for _, record in stages] == [
            round(kappa * N) for kappa in lossprune.sparsities("exponential", 0.5, expected)
        ]
        own = dataclasses.replace(lossprune.CRITERIA["LM"], name="own", stages=1)
        assert len(lossprune.prune(network(), own, **settings).stages) == 1

    @pytest.mark.parametrize("criterion", ["MP", "LM", "QM", "OBD"])
    def test_a_penalty_is_taken_where_none_is_given(self, criterion):
        settings = {"sparsity": 0.6, "data": [pool()], "stages": 5}
        expected = 0.01 if criterion in ("LM", "QM") else 0.0
        taken = lossprune.prune(network(), criterion, **settings).mask
        assert taken == lossprune.prune(network(), criterion, **settings, reg=expected).mask
        if expected:
            assert taken != lossprune.prune(network(), criterion, **settings, reg=0.0).mask

    def test_literal_counts(self):
        result = lossprune.prune(network(), "MP", sparsity=0.956, stages=4)
        # round(119 · (1 − 0.044^(i/4))), by hand: 64.50, 94.04, 107.57, 113.76
        assert [record.removed for record in result.stages] == [64, 94, 108, 114]

    def test_a_half_rounds_to_the_even_count(self):
        model = nn.Linear(5, 1, bias=False)
        assert lossprune.prune(model, "MP", sparsity=0.5).mask.removed == 2
        assert lossprune.prune(model, "MP", sparsity=0.7).mask.removed == 4

    def test_magnitudes_in_order(self):
        model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[0.1, -5.0, 0.0], [1.0, -0.3, 2.0]]))
            model[1].weight.copy_(torch.tensor([[0.2, 3.0]]))
        mask = lossprune.prune(model, "MP", sparsity=0.5, stages=3).mask
        assert mask["0.weight"].tolist() == [[False, True, False], [True, False, True]]
        assert mask["1.weight"].tolist() == [[False, True]]

    def test_ties_go_by_position(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        with torch.no_grad():
            for layer in model:
                layer.weight.fill_(-1.0)
        mask = lossprune.prune(model, "MP", sparsity=5 / 8).mask
        assert mask["0.weight"].tolist() == [[False, False], [False, False]]
        assert mask["1.weight"].tolist() == [[False, True], [True, True]]

    def test_stages_so_fine_that_some_remove_nothing(self):
        result = lossprune.prune(network(), "QM", sparsity=0.1, data=[pool()], stages=100)
        removed = [record.removed for record in result.stages]
        assert removed[-1] == 12
        idle = [
            record
            for record, before in zip(result.stages, [0, *removed], strict=False)
            if record.removed == before
        ]
        assert len(idle) == 88
        for record in idle:
            assert record.predicted_change == 0.0
            assert record.realised_change == 0.0

    def test_sequence_as_schedule(self):
        result = lossprune.prune(
            network(), "LM", sparsity=0.8, data=[pool()], schedule=(0.1, 0.1, 0.8)
        )
        assert [record.removed for record in result.stages] == [12, 12, 95]

    def test_one_weight_may_be_left_but_not_none(self):
        model = nn.Linear(10, 10)
        assert lossprune.prune(model, "MP", sparsity=0.99).mask.removed == 99
        for sparsity in (0.996, 0.99999):
            with pytest.raises(PruningError, match=rf"{sparsity} leaves none of the 100"):
                lossprune.prune(model, "MP", sparsity=sparsity)

    def test_a_layer_may_be_emptied(self):
        model = network()
        with torch.no_grad():
            model[4].weight.mul_(1e-3)
        mask = lossprune.prune(model, "MP", sparsity=0.7).mask
        assert not mask["4.weight"].any()

    def test_deterministic(self):
        runs = [
            lossprune.prune(network(), "QM", sparsity=0.9, data=[pool()], stages=5)
            for _ in range(2)
        ]
        assert runs[0].mask == runs[1].mask
        assert [dataclasses.replace(record, seconds=0) for record in runs[0].stages] == [
            dataclasses.replace(record, seconds=0) for record in runs[1].stages
        ]


class TestRecords:
    @pytest.mark.parametrize("criterion", ["MP", "LM", "QM", "OBD"])
    def test_losses_are_those_of_the_examples_of_the_stage(self, criterion):
        model = network()
        stages = prune_by_stage(
            model, criterion, sparsity=0.8, data=Fresh(), examples=17, stages=4, reg=0.01
        )
        before = lossprune.Mask.dense(model)
        for stage, (mask, record) in enumerate(stages):
            inputs, targets = (torch.cat(parts)[:17] for parts in zip(*Fresh(stage), strict=True))
            batch = [(inputs, targets)]
            assert record.loss_before == pytest.approx(mean_loss(model, batch, before), rel=1e-12)
            assert record.loss_after == pytest.approx(mean_loss(model, batch, mask), rel=1e-12)
            assert record.realised_change == record.loss_after - record.loss_before
            assert record.realised_change != 0
            assert record.seconds > 0
            before = mask

    @pytest.mark.parametrize("criterion", ["LM", "QM", "OBD"])
    @pytest.mark.parametrize("reg", [0.0, 10.0])
    def test_predicted_change_is_that_of_the_model_without_the_penalty(
        self, criterion, reg, by_autograd
    ):
        model = network()
        stages = prune_by_stage(model, criterion, sparsity=0.8, data=Fresh(), stages=3, reg=reg)
        before = lossprune.Mask.dense(model)
        for stage, (mask, record) in enumerate(stages):
            inputs, targets = (torch.cat(parts) for parts in zip(*Fresh(stage), strict=True))
            _, gradient, diagonal = by_autograd(model, inputs, targets, mask=before)
            expected = 0.0
            for name, kept in mask.items():
                gone = before[name] & ~kept
                theta = model.state_dict()[name][gone]
                linear = -(gradient[name][gone] * theta).sum()
                quadratic = (0.5 * diagonal[name][gone] * theta**2).sum()
                expected += {"LM": linear, "QM": linear + quadratic, "OBD": quadratic}[criterion]
            assert record.predicted_change == pytest.approx(float(expected), rel=1e-9)
            before = mask

    def test_the_smallest_saliencies_go(self, by_autograd):
        """The whole of a stage, from the oracle's statistics by a sort."""
        model = network()
        inputs, targets = pool()
        mask = lossprune.prune(
            model, "QM", sparsity=0.7, data=[(inputs, targets)], stages=1, reg=0.02
        ).mask  # fmt: skip
        _, g, h = by_autograd(model, inputs, targets)
        saliencies = torch.cat(
            [
                (-g[name] * theta + 0.5 * h[name] * theta**2).abs().flatten()
                + 0.01 * theta.flatten() ** 2
                for name in mask
                for theta in [model.state_dict()[name]]
            ]
        )
        order = saliencies.argsort()
        kept = torch.ones(N, dtype=torch.bool)
        kept[order[: round(0.7 * N)]] = False
        assert torch.equal(torch.cat([part.flatten() for part in mask.values()]), kept)

    def test_magnitude_needs_no_data_and_records_no_losses_without(self):
        result = lossprune.prune(network(), "MP", sparsity=0.5, stages=2)
        for record in result.stages:
            assert record.loss_before is None
            assert record.loss_after is None
            assert record.realised_change is None
            assert record.predicted_change is None

    def test_magnitude_does_not_depend_on_the_number_of_stages_or_on_data(self):
        masks = [
            lossprune.prune(network(), "MP", sparsity=0.8, stages=stages, data=data).mask
            for stages, data in ((1, None), (6, None), (6, [pool()]))
        ]
        assert masks[0] == masks[1] == masks[2]

    def test_can_be_written_as_json(self):
        for data in (None, [pool()]):
            result = lossprune.prune(network(), "MP", sparsity=0.5, data=data, stages=2)
            rows = [dataclasses.asdict(record) for record in result.stages]
            assert json.loads(json.dumps(rows)) == rows

    def test_mask_carries_the_criterion(self):
        assert lossprune.prune(network(), "LM", sparsity=0.5, data=[pool()]).mask.criterion == "LM"


class TestResuming:
    @pytest.mark.parametrize("criterion", ["MP", "QM"])
    @pytest.mark.parametrize("completed", range(6))
    def test_from_any_stage_equals_never_stopped(self, criterion, completed, tmp_path):
        settings = {"sparsity": 0.9, "stages": 6, "examples": 15, "reg": 1e-3}
        whole = list(prune_by_stage(network(), criterion, data=Fresh(), **settings))
        start = None
        if completed:
            whole[completed - 1][0].save(tmp_path / "mask")
            start = lossprune.Mask.load(tmp_path / "mask")

        rest = list(
            prune_by_stage(
                network(),
                criterion,
                data=Fresh(completed),
                start=start,
                completed=completed,
                **settings,
            )
        )

        assert len(rest) == 6 - completed
        for (mask, record), (expected, other) in zip(rest, whole[completed:], strict=True):
            assert mask == expected
            assert dataclasses.replace(record, seconds=0) == dataclasses.replace(other, seconds=0)

    @pytest.mark.parametrize("completed", [-1, 3, 4])
    def test_more_stages_completed_than_there_are(self, completed):
        with pytest.raises(ValueError, match=f"between 0 and 2, got {completed}"):
            prune_by_stage(network(), "MP", sparsity=0.5, stages=3, completed=completed)

    @pytest.mark.parametrize(
        ("start", "message"),
        [
            (lambda: lossprune.Mask.dense(nn.Linear(3, 2)), r"'0\.weight'"),
            (lambda: lossprune.Mask.dense(network()[:2]), r"'4\.weight'"),
            (
                lambda: lossprune.Mask(
                    {name: kept.mT for name, kept in lossprune.Mask.dense(network()).items()}
                ),
                r"\(4, 3, 2\) for '0\.weight', the weight \(4, 2, 3\)",
            ),
            (
                lambda: lossprune.prune(network(), "MP", sparsity=0.8).mask,
                "start has 95 weights removed.*stage 2 removes 60",
            ),
        ],
        ids=["other names", "names missing", "other shapes", "too sparse"],
    )
    def test_start_that_does_not_fit(self, start, message):
        with pytest.raises(ValueError, match=message):
            prune_by_stage(
                network(), "MP", sparsity=0.5, stages=2, schedule="linear", start=start(),
                completed=1,
            )  # fmt: skip


class TestFromAPrunedNetwork:
    @staticmethod
    def start():
        return lossprune.prune(network(), "MP", sparsity=0.2).mask  # 24 of 119

    @pytest.mark.parametrize(
        ("schedule", "removed"),
        [
            # 24 + 71 i/3 by hand: 47.67, 71.33; 119 − 95 (24/95)^(i/3): 58.98, 81.07
            ("linear", [48, 71, 95]),
            ("exponential", [59, 81, 95]),
            ((0.21, 0.5, 0.8), [25, 60, 95]),
        ],
    )
    @pytest.mark.parametrize("criterion", ["MP", "QM", "random"])
    def test_stages_begin_where_the_start_is(self, schedule, removed, criterion):
        settings = {"sparsity": 0.8, "schedule": schedule, "stages": 3, "data": [pool()]}
        start = self.start()
        result = lossprune.prune(network(), criterion, start=start, seed=3, **settings)
        assert [record.removed for record in result.stages] == removed
        assert not any((result.mask[name] & ~kept).any() for name, kept in start.items())
        assert result.stages[0].loss_before == pytest.approx(
            mean_loss(network(), [pool()], start), rel=1e-12
        )
        *_, (mask, _) = prune_by_stage(network(), criterion, origin=start, seed=3, **settings)
        assert mask == result.mask

    def test_can_be_resumed(self):
        settings = {"sparsity": 0.8, "stages": 4, "data": [pool()], "origin": self.start()}
        whole = [mask for mask, _ in prune_by_stage(network(), "LM", **settings)]
        rest = prune_by_stage(network(), "LM", start=whole[1], completed=2, **settings)
        assert [mask for mask, _ in rest] == whole[2:]

    def test_a_pattern_is_reached_from_what_it_allows(self):
        layer = nn.Linear(8, 4)
        kept = torch.ones(4, 8, dtype=torch.bool)
        kept[:, ::4] = False  # one of four, at a sparsity of 1/4
        stages = lossprune.prune(
            layer,
            "MP",
            pattern="2:4",
            stages=2,
            schedule="linear",
            start=lossprune.Mask({"weight": kept}),
        ).stages
        assert [record.removed for record in stages] == [12, 16]

    def test_as_sparse_as_asked_for_removes_nothing_more(self):
        # 60 of 119 is 0.504, yet what 0.5 rounds to
        start = lossprune.prune(network(), "MP", sparsity=0.5).mask
        again = lossprune.prune(network(), "LM", sparsity=0.5, stages=3, start=start, data=[pool()])
        assert again.mask == start

    @pytest.mark.parametrize(
        ("start", "settings", "message"),
        [
            (
                lambda: lossprune.prune(network(), "MP", sparsity=0.8).mask,
                {"sparsity": 0.5},
                "start has 95 of 119 weights removed, but sparsity 0.5 is 60 of them: it must be "
                "at least 0.798",
            ),
            (
                lambda: lossprune.prune(network(), "MP", sparsity=0.3).mask,
                {"sparsity": 0.5, "schedule": [0.1, 0.5]},
                "start has 36 weights removed, but stage 1 removes 12 in all",
            ),
            (lambda: lossprune.Mask.dense(network()[:2]), {"sparsity": 0.5}, r"'4\.weight'"),
            (lambda: "mask.safetensors", {"sparsity": 0.5}, "must be a lossprune.Mask, got str"),
        ],
    )
    def test_a_start_that_does_not_fit(self, start, settings, message):
        with pytest.raises(ValueError, match=message):
            lossprune.prune(network(), "MP", start=start(), **settings)


class TestWeightsThatAreZero:
    """They go before all others, and the rest as if they had not been there."""

    @pytest.mark.parametrize("reg", [0.0, 0.1])
    @pytest.mark.parametrize("criterion", lossprune.CRITERIA)
    def test_go_first(self, criterion, reg):
        start = TestFromAPrunedNetwork.start()
        model = start.apply_(network())
        settings = {"data": [pool()], "seed": 3, "reg": reg, "sparsity": 0.5, "scope": "global"}
        settings["schedule"] = (0.1, 24 / 119, 0.5)
        masks = prune_by_stage(model, criterion, **settings)
        (first, _), (second, _), (third, _) = masks
        assert first.removed == 12
        assert not any((start[name] & ~kept).any() for name, kept in first.items())
        assert second == start
        ((mask, _),) = prune_by_stage(model, criterion, start=start, completed=2, **settings)
        assert third == mask

    def test_go_first_within_layers_and_groups(self):
        backwards = lossprune.Criterion("largest first", lambda theta, g, h: -theta.abs())
        model = nn.Sequential(nn.Linear(8, 1, bias=False), nn.Linear(4, 1, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[0.0, 1.0, 0.0, -0.0, 4.0, 0.0, 3.0, 2.0]]))
            model[1].weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 0.0]]))
        layers = lossprune.prune(model, backwards, sparsity=0.5, scope="layer").mask
        assert layers["0.weight"].tolist() == [[False, True, False, False, True, False, True, True]]
        assert layers["1.weight"].tolist() == [[True, True, False, False]]
        groups = lossprune.prune(model, backwards, pattern="2:4").mask
        assert groups["0.weight"].tolist() == [[False, True, False, True, False, False, True, True]]


class TestData:
    def test_an_iterator_does_for_one_stage_only(self):
        mask = lossprune.prune(network(), "LM", sparsity=0.5, data=iter([pool()]), stages=1).mask
        assert mask.removed == 60
        for data in (iter([pool()]), (batch for batch in [pool()])):
            with pytest.raises(ValueError, match=r"each of 2 stages, but an .* or a DataLoader$"):
                lossprune.prune(network(), "LM", sparsity=0.5, data=data, stages=2)
            with pytest.raises(
                ValueError,
                match=r"of 14 stages, what LM takes if stages is not given, but .*, or stages=1$",
            ):
                lossprune.prune(network(), "LM", sparsity=0.5, data=data)

    def test_iterated_anew_at_each_stage(self):
        data = Fresh()
        lossprune.prune(network(), "LM", sparsity=0.5, data=data, stages=5)
        assert data.stage == 5

    def test_a_shuffling_loader_draws_fresh_examples_and_leaves_the_random_state(self):
        inputs, targets = pool(200)
        inputs[:, 0, 0] = torch.arange(200)

        class Seen(DataLoader):
            def __iter__(self):
                for batch in super().__iter__():
                    seen[-1].extend(batch[0][:, 0, 0].tolist())
                    yield batch

        loader = Seen(TensorDataset(inputs, targets), batch_size=10, shuffle=True)
        seen: list[list] = [[]]
        model = network()
        torch.manual_seed(7)
        state = torch.get_rng_state()
        stages = prune_by_stage(model, "LM", sparsity=0.5, data=loader, examples=20, stages=3)
        for _ in stages:
            seen.append([])
            assert torch.equal(torch.get_rng_state(), state)

        first, second, third, _ = seen
        assert len(first) == len(second) == len(third) == 20
        assert len({tuple(first), tuple(second), tuple(third)}) == 3

        seen = [[]]  # the same draws again, as the state is the same
        lossprune.prune(model, "LM", sparsity=0.5, data=loader, examples=20, stages=3)
        assert seen[0] == first + second + third

    def test_examples_without_data(self):
        with pytest.raises(ValueError, match=r"examples=5 .*no data"):
            lossprune.prune(network(), "MP", sparsity=0.5, examples=5)


class TestNumbersThatAreNotFinite:
    """The parameter and the stage are named."""

    @pytest.mark.parametrize(
        "criterion",
        [
            "MP",
            "LM",
            "QM",
        ],
    )
    def test_loss(self, criterion):
        inputs, targets = pool()
        inputs[3, 0, 0] = torch.nan
        with pytest.raises(PruningError, match=r"stage 1 of 4: the loss is not finite \(nan\)"):
            lossprune.prune(network(), criterion, sparsity=0.5, data=[(inputs, targets)], stages=4)

    def test_loss_at_a_later_stage(self):
        class Breaks(Fresh):
            def __iter__(self):
                for inputs, targets in super().__iter__():
                    yield (inputs / 0 if self.stage == 3 else inputs), targets

        with pytest.raises(PruningError, match="stage 3 of 5: the loss"):
            lossprune.prune(network(), "MP", sparsity=0.5, data=Breaks(), stages=5)

    def test_gradient(self):
        class Root(nn.Module):
            """√ of what is exactly 0: finite, with an infinite slope."""

            def __init__(self):
                super().__init__()
                self.a = nn.Linear(2, 2, bias=False)
                self.b = nn.Linear(2, 3)

            def forward(self, x):
                return self.b(self.a(x).sqrt())

        model = Root()
        with torch.no_grad():
            model.a.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        batch = (torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
        with pytest.raises(
            PruningError, match=r"stage 1 of 14: the gradient of 'a\.weight' is not finite in 2 of"
        ):
            lossprune.prune(model, "LM", sparsity=0.5, data=[batch])
        with pytest.raises(PruningError, match=r"the curvature of 'a\.weight' is not finite"):
            lossprune.prune(model, "OBD", sparsity=0.5, data=[batch])

    def test_saliency(self):
        model = network(torch.float32)
        with torch.no_grad():
            model[4].weight[0, 0] = 1e30  # whose square is infinite
        with pytest.raises(
            PruningError, match=r"stage 1 of 2: the saliency of '4\.weight' .* in 1 of 80"
        ):
            lossprune.prune(model, "MP", sparsity=0.5, stages=2)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_weight(self, value):
        model = network()
        with torch.no_grad():
            model[6].weight[1, 2] = value
        with pytest.raises(PruningError, match=r"stage 1 of 1: the saliency of '6\.weight'"):
            lossprune.prune(model, "MP", sparsity=0.5)

    def test_is_a_value_error(self):
        assert issubclass(PruningError, ValueError)


class Parts(nn.Module):
    """Two layers that work, behind ReLUs; a head used in training only, and a copy of everything.

    ``expert`` works for examples whose first number is positive only.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.expert = nn.Linear(4, 6, bias=False)
        self.auxiliary = nn.Linear(6, 3)
        self.average = nn.ModuleDict({"first": nn.Linear(4, 6), "head": nn.Linear(6, 3)})

    def forward(self, x):
        chosen = x[:, :1] > 0
        hidden = self.first(x).relu()
        if chosen.any():
            hidden = hidden + chosen * self.expert(x)
        self.auxiliary(hidden)
        return self.head(hidden)


def parts_data(experts: bool) -> list:
    inputs = torch.randn(9, 4, generator=torch.Generator().manual_seed(2))
    inputs[:, 0] = -inputs[:, 0].abs()
    if experts:
        inputs[7, 0] = 1.0
    return [(inputs[:5], torch.arange(5) % 3), (inputs[5:], torch.arange(4) % 3)]


class TestUnusedParts:
    @pytest.mark.parametrize("criterion", lossprune.CRITERIA)
    def test_are_named_whatever_the_criterion(self, criterion):
        model, settings = Parts(), {"sparsity": 0.5, "data": parts_data(True), "stages": 2}
        with pytest.warns(UserWarning, match="do not depend") as every:
            result = lossprune.prune(model, criterion, **settings)
        told = [warning for warning in every if "do not depend" in str(warning.message)]
        assert result.unused == ("auxiliary.weight", "average.first.weight", "average.head.weight")
        (warning,) = told
        assert str(warning.message) == (
            "the outputs do not depend on auxiliary.weight, average.first.weight, "
            "average.head.weight in evaluation mode (60 of 126 prunable weights): they count in "
            "the sparsity, and criteria that look at the loss remove them first; "
            "exclude=['auxiliary', 'average'] leaves them out"
        )
        assert warning.filename == __file__
        exclude = ["auxiliary", "average"]
        result = lossprune.prune(model, criterion, exclude=exclude, **settings)  # warns no more
        assert result.unused == ()
        assert result.mask.removed == 33

    def test_those_that_only_other_examples_use_are_not_among_them(self):
        with pytest.warns(UserWarning, match="auxiliary"):
            result = lossprune.prune(Parts(), "LM", sparsity=0.5, data=parts_data(False))
        assert "expert.weight" in result.unused

    def test_a_layer_behind_a_relu_that_is_shut_is_used(self):
        model = network()[-3:].float()
        model[1] = nn.ReLU()
        with torch.no_grad():
            model[0].bias.fill_(-1e6)
        data = [(torch.randn(6, 16), torch.arange(6) % 3)]
        result = lossprune.prune(model, "LM", sparsity=0.5, data=data)
        assert result.unused == ()

    def test_nothing_is_known_without_data(self):
        assert lossprune.prune(Parts(), "MP", sparsity=0.5).unused == ()

    @pytest.mark.parametrize("criterion", ["LM", "QM", "EF-OBD"])
    def test_outputs_without_a_graph_are_no_zero_gradient(self, criterion):
        def forward(model, batch):
            return model(batch[0]).detach(), batch[1]

        settings = {"sparsity": 0.5, "data": [pool()], "forward": forward}
        with pytest.raises(PruningError, match="stage 1 of 14: the outputs do not depend on any"):
            lossprune.prune(network(), criterion, **settings)
        assert lossprune.prune(network(), "MP", **settings).unused == ()


@pytest.mark.parametrize("reg", [-1e-9, math.nan, math.inf, "1", 10**400])
def test_reg_must_be_a_number_of_at_least_zero(reg):
    with pytest.raises(ValueError, match=f"reg must be .* got {reg!r}"):
        lossprune.prune(network(), "MP", sparsity=0.5, reg=reg)


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("criterion", "qm", "QM"),
        ("criterion", "EFOBD", "EF-OBD"),
        ("scope", "Global", "global"),
        ("schedule", "exponental", "exponential"),
        ("loss", "crossentropy", "cross_entropy"),
        ("estimator", "monte_carlo:20", "monte-carlo"),
        ("pattern", "Unstructured", "unstructured"),
    ],
)
def test_names_that_are_nearly_right_are_told_which_are(name, value, meant):
    settings = {"criterion": "QM", "sparsity": 0.5, "data": [pool()], name: value}
    with pytest.raises(ValueError, match=rf"^(unknown )?{name} .*\(did you mean '{meant}'\?\)"):
        lossprune.prune(network(), **settings)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan, None])
def test_sparsity_must_lie_below_one(sparsity):
    with pytest.raises(ValueError, match=f"sparsity must be .* got {sparsity!r}"):
        lossprune.prune(network(), "MP", sparsity=sparsity)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"stages": 10**9}, "stages must be a whole number from 1 to 1,000,000, got 1000000000"),
        ({"stages": 1001}, "stages must be at most 1,000 for 119 prunable weights, .* got 1001"),
        ({"seed": 1.5}, r"seed must be a whole number or None, got 1\.5"),
    ],
)
def test_what_would_go_on_for_ever_or_break_later_is_refused_at_once(argument, message):
    with pytest.raises(ValueError, match=message):
        lossprune.prune(network(), "QM", sparsity=0.5, data=[pool()], **argument)


def test_a_seed_may_be_any_whole_number():
    """Also one of more than 64 bits, as hashes are."""
    data, settings = [pool()], {"sparsity": 0.5, "estimator": "monte-carlo:1"}
    one, other = (
        lossprune.prune(network(), "QM", data=data, seed=seed, **settings).stages[0]
        for seed in (2**70, 2**70 + 1)
    )
    assert one.predicted_change != other.predicted_change


def test_wrong_arguments_are_answered_before_any_data_is_read():
    def untouched():
        raise AssertionError("data was read")
        yield

    with pytest.raises(ValueError, match="reg"):
        prune_by_stage(network(), "QM", sparsity=0.5, data=untouched(), reg=-1)


def test_settings_are_those_of_the_call():
    """What ``prune`` takes and what it is checked and kept as have the same names and defaults.

    But for who watches, which is no setting of what is done.
    """
    fields = inspect.signature(Pruning).parameters.values()
    *parameters, progress, on_stage = inspect.signature(lossprune.prune).parameters.values()
    assert (progress.name, on_stage.name) == ("progress", "on_stage")
    assert [(field.name, field.kind, field.default) for field in fields] == [
        (parameter.name, parameter.kind, parameter.default) for parameter in parameters
    ]


class TestANetworkThatChangesBetweenStages:
    @pytest.mark.parametrize("criterion", ["MP", "QM", "SynFlow"])
    def test_is_looked_at_anew(self, criterion):
        """As a pruning that begins with the changed network where this one stands."""
        settings = {"sparsity": 0.8, "data": [pool()], "stages": 2}
        model, changed = network(), network()
        with torch.no_grad():
            for tensor in (*changed.parameters(), changed[1].running_mean):
                tensor.add_(torch.linspace(-0.5, 0.5, tensor.numel()).view_as(tensor))
        stages = prune_by_stage(model, criterion, **settings)
        first, _ = next(stages)
        model.load_state_dict(changed.state_dict())
        mask, record = next(stages)
        rest = prune_by_stage(changed, criterion, start=first, completed=1, **settings)
        ((expected, other),) = rest
        assert mask == expected
        assert dataclasses.replace(record, seconds=0) == dataclasses.replace(other, seconds=0)

    def test_parameters_that_are_gone(self):
        model = network()
        stages = prune_by_stage(model, "MP", sparsity=0.8, stages=2)
        next(stages)
        model[4] = nn.Tanh()
        with pytest.raises(PruningError, match=r"stage 2 of 2: .*no longer has '4\.weight'"):
            next(stages)
