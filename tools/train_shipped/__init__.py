"""Training and judging of the priors that ship with csd3d: VAE, InstructPix2Pix, text-to-image and CLIP.

`python -m tools.train_shipped vae|tokenizer|ip2p|t2i|clip|judge`: seeded, resumable, with throughput and ETA.
"""
