"""Tiny random pipelines of every family, built offline in a moment: `PIPELINES["sd15"]`."""

from tiny import unets
from tiny.base import NEGATIVE, PROMPTS, Ask, Tiny

PIPELINES: dict[str, Tiny] = {tiny.name: tiny for tiny in (*unets.FAMILIES,)}

__all__ = ["NEGATIVE", "PIPELINES", "PROMPTS", "Ask", "Tiny"]
