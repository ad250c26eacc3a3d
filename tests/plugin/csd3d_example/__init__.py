"""One small thing of each kind that csd3d can be extended by, each in a file that also works alone as a plugin.

csd3d imports this module when the package is installed, and what is imported here registers itself.
"""

from csd3d_example import ball, fade_canvas, fade_scene, one_colour, poses, towards_grey  # noqa: F401
