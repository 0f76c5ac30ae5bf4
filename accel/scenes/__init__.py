"""Procedural landscapes with captions: data whose ground truth is known.

`scene(seed)` draws and describes, `picture` and `clip` render; `accel.scenes.oracle` and
`accel.scenes.motion` (they need torch) judge pictures and clips by what their caption mentions.
"""

from accel.scenes.grammar import clip_scene as clip_scene
from accel.scenes.grammar import describe as describe
from accel.scenes.grammar import motion_of as motion_of
from accel.scenes.grammar import scene as scene
from accel.scenes.grammar import vocabulary as vocabulary
from accel.scenes.render import clip as clip
from accel.scenes.render import picture as picture
from accel.scenes.scene import ATTRIBUTES as ATTRIBUTES
from accel.scenes.scene import HELD_OUT as HELD_OUT
from accel.scenes.scene import MOTIONS as MOTIONS
from accel.scenes.scene import TRAINING as TRAINING
from accel.scenes.scene import Motion as Motion
from accel.scenes.scene import Scene as Scene

__all__ = [
    "ATTRIBUTES",
    "HELD_OUT",
    "MOTIONS",
    "TRAINING",
    "Motion",
    "Scene",
    "clip",
    "clip_scene",
    "describe",
    "motion_of",
    "picture",
    "scene",
    "vocabulary",
]
