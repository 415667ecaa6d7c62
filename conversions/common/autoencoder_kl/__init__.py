"""AutoencoderKL: the image autoencoder of latent diffusion, as FLUX.1 and others use it."""
