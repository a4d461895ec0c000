"""Differential privacy: what is protected, how noise is drawn, and what has been spent."""
