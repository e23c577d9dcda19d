"""Matching, loss, optimiser, trainer and checkpoints (paper, section 4)."""
