"""Saved results as tables and pages."""

from loopdiag.report.page import caveats, page, recommendation
from loopdiag.report.reproduction import reproduction
from loopdiag.report.tables import probe_table, tables

__all__ = ["caveats", "page", "probe_table", "recommendation", "reproduction", "tables"]
