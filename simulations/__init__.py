"""Simulations: what runs many clients. The command line, the round loop, the engines."""
