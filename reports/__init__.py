"""Reports: what commands print, and the tables, figures and pages they write, one file per report.

Nothing here measures, trains or imports torch: reports are made from records and results alone.
"""
