"""The call: prune a network, at once or stage by stage."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lossprune.progress import Progress
from lossprune.pruning.automatic import Until
from lossprune.pruning.choices import Choices
from lossprune.pruning.compensation import Compensation
from lossprune.pruning.criteria import Criterion
from lossprune.pruning.curvature.batch import Forward
from lossprune.pruning.curvature.estimators import Estimator
from lossprune.pruning.curvature.losses import Loss, LossFunction
from lossprune.pruning.curvature.statistics import Statistics
from lossprune.pruning.mask import Mask
from lossprune.pruning.pace import Forecast
from lossprune.pruning.result import PruningResult
from lossprune.pruning.scopes import Scope
from lossprune.pruning.settings import Pruning
from lossprune.pruning.skipped import numbers_in
from lossprune.pruning.stages import StageRecord, Stages
from lossprune.pruning.watching import (
    check_watching,
    described,
    shown,
    warn_of_the_first,
    warn_of_what_is_left_out,
    warning_here,
    warning_of_long,
)


def prune(
    model: nn.Module,
    criterion: str | Criterion,
    *,
    sparsity: float | None = None,
    data: Iterable[Any] | None = None,
    examples: int | None = None,
    stages: int | str | None = None,
    schedule: str | Sequence[float] = "exponential",
    reg: float | str | None = None,
    average: float | None = None,
    tolerance: float | None = None,
    max_examples: int | None = None,
    seconds: float | None = None,
    validation: Iterable[Any] | None = None,
    max_loss_increase: float | None = None,
    max_error_increase: float | None = None,
    until: Until | None = None,
    parameters: Choices | None = None,
    exclude: Choices | None = None,
    scope: str | Scope | None = None,
    pattern: str | None = "unstructured",
    multiply_adds: float | None = None,
    example: Any = None,
    loss: str | Loss | LossFunction = "cross_entropy",
    forward: Forward | None = None,
    estimator: str | Estimator = "exact",
    memory: int | None = None,
    seed: int | None = None,
    sharded: bool = False,
    start: Mask | None = None,
    compensate: bool | Compensation = False,
    recalibrate: str | None = None,
    progress: bool | None = None,
    on_stage: Callable[[Mask, StageRecord], Any] | None = None,
) -> PruningResult:
    """Find which weights of ``model`` to remove so that a model of its loss rises least.

    In each stage i the statistics that the criterion needs are measured at θ ⊙ m of the stage
    before, on fresh examples; every weight that is left gets its saliency + ½ λ θ²; and the
    smallest over all layers together, or as ``scope`` and ``pattern`` say, are removed until
    round(κᵢ · N) are gone.  A weight once removed stays removed, and θ itself does not change
    unless ``compensate`` moves what is left.
    Weights that are exactly 0 go before all others, whatever the criterion; equal ones by position.
    Source: Laurent et al., "Revisiting Loss Modelling for Unstructured Pruning", 2020.

    Args:
        model: left unchanged; ``result.apply_(model)`` prunes it.
        criterion: a name in ``lossprune.CRITERIA`` or a :class:`Criterion`.
        sparsity: κ, the fraction of the prunable weights removed at the end, in [0, 1); with an
            N:M pattern it is 1 − N/M and may be left out; with a budget, the most that is removed.
        data: iterable of batches: (inputs, targets), dicts of the network's keyword arguments and
            ``labels``, or whatever ``forward`` understands; iterated anew at each stage, so an
            iterator will not do for several.  A criterion that needs no statistics (MP) does
            without; given data, its stages record their losses.
        examples: how many to read a stage, exactly; None reads all.  A stage holds its examples
            until it ends, where the iterable puts them.
        stages: π; if not given, what the criterion says: 14 for LM, QM, OBD and EF-OBD, 100 for
            SynFlow, 1 for the others.  Without a sparsity it is the number of stages to 99 %, and
            112 where several are the rule.  ``"auto"``: each stage goes as far as the model holds
            (see ``tolerance``).
        schedule: ``"exponential"``, ``"linear"``, ``"cubic"``, or a rising sequence of sparsities.
        reg: λ ≥ 0, the step-size penalty; if not given, what the criterion says: 0.01 for LM and
            QM, 0 for the others.  ``"auto"``: chosen at every stage, by the loss on a fifth of its
            examples that are kept out of the measurement.
        average: β in [0, 1): the share that is kept of what earlier stages measured, when a stage
            adds its own gradient and curvature, for each 5 % of the weights left that the stage
            before removed, and at least once; if not given, 0.9 where ``reg`` or ``stages`` is
            ``"auto"`` or no sparsity is given, and the criterion has a gradient, else 0.
        tolerance: of ``stages="auto"``: how many nats the model may be off, by the realised change
            of the loss, where a stage leaves 1/e of what it found, and in proportion to the
            logarithm of what it leaves; 0.1 if not given.  A stage within it makes the next one
            longer; one beyond it is taken back, and a shorter one tried on the same statistics.
        max_examples: of ``stages="auto"``: the most that all stages read together.
        seconds: of ``stages="auto"``: about how long all stages may take.
        validation: batches to judge each stage's mask by, as ``data``; for ``result.curve``.
        max_loss_increase: a budget: the pruning ends with the sparsest mask on its way whose mean
            loss on the validation data (if not given: on the examples that the data gives first)
            is above that before pruning by no more than this.
        max_error_increase: a budget of the share of wrong answers there, in percentage points.
        until: ``until(mask, moved)``, in the place of a sparsity: the pruning ends with the first
            mask on its way of which it is true, to one in 10,000 of the weights, such as
            :class:`lossprune.FileSize`.  Once true it must be so of all masks that remove more;
            ``moved`` are parameters and buffers that a pruning has moved, by name.
        parameters: which weights to prune, if not all that stand in products with activations: a
            name, glob pattern, type of module, module, function of (name, parameter, module), or a
            sequence of these; see :func:`lossprune.pruning.prunable_weights`.
        exclude: which of them not, in the same ways, or ``"first and last"`` for the first and
            last layer that the network registers.
        scope: which weights compete: a name in ``SCOPES`` or a :class:`Scope`; if not given, what
            the criterion says: ``"row"`` for Wanda, ``"global"`` for the others;
            ``"multiply-adds"`` divides each saliency by the multiply-adds that its weight takes
            part in.
        pattern: ``"unstructured"``, or ``"N:M"``, such as ``"2:4"``, to keep N in every group of M
            weights that are neighbours along a layer's inputs.
        multiply_adds: instead of a sparsity, the share that is left of the multiply-adds of all
            prunable weights, in (0, 1]; whatever the scope.  What is left is at most that, and by
            less than one weight's below it (by one of each layer, where the scope has quotas).
            κ, of ``schedule`` and ``start`` as well, is then the share of them that is gone.
        example: what multiply-adds are counted on: a batch of inputs, a tuple of arguments or a
            dict of keyword arguments, of which the first example is run; if not given, that of the
            first batch of ``data``.
        loss: a name in ``LOSSES``, a :class:`Loss`, or, for criteria that need no curvature and
            for ``estimator="empirical-fisher"``, any function of (outputs, targets).
        forward: ``forward(model, batch)`` gives (outputs, targets) of batches of any other form;
            as in :func:`measure`.
        estimator: of the GGN diagonal: a name in ``ESTIMATORS`` or an :class:`Estimator`.
        memory: bytes that a measurement may take at once; as in :func:`measure`.
        seed: of what an estimator or a criterion draws, for each stage apart; if not given it
            draws from torch's global generator as it stands, and leaves that as it was.
        sharded: whether the data of each process of a ``torch.distributed`` group is its own share;
            as in :func:`measure`.
        start: the mask of a network that is pruned already, to prune it further: what it removes
            stays removed, and the schedule begins at its sparsity κ₀ (see
            :func:`lossprune.sparsities`).  ``sparsity`` is still of all prunable weights.
        compensate: whether each stage also moves the weights that are left, to where a second-order
            model of the loss has them after the removal; how, a :class:`Compensation` says.  The
            moved weights are in ``result.weights``, and stages after one are measured at them.
        recalibrate: ``"stages"`` to estimate the running statistics of batch normalisation anew
            after each stage, on its examples, ``"end"`` after the last one; they are in
            ``result.buffers``, and :func:`lossprune.recalibrate` says how.
        progress: whether to show stages, examples and the time that is left on standard error; if
            not given, where that is a terminal or a notebook, and the work takes over two seconds.
        on_stage: ``on_stage(mask, record)`` is called after each stage.  What it returns does not
            matter; what it raises ends the pruning.

    Exact curvature that will take over five minutes in all is foretold, in a warning that says what
    would shorten it, as soon as a few seconds of measuring show it.

    Weights that the network's outputs do not depend on in evaluation mode, such as those of a copy
    or a head that is used in training only, count in the sparsity, and criteria that look at the
    loss remove them first: a warning and ``result.unused`` name them, where there is data.

    What is not pruned is in ``result.skipped``; where matrices of a considerable size are left out
    and neither ``parameters`` nor ``exclude`` says so, a warning has what takes them in.

    Under an initialised ``torch.distributed`` group every process must call this with the same
    model, and with the same data or ``sharded``; they share the work, and each gets the same mask.

    Raises:
        ValueError: an argument out of range; ``start`` is not a mask of this network, or has more
            removed than ``sparsity`` asks for.
        PruningError: no weight would be left; the data does not do (see :func:`measure`); a loss,
            gradient, curvature or saliency is not finite.  The stage is named.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    >>> batches = [(torch.randn(32, 8), torch.arange(32) % 4)]
    >>> result = prune(model, "QM", sparsity=0.75, data=batches, stages=3)
    >>> result.mask
    Mask(144 of 192 weights removed, 2 parameters)
    >>> [stage.removed for stage in result.stages]
    [71, 116, 144]
    """
    settings = locals()  # each is a parameter here and a field of Pruning, but for these two
    del settings["progress"], settings["on_stage"]
    check_watching(progress, on_stage)
    pruning, warn = Pruning(**settings), warning_here()
    records, total = [], pruning.path.total
    with shown(progress) as told:
        running = Stages(pruning, progress=told, on_long=warning_of_long(warn))
        warn_of_what_is_left_out(running, warn)
        mask = running.before
        told.advance("stage", 0, total)
        for mask, record in running:
            if not records:
                warn_of_the_first(running, warn)
            records.append(record)
            told.advance("stage", record.stage, total, described(record))
            if on_stage is not None:
                on_stage(mask, record)
    return result_of(model, mask, records, running)


def result_of(
    model: nn.Module, mask: Mask, records: Sequence[StageRecord], stages: Stages
) -> PruningResult:
    """Return what the stages came to, after the last one."""
    parameters = dict(model.named_parameters())
    moved = stages.moved
    return PruningResult(
        mask,
        tuple(records),
        stages.unused,
        stages.skipped,
        numbers_in(model),
        weights={name: value for name, value in moved.items() if name in parameters},
        buffers={name: value for name, value in moved.items() if name not in parameters},
        cost=stages.cost(mask),
    )


def prune_by_stage(
    model: nn.Module,
    criterion: str | Criterion,
    *,
    start: Mask | None = None,
    completed: int = 0,
    origin: Mask | None = None,
    recall: Callable[[int, Callable[[], Statistics]], Statistics] | None = None,
    progress: Progress | None = None,
    on_long: Callable[[Forecast], Any] | None = None,
    damping: float | None = None,
    done: Sequence[StageRecord] = (),
    averages: Mapping[str, Tensor] | None = None,
    **settings: Any,
) -> Stages:
    """Prune as :func:`prune`, giving mask and record after every stage.

    What is returned is an iterator; after its first step ``unused`` is as in
    :class:`PruningResult`.

    ``start`` is the mask after ``completed`` stages, to go on from there: the masks are those of
    a pruning that was never stopped, if the data gives the same examples at the same stage.

    ``origin`` is the mask before the first stage, :func:`prune`'s ``start``, where not all weights
    were there: the schedule begins at its sparsity.

    ``recall(stage, measure)`` gives a stage's statistics where given: ``measure()``, or what that
    returned before for the same network, mask, examples and criterion.

    ``progress.advance("example", done, total, text)`` is called as examples of a stage are
    measured, and ``on_long(forecast)`` where exact curvature will take long, in the place of the
    warning; ``forecast.told()`` is its sentence.

    ``damping`` is the λ of the last stage's compensation, its record's ``damping``, where there was
    one.

    ``done`` are the records of all completed stages, and ``averages`` what the iterator's
    ``averages`` was after the last one: needed where λ, stages or a budget are found on the way.

    ``settings`` are the other arguments of :func:`prune`, but for ``on_stage``.

    With ``compensate`` or ``recalibrate`` the network itself gets the moved weights, 0 where
    removed, and the new statistics after every stage.

    Between two stages the network may be trained or get other values: each stage looks at its
    parameters and buffers anew.  Which parameters are pruned stays as it was at the call.

    Raises:
        ValueError: as :func:`prune`, at once; ``completed`` is not below the number of stages, or
            ``start`` is not a mask of this network, or has more removed than the next stage ends
            with.
        PruningError: as :func:`prune`, when the stage is reached; or a parameter that is pruned is
            no longer there.
    """
    pruning, warn = Pruning(model, criterion, start=origin, **settings), warning_here()
    on_long = on_long or warning_of_long(warn)
    return Stages(
        pruning,
        start,
        completed,
        recall,
        progress,
        on_long,
        damping=damping,
        in_place=True,
        done=done,
        averages=averages,
    )
