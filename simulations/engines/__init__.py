"""Engines: what executes client work. All give the same numbers."""
