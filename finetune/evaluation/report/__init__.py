"""Pieces of a run's report: what its folder holds, in words and tables that `page.html` lays out. Imports no torch."""
