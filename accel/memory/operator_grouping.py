"""Operator grouping: runs of operators of one kind in slices, so that one small intermediate lives.

Source: "Fast and Memory-Efficient Video Diffusion Using Streamlined Inference" (arXiv 2411.01171),
section 3, Operator Grouping (with its Feature Slicer).
"""

from __future__ import annotations

from typing import ClassVar

from accel.memory.fields import Slicing


class OperatorGrouping(Slicing):
    """Run each resnet, transformer and sampler of a UNet in slices, all of its operators at once.

    A resnet or a transformer within pictures is a run of spatial operators, cut along batch and
    frames; a transformer block along time is a run of temporal ones, cut along positions, with
    all frames of each. Only a slice of what lies between the operators of a run lives; what lies
    between runs is whole. What norms over positions is left whole, and what another method of the
    plan works inside of. Equal to the stock pipeline up to the rounding of kernels that are chosen
    by size. The authors measured 39.5 → 23.4 GB for SVD and 42 → 11 GB for AnimateDiff with 7
    slices of each. Costs time where slices are too small to fill the device.
    """

    name: ClassVar[str] = "memory.OperatorGrouping"
    supports: ClassVar[str] = (
        "UNets for video (AnimateDiff, SVD, UNet3D) and pictures, blocks compiled at most; "
        "operators with attention processors of a user's own stay whole"
    )
    source: ClassVar[str] = "arXiv 2411.01171 §3, Operator Grouping"
    grouped: ClassVar[bool] = True
