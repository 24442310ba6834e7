"""Tables, figures and pages rendered from ``runs.csv`` and from claims. No torch."""
