"""From ``runs.csv`` to tables, figures and the report. No torch."""
