"""Which values of a network may share memory, so that a change in place of one changes others."""

from torch import fx, nn

from lossprune.channels.nodes import in_place, may_be_view
from lossprune.training.convolution.layers import BlockNorm1d, BlockNorm2d, SparseLayer


class SharedMemory:
    """Of the values of a network's graph, added in order."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._together: dict[fx.Node, set[fx.Node]] = {}

    def add(self, node: fx.Node) -> None:
        """Note with which values that of ``node`` may share memory."""
        sources = node.all_input_nodes
        if self._fresh(node) or not may_be_view(self._network, node):
            sources = []
        elif in_place(self._network, node):
            sources = sources[:1]
        together = {node}.union(*(self._together[source] for source in sources))
        self._together.update(dict.fromkeys(together, together))

    def others(self, node: fx.Node) -> set[fx.Node]:
        """Return the values so far that may share the memory of that of ``node``."""
        return self._together[node] - {node}

    def changed_by(self, node: fx.Node) -> fx.Node | None:
        """Return the value that ``node`` may change in place, if there is one."""
        if self._fresh(node) or not node.all_input_nodes or not in_place(self._network, node):
            return None
        return node.all_input_nodes[0]

    def _fresh(self, node: fx.Node) -> bool:
        """Whether a node is one of our layers: they change nothing, and return what is new."""
        module = self._network.get_submodule(str(node.target)) if node.op == "call_module" else None
        return isinstance(module, SparseLayer | BlockNorm1d | BlockNorm2d)
