"""The data of lm-eval's own benchmarks, fetched before any run needs them. No torch.

lm-eval decides how a benchmark asks and scores. Only the source of its rows is changed, so that runs need no hub.
"""

from __future__ import annotations

import re
from functools import lru_cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from peftscope.errors import InputError, Problem, close_match
from peftscope.files.content import BENCHMARK_PATTERN
from peftscope.files.hub import load_rows
from peftscope.files.resource import Resource
from peftscope.layout import BENCHMARKS_FOLDER

SPLIT_FIELDS = ("training_split", "validation_split", "test_split", "fewshot_split")


class _Loader(yaml.SafeLoader):
    """Loads YAML and ignores tags such as ``!function``."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def benchmark_folder(name: str) -> Path:
    """Returns the folder of a benchmark's fetched rows."""
    return BENCHMARKS_FOLDER / name


def lm_eval_tasks() -> Path:
    """Returns the folder of lm-eval's own task files.

    Raises:
        ModuleNotFoundError: lm-eval is not installed.
    """
    found = find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("lm_eval", name="lm_eval")
    return Path(found.submodule_search_locations[0]) / "tasks"


@lru_cache
def find_benchmark(name: str, where: str = "benchmarks") -> Path:
    """Returns lm-eval's own task file of a benchmark.

    Raises:
        InputError: lm-eval has no benchmark of that name.
    """
    root = lm_eval_tasks()
    if re.fullmatch(BENCHMARK_PATTERN, name):
        # Most files are in a folder with their name; to read all fourteen thousand takes a second or more.
        near = sorted(root.glob(f"{name.split('_')[0]}*/**/*.yaml"))
        names_it = re.compile(rf"^task:\s*[\"']?{re.escape(name)}[\"']?\s*(#.*)?$", re.MULTILINE)
        for path in [*near, *sorted(root.rglob("*.yaml"))]:
            if names_it.search(path.read_text(errors="replace")):
                return path
    names = [path.stem for path in root.rglob("*.yaml")]
    raise InputError(Problem(where, f"lm-eval has no task of that name (got {name!r})", close_match(name, names)))


def _config(path: Path) -> dict[str, Any]:
    """Returns the fields of a task file; they override those of the file that it includes."""
    content = yaml.load(path.read_text(), Loader=_Loader) or {}
    parent = content.pop("include", None)
    return {**_config(path.parent / parent), **content} if parent else content


def benchmark_resource(name: str) -> Resource:
    """Returns the folder of a benchmark's rows, fetched or not; to fetch it fails if lm-eval does not know its name."""
    return Resource(benchmark_folder(name), partial(_fill, name), ".parquet")


def _fill(name: str, target: Path) -> dict[str, Any]:
    """Fetches a benchmark's rows into a folder, and returns their source."""
    file = find_benchmark(name)
    config = _config(file)
    splits = sorted({config[field] for field in SPLIT_FIELDS if config.get(field)})
    if not splits or "dataset_path" not in config:
        raise InputError(Problem(f"benchmark {name}", "its data do not come from a hub", "choose another one"))
    facts: dict[str, str] = {}
    items: dict[str, int] = {}
    revision = (config.get("dataset_kwargs") or {}).get("revision")
    for split in splits:
        rows, facts = load_rows(config["dataset_path"], config.get("dataset_name"), split, revision)
        rows.to_parquet(target / f"{split}.parquet")
        items[split] = len(rows)
    return {
        "name": name,
        "lm_eval": version("lm_eval"),
        "file": file.relative_to(lm_eval_tasks()).as_posix(),
        "dataset": config["dataset_path"],
        "config": config.get("dataset_name"),
        **facts,
        "items": items,
    }


def write_task_file(name: str, folder: Path) -> None:
    """Writes an lm-eval task file into a folder. It includes lm-eval's own file and reads the fetched rows."""
    own = benchmark_folder(name).resolve()
    files = {path.stem: str(path) for path in sorted(own.glob("*.parquet"))}
    content = {
        "include": str(find_benchmark(name)),
        "task": name,
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
