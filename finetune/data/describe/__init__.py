"""Rows for media that have none: a model answers a prompt about each file, and each answer keeps its source."""
