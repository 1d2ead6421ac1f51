"""`recfx report`: one HTML page about a run, which needs no other file and no network."""

from recfx.report.page import write_report

__all__ = ["write_report"]
