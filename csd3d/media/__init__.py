"""Reading and writing pictures and videos; memory use does not depend on the length of a video."""

from csd3d.media.encoding import encode, frame_writer
from csd3d.media.image_writing import write_image
from csd3d.media.pictures import MAX_PIXELS, Picture, read_image
from csd3d.media.videos import MAX_DECODED_GIB, MAX_FRAMES, VideoReader, frames_of, open_video

__all__ = [
    "MAX_DECODED_GIB",
    "MAX_FRAMES",
    "MAX_PIXELS",
    "Picture",
    "VideoReader",
    "encode",
    "frame_writer",
    "frames_of",
    "open_video",
    "read_image",
    "write_image",
]
