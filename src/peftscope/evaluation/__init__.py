"""Evaluation: held-out loss, generated answers scored by lm-eval, retention of English, and latency."""
