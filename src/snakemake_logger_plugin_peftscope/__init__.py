"""Snakemake's rich progress bars with the time that is left, and a line after each job where there is no terminal.

snakemake-logger-plugin-rich shows elapsed time only, and nothing outside a terminal. Chosen by ``logger: peftscope`` in
the profile; Snakemake finds it by the name of this package.
"""

from __future__ import annotations

import logging
import time

from rich.progress import TextColumn, TimeRemainingColumn
from snakemake_interface_logger_plugins.common import LogEvent
from snakemake_logger_plugin_rich import LogHandler as RichLogHandler

from peftscope.planning.estimate import spoken

LONGEST_RUN_SECONDS = 30 * 24 * 3600
"""Jobs take minutes: the speed has to be taken over the whole run, not over the last half minute."""


class LogHandler(RichLogHandler):
    """The rich handler, told to estimate."""

    def __post_init__(self) -> None:
        """Adds the time left to the bars."""
        super().__post_init__()
        self.progress.speed_estimate_period = LONGEST_RUN_SECONDS
        self.progress.columns = (*self.progress.columns, TimeRemainingColumn(), TextColumn("left"))
        self._began = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        """Hands the record on; after each job, says how far the workflow is where no bar can be drawn."""
        super().emit(record)
        if getattr(record, "event", None) == LogEvent.PROGRESS and not self.console.is_terminal:
            done, total = record.done, record.total  # type: ignore[attr-defined]
            left = (time.monotonic() - self._began) / done * (total - done) if done else None
            about = f", about {spoken(left)} left" if left else ""
            self.console.print(f"{done} of {total} jobs{about}", highlight=False)
