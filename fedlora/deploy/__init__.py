"""The client side of a deployment: one data owner, its rows, its key, its policy, and the process that serves it."""
