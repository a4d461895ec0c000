"""What ``fedlora`` says on standard error: notices about the data, and one paragraph for an error."""

from __future__ import annotations

import logging
import traceback

from rich.console import Console
from rich.text import Text

from fedlora.errors import FedloraError
from simulations import compose


class NoticeHandler(logging.Handler):
    """Prints every notice about the data once, however many trials a sweep has."""

    def __init__(self) -> None:
        super().__init__()
        self.told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print the notice."""
        text = record.getMessage()
        if text not in self.told:
            self.told.add(text)
            say("note", text)


def say(what: str, text: str, style: str = "bold yellow") -> None:
    """One paragraph on standard error: ``note: ...``."""
    Console(stderr=True).print(Text.assemble((f"{what}: ", style), text), soft_wrap=True)


def described(error: Exception) -> tuple[str, int]:
    """One paragraph about ``error``, and the exit status of a command that ends with it."""
    if isinstance(error, compose.HYDRA_ERRORS):
        error = compose.explain(error)
    if isinstance(error, FedloraError):
        return str(error), error.exit_code
    return f"{type(error).__name__}: {error}. This is a fault of fedlora; --debug shows where.", 1


def report(error: Exception, debug: bool) -> int:
    """Print one paragraph about ``error`` (and its traceback when asked) and return the exit status."""
    if debug:
        traceback.print_exception(error)
    text, code = described(error)
    say("error", text, "bold red")
    return code
