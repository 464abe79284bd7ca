"""The command line: arguments in, calls, tables out."""

from loopdiag.cli.app import app, main
from loopdiag.cli.output import Exit

__all__ = ["Exit", "app", "main"]
