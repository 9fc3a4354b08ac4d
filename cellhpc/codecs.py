"""Lossless compression of pixels by Blosc, by the names that settings give it."""

from __future__ import annotations

import zarr.codecs

CODECS = {
    "zstd": zarr.codecs.BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle"),
    "lz4": zarr.codecs.BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"),
    "none": None,
}
"""Measured by tests/bench/codec.py on tiles of synthetic cells, written to the disk in shards of 16 fields, by one
thread of a machine with 2 cores; MB/s of tiles:

=====  =====  =====  =====
codec  ratio  write  read
=====  =====  =====  =====
zstd    1.33    274    426
lz4     1.24    347    428
none    1.00    582  1,189
=====  =====  =====  =====

At level 5, zstd writes 100 MB/s. Without bit shuffle it writes 322 and the ratio of these tiles is 1.36; the archive's
pixels of 16 bits need it. Shards of 1 field instead of 16 are written at 201 MB/s, and are 16 times as many files. One
tile a chunk: training from a store reads single tiles.
"""
