"""Training-free accelerators that attach to stock diffusers pipelines."""
