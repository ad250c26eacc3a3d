"""Training and judging of the priors that ship with csd3d: VAE, InstructPix2Pix, text-to-image and CLIP (world).

`python -m tools.train_shipped vae|tokenizer|ip2p|t2i|clip|lmc|judge|judge-text`: seeded, resumable, with throughput and
ETA. `… gpu` trains further on a GPU within minutes (`tools.train_shipped.gpu`). No part of the package imports this.
"""
