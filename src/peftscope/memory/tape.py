"""Tensors without values, and a gradient tape for them: arithmetic on sizes that tracks which blocks live. No torch.

The tape mirrors the parts of torch's autograd that decide memory. An operation saves a tensor only if a gradient needs
it. The backward pass visits operations in reverse order, and frees what an operation saved once it is done. A tensor's
block lives exactly as long as Python holds the tensor.
"""

from __future__ import annotations

import heapq
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from peftscope.memory.trace import Block, Trace, bytes_of, spoken_width

Dims = tuple[str, ...]

_LETTERS = [*"12LBSPTUNEFcsnwmvaegdrohqk", "q+2k", "I", "2I", "J", "2J", "V"]
"""The order of the dimensions in a formula."""


class Storage:
    """A block that is freed when nothing refers to it."""

    __slots__ = ("block", "index", "trace")

    def __init__(self, trace: Trace, block: Block) -> None:
        self.trace, self.block = trace, block
        self.index = trace.born(block)

    def __del__(self) -> None:
        self.trace.events.append(~self.index)


class Shaped:
    """A tensor: its named dimensions, bytes per element, and the node that its gradient goes to (None: no gradient)."""

    __slots__ = ("dims", "node", "slot", "storage", "width")

    def __init__(self, storage: Storage, dims: Dims, width: float, node: Any = None, slot: int = 0) -> None:
        self.storage, self.dims, self.width, self.node, self.slot = storage, dims, width, node, slot

    def view(self, dims: Dims) -> Shaped:
        """Returns a tensor of other dimensions that shares the block."""
        return Shaped(self.storage, dims, self.width, self.node, self.slot)


Gradients = list["Shaped | None"]
Backward = Callable[[list[Any], Sequence[Any]], Gradients]


class _Leaf:
    """A trained parameter. It sums the gradients of its uses, and has a gradient once all of them have arrived."""

    __slots__ = ("arrived", "grad", "name", "uses", "variable", "waiting")

    def __init__(self, name: str, variable: Storage | None = None) -> None:
        self.name, self.variable = name, variable
        self.uses = self.arrived = 0
        self.waiting: Shaped | None = None
        self.grad: Shaped | None = None


class _Node:
    """An operation on the tape: where its gradients go, what it saved, and how it computes the gradients."""

    __slots__ = ("__weakref__", "backward", "edges", "frame", "module", "order", "outputs", "saved")

    def __init__(self, order: int, module: str, edges: list[Any], backward: Backward, outputs: int) -> None:
        self.order, self.module, self.edges, self.backward, self.outputs = order, module, edges, backward, outputs
        self.saved: Sequence[Any] = ()
        self.frame: _Frame | None = None


class _Frame:
    """A checkpointed layer. Its operations save nothing; a rerun in the backward pass gives them what they need.

    The frame and the layer's input live until the last operation that needs a saved tensor is done.

    Attributes:
        run: The layer.
        inputs: The layer's input.
        nodes: Its operations in order. A reference is dead if no gradient will reach the operation.
        last: The place of the last operation that needs a saved tensor, where the rerun ends.
        kept: What each operation of the rerun saves, for the operation at the same place in the first run.
    """

    __slots__ = ("inputs", "kept", "last", "nodes", "run")

    def __init__(self, run: Callable[[Shaped], Shaped], inputs: Shaped) -> None:
        self.run, self.inputs = run, inputs
        self.nodes: list[weakref.ref[_Node]] = []
        self.last = -1
        self.kept: list[Sequence[Any]] = []


class _RecomputedError(Exception):
    """Ends a rerun once everything needed was saved, as torch's ``_StopRecomputationError`` does."""


def _count_uses(root: _Node) -> None:
    """Counts for every parameter how many gradients will arrive."""
    seen, stack = {root}, [root]
    while stack:
        for edge in stack.pop().edges:
            if edge is None:
                continue
            if isinstance(edge[0], _Leaf):
                edge[0].uses += 1
            elif edge[0] not in seen:
                seen.add(edge[0])
                stack.append(edge[0])


