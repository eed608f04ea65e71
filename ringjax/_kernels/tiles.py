"""Tile sizes: what the caller may ask for, and each implementation's tuned choice with the measurement behind it."""

from typing import NamedTuple, Protocol

from ringjax._window import Window


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


MANY_ROWS = 64
"""Queries times group from which one head fills a CPU's cache: below, all heads of a ring are read at once."""


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
        # A block is a copy: of a small ring, not a copy of all of it.
        block = 512 if queries * group >= MANY_ROWS else max(1, min(512, keys // 4))
    else:
        reach = keys if span is None else min(keys, tile + span - 1)
        runs = -(-reach // 1024) if reach > 1536 else 1
        block = -(-reach // (16 * runs)) * 16
    return XlaTiles(min(block, keys), tile, head_tile)


class MosaicForwardTiles(NamedTuple):
    """Sizes of the Hopper forward kernel.

    Attributes:
      block_size: keys in a tile.
      warpgroups: that compute, of 64 queries each.
      stages: key and value tiles in shared memory.
      persistent: whether a program takes one query tile after another.
      heads_inner: whether neighbouring programs have the heads of one query tile, or the query tiles of one head.
      take_turns: whether the warpgroups take turns at the tensor cores.
      polynomial: columns of a tile whose exponentials are computed without the special function unit.
      registers, loader_registers: of each thread of a computing and of the loading warpgroup.
    """

    block_size: int
    warpgroups: int = 2
    stages: int = 2
    persistent: bool = True
    heads_inner: bool = True
    take_turns: bool = True
    polynomial: int = 0
    registers: int = 240
    loader_registers: int = 24


def mosaic_forward_tiles(
    tiles: Tiles, *, head_dim: int, group: int, softcap: float | None = None
) -> MosaicForwardTiles:
    """Sizes for the Hopper forward kernel; `head_tile_size` and `tile_size` have no say in it.

    Persistent programs gave 4% at W = 4096 and 10 to 20% at W = 1024, where a program has few tiles to hide its start
    behind. Blocks of 64 keys cost 15% at head size 128; at 256 no more fit into shared memory. Without a group to share
    the keys, heads side by side read more than stays in L2: 447 against 472 TFLOP/s on (4, 8192, 16, 16, 128, W 1024),
    while with a group of four they gain 8% at W = 4096. Turns gave 6% at head sizes 64 and 128, where the exponentials
    take as long as the products, and cost 3% at 256. With a softcap there are twice as many: a quarter of them by a
    polynomial took row A from 510 to 537 TFLOP/s (an eighth: 527, half: 516) and row C from 259 to 297, and cost 3% on
    row D; without one they cost 3 to 6% on row C. Once each thread kept its own sums to the end, row A had 495 with
    none, 546 with an eighth, 544 with a quarter and 543 with three eighths; without turns 490. (One H200, jax 0.11.2,
    2026-11-22 and 23.)
    """
    largest = 128 if head_dim <= 128 else 64
    block = largest if tiles.block_size is None else min(largest, max(64, tiles.block_size // 64 * 64))
    narrow = head_dim <= 128
    polynomial = block // 4 if softcap is not None and narrow else 0
    return MosaicForwardTiles(block_size=block, heads_inner=group > 1, take_turns=narrow, polynomial=polynomial)


class MosaicBackwardTiles(NamedTuple):
    """Sizes of the Hopper backward kernels.

    Attributes:
      fused: whether one kernel makes dq, dk and dv, or two (three) do.
      tile_size: queries in a tile that passes by.
      warpgroups: that compute, of 64 keys each (in the dq kernel, of 64 queries each).
      q_stages, g_stages: tiles of the queries and of the output's cotangents in shared memory.
      heads_outer: whether the heads of a group pass one after the other, or all of them tile by tile.
      descending: whether the query tiles pass by from the last to the first (fused only).
      skip: whether, in the kernels of dk and dv, a warpgroup leaves out query tiles that see none of its own keys; in
        the fused kernel it does.
      dk_with_dv: whether one kernel makes both.
      dq_block, dq_k_stages, dq_v_stages: of the dq kernel, keys in a tile and tiles in shared memory.
      registers, loader_registers: of each thread of a computing and of the loading warpgroup.
    """

    fused: bool = True
    tile_size: int = 64
    warpgroups: int = 2
    q_stages: int = 3
    g_stages: int = 2
    heads_outer: bool = False
    descending: bool = False
    skip: bool = True
    dk_with_dv: bool = True
    dq_block: int = 128
    dq_k_stages: int = 2
    dq_v_stages: int = 2
    registers: int = 240
    loader_registers: int = 24


def mosaic_backward_tiles(
    tiles: Tiles, *, head_dim: int, window: Window, group: int, deterministic: bool = False
) -> MosaicBackwardTiles:
    """Sizes for the Hopper backward kernels; shared memory and registers leave the caller's `tiles` no say in them.

    Heads one after the other gave the fused kernel 5% at W = 1024, 21% at W = 4096 and 15% under a causal mask without
    bound; they cost the others 3% at W = 1024. The query tiles from last to first gave 3% at W = 1024, cost 8% at
    W = 4096 and 3% without bound. The fused kernel's float32 dq must be cleared before and cast after: on (1, 16384,
    32, 8, 128), forward and backward took 0.91 ms fused and 0.73 ms split at W = 128, 1.16 and 0.97 at W = 256, before
    either skipped tiles by warpgroup; the bound is interpolated. Two stages of queries instead of three cost 13%. In
    the kernels that are not fused, skipping by warpgroup gave 2% at head size 256 and cost 3% at W = 4096, head size
    128. At 256 dk and dv do not both fit into the registers, nor a fused kernel into shared memory. (One H200, jax
    0.11.2, 2026-11-22.)
    """
    wide = window.left is None or window.left >= 2047
    span = None if window.left is None or window.right is None else window.left + window.right + 1
    narrow = span is not None and span <= (384 if head_dim == 64 else 768)
    fused = not narrow and not deterministic and head_dim <= 128
    order = {
        "heads_outer": (wide or fused) and group > 1,
        "descending": not wide,
        "skip": narrow or head_dim > 128,
    }
    if head_dim == 64:
        return MosaicBackwardTiles(fused=fused, tile_size=128, **order)
    if head_dim == 128:
        return MosaicBackwardTiles(fused=fused, **order)
    return MosaicBackwardTiles(
        fused=False, q_stages=2, g_stages=1, dk_with_dv=False, dq_block=64, dq_v_stages=1, **order
    )


class MosaicDecodeTiles(NamedTuple):
    """Sizes of the Hopper decode kernel.

    Attributes:
      block_size: slots in a tile.
      stages: key and value tiles in shared memory.
      splits: programs, of one cluster, that share the tiles of one kv head of one row: 1, 2, 4 or 8.
      overlap: whether the next kernel may begin to be set up before this one ends (programmatic dependent launch).
    """

    block_size: int = 128
    stages: int = 3
    splits: int = 1
    overlap: bool = False


def merging_programs(splits: int, rows: int) -> int:
    """Of the programs that split the tiles of `rows` queries, how many merge: each 8 queries or a multiple of them."""
    return max(n for n in range(1, splits + 1) if rows // 8 % n == 0)


def mosaic_decode_tiles(
    tiles: Tiles,
    *,
    programs: int,
    slots: int,
    rows: int,
    head_dim: int,
    value_dim: int,
    itemsize: int = 2,
    spread: bool = False,
) -> MosaicDecodeTiles:
    """Sizes for the Hopper decode kernel.

    Splits until the machine is full: one program on every other multiprocessor is what 8 heads of one row can have (a
    cluster has 8 programs at most; 4 took 11.6 us where 8 took 9.3). More than that costs: a long ring in clusters of 4
    instead of 2 took 300 us, not 240. With one program a multiprocessor, one stage was as fast as three (63.9 and 65.0
    us at 16 rows; 244 and 251 at 64, where more programs fit side by side with one). Blocks of 64 slots cost 1 to 10%;
    blocks of 256 gained 1% at one row in one run and cost 1% in another. Overlap gave 0.3 us of 10 at one row where
    launches follow each other in a stream, nothing in a CUDA graph, and cost 1% at 16 rows. With 8 bits a number, two
    stages let several programs share a multiprocessor: 137 us at 64 rows, 138 with three, 142 with one; at head size
    256 one stage took 147, two 153; and 16 rows took 41.5 with two splits, 43.2 with one. (One H200, jax 0.11.2,
    2026-11-22; docs/decoding.md.) With 64 queries a program and `spread`, one row has 8 splits where one program could
    merge 2: checked, not timed.

    Args:
      tiles: what the caller asked for; only `block_size` has a say.
      programs: rows of the batch times kv heads, times the programs that share a group's queries.
      slots: C.
      rows: queries of a program.
      head_dim, value_dim: multiples of 64; of 128 with one byte a number.
      itemsize: bytes of a key's or value's number.
      spread: whether several programs merge (`merging_programs`), or one.
    """
    splits = 1
    while splits < 8 and programs * splits < 120 and 2 * splits <= -(-slots // 128):
        splits *= 2
    few = programs * splits <= 66  # half of the multiprocessors: those of the next kernel fit beside them
    largest = 64 if rows > 32 else 128
    block = largest if tiles.block_size is None else min(largest, max(64, tiles.block_size // 64 * 64))
    stages = 1 if splits == 1 else 2
    if itemsize == 1:  # two programs a multiprocessor
        block, stages = 128, 2 if max(head_dim, value_dim) <= 128 else 1
        splits = 2 if splits == 1 and programs < 240 and slots > 128 else splits

    def held(block: int, stages: int, splits: int) -> int:
        """Bytes of shared memory."""
        ring = stages * (block * (head_dim + value_dim) * itemsize + 12 * block * (2 - itemsize))
        queries = rows * (2 * head_dim + 2 * block + 4 * value_dim + 256 + 16) + 16 * 2 * (head_dim + value_dim)
        mergers = merging_programs(splits, rows) if spread else 1
        parts = splits - 1 if mergers == 1 else splits
        return ring + queries + parts * (value_dim + 128) * (rows // mergers) * 4 + 4096

    while held(block, stages, splits) > 227 * 1024:
        if stages > 1:
            stages -= 1
        elif block > 64 and itemsize > 1:
            block = 64
        else:
            splits //= 2
    return MosaicDecodeTiles(block, stages, splits, few)
