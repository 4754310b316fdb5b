"""Serving: an engine that batches requests as they come (`engine`), and the HTTP app in front of it (`app`)."""
