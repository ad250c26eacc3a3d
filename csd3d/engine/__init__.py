"""The parts of every job: loops that can be killed, checkpoints, the run folder, logs."""
