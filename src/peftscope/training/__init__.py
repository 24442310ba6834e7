"""Training: the step, the loop, the probe, and the run that joins them."""
