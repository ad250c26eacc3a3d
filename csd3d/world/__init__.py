"""The procedural world: scenes of signed-distance objects, their instructions and edited scenes, and their true pictures."""
