"""Who edits scenes right: methods under one prior, equally tuned, against the true answers of the procedural world."""
