"""What the kernels read of norms, and of steps on tokens."""

from lossprune.deployment.sparse.plan import MapStruct, OperationKind, OperationStruct
from lossprune.deployment.sparse.steps import MapNorm, SparseOperation
from lossprune.deployment.sparse.token_steps import (
    RowNorm,
    TokenAttention,
    TokenMean,
    TokenOperation,
    TokenPatches,
    TokenPick,
    TokenShift,
)

_CHUNK = 64  # at least the queries that attention takes together in ``token_kernels.h``
_KEYS = 6  # at least the keys


def token_room(operation: SparseOperation) -> tuple[int, int]:
    """Return the numbers of a step's lines: those that there are in any case, and for each token.

    Tokens, and numbers of a query and of a value, are rounded up to whole tiles.
    """
    match operation:
        case TokenAttention(size=size, value_size=value):
            size, value = size + _KEYS, value + _KEYS
            each = size + value + 1 + _CHUNK
            return (size + value + 1) * _CHUNK + _KEYS * each, each
        case TokenMean():
            return _CHUNK, 1
    return 0, 0


def set_token_(made: OperationStruct, operation: TokenOperation | MapNorm) -> None:
    """Set the fields of a norm, or of a step on tokens."""
    match operation:
        case RowNorm(epsilon=epsilon, centred=centred) | MapNorm(epsilon=epsilon, centred=centred):
            made.kind = OperationKind.NORM if centred else OperationKind.ROOT_NORM
            made.number = epsilon
        case TokenAttention() as one:
            made.kind, made.number, made.causal = OperationKind.ATTENTION, one.scale, one.causal
            made.heads, made.key_heads = one.heads, one.key_heads
            made.size, made.value_size = one.size, one.value_size
            made.query, made.key, made.values = one.query, one.key, one.values
        case TokenPick(place=place, back=back):
            made.kind, made.place = OperationKind.TOKEN, -1 - place if back else place
        case TokenMean():
            made.kind = OperationKind.TOKEN_MEAN
        case TokenShift():
            made.kind = OperationKind.TOKEN_SHIFT
        case TokenPatches():
            made.kind = OperationKind.NOTHING  # as what reads the input does it


def set_patches_(made: OperationStruct, patches: TokenPatches, target: MapStruct) -> None:
    """Let what reads an input read patches of images into a map."""
    made.kind, made.source, made.target = OperationKind.PATCHES, target, target
    made.height, made.width, made.place = patches.height, patches.width, patches.leading
    made.stride_y, made.stride_x = patches.size
