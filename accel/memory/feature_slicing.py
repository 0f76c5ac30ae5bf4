"""Feature slicing: the operators of a UNet run one after the other in slices of their features.

Source: "Fast and Memory-Efficient Video Diffusion Using Streamlined Inference" (arXiv 2411.01171),
section 3, Feature Slicer.
"""

from __future__ import annotations

from typing import ClassVar

from accel.memory.fields import Slicing


class FeatureSlicing(Slicing):
    """Run each convolution, attention, feed-forward and projection in slices.

    Saves what an operator needs inside itself: a feed-forward's wide layer, queries, keys, values
    and scores, a convolution's workspace. Each answer is whole again before the next operator, so
    `memory.OperatorGrouping` saves more. Spatial operators are cut along batch and frames,
    temporal ones along positions, with all frames of each; what norms over positions is left
    whole, and what another method of the plan works inside of. Equal to the stock pipeline up to
    the rounding of kernels that are chosen by size. Costs time: more and smaller calls.
    """

    name: ClassVar[str] = "memory.FeatureSlicing"
    supports: ClassVar[str] = (
        "UNets for video (AnimateDiff, SVD, UNet3D) and pictures, not compiled; operators with "
        "attention processors of a user's own stay whole"
    )
    source: ClassVar[str] = "arXiv 2411.01171 §3, Feature Slicer"
    grouped: ClassVar[bool] = False
