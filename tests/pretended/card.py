"""A pretended card: ``cuda`` is the processor, and every tensor that was put there carries a mark by its storage.

A function mode maps the device of calls, and answers as a card does. A dispatch mode refuses operators whose tensors
lie on two devices. Stubs of ``torch.cuda`` describe a card and count the bytes of the marked storages. It shows whether
code puts tensors where they belong and asks a card in the right order. It shows nothing of kernels, of the real
allocator, of drivers or of time: a green run on it was not tested on a card.
"""

import os
import time
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from described import described
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST, REAL_DEVICE, MIB = torch.device("cpu"), torch.device, 2**20
COPIES = ("copy_", "_to_copy", "lift_fresh", "set_", "detach")
INDEXING = ("index", "index_put_", "index_put", "_index_put_impl_")
ACROSS = {f"aten.{name}" for name in COPIES + INDEXING}
"""Operators that CUDA lets read from the host; their result lies where their first tensor does."""
HOLDS_DEVICE = ("to", "cuda", "cpu")
ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


class Memory:
    """The storages on the card, and their bytes: now, and at the peak."""

    def __init__(self) -> None:
        self.marked: dict[int, Any] = {}
        self.held = self.peak = 0
        self.limit = int(described().total_mib * MIB)
        self.device, self.began = 0, False

    def add(self, tensor: Any) -> None:
        if tensor.is_meta or type(tensor).__name__ == "FakeTensor":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.marked:
            return
        self.began = True
        if self.held + size > self.limit:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size / MIB:.2f} MiB. GPU 0 has a total capacity of "
                f"{described().total_mib / 1024:.2f} GiB. (a pretended card)"
            )
        self.held += size
        self.peak = max(self.peak, self.held)
        self.marked[key] = weakref.ref(storage, lambda _: self.drop(key, size))

    def drop(self, key: int, size: int) -> None:
        if self.marked.pop(key, None) is not None:
            self.held -= size

    def __contains__(self, tensor: Any) -> bool:
        if tensor is None or tensor.is_meta or type(tensor).__name__ == "FakeTensor":
            return False
        return tensor.untyped_storage()._cdata in self.marked

    def reset_peak(self, *_: Any) -> None:
        self.peak = self.held


MEMORY = Memory()
simulating = 0
"""How many of torch's fake modes are on: in them nothing is mapped, because the simulator needs no card."""


def wants_card(value: Any) -> bool:
    named = isinstance(value, str) and value.partition(":")[0] == "cuda"
    return named or (isinstance(value, REAL_DEVICE) and value.type == "cuda")


def wants_host(value: Any) -> bool:
    return isinstance(value, str | REAL_DEVICE) and str(value) == "cpu"


def tensors(values: Any) -> list[Any]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class OneDevice(TorchDispatchMode):
    """Refuses operators whose tensors lie on two devices, as CUDA does, and marks what they return."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, str(func).rpartition(".")[0]
        if simulating:
            return func(*args, **kwargs)
        given = tensors((args, kwargs))
        on = [tensor in MEMORY for tensor in given]
        if any(on) and name not in ACROSS:
            for tensor, there in zip(given, on, strict=True):
                if not there and tensor.dim():
                    raise RuntimeError(
                        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
                        f"cpu! ({func}: a {tuple(tensor.shape)} {tensor.dtype} is on the host)"
                    )
        result = func(*args, **kwargs)
        if on and (on[0] if name in ACROSS else any(on)):
            for tensor in tensors(result):
                MEMORY.add(tensor)
        return result


class AsCard(TorchFunctionMode):
    """Maps ``cuda`` in calls to the processor, and says of marked tensors what a card's say."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", str(func))
        if simulating:
            return func(*args, **kwargs)
        owner = args[0] if args and isinstance(args[0], torch.Tensor) else None
        there = owner in MEMORY
        if func == torch.Tensor.device.__get__:
            return REAL_DEVICE(f"cuda:{MEMORY.device}") if there else func(*args)
        if func in (torch.Tensor.is_cuda.__get__, torch.Tensor.is_cpu.__get__):
            return there == (func == torch.Tensor.is_cuda.__get__)
        if func is torch.Tensor.get_device:
            return 0 if there else -1
        if name in ("numpy", "__array__") and there:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first.")
        if name in HOLDS_DEVICE and owner is not None:
            return self.moved(func, name, owner, args[1:], kwargs)
        if func is REAL_DEVICE or name == "_parse_to":
            return func(*args, **kwargs)
        to_card = any(wants_card(value) for value in [*args, *kwargs.values()])
        if to_card:
            args = tuple(HOST if wants_card(value) else value for value in args)
            kwargs = {key: HOST if wants_card(value) else value for key, value in kwargs.items()}
        result, given = func(*args, **kwargs), tensors((args, kwargs))
        # Composite operators make their results inside C++, where no mode sees the device that was asked for.
        if to_card or (given and all(tensor in MEMORY for tensor in given)):
            for tensor in tensors(result):
                MEMORY.add(tensor)
        return result

    def moved(self, func: Any, name: str, owner: Any, rest: Any, kwargs: Any) -> Any:
        """Returns a tensor after ``to``, ``cuda`` or ``cpu``: a copy where it changes the device."""
        said, there = [*rest, *kwargs.values()], owner in MEMORY
        like = [value for value in said if isinstance(value, torch.Tensor)]
        to_card = name == "cuda" or any(map(wants_card, said)) or any(tensor in MEMORY for tensor in like)
        to_host = name == "cpu" or any(map(wants_host, said)) or any(tensor not in MEMORY for tensor in like)
        result = owner
        if name == "to":
            types = [value for value in rest if isinstance(value, torch.dtype)] + [tensor.dtype for tensor in like]
            options = {key: kwargs[key] for key in ("dtype", "copy", "memory_format") if kwargs.get(key) is not None}
            result = func(owner, *types, **options) if types or options else owner
        if there == to_card or (there and not to_host):
            return result
        if result.untyped_storage()._cdata == owner.untyped_storage()._cdata or (to_host and result in MEMORY):
            with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
                result = result.clone() if to_card or not result.requires_grad else result.detach().clone()
        if to_card:
            MEMORY.add(result)
        return result


