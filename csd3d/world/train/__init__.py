"""Training and judging of the priors that ship with csd3d: VAE, InstructPix2Pix and text-to-image of the world.

`python -m csd3d.world.train vae|tokenizer|ip2p|t2i|judge`. All is seeded, resumable and prints throughput and ETA.
"""