class Tape:
    """Runs operations on shapes and writes their trace.

    Attributes:
        sizes: The value of every named dimension.
        trace: The blocks that were allocated and freed.
        module: The dotted path of the module that runs now.
        autocast: Whether matrix products and attention compute in 16 bits, whatever their inputs are.
        training: Whether the tape records gradients at all.
        trained: The names of the trained parameters.
        casts: The 16-bit copies of trained parameters that autocast made in this pass. Clear it after the pass.
        offloads: Whether the inputs of layers that are recomputed wait on the host.
        steps_in_backward: Whether a gradient goes as soon as it is whole, because the optimizer has used it.
    """

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes
        self.trace = Trace()
        self.module = ""
        self.autocast = False
        self.training = True
        self.trained: set[str] = set()
        self.casts: dict[int, Shaped] = {}
        self.offloads = self.steps_in_backward = False
        self._order = 0
        self._kind = ""
        self._frame: _Frame | None = None
        self._rerun: _Frame | None = None
        self._known: dict[tuple[Dims, float], tuple[int, str]] = {}

    def new(self, dims: Dims, width: float, kind: str = "", term: str = "") -> Shaped:
        """Returns a tensor in a new block."""
        module = self.module
        kind = kind or ("logits and loss" if module in ("lm_head", "loss") else self._kind)
        size, formula = self._known.get((dims, width)) or self.measure(dims, width)
        return Shaped(Storage(self.trace, Block(size, kind, module, term, formula)), dims, width)

    def last_of(self, number: int, dims: Dims, width: float, term: str = "") -> Shaped:
        """Returns the last of so many tensors, of which all are there before the others go."""
        return [self.new(dims, width, term=term) for _ in range(number)][-1]

    def measure(self, dims: Dims, width: float) -> tuple[int, str]:
        """Returns the bytes of a tensor, rounded up as the allocator does, and their formula."""
        known = self._known.get((dims, width))
        if known is None:
            formula = "·".join([spoken_width(width), *sorted(dims, key=_LETTERS.index)])
            known = (bytes_of(width, dims, self.sizes), formula)
            self._known[dims, width] = known
        return known

    def parameter(self, name: str, dims: Dims, width: float, kind: str, term: str = "", *, trained: bool) -> Shaped:
        """Returns a weight, whose term is by default the last part of its name. A trained one collects a gradient."""
        tensor = self.new(dims, width, kind, term or name.rpartition(".")[2])
        tensor.storage.block.module = name
        if trained:
            tensor.node = _Leaf(name)
            self.trained.add(name)
        return tensor

    def require_grad(self, x: Shaped) -> None:
        """Makes a computed tensor a leaf. The tensor and its gradient then live as long as the tape."""
        x.node = _Leaf(self.module, x.storage)

    def op(
        self,
        inputs: Sequence[Shaped],
        dims: Dims,
        width: float,
        backward: Backward | None = None,
        saves: Sequence[Any] = (),
        term: str = "",
    ) -> Shaped:
        """Returns the output of an operation.

        Args:
            inputs: The tensors that the operation reads.
            dims: The dimensions of the output.
            width: The bytes per element of the output.
            backward: Maps (gradients of the outputs, saved tensors) to one gradient per input. By default,
                each of these is a new tensor.
            saves: The tensors that the backward pass needs. They are kept only if there will be a backward pass.
            term: The name of the output in an explanation.
        """
        if self._rerun is not None and len(self._rerun.kept) == self._rerun.last and any(x.node for x in inputs):
            self._keep(saves)
        output = self.new(dims, width, term=term)
        self.record(inputs, [output], backward, saves)
        return output

    def record(
        self, inputs: Sequence[Shaped], outputs: Sequence[Shaped], backward: Backward | None, saves: Sequence[Any] = ()
    ) -> None:
        """Records an operation and its outputs on the tape if any input needs a gradient."""
        if not self.training:
            return
        edges = [(t.node, t.slot, t.width) if t.node is not None else None for t in inputs]
        if not any(edges):
            return
        self._order += 1
        if backward is None:
            shapes = [(t.dims, outputs[0].width) if t.node is not None else None for t in inputs]

            def backward(grads: list[Any], saved: Sequence[Any]) -> Gradients:
                return [self.new(*shape) if shape else None for shape in shapes]

        node = _Node(self._order, self.module, edges, backward, len(outputs))
        if self._frame is not None:
            if any(tensor is not None for tensor in saves):
                node.frame, self._frame.last = self._frame, len(self._frame.nodes)
            self._frame.nodes.append(weakref.ref(node))
        else:
            if self._rerun is not None:
                self._keep(saves)
            node.saved = saves
        for slot, output in enumerate(outputs):
            output.node, output.slot = node, slot

    def _keep(self, saves: Sequence[Any]) -> None:
        """Keeps what an operation of a rerun saves, for the operation at the same place in the first run.

        Raises:
            _RecomputedError: This was the last operation that needs a saved tensor.
        """
        frame = self._rerun
        assert frame is not None
        place = len(frame.kept)
        frame.kept.append(saves if frame.nodes[place]() is not None else ())
        if place == frame.last:
            raise _RecomputedError

    def checkpoint(self, run: Callable[[Shaped], Shaped], inputs: Shaped) -> Shaped:
        """Returns ``run(inputs)`` without what its operations would save. The backward pass runs it a second time."""
        self._frame = frame = _Frame(run, inputs)
        output = run(inputs)
        self._frame = None
        if self.offloads:
            frame.inputs = Shaped(None, inputs.dims, inputs.width, inputs.node, inputs.slot)  # type: ignore[arg-type]
        return output

    def _recompute(self, frame: _Frame) -> None:
        before = self.module, self._kind, self._order
        self._rerun, self._kind = frame, "saved activations"
        if self.offloads:
            frame.inputs.storage = self.new(frame.inputs.dims, frame.inputs.width).storage
        with suppress(_RecomputedError):
            frame.run(frame.inputs)
        self._rerun = None
        self.casts.clear()
        self.module, self._kind, self._order = before
        for reference, saves in zip(frame.nodes, frame.kept, strict=False):
            node = reference()
            if node is not None:
                node.saved = saves
        frame.nodes, frame.kept = [], []

    def backward(self, loss: Shaped) -> None:
        """Runs the backward pass from a scalar, after which all parameters have their gradients."""
        root = loss.node
        _count_uses(root)
        pending: dict[_Node, list[Any]] = {root: [self.new((), 4)]}
        ready = [(-root.order, root)]  # later operations first
        before = self.module, self._kind
        self._kind = "temporaries"
        while ready:
            _, node = heapq.heappop(ready)
            grads = pending.pop(node)
            self.module = node.module
            if node.frame is not None and node.frame.nodes:
                self._recompute(node.frame)
            results = node.backward(grads, node.saved)
            node.saved, node.backward, node.frame = (), None, None
            del grads
            for edge, grad in zip(node.edges, results, strict=True):
                if edge is None:
                    continue
                target, slot, width = edge
                if grad.width != width:
                    grad = self.new(grad.dims, width)
                if isinstance(target, _Leaf):
                    self._arrive(target, grad)
                    continue
                waiting = pending.get(target)
                if waiting is None:
                    waiting = pending[target] = [None] * target.outputs
                    heapq.heappush(ready, (-target.order, target))
                old = waiting[slot]
                waiting[slot] = grad if old is None else self.new(grad.dims, grad.width)
                del old
            del results, grad, edge, node
        self.module, self._kind = before

    def _arrive(self, leaf: _Leaf, grad: Shaped) -> None:
        leaf.arrived += 1
        leaf.waiting = grad if leaf.waiting is None else self.new(grad.dims, grad.width)
        if leaf.arrived < leaf.uses:
            return
        if leaf.grad is None:  # otherwise the sum is added in place
            leaf.grad = leaf.waiting
            block = leaf.grad.storage.block
            block.kind, block.module = "gradients", leaf.name
        leaf.grad = None if self.steps_in_backward else leaf.grad
        leaf.waiting, leaf.arrived, leaf.uses = None, 0, 0

    # Operations that several models and methods share.

    def cast(self, x: Shaped, width: float, term: str = "") -> Shaped:
        """Returns ``x`` in another precision, or ``x`` itself if it already has this precision."""
        if x.width == width:
            return x
        dims, before = x.dims, x.width
        return self.op([x], dims, width, lambda *_: [self.new(dims, before)], term=term)

    def add(self, a: Shaped, b: Shaped) -> Shaped:
        """Returns the sum. Its gradient passes to both inputs without a copy."""
        return self.op([a, b], a.dims, max(a.width, b.width), lambda grads, _: [grads[0], grads[0]])

    def scale(self, x: Shaped) -> Shaped:
        """Returns ``x`` multiplied by a number."""
        return self.op([x], x.dims, x.width)

    def contiguous(self, x: Shaped, term: str) -> Shaped:
        """Returns a copy of ``x`` in another order of values; its gradient passes without a copy."""
        return self.op([x], x.dims, x.width, lambda grads, _: [grads[0]], term=term)

    def with_saved_output(self, inputs: Sequence[Shaped], dims: Dims, width: float, term: str) -> Shaped:
        """Returns the output of an operation whose gradient needs that output."""
        output = self.new(dims, width, term=term)
        self.record(inputs, [output], None, (output.storage,))
        return output

    def multiply(self, a: Shaped, b: Shaped, term: str = "") -> Shaped:
        """Returns the elementwise product. The smaller factor is broadcast, and its gradient is summed accordingly."""
        dims = a.dims if len(a.dims) >= len(b.dims) else b.dims
        width = max(a.width, b.width)
        shapes = [t.dims if t.node is not None else None for t in (a, b)]

        def backward(_: list[Any], __: Sequence[Any]) -> Gradients:
            spread = [self.new(dims, width) if shape else None for shape in shapes]
            return [self.new(s, width) if s and s != dims else g for s, g in zip(shapes, spread, strict=True)]

        saves = (a if b.node is not None else None, b if a.node is not None else None)
        return self.op([a, b], dims, width, backward, saves, term)

    def _cast_weight(self, weight: Shaped) -> Shaped:
        """Returns a weight in 16 bits. Autocast casts a trained parameter only once in a pass."""
        if weight.storage.block.module not in self.trained:
            return self.cast(weight, 2, "16-bit weights (autocast)")
        key = weight.storage.index
        if key not in self.casts:
            self.casts[key] = self.cast(weight, 2, "16-bit weights (autocast)")
        return self.casts[key]

    def matmul(self, x: Shaped, weight: Shaped, dims: Dims, term: str = "") -> Shaped:
        """Returns a matrix product. Each factor is saved if the other one needs a gradient."""
        if self.autocast:
            x, weight = self.cast(x, 2, "16-bit copy of an input (autocast)"), self._cast_weight(weight)
        saves = (x if weight.node is not None else None, weight if x.node is not None else None)
        return self.op([x, weight], dims, x.width, None, saves, term)
