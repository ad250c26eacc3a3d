"""What every job stands on: loops that can be killed, checkpoints, the run folder, logs."""
