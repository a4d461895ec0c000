"""The errors a user sees. Each message is one paragraph: what is wrong, which setting, how to mend it."""


class FedloraError(Exception):
    """A run failed for a reason the user should read. The command exits with status 1."""

    exit_code = 1


class InputError(FedloraError):
    """The configuration or the data cannot work as given. The command exits with status 2."""

    exit_code = 2


class PolicyError(FedloraError):
    """A run asks a client for something that its policy does not allow. The text names no number of its data."""
