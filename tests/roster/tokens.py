"""Methods that reduce tokens."""

from accel import tokens
from roster.row import Row

UNKNOWN = frozenset({"hunyuanimage", "lumina2", "mochi", "zimage"})
"""Whose order of tokens is not known, or whose rows attend apart."""

REFERENCES = frozenset({"flux_kontext"})
"""Whose runs are refused: tokens of another picture lie beside the picture's."""

GRIDS = frozenset({"sana", "animatediff", "svd"})
"""Whose blocks need the whole grid, or fold frames."""

ALL_LEVELS = 8

LED = frozenset({"uncond"})
GUIDED = frozenset({"cond", "uncond"})

ROWS = {
    "tokens.ToMe": Row(
        engine="tokens",
        refused=UNKNOWN,
        idle=REFERENCES,
        follows=LED,
        active=tokens.ToMe(max_downsample=ALL_LEVELS),
        variants=(
            tokens.ToMe(ratio=0.7, max_downsample=ALL_LEVELS, steps=2, layers=2),
            tokens.ToMe(ratio=0.3, max_downsample=ALL_LEVELS, cell=3, seed=1, layers=0),
        ),
    ),
    "tokens.Importance": Row(
        engine="tokens",
        refused=UNKNOWN,
        idle=REFERENCES,
        follows=GUIDED,
        active=tokens.Importance(max_downsample=ALL_LEVELS),
        variants=(tokens.Importance(ratio=0.6, share=0.4, max_downsample=ALL_LEVELS, steps=3),),
    ),
    "tokens.ToMA": Row(
        engine="tokens",
        refused=UNKNOWN,
        idle=REFERENCES,
        follows=LED,
        active=tokens.ToMA(max_downsample=ALL_LEVELS, steps=2, choose=3),
        variants=(tokens.ToMA(max_downsample=ALL_LEVELS, window=4, temperature=0.1),),
    ),
    "tokens.Transforming": Row(
        engine="tokens",
        refused=UNKNOWN,
        idle=REFERENCES,
        follows=LED,
        active=tokens.Transforming(max_downsample=ALL_LEVELS),
        variants=(
            tokens.Transforming(max_downsample=ALL_LEVELS, ratio=0.3, window=4, temperature=0.2),
        ),
    ),
    "tokens.ToDo": Row(
        engine="downsampling",
        refused=UNKNOWN,
        idle=REFERENCES | {"sana"},  # whose attention is linear
        active=tokens.ToDo(factor=2, next_factor=2),
        variants=(tokens.ToDo(factor=3, next_factor=2, frames=2, proportional=True),),
    ),
    "tokens.SADA": Row(
        engine="pruning",
        refused=UNKNOWN | GRIDS,
        idle=REFERENCES,
        follows=GUIDED,
        active=tokens.SADA(most=8, max_downsample=ALL_LEVELS),
        variants=(tokens.SADA(most=0, cell=2, refresh=3, seed=1, max_downsample=ALL_LEVELS),),
    ),
}
