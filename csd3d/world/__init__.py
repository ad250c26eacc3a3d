"""The procedural world: scenes of signed-distance objects, instructions, edited scenes, true pictures."""
