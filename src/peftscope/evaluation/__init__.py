"""Evaluation: held-out loss, generated answers scored by lm-eval, and retention of English."""
