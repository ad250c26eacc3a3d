"""Training and judging of the two priors that ship with csd3d: the VAE and the InstructPix2Pix of the procedural world.

`python -m csd3d.world.train vae|tokenizer|ip2p|judge`. Every part is seeded, resumable and prints throughput and ETA.
"""
