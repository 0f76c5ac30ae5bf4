"""TeaCache's polynomials: from the change of a signal to the change of the output, by model.

Source: the coefficients that come with TeaCache (arXiv 2411.19108), highest power first. They hold
near the number of steps and the sampler that they were fitted with.
"""

from __future__ import annotations

from typing import Literal

Name = Literal[
    "identity",
    "flux",
    "hunyuan-video",
    "mochi",
    "ltx-video",
    "cogvideox-2b",
    "cogvideox-5b",
    "cogvideox1.5-5b",
    "cogvideox1.5-5b-i2v",
    "wan2.1-1.3b",
    "wan2.1-1.3b-retention",
    "wan2.1-14b",
    "wan2.1-14b-retention",
    "wan2.1-i2v-480p",
    "wan2.1-i2v-480p-retention",
    "wan2.1-i2v-720p",
    "wan2.1-i2v-720p-retention",
    "cosmos",
    "lumina2",
    "hidream",
]

Polynomial = tuple[float, float, float, float, float]

BY_TIME = ("cogvideox", "wan2.1")
"""Models whose polynomials are of the time embedding's change, by the beginning of the name."""

POLYNOMIALS: dict[str, Polynomial] = {
    "identity": (0.0, 0.0, 0.0, 1.0, 0.0),
    "flux": (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
    "hunyuan-video": (733.226126, -401.131952, 67.5869174, -3.14987800, 0.0961237896),
    "mochi": (-3512.41319, 811.675948, -60.9400215, 2.42429681, 0.00305291719),
    "ltx-video": (21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326),
    "cogvideox-2b": (-31.0658903, 25.4732368, -5.92380459, 1.75769064, -0.00361568434),
    "cogvideox-5b": (-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339),
    "cogvideox1.5-5b": (250.210439, -165.061612, 35.7804877, -0.781551492, 0.0358559703),
    "cogvideox1.5-5b-i2v": (122.842302, -104.088754, 26.2981677, -0.306009921, 0.0371213220),
    "wan2.1-1.3b": (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
    "wan2.1-1.3b-retention": (-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664),
    "wan2.1-14b": (
        -5784.54975374,
        5449.50911966,
        -1811.16591783,
        256.27178429,
        -13.02252404,
    ),
    "wan2.1-14b-retention": (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525),
    "wan2.1-i2v-480p": (-302.331670, 223.948934, -52.5463970, 5.87348440, -0.201973289),
    "wan2.1-i2v-480p-retention": (
        257151.496,
        -35422.9917,
        1402.86849,
        -13.5890334,
        0.132517977,
    ),
    "wan2.1-i2v-720p": (
        -114.36346466,
        65.26524496,
        -18.82220707,
        4.91518089,
        -0.23412683,
    ),
    "wan2.1-i2v-720p-retention": (
        8107.05460,
        2133.93892,
        -372.934672,
        16.6203073,
        -0.0417769401,
    ),
    "cosmos": (271.156237, -91.9775607, 2.24437250, 2.08355751, 0.141776330),
    "lumina2": (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344),
    "hidream": (-31360.5009, -712.425503, 49.1363285, 8.26515490, 0.108053901),
}
