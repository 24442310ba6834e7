"""Gives the reason why a field of a record is null."""

from __future__ import annotations

from peftscope.memory.predict import why_not_simulated
from peftscope.record import Ceilings, RunRecord, Speed

NOT_LIMITED = "not enforced: only the allocator of a CUDA card can be limited"


def why_unavailable(record: RunRecord) -> dict[str, str]:
    """Returns the reason for each field that is null, by the field's path."""
    reasons: dict[str, str] = {}
    cpu = record.spec.device == "cpu"
    for phase in ("load", "train", "evaluate"):
        for field, value in getattr(record.memory, phase):
            if value is None:
                cuda_only = cpu and field in ("peak_reserved_bytes", "peak_device_bytes")
                reasons[f"memory.{phase}.{field}"] = "CUDA only" if cuda_only else _why_missing(record, phase, field)
    for phase in ("forward", "backward", "optimizer"):
        if getattr(record.memory, f"{phase}_peak_tensor_bytes") is None:
            reasons[f"memory.{phase}_peak_tensor_bytes"] = _why_missing(record, "train", "peak_tensor_bytes")
    failed = record.status == "ok" and all(value is None for _, value in record.memory.predicted)
    for field, value in record.memory.predicted:
        if failed:
            reason = why_not_simulated(record.spec) or "the simulation failed, see train.log"
            reasons[f"memory.predicted.{field}"] = reason
        elif value is None:
            cuda_only = cpu and field.endswith(("reserved_bytes", "device_bytes"))
            reasons[f"memory.predicted.{field}"] = "CUDA only" if cuda_only else _why_missing(record, "train")
    if record.memory.paged_state_bytes is None:
        reasons["memory.paged_state_bytes"] = "CUDA only" if cpu else _why_missing(record, "train")
    if cpu and record.spec.memory_limit_gib:
        reasons["spec.memory_limit_gib"] = NOT_LIMITED
    for part in ("speed", "ceilings", "quality", "size"):
        for field, value in getattr(record, part):
            if value is None:
                reasons[f"{part}.{field}"] = _why_missing(record, "evaluate" if part == "quality" else "train", field)
    return reasons


def _why_missing(record: RunRecord, phase: str, field: str = "") -> str:
    if record.status != "ok":
        return f"the run ended: {record.status}"
    if field == "peak_device_bytes":
        return "NVML gave no answer"
    if phase == "train" and not record.spec.method.trains:
        return "nothing is trained"
    if field in (*Speed.model_fields, *Ceilings.model_fields) and not record.provenance.get("alone", True):
        return "other runs shared the machine"
    if field in ("matmul_share", *Ceilings.model_fields) and record.speed.timed_steps:
        return "the model left no room to measure the device's rates"
    if field == "peak_tensor_bytes" and record.spec.shards > 1:
        return "the byte tracker knows a single process"
    if field == "peak_tensor_bytes" and record.spec.compile:
        return "the byte tracker does not see into compiled layers"
    if field == "peak_tensor_bytes" and record.spec.device == "cuda" and record.spec.probe_steps:
        return "the model left no room for further steps"
    return "switched off in the spec"
