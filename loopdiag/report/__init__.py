"""Saved results as tables and pages."""

from loopdiag.report.reproduction import reproduction
from loopdiag.report.tables import tables

__all__ = ["reproduction", "tables"]
