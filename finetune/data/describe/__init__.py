"""Rows for media that have none: a model is asked about each file, and what it says is kept with where it is from."""
