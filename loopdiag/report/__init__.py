"""Saved results as tables and pages."""

from loopdiag.report.page import page
from loopdiag.report.reproduction import reproduction
from loopdiag.report.tables import probe_table, tables
from loopdiag.report.verdict import caveats, recommendation

__all__ = ["caveats", "page", "probe_table", "recommendation", "reproduction", "tables"]
