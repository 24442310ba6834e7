"""Developers' benchmarks: what the suite itself costs, and how its two calculators agree."""
