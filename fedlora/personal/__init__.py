"""Clients with models of their own: any architecture each, one width of features, and what they share beside it."""
