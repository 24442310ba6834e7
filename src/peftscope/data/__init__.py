"""Data: tasks and their splits, tokenising, and the one collator that every method uses."""
