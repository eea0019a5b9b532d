"""What a compensation is asked to do, and what it records."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from numbers import Real

from lossprune.pruning.curvature.examples import check_examples

PARAMETERS = ("prunable", "all")


@dataclass(frozen=True)
class Compensation:
    """How the weights that are left move after each stage.

    Attributes:
        iterations: of conjugate gradients a stage, each a product with the GGN matrix.
        examples: how many of a stage's examples the fit and the choice of λ use; None: all.  A
            fifth of them takes no part in the fit.  A network of millions of weights gains little
            from a hundred (docs/compensation.md): give a stage a thousand or more.
        dampings: multiples of the stage before's λ, of which the loss on that fifth chooses: the
            smallest that does not raise it, and from the stage with the final mask on the one that
            lowers it most; where all raise it the weights stay.  With fewer than a hundred examples
            apart a fall counts beyond its standard error only.  The first stage's λ is the mean of
            diag(G) over the weights that are left, and no λ is below a quarter of that.  A Krylov
            space serves all of them.
        parameters: what moves: the ``"prunable"`` weights that are left, or ``"all"`` parameters,
            biases and normalisations too.
        finish: how many stages more at the final mask, that remove nothing.

    Raises:
        ValueError: a value that is out of range.
    """

    iterations: int = 10
    examples: int | None = None
    dampings: Sequence[float] = (0.25, 1.0, 4.0, 16.0)
    parameters: str = "prunable"
    finish: int = 0

    def __post_init__(self) -> None:
        for name, least in (("iterations", 1), ("finish", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"{name} must be a whole number of at least {least}, got {value!r}"
                )
        check_examples(self.examples)
        if self.parameters not in PARAMETERS:
            raise ValueError(
                f"parameters of a compensation must be one of {', '.join(PARAMETERS)}, got "
                f"{self.parameters!r}"
            )
        given = [self.dampings] if isinstance(self.dampings, Real) else self.dampings
        try:
            dampings = tuple(float(multiple) for multiple in given)
        except (TypeError, ValueError):
            dampings = ()
        if not dampings or not all(0 < multiple < float("inf") for multiple in dampings):
            raise ValueError(f"dampings must be positive numbers, got {self.dampings!r}")
        # The one nearest to the last first: it builds the space.
        object.__setattr__(self, "dampings", tuple(sorted(dampings, key=lambda m: abs(log(m)))))


@dataclass(frozen=True)
class CompensationRecord:
    """How the weights of one stage moved.

    Attributes:
        moved: whether they did: not where every λ raised the loss on the examples apart.
        damping: λ of the step that was taken; where none was, four times the last: what the next
            stage's are multiples of.
        iterations: of conjugate gradients.
        residual: |b − (G_SS + λ I) δ_S| / |b| after them, with the λ of the stage before.
        predicted_change: gᵀδ + ½ δᵀGδ of the step, over the examples of the fit.
        predicted_change_without: of removing alone, δ_S = 0.
        loss_without: at the mask alone, over the stage's examples.
        realised_change_without: ``loss_without`` − the stage's ``loss_before``.
        apart: how many examples took no part in the fit.
        loss_apart: over these, after the step.
        loss_apart_without: over these, at the mask alone.
    """

    moved: bool
    damping: float
    iterations: int
    residual: float
    predicted_change: float
    predicted_change_without: float
    loss_without: float
    realised_change_without: float
    apart: int
    loss_apart: float
    loss_apart_without: float
