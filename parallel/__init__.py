"""Parallel strategies over several devices. None has been built yet."""
