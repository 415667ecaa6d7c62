"""AutoencoderDC: the deep-compression image autoencoder, as Sana uses it."""
