"""Results of a run for its user: report.html, grids of pictures, curves."""

from csd3d.report.page import Curves, ReportData, ViewRow, write_report

__all__ = ["Curves", "ReportData", "ViewRow", "write_report"]
