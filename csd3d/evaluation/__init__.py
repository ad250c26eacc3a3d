"""How right a result is: of scenes, canvases and texts."""
