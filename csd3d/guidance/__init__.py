"""What text jobs ask of a prior: random views and how a prompt is said of each, and the methods that a config names."""
