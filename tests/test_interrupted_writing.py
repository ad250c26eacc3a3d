"""Ctrl+C in a real run while result.mp4 is written: no half file, and --resume ends as if nothing had happened."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
SLOW_WRITER = """
import sys, time
from csd3d.media import encoding
write = encoding.frame_writer
import csd3d.report.canvas as canvas
import launch
def slow(frames):
    for frame in frames:
        print("writing", flush=True)
        time.sleep(0.6)
        yield frame
"""
