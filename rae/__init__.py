"""Representation Autoencoders and diffusion transformers on their latents."""
