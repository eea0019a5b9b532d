"""What a weight is worth: the loss models and their saliencies.

With the weights θ, the gradient g = ∇L(θ), the diagonal h of the generalised Gauss-Newton matrix
and the step δ = −θ of removing a weight, a model of the loss predicts the change ΔL of removing
each weight alone.  A saliency is what pruning ranks by: weights with the smallest are removed.

Sources: for MP, LM and QM, Laurent et al., "Revisiting Loss Modelling for Unstructured Pruning",
2020; OBD: LeCun, Denker and Solla, "Optimal Brain Damage", NIPS 1989; EF-OBD: the same with the
empirical Fisher, as in Theis et al., "Faster gaze prediction with dense networks and Fisher
pruning", 2018; SNIP: Lee, Ajanthan and Torr, "SNIP: Single-shot network pruning based on connection
sensitivity", ICLR 2019; GraSP: Wang, Zhang and Grosse, "Picking winning tickets before training by
preserving gradient flow", ICLR 2020; SynFlow: Tanaka, Kunin, Yamins and Ganguli, "Pruning neural
networks without any data by iteratively conserving synaptic flow", NeurIPS 2020; Wanda: Sun, Liu,
Bair and Kolter, "A simple and effective pruning approach for large language models", ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lossprune.pruning.names import find_in

if TYPE_CHECKING:
    from torch import Tensor

    Formula = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Criterion:
    """A saliency, elementwise in the weight θ, gradient g and curvature h of one parameter.

    Attributes:
        name: what records and masks call it.
        saliency: ``saliency(theta, g, h)``, a tensor of θ's shape; smallest is removed first.
            The step-size penalty ½ λ θ² is added by :func:`lossprune.prune`, not here.  Of a
            complex weight, which has no g or h, θ is the modulus.
        change: ``change(theta, g, h)``, the signed ΔL that the loss model predicts for removing
            each weight; None where there is no model of the loss.
        gradient: whether g is needed; where not, the formulas get None for it.
        curvature: whether h is needed; where not, the formulas get None for it.
        description: one line for help texts and tables.
        statistic: a name in ``lossprune.pruning.STATISTICS``: what the formulas get for h instead
            of the curvature; None: the curvature.
        stages: how many stages :func:`lossprune.prune` takes where it is not told.
        reg: the λ that it takes where it is not told.
        scope: which weights compete where it is not told, a name in ``lossprune.pruning.SCOPES``.
        before_training: whether it is made for networks that are not trained.

    >>> import lossprune, torch
    >>> double = lossprune.Criterion("|gθ|²", lambda theta, g, h: (g * theta) ** 2, gradient=True)
    >>> double.saliency(torch.tensor([2.0]), torch.tensor([0.5]), None)
    tensor([1.])
    """

    name: str
    saliency: Formula = field(repr=False)
    change: Formula | None = field(default=None, repr=False)
    gradient: bool = False
    curvature: bool = False
    description: str = ""
    statistic: str | None = None
    stages: int = 1
    reg: float = 0.0
    scope: str = "global"
    before_training: bool = False


# What chooses and moves weights block by block, and is no saliency.
SPARSE_GPT = "SparseGPT"

# A model of the loss holds near the weights that it was measured at, and one stage goes far from
# them.  So many are the middle one of 1, 14 and 140, which the published experiments compare.
_STAGES = 14
# A saliency made of g may be small by chance, of a large weight too, which ½ λ θ² then keeps.
# ½ h θ² is small where the loss is flat, and the penalty spoils it.
# ``python -m benchmarks.defaults`` measures what they come to.
_REG = 1e-2

CRITERIA: dict[str, Criterion] = {
    "MP": Criterion(
        "MP",
        saliency=lambda theta, g, h: (theta**2).mul_(0.5),
        description="magnitude: ½ θ²",
    ),
    "LM": Criterion(
        "LM",
        saliency=lambda theta, g, h: (g * theta).abs_(),
        change=lambda theta, g, h: (g * theta).neg_(),
        gradient=True,
        stages=_STAGES,
        reg=_REG,
        description="linear model of the loss: |g θ|",
    ),
    "QM": Criterion(
        "QM",
        saliency=lambda theta, g, h: (-g * theta + 0.5 * h * theta**2).abs(),
        change=lambda theta, g, h: -g * theta + 0.5 * h * theta**2,
        gradient=True,
        curvature=True,
        stages=_STAGES,
        reg=_REG,
        description="quadratic model of the loss: |−g θ + ½ h θ²|",
    ),
    "OBD": Criterion(
        "OBD",
        saliency=lambda theta, g, h: 0.5 * h * theta**2,
        change=lambda theta, g, h: 0.5 * h * theta**2,
        curvature=True,
        stages=_STAGES,
        description="Optimal Brain Damage: ½ h θ²",
    ),
    "EF-OBD": Criterion(
        "EF-OBD",
        saliency=lambda theta, g, f: 0.5 * f * theta**2,
        change=lambda theta, g, f: 0.5 * f * theta**2,
        statistic="empirical-fisher",
        stages=_STAGES,
        description="Optimal Brain Damage with the empirical Fisher F: ½ F θ²",
    ),
    # The published score is divided by its sum over all weights, which changes no ranking.
    "SNIP": Criterion(
        "SNIP",
        saliency=lambda theta, g, h: (g * theta).abs(),
        gradient=True,
        before_training=True,
        description="connection sensitivity: |g θ|, ranked as LM",
    ),
    # Removing a weight changes ‖g‖² by −2 θ H g; those go first whose going raises it most.
    "GraSP": Criterion(
        "GraSP",
        saliency=lambda theta, g, hg: theta * hg,
        statistic="hessian-gradient",
        before_training=True,
        description="gradient signal preservation: θ (H g), H the Hessian of the loss",
    ),
    "SynFlow": Criterion(
        "SynFlow",
        saliency=lambda theta, g, r: r * theta.abs(),
        statistic="synaptic-flow",
        stages=100,
        before_training=True,
        description="synaptic flow: |θ| ∂R/∂|θ|, R the output of |θ| on ones; made for --pi 100",
    ),
    "random": Criterion(
        "random",
        saliency=lambda theta, g, u: u,
        statistic="uniform",
        before_training=True,
        description="uniformly at random",
    ),
    "Wanda": Criterion(
        "Wanda",
        saliency=lambda theta, g, x: theta.abs() * x,
        statistic="input-norm",
        scope="row",
        description="weights and activations: |θ| ‖x‖, x the inputs it multiplies, per output",
    ),
}


def find_criterion(criterion: str | Criterion) -> Criterion:
    """Return the criterion of that name, or the criterion given.

    Raises:
        ValueError: a name that is not in :data:`CRITERIA`.
    """
    if isinstance(criterion, Criterion):
        return criterion
    return find_in(CRITERIA, criterion, "criterion", ", or give a lossprune.Criterion")
