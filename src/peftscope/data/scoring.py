"""How a task is asked and scored: its lm-eval file, read as data. No torch.

lm-eval itself imports Python for the tag ``!function`` and the key ``class``, and renders templates without a sandbox.
So it never reads the file here: it is given what this module read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peftscope.errors import InputError, Problem
from peftscope.files.content import Count, read_yaml
from peftscope.files.problems import dotted, problems_of
from peftscope.layout import EXPERIMENTS, shipped

Text = Annotated[str, Field(max_length=10_000)]


_TARGET = re.compile(r"^(?:response|\{\{response(?:\.split\('([^'\\{}]{1,40})'\)\[-1\]\.strip\(\))?\}\})$")
"""The response, or what stands in it after the last of some words: the one template that lm-eval need not render."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Generation(_Part):
    """Greedy decoding: where it stops."""

    until: list[Text] = ["\n"]
    max_gen_toks: Annotated[Count, Field(le=100_000)] = 16
    do_sample: Literal[False] = False


class FilterStep(_Part):
    """One of lm-eval's filters of text; ``custom``, which runs a function, is not among them."""

    function: Literal["remove_whitespace", "take_first", "lowercase", "uppercase", "regex"]
    regex_pattern: Text | None = None
    group_select: int | None = None
    fallback: Text | None = None


class Filter(_Part):
    """A chain of filters."""

    name: Text = "stripped"
    filter: Annotated[list[FilterStep], Field(min_length=1)]


class Metric(_Part):
    """Exact match; lm-eval fetches and runs the code of metrics that it does not have."""

    metric: Literal["exact_match"] = "exact_match"
    aggregation: Literal["mean"] = "mean"
    higher_is_better: Literal[True] = True
    ignore_case: bool | None = None
    ignore_punctuation: bool | None = None
    ignore_numbers: bool | None = None
    regexes_to_ignore: list[Text] | None = None


class Scoring(_Part):
    """What a task's lm-eval file may say. What it leaves out is as in the suite's own files."""

    task: str
    dataset_path: Literal["json"] = "json"
    dataset_kwargs: dict[str, Any] = {}
    test_split: Literal["test"] = "test"
    output_type: Literal["generate_until"] = "generate_until"
    # Training sees the prompt, a space and the response, so that is how it must be asked.
    doc_to_text: Literal["{{prompt}}", "prompt"] = "prompt"
    doc_to_target: Annotated[str, Field(pattern=_TARGET.pattern)] = "response"
    target_delimiter: Literal[" "] = " "
    generation_kwargs: Generation = Generation()
    filter_list: Annotated[list[Filter], Field(min_length=1, max_length=1)] = [
        Filter(filter=[FilterStep(function="remove_whitespace"), FilterStep(function="take_first")])
    ]
    metric_list: Annotated[list[Metric], Field(min_length=1, max_length=1)] = [Metric()]
    metadata: dict[str, Any] = {"version": 1}

    def target_of(self, response: str) -> str:
        """Returns what of a response an answer has to match.

        >>> Scoring(task="sums", doc_to_target="{{response.split('####')[-1].strip()}}").target_of("2 + 2 #### 4")
        '4'
        """
        found = _TARGET.match(self.doc_to_target)
        return response.split(found[1])[-1].strip() if found and found[1] else response


def lm_eval_file(name: str) -> Path:
    """Returns the path of a task's lm-eval file."""
    return shipped(EXPERIMENTS / "tasks" / f"{name}.yaml")


def read_scoring(name: str) -> Scoring:
    """Returns what a task's lm-eval file says.

    Raises:
        InputError: Every problem of the file.
    """
    path = lm_eval_file(name)
    try:
        found = Scoring.model_validate(read_yaml(path))
    except ValidationError as error:
        known = {field for part in (Scoring, Generation, Filter, FilterStep, Metric) for field in part.model_fields}
        raise InputError(problems_of(error, lambda location: f"{path}: {dotted(location)}", known)) from None
    data = f"resources/tasks/{name}/test.jsonl"
    if found.dataset_kwargs not in ({}, {"data_files": {"test": data}}):
        raise InputError(Problem(f"{path}: dataset_kwargs", "other data", f"leave it out, or name {data}"))
    if found.task != name:
        raise InputError(Problem(f"{path}: task", f"must be the file's own name, {name} (got {found.task!r})"))
    return found
