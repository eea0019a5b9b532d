"""Whether the targets of a batch suit a loss, and what to give where they do not."""

from torch import Tensor

from lossprune.pruning.errors import PruningError


def check_shapes_alike(what: str, outputs: Tensor, targets: Tensor) -> None:
    """Raise unless targets have the shape of the outputs; ``what`` is the loss's name."""
    if not isinstance(targets, Tensor) or targets.shape != outputs.shape:
        got = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise PruningError(
            f"{what} needs targets of the shape of the outputs, {tuple(outputs.shape)}, got {got}"
        )


def check_class_shapes(outputs: Tensor, targets: Tensor, class_dim: int, shift: int) -> None:
    """Raise unless there is a class for each position of the outputs, or their probabilities."""
    layout = "(examples, classes" + (", positions...)" if outputs.ndim > 2 else ")")
    if class_dim == -1:
        layout = "(examples, positions..., classes)"
    if outputs.ndim < 2 or outputs.ndim < 2 + shift:
        raise PruningError(
            f"cross-entropy needs outputs of shape {layout}, got {tuple(outputs.shape)}"
        )
    if not isinstance(targets, Tensor):
        raise PruningError(f"cross-entropy needs a tensor of targets, got {type(targets).__name__}")
    expected = outputs.movedim(class_dim, -1).shape[:-1]
    if targets.is_floating_point():
        if targets.shape == outputs.shape and not shift:
            return
    elif targets.shape == expected and not targets.is_complex():
        return
    if class_dim == 1 and outputs.ndim > 2 and targets.shape == outputs.shape[:-1]:
        raise PruningError(
            f"outputs of shape {tuple(outputs.shape)} with targets of shape "
            f"{tuple(targets.shape)} have their classes last: give loss='token_cross_entropy', "
            "or loss='next_token' for a language model whose labels are its own tokens"
        )
    one = "example" if outputs.ndim == 2 else "position"
    raise PruningError(
        f"cross-entropy needs one whole-number class per {one}, shape {tuple(expected)} for "
        f"outputs {layout} of {tuple(outputs.shape)}"
        + ("" if shift else ", or floating class probabilities of the outputs' shape")
        + f", got targets of shape {tuple(targets.shape)} and type {targets.dtype}"
    )


def check_classes(targets: Tensor, classes: int, ignored: int) -> None:
    """Raise unless all targets but ignored ones are in [0, classes)."""
    lowest, highest = int(targets.min()), int(targets.max())
    if lowest < 0 or highest >= classes:
        counted = targets[targets != ignored]
        if not len(counted):
            return
        lowest, highest = int(counted.min()), int(counted.max())
    if lowest < 0 or highest >= classes:
        raise PruningError(
            f"targets must lie in [0, {classes}), the network's classes, "
            f"got {lowest if lowest < 0 else highest}"
        )


def check_probabilities(targets: Tensor) -> None:
    """Raise unless all are finite numbers of at least 0."""
    if not bool((targets.isfinite() & (targets >= 0)).all()):
        raise PruningError(
            "class probabilities must be finite numbers of at least 0, got "
            f"{float(targets.min())} to {float(targets.max())}"
        )
