"""Experiments with their commands, numbers and figures, one folder each."""
