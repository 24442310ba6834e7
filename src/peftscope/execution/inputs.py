"""What a run reads: its base model, its data and its benchmarks. No torch."""

from __future__ import annotations

from peftscope.data.benchmarks import benchmark_resource
from peftscope.data.tasks import task_resource
from peftscope.files.resource import Resource
from peftscope.models.fetch import model_resource
from peftscope.spec import RunSpec


def inputs(spec: RunSpec) -> list[Resource]:
    """Returns the folders that a run reads: its base model, its task, its benchmarks."""
    benchmarks = [benchmark_resource(name) for name in spec.benchmarks]
    return [model_resource(spec.model, spec.revision), task_resource(spec.task), *benchmarks]
