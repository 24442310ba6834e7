"""Advice for a model, a card and data: rules that are data, what fits, and what it takes."""
