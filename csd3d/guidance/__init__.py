"""Guidance of text jobs: random views with their prompts, and the methods of a config."""
