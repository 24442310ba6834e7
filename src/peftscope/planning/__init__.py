"""From an experiment's file to its runs, and what they will take."""
