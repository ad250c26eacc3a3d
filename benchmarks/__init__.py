"""What was measured, by one command each, as JSON."""
