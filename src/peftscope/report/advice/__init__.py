"""Advice for a model, a card and data: rules that are data, what fits, what it takes, and an experiment to check it."""