class Event:
    """An event of a stream that works at once."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.at: float | None = None

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: "Event") -> float:
        assert self.at is not None and end.at is not None, "both events must be recorded"
        return 1000 * (end.at - self.at)


def properties(index: Any = 0) -> Any:
    card = described()
    number = index if isinstance(index, int) else 0
    if not 0 <= number < card.count:
        raise AssertionError("Invalid device id")
    place = {"pci_domain_id": 0, "pci_bus_id": 59 + number, "pci_device_id": 0}
    return SimpleNamespace(
        name=card.name, major=card.major, minor=card.minor, total_memory=int(card.total_mib * MIB), **place
    )


def visible() -> int:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return described().count if named is None else len([part for part in named.split(",") if part not in ("", "-1")])


def filled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function with a card that has no room while it runs."""

    def run(*args: Any, **kwargs: Any) -> Any:
        limit, MEMORY.limit = MEMORY.limit, MEMORY.held
        try:
            return function(*args, **kwargs)
        finally:
            MEMORY.limit = limit

    return run


def limit_memory(fraction: float, *_: Any) -> None:
    MEMORY.limit = int(fraction * described().total_mib * MIB)


def install() -> None:
    """Puts the card under torch, in this process and in those that it forks."""
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # a mode is local to a thread
    import bitsandbytes  # noqa: F401  (before there is a card: its CUDA code would look for the driver)
    import peft  # noqa: F401
    from torch._subclasses.fake_tensor import FakeTensorMode

    card = described()
    total = int(card.total_mib * MIB)
    stubs: dict[str, Callable[..., Any]] = {
        "is_available": lambda: not simulating,
        "is_initialized": lambda: not simulating,
        "device_count": visible,
        "current_device": lambda: MEMORY.device,
        "set_device": lambda device: setattr(MEMORY, "device", device),
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": MEMORY.reset_peak,
        "max_memory_allocated": lambda *_: MEMORY.peak,
        "max_memory_reserved": lambda *_: MEMORY.peak,
        "memory_allocated": lambda *_: MEMORY.held,
        "memory_reserved": lambda *_: MEMORY.held,
        "mem_get_info": lambda *_: (MEMORY.limit - MEMORY.held, total),
        "get_device_properties": properties,
        "get_device_name": lambda *_: card.name,
        "get_device_capability": lambda *_: (card.major, card.minor),
        "get_arch_list": lambda: ARCHITECTURES,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "manual_seed_all": lambda _: None,
        "is_bf16_supported": lambda *_, **__: card.major >= 8,
        "set_per_process_memory_fraction": limit_memory,
        "Event": Event,
    }
    for name, stub in stubs.items():
        setattr(torch.cuda, name, stub)
    torch.version.cuda = "pretended"
    torch._C._accelerator_getAllocatorSettings = lambda: ""  # type: ignore[attr-defined]
    generator, autocast = torch.Generator, torch.amp.autocast_mode.autocast
    begin_cast, begin, end = autocast.__init__, FakeTensorMode.__enter__, FakeTensorMode.__exit__
    torch.Generator = lambda device="cpu": generator("cpu")  # type: ignore[assignment,misc]

    def cast(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        begin_cast(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    def enter(self: Any) -> Any:
        global simulating
        simulating += 1
        return begin(self)

    def leave(self: Any, *error: Any) -> Any:
        global simulating
        simulating -= 1
        return end(self, *error)

    autocast.__init__ = cast  # type: ignore[method-assign]
    FakeTensorMode.__enter__, FakeTensorMode.__exit__ = enter, leave  # type: ignore[method-assign]
    OneDevice().__enter__()
    AsCard().__enter__()
