"""Lossless compression of pixels by Blosc, by the names that settings give it."""

from __future__ import annotations

import zarr.codecs

CODECS = {
    "zstd": zarr.codecs.BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle"),
    "lz4": zarr.codecs.BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"),
    "none": None,
}
"""Measured by tests/bench/codec.py on tiles of synthetic cells, in shards of 16 fields, by one thread of a machine with
2 cores; MB/s of tiles:

=====  =====  =====  =====
codec  ratio  write  read
=====  =====  =====  =====
zstd    1.33    181    365
lz4     1.24    210    378
none    1.00    283    808
=====  =====  =====  =====

Without bit shuffle, zstd writes 144 MB/s; at level 5, 94. Shards of 1 field instead of 16 are written half as fast, and
are 16 times as many files. One tile a chunk: training from a store reads single tiles.
"""
