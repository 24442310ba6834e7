"""A tracker of live tensor bytes, for devices that record no peak: the CPU, and tensors without data.

The tracker counts every storage that an operator returns once, and subtracts it when its last tensor dies. Sizes are
rounded up to 512 bytes, as the CUDA allocator does. The tracker does not see memory inside operators or outside torch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftscope.memory.trace import Block, Trace, rounded


class MemoryTracker(TorchDispatchMode):
    """Records the trace of live storages inside its context.

    Attributes:
        trace: All blocks that it has seen, in the order in which they were allocated and freed.
        live_bytes: The bytes that are alive now.
        peak_bytes: The largest ``live_bytes`` so far.
    """

    def __init__(
        self,
        alive: Iterable[torch.Tensor] = (),
        owner_of_now: Callable[[], tuple[str, str]] = lambda: ("", ""),
        workspace_of: Callable[[Any, Any], int] = lambda function, arguments: 0,
    ) -> None:
        """Starts with the tensors that are already alive.

        ``owner_of_now`` returns the module and kind of a new block; ``workspace_of`` the bytes that an operator with
        these arguments takes for itself on the device that is simulated.
        """
        super().__init__()
        self.trace = Trace()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._owner_of_now = owner_of_now
        self._workspace_of = workspace_of
        self._known: dict[int, tuple[weakref.ref[torch.UntypedStorage], Block]] = {}
        for tensor in alive:
            self.add(tensor)

    def add(self, tensor: torch.Tensor) -> Block:
        """Counts a tensor's storage unless it is already counted, and returns its block."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return self._known[key][1]
        module, kind = self._owner_of_now()
        block = Block(rounded(storage.nbytes()), kind=kind, module=module)
        index = self.trace.born(block)

        def forget(_: object) -> None:
            del self._known[key]
            self.live_bytes -= block.size
            self.trace.events.append(~index)

        self._known[key] = (weakref.ref(storage, forget), block)
        self.live_bytes += block.size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return block

    def block_of(self, tensor: torch.Tensor) -> Block | None:
        """Returns the block of a tensor's storage, or None if the tracker has not seen it."""
        known = self._known.get(tensor.untyped_storage()._cdata)
        return known[1] if known else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator and counts what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):  # a sparse one's bytes are those of its indices and values
                for part in (leaf._indices(), leaf._values()) if leaf.is_sparse else (leaf,):
                    self.add(part)
        workspace = self._workspace_of(func, args)
        if workspace:
            self.trace.pass_by(Block(rounded(workspace), "kernel workspace", self._owner_of_now()[0]))
        return result


def tensors_of(*owners: Any) -> list[torch.Tensor]:
    """Returns the tensors of models (with gradients and quantisation states) and of batches."""
    tensors: list[torch.Tensor] = []
    for owner in owners:
        if isinstance(owner, torch.nn.Module):
            for parameter in owner.parameters():
                tensors.append(parameter.data)
                if parameter.grad is not None:
                    tensors.append(parameter.grad)
                tensors += quantisation_tensors(parameter)
            tensors += list(owner.buffers())
        else:
            tensors += [v for v in vars(owner).values() if isinstance(v, torch.Tensor)]
    return tensors


def quantisation_tensors(parameter: torch.Tensor) -> list[torch.Tensor]:
    """Returns the block constants and code tables of a 4-bit parameter; nothing for another parameter."""
    found: list[torch.Tensor] = []
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        found += [v for v in (state.absmax, state.code, state.offset) if isinstance(v, torch.Tensor)]
        state = getattr(state, "state2", None)
    return found
