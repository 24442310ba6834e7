"""Questions about memory and time: fit, duration, differences of runs, failures, and a trainer's file."""
