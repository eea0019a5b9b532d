"""λ, stages and budgets that are found on the way, against what plain torch says of them."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lossprune
from lossprune.pruning import PruningError, prune_by_stage

EXAMPLES = 60


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    inputs, targets = data()[0]
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
    return net


def data(seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(EXAMPLES, 12, generator=generator, dtype=torch.float64)
    return [(inputs, inputs[:, :4].argmax(1))]


class Fresh:
    """Other examples at each stage, by its number alone."""

    def __init__(self, stage: int = 1) -> None:
        self.stage = stage

    def __iter__(self):
        yield from data(100 + self.stage)


def losses(net: nn.Module, mask: dict[str, torch.Tensor], batch: tuple) -> torch.Tensor:
    weights = {name: p.detach() * mask.get(name, 1) for name, p in net.named_parameters()}
    logits = torch.func.functional_call(net, weights, (batch[0],))
    return F.cross_entropy(logits, batch[1], reduction="none")


def without(net: nn.Module, scores: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """The mask without the smallest scores, by sorting."""
    flat = torch.cat([s.flatten() for s in scores.values()])
    kept = torch.ones(len(flat), dtype=torch.bool)
    kept[flat.argsort(stable=True)[:count]] = False
    parts = kept.split([s.numel() for s in scores.values()])
    return {n: k.reshape(s.shape) for (n, s), k in zip(scores.items(), parts, strict=True)}


class TestReg:
    @pytest.mark.parametrize("criterion", ["LM", "QM", "OBD"])
    def test_the_first_stage_takes_the_lowest_rung_within_a_standard_error_of_the_best(
        self, criterion
    ):
        net, (batch,) = network(), data()
        record = lossprune.prune(net, criterion, sparsity=0.6, data=[batch], stages=1, reg="auto")
        apart = torch.arange(1, EXAMPLES + 1) % 5 == 0
        fit, held = [tuple(part[where] for part in batch) for where in (~apart, apart)]
        found = lossprune.measure(net, [fit])
        theta = {name: net.get_parameter(name).detach() for name in found.gradient}
        formula = lossprune.CRITERIA[criterion].saliency
        plain = {n: formula(theta[n], found.gradient[n], found.ggn_diagonal[n]) for n in theta}
        count = record.mask.removed

        def mask(reg: float) -> dict[str, torch.Tensor]:
            return without(net, {n: plain[n] + 0.5 * reg * theta[n] ** 2 for n in theta}, count)

        gone = {n: ~kept for n, kept in mask(0.0).items()}
        dearest = max(plain[n][gone[n]].max() for n in theta if gone[n].any())
        squares = torch.cat([theta[n][gone[n]] ** 2 for n in theta])
        unit = float(2 * dearest / squares.mean())
        regs = [0.0, *(unit * 10 ** ((r - 2) / 2) for r in range(1, 9))]
        each = [losses(net, mask(reg), held) for reg in regs]
        best = min(range(9), key=lambda r: each[r].mean())
        excess = [(one - each[best]).mean() for one in each]
        error = [(one - each[best]).std() / math.sqrt(len(one)) for one in each]
        chosen = next(r for r in range(9) if excess[r] <= error[r] or r == best)

        (stage,) = record.stages
        assert [tried.reg for tried in stage.tried] == pytest.approx(regs, rel=1e-9)
        means = [float(one.mean()) for one in each]
        assert [tried.loss for tried in stage.tried] == pytest.approx(means, rel=1e-9)
        assert stage.rung == chosen
        assert all(torch.equal(record.mask[n], kept) for n, kept in mask(regs[chosen]).items())

    def test_later_stages_try_the_neighbours_of_the_rung_before(self):
        stages = lossprune.prune(
            network(), "QM", sparsity=0.8, data=Fresh(), stages=6, reg="auto"
        ).stages
        assert len(stages[0].tried) == 9
        for before, after in itertools.pairwise(stages):
            assert abs(before.rung - after.rung) <= 1
            assert len(after.tried) == (3 if 0 < before.rung < 8 else 2)

    def test_of_magnitudes_there_is_nothing_to_choose(self):
        with pytest.raises(ValueError, match=r'reg="auto" has nothing to choose for MP'):
            lossprune.prune(network(), "MP", sparsity=0.5, data=data(), reg="auto")

    def test_too_few_examples_to_keep_some_out(self):
        few = [tuple(part[:4] for part in data()[0])]
        with pytest.raises(PruningError, match='reg="auto" sets one of every 5 examples apart'):
            lossprune.prune(network(), "QM", sparsity=0.5, data=few, reg="auto", stages=1)


@pytest.mark.parametrize(
    ("first_stage", "strides"), [(0.04, 1.0), (0.2, -math.log(0.8) / 0.05)]
)  # a short stage counts as one of 5 %
def test_statistics_are_averaged_with_those_of_earlier_stages(first_stage, strides):
    net, beta = network(), 0.7
    drawn = [data(5), data(6)]
    draws = itertools.chain(drawn)

    class Draws:
        def __iter__(self):
            return iter(next(draws))

    got = lossprune.prune(
        net,
        "QM",
        sparsity=0.5,
        data=Draws(),
        stages=2,
        schedule=(first_stage, 0.5),
        reg=0.0,
        average=beta,
    ).mask
    theta = {n: net.get_parameter(n).detach() for n in ("0.weight", "2.weight")}
    one = lossprune.measure(net, drawn[0])
    formula = lossprune.CRITERIA["QM"].saliency
    total = sum(t.numel() for t in theta.values())
    first = without(
        net,
        {n: formula(theta[n], one.gradient[n], one.ggn_diagonal[n]) for n in theta},
        round(first_stage * total),
    )
    share = beta**strides
    two = lossprune.measure(net, drawn[1], mask=first)
    scores = {}
    for n, weight in theta.items():
        g, h = (
            (b[n] + share * a[n]) / (1 + share)
            for a, b in ((one.gradient, two.gradient), (one.ggn_diagonal, two.ggn_diagonal))
        )
        scores[n] = formula(weight, g, h).masked_fill(~first[n], -math.inf)
    wanted = without(net, scores, round(0.5 * total))
    assert all(torch.equal(got[n], wanted[n]) for n in theta)


@pytest.mark.parametrize(("criterion", "averaged"), [("LM", True), ("OBD", False)])
def test_what_is_found_on_the_way_averages_where_there_is_a_gradient(criterion, averaged):
    asked = {"sparsity": 0.5, "stages": 2, "data": data(), "reg": "auto"}
    running = prune_by_stage(network(), criterion, **asked)
    list(running)
    assert bool(running.averages) is averaged


class TestStages:
    @pytest.mark.parametrize("criterion", ["LM", "QM", "OBD"])
    def test_each_is_within_the_tolerance_or_as_short_as_stages_get(self, criterion):
        result = lossprune.prune(
            network(), criterion, sparsity=0.9, data=data(), stages="auto", tolerance=0.3
        )
        assert result.mask.removed == round(0.9 * result.mask.total)
        before, taken_back = 0.0, 0
        for stage in result.stages:
            gone = math.log1p(-before) - math.log1p(-stage.sparsity)
            miss = abs(stage.realised_change - stage.predicted_change)
            # Whole weights are removed: a stage may be longer than the shortest by one of them.
            one = 2 / (result.mask.total * (1 - before))
            # … and none is shorter than one weight, of few that are left.
            assert miss <= 0.3 * gone * (1 + one) or gone <= -math.log(0.99) + one
            for tried in stage.taken_back:
                assert tried.sparsity > stage.sparsity
                step = math.log1p(-before) - math.log1p(-tried.sparsity)
                assert abs(tried.realised_change - tried.predicted_change) > 0.3 * step
            taken_back += len(stage.taken_back)
            before = stage.sparsity
        assert taken_back
        assert len(result.stages) > 2

    @pytest.mark.parametrize("stages", [1, 2, 5])
    def test_a_ceiling_on_examples_is_kept_and_the_sparsity_reached(self, stages):
        result = lossprune.prune(
            network(),
            "QM",
            sparsity=0.9,
            data=data(),
            examples=50,
            stages="auto",
            max_examples=50 * stages + 49,
            tolerance=1e-3,
        )
        assert len(result.stages) == stages
        assert result.mask.removed == round(0.9 * result.mask.total)

    def test_a_ceiling_on_seconds_ends_it_early(self):
        result = lossprune.prune(
            network(), "QM", sparsity=0.9, data=data(), stages="auto", seconds=1e-9, tolerance=1e-3
        )
        assert len(result.stages) == 2  # the first shows how long one takes
        assert result.mask.removed == round(0.9 * result.mask.total)


class TestBudgets:
    @pytest.mark.parametrize("stages", [8, "auto"])
    def test_the_loss_is_as_near_to_its_limit_as_one_more_weight_allows(self, stages):
        net, valid = network(), data(9)
        result = lossprune.prune(
            net, "QM", data=data(), stages=stages, validation=valid, max_loss_increase=0.3
        )
        dense = float(losses(net, {}, valid[0]).mean())
        reached = float(losses(net, dict(result.mask), valid[0]).mean())
        assert reached - dense <= 0.3
        curve = result.curve
        assert (curve[0].removed, curve[0].loss) == (0, pytest.approx(dense, rel=1e-9))
        assert [p.removed for p in curve] == sorted({p.removed for p in curve})
        at = [p.removed for p in curve].index(result.mask.removed)
        assert curve[at].loss == pytest.approx(reached, rel=1e-9)
        assert curve[at + 1].removed == result.mask.removed + 1
        assert curve[at + 1].loss - dense > 0.3

    def test_the_error_is_in_percentage_points(self):
        net, valid = network(), data(9)
        result = lossprune.prune(
            net, "QM", data=data(), stages=8, validation=valid, max_error_increase=10
        )
        inputs, targets = valid[0]
        before = (net(inputs).argmax(1) != targets).double().mean()
        after = (result.apply_(net)(inputs).argmax(1) != targets).double().mean()
        assert result.mask.sparsity > 0
        assert float(after - before) <= 0.1 + 1e-12

    @pytest.mark.parametrize(("stages", "to_far"), [(None, 112), (20, 20)])
    def test_stages_to_a_budget_are_short(self, stages, to_far):
        asked = {"max_loss_increase": 0.02, "validation": data(9), "stages": stages}
        first = lossprune.prune(network(), "QM", data=data(), **asked).stages[0]
        assert first.removed == round((1 - 0.01 ** (1 / to_far)) * (12 * 16 + 16 * 4))

    def test_magnitudes_need_validation_data_alone(self):
        result = lossprune.prune(network(), "MP", validation=data(9), max_loss_increase=0.2)
        assert result.curve[0].loss + 0.2 >= next(
            p.loss for p in result.curve if p.removed == result.mask.removed
        )

    def test_a_sparsity_is_where_it_ends_at_most(self):
        result = lossprune.prune(
            network(), "QM", sparsity=0.3, data=data(), stages=3, max_loss_increase=100.0
        )
        assert result.mask.removed == round(0.3 * result.mask.total)

    def test_nothing_stops_it_before_the_last_weight(self):
        result = lossprune.prune(network(), "QM", data=data(), stages=3, max_loss_increase=1e9)
        assert result.mask.removed == result.mask.total - 1

    def test_the_weights_of_a_compensation_are_those_of_the_mask(self):
        net = network()
        result = lossprune.prune(
            net, "QM", data=data(), stages=6, compensate=True, max_loss_increase=0.3,
            validation=data(9),
        )  # fmt: skip
        at = next(p for p in result.curve if p.removed == result.mask.removed)
        reached = losses(result.apply_(net), {}, data(9)[0]).mean()
        assert float(reached) == pytest.approx(at.loss, rel=1e-9)


@pytest.mark.parametrize(
    "asked",
    [
        {"sparsity": 0.9, "stages": 5, "reg": "auto"},
        {"sparsity": 0.9, "stages": "auto", "tolerance": 0.5},
        {"sparsity": 0.9, "stages": "auto", "tolerance": 1.0, "reg": "auto", "compensate": True},
        {"stages": 8, "max_loss_increase": 0.3, "validation": data(9)},
    ],
)
def test_stopped_after_any_stage_it_goes_on_to_the_same_masks(asked):
    def stages(net, **state):
        return prune_by_stage(net, "QM", data=fresh, **asked, **state)

    fresh, net = Fresh(), network()
    whole, averages, networks = [], [], []
    running = stages(net)
    for mask, record in running:
        whole.append((mask, record))
        averages.append(running.averages)
        networks.append({n: v.clone() for n, v in net.state_dict().items()})
        fresh.stage += 1
    assert len(whole) > 2
    for completed in {1, len(whole) // 2, len(whole) - 1}:
        net.load_state_dict(networks[completed - 1])
        fresh.stage = completed + 1
        done = [record for _, record in whole[:completed]]
        step = done[-1].compensation
        going = stages(
            net,
            start=whole[completed - 1][0],
            completed=completed,
            done=done,
            averages=averages[completed - 1],
            damping=step and step.damping,
        )
        rest = []
        for mask, _ in going:
            rest.append(mask)
            fresh.stage += 1
        assert rest == [mask for mask, _ in whole[completed:]]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"sparsity": 0.5, "reg": "best"}, r"""reg must be a number .* or "auto", got 'best'"""),
        ({"sparsity": 0.5, "average": 1.0}, r"average must be a number in \[0, 1\), got 1.0"),
        ({"sparsity": 0.5, "tolerance": 0.1}, r'tolerance=0.1 is for stages="auto"'),
        ({"sparsity": 0.5, "stages": "auto", "seconds": 0}, "seconds must be a number above 0"),
        ({"sparsity": 0.5, "stages": "auto", "max_examples": 10}, "give examples="),
        ({"sparsity": 0.5, "stages": "all"}, "stages must be a whole number"),
        ({"max_loss_increase": -1}, "max_loss_increase must be a number of at least 0"),
        ({"max_error_increase": math.nan}, "max_error_increase must be a number"),
        ({"max_loss_increase": 1, "recalibrate": "end"}, 'give recalibrate="stages"'),
        ({"max_loss_increase": 1, "pattern": "2:4"}, "pattern '2:4' is there as a whole"),
        ({"max_loss_increase": 1, "schedule": [0.5]}, "a schedule that is a sequence"),
        ({"max_loss_increase": 1, "validation": iter(data())}, "validation is iterated anew"),
        (
            {"max_loss_increase": 1, "compensate": lossprune.Compensation(finish=2)},
            r"Compensation\(finish=2\) is for a number of stages",
        ),
    ],
)
def test_what_does_not_go_is_told_in_a_sentence(asked, told):
    with pytest.raises(ValueError, match=told):
        lossprune.prune(network(), "QM", data=data(), **asked)


def test_an_error_rate_that_a_loss_lacks_is_refused():
    batch = [(data()[0][0], torch.zeros(EXAMPLES, 4, dtype=torch.float64))]
    with pytest.raises(PruningError, match="give max_loss_increase"):
        lossprune.prune(network(), "QM", data=batch, loss="mse", max_error_increase=1)


def test_a_sensitivity_has_no_stages_to_choose_for():
    with pytest.raises(ValueError, match='reg="auto" is chosen from stage to stage'):
        lossprune.sensitivity(network(), data(), reg="auto")
