"""Lossless compression of pixels by Blosc, by the names that settings give it."""

from __future__ import annotations

import zarr.codecs

CODECS = {
    "zstd": zarr.codecs.BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle"),
    "lz4": zarr.codecs.BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"),
    "none": None,
}
"""Measured by tests/bench/codec.py."""
