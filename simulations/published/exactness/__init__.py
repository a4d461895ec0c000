"""Exact against approximate aggregation."""
