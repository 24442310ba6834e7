"""The check on a card: memory, fit, speed and latency measured on random weights, and the claims that they decide."""
