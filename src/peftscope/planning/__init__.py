"""From an experiment's file to its runs, with the time and memory that they will take."""
