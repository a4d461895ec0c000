"""Reports: run folders in, one page that opens offline and tables for papers out.

>>> from simulations.report import Report
>>> report = Report.of("runs/2026-01-31_12-00-00")
>>> report.figures()["pareto"].show()
>>> report.write("report.html", tables=["report.csv", "report.tex"])
"""

from simulations.report.report import Report

__all__ = ["Report"]
