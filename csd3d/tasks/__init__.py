"""The jobs: each turns a config and a run folder into results."""
