"""Training and judging of the priors that ship with csd3d: VAE, InstructPix2Pix, text-to-image and CLIP.

`python -m csd3d.world.train vae|tokenizer|ip2p|t2i|clip|judge`: seeded, resumable, with throughput and ETA.
"""
