"""Pictures and videos, in and out: any size, memory flat in a video's length, one clear line for what can't be read."""

from csd3d.media.encoding import encode, frame_writer, write_frames
from csd3d.media.pictures import MAX_PIXELS, Picture, read_image, write_image
from csd3d.media.videos import MAX_FRAMES, VideoReader, open_video

__all__ = [
    "MAX_FRAMES",
    "MAX_PIXELS",
    "Picture",
    "VideoReader",
    "encode",
    "frame_writer",
    "open_video",
    "read_image",
    "write_frames",
    "write_image",
]
