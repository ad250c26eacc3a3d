"""Ways to edit a scene or a canvas: each in a file of its own, registered as "canvas_editor" or "scene_editor"."""
