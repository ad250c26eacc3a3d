"""Pictures and videos as canvases of latents: clip, latents, detail, windows, regions, optical flow."""
