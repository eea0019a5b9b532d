"""How each layer of a deployed network is computed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerChoice:
    """How one layer is computed, and why.

    Attributes:
        name: the layer's, in the model.
        kind: "sparse" or "dense".
        kept: its weights that are not zero.
        total: its weights after compaction.
        multiply_adds: of its kept weights, for the example's whole batch.
        sparse_seconds: of the sparse kernel alone, on the example; None: it has none.
        dense_seconds: of torch's layer alone.
        reason: why it is dense; nothing where it is not.
    """

    name: str
    kind: str
    kept: int
    total: int
    multiply_adds: int
    sparse_seconds: float | None
    dense_seconds: float
    reason: str = ""
