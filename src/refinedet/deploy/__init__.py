"""Exporting a trained detector to files that run without PyTorch (docs/deploy.md)."""
