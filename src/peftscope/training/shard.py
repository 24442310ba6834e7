"""Shards one model over several processes: each holds a share of every weight, gradient and optimizer state.

PyTorch's ``fully_shard`` gathers the weights of a layer when the layer runs, and then sums and scatters its gradients.
Every process builds the whole batch and takes its own rows. In an evaluation, all processes evaluate everything.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from peftscope.data.batching import Batch
from peftscope.spec import RunSpec

PATIENCE = timedelta(hours=2)
"""How long a process waits for others, such as while the first saves a large model. Dead ones are noticed earlier."""

T = TypeVar("T")


def join(spec: RunSpec, rank: int, meeting: Path) -> None:
    """Joins the processes of a run as number ``rank``. They meet through a file, which must not exist before."""
    if spec.device == "cuda":
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        "nccl" if spec.device == "cuda" else "gloo",
        init_method=meeting.absolute().as_uri(),
        rank=rank,
        world_size=spec.shards,
        timeout=PATIENCE,
    )


def shard(model: Any, spec: RunSpec) -> None:
    """Reduces a model that all processes have built to this process's share, and moves it to the device.

    Layers are gathered one by one. Parameters outside of layers (embeddings, head) stay gathered during a pass.
    """
    mesh = init_device_mesh(spec.device, (spec.shards,))
    for layer in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh)
    # By default it stays gathered after an evaluation, and an optimizer made then would train the gathered copy.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    # ``generate`` calls the layers without the model's own ``forward``.
    register_fsdp_forward_method(model, "generate")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Each process's loss is already its part of the mean over all response tokens, so gradients are summed.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def own_rows(batch: Batch, spec: RunSpec) -> Batch:
    """Returns this process's rows of a batch. ``tokens`` and ``response_tokens`` still count the whole batch."""
    if spec.shards == 1:
        return batch
    rows = len(batch.input_ids) // spec.shards
    mine = slice(rows * distributed.get_rank(), rows * (distributed.get_rank() + 1))
    by_row = ("input_ids", "attention_mask", "labels", "kept_labels", "position_ids", "example_ids")
    rows_of: dict[str, Any] = {name: value[mine] for name in by_row if (value := getattr(batch, name)) is not None}
    return replace(batch, **rows_of)


def summed(value: torch.Tensor, spec: RunSpec) -> torch.Tensor:
    """Returns the sum of a tensor over all processes."""
    if spec.shards > 1:
        distributed.all_reduce(value)
    return value


def anywhere(value: bool, spec: RunSpec) -> bool:
    """Returns whether a value is true in any process. All processes must call this together."""
    if spec.shards == 1:
        return value
    return bool(summed(torch.tensor(float(value), device=spec.device), spec))


def own_seed(seed: int, spec: RunSpec) -> int:
    """Returns the seed of this process's dropout: the run's seed in the first process, and in others no run's seed."""
    return seed if spec.shards == 1 else seed + (distributed.get_rank() << 32)


def is_first() -> bool:
    """Returns whether this process writes the run's files."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def trained_state(model: Any) -> dict[str, torch.Tensor]:
    """Returns a sharded model's trained tensors by name, whole and on the host; nothing outside the first process."""
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = parameter.detach().full_tensor()  # all processes take part
            if is_first():
                state[name] = whole.cpu()
    return state


def own_share(value: Any) -> Any:
    """Returns a structure of dicts and lists in which this process's share replaces every sharded tensor."""
    if isinstance(value, DTensor):
        return value.to_local()
    if isinstance(value, dict):
        return {key: own_share(item) for key, item in value.items()}
    return [own_share(item) for item in value] if isinstance(value, list) else value


def as_shares(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns an optimizer's state in which each tensor is this process's share, sharded like its parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def spread(value: Any, parameter: torch.Tensor) -> Any:
        if not isinstance(parameter, DTensor) or not isinstance(value, torch.Tensor) or not value.dim():
            return value
        share, shape, stride = value.to(parameter.device), parameter.shape, parameter.stride()
        return DTensor.from_local(share, parameter.device_mesh, parameter.placements, shape=shape, stride=stride)

    states = {
        index: {name: spread(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return state | {"state": states}


def held_bytes(model: Any) -> int:
    """Returns the bytes of the parameters that this process holds."""
    return sum(share.numel() * share.element_size() for share in (p.to_local() for p in model.parameters()))


def from_all(value: T, spec: RunSpec) -> list[T]:
    """Returns the values of all processes in the order of their ranks."""
    if spec.shards == 1:
        return [value]
    values: list[Any] = [None] * spec.shards
    distributed.all_gather_object(values, value)
    return values
