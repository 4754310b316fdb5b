"""Serving: an engine that generates answers in batches (`engine`), and the HTTP app in front of it (`http`)."""
