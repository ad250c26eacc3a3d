"""Formats of captures, one a file: `registry.names("reader")` lists them."""
