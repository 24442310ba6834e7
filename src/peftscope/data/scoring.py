"""Reads a task's lm-eval file, which says how the task is asked and scored, as data. No torch.

lm-eval itself imports Python for the tag ``!function`` and the key ``class``, and renders templates without a sandbox.
So lm-eval never reads the file: this module reads it and passes the content on.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from peftscope.errors import InputError, Problem
from peftscope.files.content import Count, Strict, read_yaml
from peftscope.files.problems import validated
from peftscope.layout import EXPERIMENTS, shipped

Text = Annotated[str, Field(max_length=10_000)]


_TARGET = re.compile(r"^(?:response|\{\{response(?:\.split\('([^'\\{}]{1,40})'\)\[-1\]\.strip\(\))?\}\})$")
"""The allowed targets: the response, or its part after the last occurrence of a text. lm-eval need not render them."""


class Generation(Strict):
    """The options of greedy decoding, such as where it stops."""

    until: list[Text] = ["\n"]
    max_gen_toks: Annotated[Count, Field(le=100_000)] = 16
    do_sample: Literal[False] = False


class FilterStep(Strict):
    """One of lm-eval's text filters, except ``custom``, which runs a function."""

    function: Literal["remove_whitespace", "take_first", "lowercase", "uppercase", "regex"]
    regex_pattern: Text | None = None
    group_select: int | None = None
    fallback: Text | None = None


class Filter(Strict):
    """A named chain of filters."""

    name: Text = "stripped"
    filter: Annotated[list[FilterStep], Field(min_length=1)]


class Metric(Strict):
    """The metric exact match. No other is allowed, because lm-eval downloads and runs the code of unknown metrics."""

    metric: Literal["exact_match"] = "exact_match"
    aggregation: Literal["mean"] = "mean"
    higher_is_better: Literal[True] = True
    ignore_case: bool | None = None
    ignore_punctuation: bool | None = None
    ignore_numbers: bool | None = None
    regexes_to_ignore: list[Text] | None = None


class Scoring(Strict):
    """The allowed content of a task's lm-eval file. The defaults are those of the suite's own files."""

    task: str
    dataset_path: Literal["json"] = "json"
    dataset_kwargs: dict[str, Any] = {}
    test_split: Literal["test"] = "test"
    output_type: Literal["generate_until"] = "generate_until"
    # Training sees the prompt, a space and the response, so evaluation must ask in the same form.
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
        """Returns the part of a response that an answer must match.

        >>> Scoring(task="sums", doc_to_target="{{response.split('####')[-1].strip()}}").target_of("2 + 2 #### 4")
        '4'
        """
        found = _TARGET.match(self.doc_to_target)
        return response.split(found[1])[-1].strip() if found and found[1] else response


def lm_eval_file(name: str) -> Path:
    """Returns the path of a task's lm-eval file."""
    return shipped(EXPERIMENTS / "tasks" / f"{name}.yaml")


def read_scoring(name: str) -> Scoring:
    """Returns the content of a task's lm-eval file.

    Raises:
        InputError: The file has problems; the error lists all of them.
    """
    path = lm_eval_file(name)
    known = {field for part in (Scoring, Generation, Filter, FilterStep, Metric) for field in part.model_fields}
    found = validated(Scoring, read_yaml(path), path, known)
    data = f"resources/tasks/{name}/test.jsonl"
    if found.dataset_kwargs not in ({}, {"data_files": {"test": data}}):
        raise InputError(Problem(f"{path}: dataset_kwargs", "names other data", f"leave it out, or name {data}"))
    if found.task != name:
        raise InputError(Problem(f"{path}: task", f"must be the file's own name, {name} (got {found.task!r})"))
    return found
