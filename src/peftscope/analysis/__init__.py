"""Records collected into tables, the statistics on them, and the comparisons of studies. No torch."""
