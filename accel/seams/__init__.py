"""The only code that names diffusers internals: denoisers, blocks, branches."""
