"""Representations of scenes and assets: one file for each kind."""
