"""The names that server and clients agree on: of records, metrics and instructions."""

from __future__ import annotations

GRADIENTS = "gradients"
"""The instruction that asks a client for the summed gradients of its rows at the start of the run, not for training."""
CAPABILITY = "capability"
"""The record in which a client announces what it is able to train, when it is asked by a message of type ``query``."""
EXAMPLES, LOSS = "num-examples", "train_loss"
"""The metrics in which a client says on how many rows it has trained, and its mean loss on them."""
EPSILON = "epsilon"
"""The metric in which a client says what everything that it has released costs."""
CLIP, NOISE = "clip-update", "noise-update"
"""The instructions to clip the whole update to a norm, and to add noise of a standard deviation, before sending."""
