"""A tracker of live tensor bytes, for devices whose allocator keeps no peak: the CPU, and tensors without data.

Every storage that an operator returns is counted once, and again subtracted when the last tensor on it dies. Bytes are
rounded up to 512, as the CUDA allocator does. Memory inside operators and outside torch is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALLOCATION_BYTES = 512


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of live storages while it is entered.

    Attributes:
        live_bytes: Bytes alive now.
        peak_bytes: Largest ``live_bytes`` since the last ``reset_peak``.
    """

    def __init__(self, alive: Iterable[torch.Tensor] = ()) -> None:
        """Starts from tensors that are alive already."""
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in alive:
            self.add(tensor)

    def add(self, tensor: torch.Tensor) -> None:
        """Counts a tensor's storage, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // ALLOCATION_BYTES) * ALLOCATION_BYTES

        def forget(_: object) -> None:
            del self._known[key]
            self.live_bytes -= size

        self._known[key] = weakref.ref(storage, forget)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def reset_peak(self) -> None:
        """Starts a new peak from what is alive now."""
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator and counts what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result


def tensors_of(*owners: Any) -> list[torch.Tensor]:
    """Returns the tensors that models and optimizers hold: parameters, buffers, quantisation states, gradients."""
    found: list[torch.Tensor] = []
    for owner in owners:
        if isinstance(owner, torch.nn.Module):
            for parameter in owner.parameters():
                found.append(parameter.data)
                if parameter.grad is not None:
                    found.append(parameter.grad)
                found += _quantisation_state(getattr(parameter, "quant_state", None))
            found += list(owner.buffers())
        elif isinstance(owner, torch.optim.Optimizer):
            found += [v for state in owner.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        else:
            found += [v for v in vars(owner).values() if isinstance(v, torch.Tensor)]
    return found


def _quantisation_state(state: Any) -> list[torch.Tensor]:
    if state is None:
        return []
    own = [v for v in (state.absmax, state.code, state.offset) if isinstance(v, torch.Tensor)]
    return own + _quantisation_state(getattr(state, "state2", None))
