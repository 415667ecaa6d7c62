"""UNet2DConditionModel: the denoiser of Stable Diffusion 1, 2 and XL."""
