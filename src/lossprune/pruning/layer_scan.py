"""The call: prune one layer at a time, to several sparsities, and see what the loss does."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from numbers import Real
from typing import Any

from torch import nn

from lossprune.progress import Progress
from lossprune.pruning.automatic import AUTO
from lossprune.pruning.choices import Choices
from lossprune.pruning.criteria import Criterion, find_criterion
from lossprune.pruning.curvature import distributed
from lossprune.pruning.curvature.batch import Forward
from lossprune.pruning.curvature.estimators import Estimator
from lossprune.pruning.curvature.losses import AnyFunction, Loss, LossFunction, find_loss
from lossprune.pruning.curvature.running import outside_inference
from lossprune.pruning.errors import PruningError
from lossprune.pruning.layer_curves import Sensitivity
from lossprune.pruning.layer_losses import measure_layers, naming
from lossprune.pruning.pace import Forecast, Pace
from lossprune.pruning.patterns import Pattern
from lossprune.pruning.randomness import PrivateRandomness
from lossprune.pruning.settings import Pruning
from lossprune.pruning.skipped import find_skipped, left_out
from lossprune.pruning.watching import check_watching, shown, warning_here, warning_of_long

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)


def sensitivity(
    model: nn.Module,
    data: Iterable[Any],
    criterion: str | Criterion = "QM",
    *,
    sparsities: Sequence[float] | None = None,
    examples: int | None = None,
    reg: float | None = None,
    parameters: Choices | None = None,
    exclude: Choices | None = None,
    pattern: str | None = "unstructured",
    loss: str | Loss | LossFunction = "cross_entropy",
    forward: Forward | None = None,
    estimator: str | Estimator | None = "exact",
    memory: int | None = None,
    seed: int | None = None,
    sharded: bool = False,
    validation: Iterable[Any] | None = None,
    progress: bool | None = None,
) -> Sensitivity:
    r"""Prune each layer of ``model`` alone, to several sparsities, and measure the loss.

    Of a layer with n weights the round(κ · n) of smallest saliency + ½ λ θ² are taken as 0, all
    other layers stay dense, and L is measured: as many forward passes over the examples as there
    are layers times sparsities.  Beside it is what the quadratic model with a diagonal Hessian
    predicts for the same weights,

        ΔL = Σ −g θ + ½ h θ²,

    whatever the criterion; g and h are measured once, at the dense network.  Removals of several
    layers at once cost more than the sum of each: the model of one layer says nothing of that.

    Under an initialised ``torch.distributed`` group every process must call this, as
    :func:`lossprune.measure`; all return the same.

    Args:
        model: left unchanged.  Its weights that are 0 already go first.
        data: iterable of batches, as in :func:`lossprune.prune`; read once.
        criterion: a name in ``lossprune.CRITERIA`` or a :class:`Criterion`.
        sparsities: κ of each layer, rising numbers in (0, 1); 0.5, 0.7, 0.8, 0.9, 0.95 and 0.98 if
            not given.  An N:M pattern has one, 1 − N/M.
        examples: how many to read, exactly; None reads all.
        reg: λ ≥ 0; if not given, what the criterion says.
        parameters: which weights are layers here, as in :func:`lossprune.prune`, and
        exclude: which of them not.
        pattern: ``"unstructured"``, or ``"N:M"``, as there.
        loss: as there.
        forward: as there.
        estimator: of the GGN diagonal, as there; None measures none, so that nothing is predicted.
            Of a loss that is a plain function no curvature is known but the empirical Fisher: by
            criteria that do without, its networks are pruned without a prediction.
        memory: as there.
        seed: as there.
        sharded: as there.
        validation: batches to measure the losses on, the dense one as well, in the place of the
            examples that g and h are measured on; all are read.
        progress: as there.

    Raises:
        ValueError: an argument out of range.
        PruningError: the data does not do (see :func:`lossprune.measure`); a loss, gradient,
            curvature or saliency is not finite; of a pruned layer it is named, with the sparsity.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    >>> found = sensitivity(model, [(torch.randn(32, 8), torch.arange(32) % 4)])
    >>> found
    Sensitivity(QM, 2 layers at 6 sparsities, loss ..., 32 examples)
    >>> [point.removed for point in found["2.weight"].points]
    [32, 45, 51, 58, 61, 63]
    """
    settings = locals()  # each is an argument of scan_layers, but for this one
    del settings["progress"]
    check_watching(progress, None)
    warn = warning_here()
    with shown(progress) as told:
        found = scan_layers(
            **settings,
            progress=told,
            on_long=warning_of_long(warn),
            on_guess=lambda text: warn(UserWarning(text)),
        )
    if found.left_out:
        instead = "name them in parameters= to take them in; parameters='*' leaves them out unsaid"
        warn(UserWarning(f"{found.told_left_out()}; {instead}"))
    return found


def scan_layers(
    model: nn.Module,
    data: Iterable[Any] | None,
    criterion: str | Criterion,
    *,
    sparsities: Sequence[float] | None,
    estimator: str | Estimator | None,
    pattern: str | None,
    validation: Iterable[Any] | None,
    progress: Progress,
    on_long: Callable[[Forecast], Any],
    on_guess: Callable[[str], Any],
    **settings: Any,
) -> Sensitivity:
    """Do as :func:`sensitivity`, and tell who asks how far it is.

    ``on_long(forecast)`` is called where exact curvature will take long, ``on_guess(text)`` where
    the network knows no more than chance; ``settings`` are the other arguments.
    """
    if settings.get("reg") == AUTO:
        raise ValueError(
            'reg="auto" is chosen from stage to stage, and here is none: give a number'
        )
    if data is None:
        raise ValueError("sensitivity needs data: an iterable of (inputs, targets)")
    pruning = Pruning(
        model,
        criterion,
        data=data,
        sparsity=0.0 if pattern in (None, "unstructured") else None,
        stages=1,
        pattern=pattern,
        estimator="exact" if estimator is None else estimator,
        **settings,
    )
    # All are checked before anything is measured.
    held = None
    if validation is not None:
        with naming("validation"):
            held = replace(pruning, data=validation, examples=None)
    steps = _checked_sparsities(sparsities, pruning.selection.pattern)
    no_prediction = _no_prediction(pruning, estimator)
    with outside_inference(), PrivateRandomness(distributed.shared_random_state()):
        scan = measure_layers(pruning, held, Pace(1, progress, on_long), predicts=not no_prediction)
        if guess := scan.told_guess():
            on_guess(guess)
        layers = tuple(scan.layers(steps, progress))
    return Sensitivity(
        criterion=find_criterion(criterion).name,
        loss=scan.dense.loss,
        examples=scan.dense.examples,
        layers=layers,
        unused=scan.statistics.unused,
        no_prediction=no_prediction,
        left_out=_left_out(pruning),
    )


def _left_out(pruning: Pruning) -> tuple[str, ...]:
    """Return the names of considerable matrices that nobody has asked to leave out."""
    if pruning.parameters is not None or pruning.exclude is not None:
        return ()
    return left_out(find_skipped(pruning.model, pruning.network.names), pruning.selection.total)


def _no_prediction(pruning: Pruning, estimator: str | Estimator | None) -> str:
    """Why nothing is predicted; empty where it is.

    Raises:
        ValueError: the criterion needs what is not measured.
        PruningError: a weight is complex, and something is to be predicted of it.
    """
    criterion, loss = find_criterion(pruning.criterion), find_loss(pruning.loss)
    if estimator is None:
        if criterion.curvature:
            raise ValueError(
                f"criterion {criterion.name!r} needs the curvature, which estimator=None leaves out"
            )
        return "no curvature was asked for"
    if isinstance(loss, AnyFunction) and estimator == "exact" and not criterion.curvature:
        return f"the curvature of {loss.name}, a plain function, is not known"
    for name, weight in pruning.network.weights.items():
        if weight.is_complex():
            raise PruningError(
                f"{name!r} is complex, of {weight.dtype}, and nothing can be predicted of it: give "
                f"MP or random with estimator=None, or exclude={name!r}"
            )
    return ""


def _checked_sparsities(
    sparsities: Sequence[float] | None, pattern: Pattern | None
) -> tuple[float, ...]:
    if pattern is not None:
        if sparsities is not None and list(sparsities) != [pattern.sparsity]:
            raise ValueError(
                f"sparsities must be that of pattern {str(pattern)!r} alone, "
                f"({pattern.sparsity},), or left out, got {sparsities!r}"
            )
        return (pattern.sparsity,)
    if sparsities is None:
        return SPARSITIES
    steps = tuple(sparsities) if isinstance(sparsities, Iterable) else ()
    numbers = all(isinstance(step, Real) and 0 < step < 1 for step in steps)
    if not (steps and numbers and all(low < high for low, high in pairwise(steps))):
        raise ValueError(
            f"sparsities must be rising numbers between 0 and 1, such as (0.5, 0.9), got "
            f"{sparsities!r}"
        )
    return tuple(map(float, steps))
