"""Puts experiments and published results, which lie in folders at the root, into the wheel; see layout.py."""

from pathlib import Path
from shutil import copyfile, rmtree

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = {
    "experiments": {".yaml", ".json"},
    "results/published": {".csv", ".json", ".md", ".parquet"},  # no figures
}
"""The folders, and the endings of the files in them that a wheel has."""
LEFT_OUT = {"items.parquet", "losses.parquet", "weights.parquet"}
"""Single items, losses along the way (records have them too), measured weights: too much for the wheel."""
MANY_RECORDS = {"sums", "pronunciation", "pronunciation-embeddings", "pronunciation-gemma"}
"""The studies of which the tables travel and the records do not: each has about a hundred or more."""


class BuildWithFolders(build_py):
    """Builds the package, and copies the folders into it. An editable install reads them where they are."""

    def shipped(self):
        """Returns the paths of the files, relative to the root."""
        return sorted(
            path.as_posix()
            for folder, endings in SHIPPED.items()
            for path in Path(folder).rglob("*")
            if path.suffix in endings
            and path.name not in LEFT_OUT
            and not (path.name == "records.parquet" and path.parent.name in MANY_RECORDS)
        )

    def get_source_files(self):
        """Returns what a source distribution has of them."""
        return [*super().get_source_files(), *self.shipped()]

    def run(self):
        """Builds the package."""
        if self.editable_mode:
            super().run()
            return
        package = Path(self.build_lib) / "peftscope"
        rmtree(package, ignore_errors=True)  # an earlier build's may have files that are gone
        super().run()
        for name in self.shipped():
            target = package / "shipped" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            copyfile(name, target)


setup(cmdclass={"build_py": BuildWithFolders})
