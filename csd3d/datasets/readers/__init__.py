"""Readers of capture formats, one a file; `registry.names("reader")` lists them."""
