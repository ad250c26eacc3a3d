"""Pictures and videos as canvases of latents: opening, encoding, windows, regions, optical flow."""
