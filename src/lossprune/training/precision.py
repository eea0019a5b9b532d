"""How logits are computed: in float32 or partly in bfloat16, by torch as it is or compiled."""

import torch
from torch import Tensor, nn

AMPS = ("off", "bf16")


class Forward:
    """The forward pass of a network: inputs (n, channels, height, width) to logits (n, classes).

    Parameters, buffers, gradients and logits are float32 and laid out as ever, whatever is asked
    for: files, masks and optimizers see no difference.  The network itself is not changed, and
    whoever calls it, as pruning does, gets float32 by torch's own operations.

    Args:
        network: stays where it is.
        amp: ``"off"``; or ``"bf16"``: convolutions and matrix products in bfloat16, by
            ``torch.autocast``.  On a GPU convolutional networks then get their inputs with
            channels last, as tensor cores read them.
        compiled: through ``torch.compile``, at the first call of each batch size and mode.

    Raises:
        ValueError: ``amp`` is none of these.
    """

    def __init__(self, network: nn.Module, amp: str = "off", *, compiled: bool = False) -> None:
        if amp not in AMPS:
            raise ValueError(f"amp must be one of {', '.join(AMPS)}, got {amp!r}")
        self.network = network
        self.amp = amp
        self.compiled = compiled
        self._device = next(network.parameters()).device.type
        convolves = any(isinstance(module, nn.Conv2d) for module in network.modules())
        # Activations follow the inputs' layout. On the CPU it makes no difference in float32.
        self._channels_last = amp != "off" and self._device == "cuda" and convolves
        # Sizes that are compiled each for itself come out the same in whichever order they are met:
        # a run that goes on computes as one that was never stopped.
        self._call = torch.compile(network, dynamic=False) if compiled else network

    @property
    def plain(self) -> bool:
        """Whether this is no more than a call of the network."""
        return self.amp == "off" and not self.compiled

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the logits of ``inputs``."""
        if self._channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        if self.amp == "off":
            return self._call(inputs)
        with torch.autocast(self._device, torch.bfloat16):
            return self._call(inputs).float()


def check_compiler(device: torch.device) -> None:
    """Raise ValueError unless ``torch.compile`` works on ``device``."""
    try:
        torch.compile(lambda x: x.relu() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # whatever is missing: torch has a class of its own for each
        told = next(
            (line for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        needs = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler"
        raise ValueError(
            f"--compile needs {needs}, and torch.compile does not work here: {told}"
        ) from error
