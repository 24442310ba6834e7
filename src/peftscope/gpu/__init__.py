"""The check on a card: memory, fit, speed and latency measured on random weights, and what claims they decide."""
