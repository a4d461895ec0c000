"""Accuracy against epsilon: the public model of the experiment."""
