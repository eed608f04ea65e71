"""Tile sizes: what the caller may ask for, and each implementation's tuned choice with the measurement behind it."""

from typing import NamedTuple, Protocol


class TileSizes(Protocol):
    """What has sizes for the tiles, such as a `RingBufferConfig`. None: the implementation's tuned choice."""

    @property
    def block_size(self) -> int | None:
        """Keys in a tile."""

    @property
    def tile_size(self) -> int | None:
        """Queries in a tile."""

    @property
    def head_tile_size(self) -> int | None:
        """Query heads that one program handles together."""


class Tiles(NamedTuple):
    """Sizes of the tiles in which attention is computed. None: the implementation's tuned choice.

    Attributes:
      block_size: keys in a tile.
      tile_size: queries in a tile.
      head_tile_size: query heads that one program handles together.
    """

    block_size: int | None = None
    tile_size: int | None = None
    head_tile_size: int | None = None


AUTOMATIC = Tiles()


class XlaTiles(NamedTuple):
    """Tile sizes of the `xla` implementation.

    Attributes:
      block_size: keys that one matrix product takes.
      tile_size: queries in a tile.
      head_tile_size: query heads of one kv head in the rows of one matrix product; divides the group.
    """

    block_size: int
    tile_size: int
    head_tile_size: int


def xla_tiles(tiles: Tiles, *, queries: int, keys: int, group: int, span: int | None, ring: bool) -> XlaTiles:
    """Tile sizes for XLA.

    On two x86 cores (float32, T=8192, N=8, K=2, H=64, W=512) a tile of 512 rows x 640 keys, 1.3 MB of logits, was
    the fastest: 50 ms; 128 rows took 72, 1024 rows 68, 2048 rows 98. One product over a whole window beats an online
    softmax over its parts while the logits stay near the cache's size. Decoding a ring (W=4096, K=8, H=128) took
    1.9 / 1.4 / 1.5 / 3.8 ms a token with blocks of 256 / 512 / 1024 / 4096 slots.

    Args:
      tiles: what the caller asked for.
      queries, keys, group: T, S and the query heads per kv head.
      span: keys that one query can see in its window; None if unbounded.
      ring: whether the keys are a ring.
    """
    head_tile = max(d for d in range(1, group + 1) if group % d == 0 and d <= (tiles.head_tile_size or group))
    tile = min(tiles.tile_size or max(16, 512 // head_tile), queries)
    if tiles.block_size is not None:
        block = tiles.block_size
    elif ring:
        block = 512
    else:
        reach = keys if span is None else min(keys, tile + span - 1)
        runs = -(-reach // 1024) if reach > 1536 else 1
        block = -(-reach // (16 * runs)) * 16
    return XlaTiles(min(block, keys), tile, head_tile)
