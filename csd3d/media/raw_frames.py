"""Raw frames with a time each, as ffmpeg reads them from a pipe: uncompressed video in Matroska.

Of the containers that hold raw video, Matroska is the simplest with times; the two libraries that would write it (PyAV,
and OpenCV's ffmpeg) load ffmpeg into this process. An element is its id, the length of its content, and the content:
https://www.matroska.org/technical/elements.html
"""

from fractions import Fraction

TICK = Fraction(1, 100_000)  # seconds; the times of frames are rounded to it
EBML, DOC_TYPE, SEGMENT, INFO, TIMESTAMP_SCALE = 0x1A45DFA3, 0x4282, 0x18538067, 0x1549A966, 0x2AD7B1
TRACKS, TRACK_ENTRY, TRACK_NUMBER, TRACK_UID, TRACK_TYPE, CODEC_ID = 0x1654AE6B, 0xAE, 0xD7, 0x73C5, 0x83, 0x86
VIDEO, PIXEL_WIDTH, PIXEL_HEIGHT, COLOUR_SPACE = 0xE0, 0xB0, 0xBA, 0x2EB524
CLUSTER, TIMESTAMP, BLOCK_GROUP, BLOCK, BLOCK_DURATION = 0x1F43B675, 0xE7, 0xA0, 0xA1, 0x9B
UNKNOWN_LENGTH = b"\x01" + b"\xff" * 7
RGB24 = b"RGB\x18"  # ffmpeg's name of 8-bit rgb


def header(width: int, height: int) -> bytes:
    """The beginning of the stream, for frames [height, width, 3] uint8."""
    size = _element(PIXEL_WIDTH, width) + _element(PIXEL_HEIGHT, height) + _element(COLOUR_SPACE, RGB24)
    track = _element(TRACK_NUMBER, 1) + _element(TRACK_UID, 1) + _element(TRACK_TYPE, 1)
    track += _element(CODEC_ID, b"V_UNCOMPRESSED") + _element(VIDEO, size)
    scale = _element(TIMESTAMP_SCALE, round(TICK * 10**9))  # in nanoseconds
    segment = _id(SEGMENT) + UNKNOWN_LENGTH + _element(INFO, scale) + _element(TRACKS, _element(TRACK_ENTRY, track))
    return _element(EBML, _element(DOC_TYPE, b"matroska")) + segment


def before_frame(begin: Fraction, end: Fraction, length: int) -> bytes:
    """What goes before the `length` bytes of a frame that is shown from `begin` to `end`, in seconds."""
    first = round(begin / TICK)
    duration = _element(BLOCK_DURATION, max(1, round(end / TICK) - first))
    block = _id(BLOCK) + _length(4 + length)
    track_time_flags = b"\x81\x00\x00\x00"  # track 1, at the cluster's own time, no flags
    group = _id(BLOCK_GROUP) + _length(len(duration) + len(block) + 4 + length)
    stamp = _element(TIMESTAMP, first)
    cluster = _id(CLUSTER) + _length(len(stamp) + len(group) + len(duration) + len(block) + 4 + length)
    return cluster + stamp + group + duration + block + track_time_flags


def _element(identity: int, content: bytes | int) -> bytes:
    content = content if isinstance(content, bytes) else content.to_bytes(8, "big")
    return _id(identity) + _length(len(content)) + content


def _id(identity: int) -> bytes:
    return identity.to_bytes((identity.bit_length() + 7) // 8, "big")


def _length(count: int) -> bytes:
    """A length in eight bytes, of which the first says so."""
    return (1 << 56 | count).to_bytes(8, "big")
