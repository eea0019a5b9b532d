"""What is refused, on which networks and in which words: all else works.

The words are a part of the sentence that says so.  A change here is one that users notice.
"""

from collections.abc import Mapping

from tests.models.architectures import ARCHITECTURES
from tests.models.calls import CALLS

_PRUNED = (*(call for call in CALLS if call.startswith("prune")), "measure")
_EVERY = tuple(CALLS)

# Networks, calls, words, and what is behind them.
_REFUSALS: tuple[tuple[tuple[str, ...], tuple[str, ...], str, str], ...] = (
    (
        ("weight norm", "old weight norm", "spectral norm"),
        _PRUNED,
        "is computed from other parameters",
        "an entry that is removed would come back; exclude the weight, or make it a parameter",
    ),
    (
        ("complex",),
        ("prune LM", "prune QM", "prune GraSP", "measure"),
        "is complex, of torch.complex64, where the loss has no gradient or curvature to prune by",
        "MP ranks by the modulus",
    ),
    (
        ("complex",),
        ("prune SynFlow",),
        "synaptic flow is one of real numbers",
        "MP ranks by the modulus",
    ),
    (("complex",), ("export_onnx",), "ONNX export needs real numbers", "ONNX has no others"),
    (
        (
            "Siamese, two inputs",
            "attention with padding",
            "Bilinear",
            "takes a dict",
            "feature pyramid of dicts",
        ),
        ("export_onnx",),
        "example must be one tensor",
        "only networks of one input are exported",
    ),
    (
        ("returns a tuple", "returns a dict"),
        ("export_onnx",),
        "ONNX export needs a network that returns one real tensor",
        "only networks of one output are exported",
    ),
    (
        ("cross-attention", "vision transformer", "experts by index_add"),
        ("export_onnx",),
        "onnxruntime cannot run the exported",
        "`len(x)` writes the example's batch into the graph; `x.shape[0]` does not",
    ),
    (
        ("bfloat16",),
        ("export_onnx",),
        "onnxruntime cannot load the exported",
        "it has no such products on a CPU",
    ),
    (
        ("complex", "float64", "bfloat16", "float16"),
        ("sparse",),
        "sparse training is in float32 on the CPU",
        "its kernels have no others",
    ),
    (
        ("depends on data", "returns an object", "Mixtral"),
        ("export_onnx",),
        "torch cannot export this",
        "torch.export takes neither branches on values nor classes that it does not know",
    ),
    (
        ("lazy, not run",),
        _EVERY,
        "not initialised yet: run the network once on a batch first",
        "there is no weight yet",
    ),
    (
        ("on meta",),
        _EVERY,
        "on the meta device, without values: load the network's values first",
        "as an offloaded network's are",
    ),
)

REFUSED: dict[tuple[str, str], str] = {}
WHY: dict[str, str] = {}
for _architectures, _calls, _words, _why in _REFUSALS:
    WHY[_words] = _why
    for _cell in ((name, call) for name in _architectures for call in _calls):
        assert _cell not in REFUSED
        REFUSED[_cell] = _words

PAGE = """# Which networks, which calls

Small networks of the kinds that people have, and every public call on each. A ✓ is a result that
equals plain torch's on the same network: saliencies, gradients and curvature in double precision,
one example at a time; outputs of the network whose weights are set to zero by hand; three steps of
SGD with momentum; running statistics of batch norms after batches in training mode. A number is a
refusal in one sentence, whose words are below the table. Nothing else happens: no other exception,
and whatever a call does not say that it changes is as before:
parameters, gradients, buffers, hooks and modes.

`python -m benchmarks.models`, from a checkout with the extra `test`, tries it all and prints this
page; the networks are in [tests/models/architectures.py](../tests/models/architectures.py).

{table}

{words}
"""


def page(refused: Mapping[tuple[str, str], str]) -> str:
    """Return the documentation's page, as Markdown, of these cells' words."""
    numbers = {words: number for number, words in enumerate(dict.fromkeys(refused.values()), 1)}
    lines = [
        "| " + " | ".join(("network", *(f"`{call}`" for call in CALLS))) + " |",
        "| --- " + "| :-: " * len(CALLS) + "|",
    ]
    for name in ARCHITECTURES:
        cells = [refused.get((name, call)) for call in CALLS]
        shown = ("✓" if words is None else str(numbers[words]) for words in cells)
        lines.append("| " + " | ".join((name, *shown)) + " |")
    listing = "\n".join(
        f"{number}. “{words}”: {WHY.get(words, 'unexpected')}." for words, number in numbers.items()
    )
    return PAGE.format(table="\n".join(lines), words=listing)
