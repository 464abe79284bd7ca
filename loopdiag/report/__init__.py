"""Saved results as tables and pages."""

from loopdiag.report.reproduction import reproduction
from loopdiag.report.tables import probe_table, tables

__all__ = ["probe_table", "reproduction", "tables"]
