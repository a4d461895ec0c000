"""The server side of a deployment: the processes behind ``fedlora serve``."""
