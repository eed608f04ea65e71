"""How much a run measures: all of it, what fits two minutes, or the test suite's tiny sizes."""

import dataclasses

from benchmarks import shapes
from benchmarks.shapes import Shape


@dataclasses.dataclass(frozen=True)
class Effort:
    """Sizes and repeats of one run.

    Attributes:
      attention: the shape of the groups `attention` and `linear`; `times` longer in the latter.
      square: side of the matrices whose product stands for the machine's rate.
      rounds, backward_rounds: how often all calls are timed in turn (`timing.interleaved`), and so for gradients.
      turn_s: seconds of each turn.
      tokamax: whether it runs in the group `attention` too.
      models: shapes of the group `models`.
      decode: shapes of the group `decode`, streamed at `positions`, multiples of W, by `tokens` tokens a call.
      decode_models: shapes that are decoded at one position.
    """

    attention: Shape
    models: tuple[Shape, ...]
    decode: tuple[Shape, ...]
    decode_models: tuple[Shape, ...]
    square: int = 4096
    times: int = 8
    rounds: int = 5
    backward_rounds: int = 3
    turn_s: float = 0.3
    tokamax: bool = True
    positions: tuple[int, ...] = (1, 2, 5, 10, 20)
    tokens: int = 128
    decode_rounds: int = 10


_MODELS = shapes.MODELS

FULL = Effort(
    attention=shapes.LONG,
    models=tuple(shapes.ON_CPU.values()),
    decode=(_MODELS["mistral-7b"], _MODELS["gemma-3-1b"]),
    decode_models=(_MODELS["gpt-oss-20b"], _MODELS["recurrentgemma-2b"]),
)

QUICK = dataclasses.replace(
    FULL,
    models=(shapes.ON_CPU["gemma-3-1b"].replace(queries=4096), shapes.ON_CPU["gpt-oss-20b"]),
    decode_models=(_MODELS["gpt-oss-20b"],),
    square=2048,
    rounds=2,
    backward_rounds=1,
    tokamax=False,
    positions=(1, 20),
    decode_rounds=5,
)


def _tiny(shape, queries=72):
    group = shape.heads // shape.kv_heads
    kv_heads = min(2, shape.kv_heads)
    right = min(shape.right, 11)
    return shape.replace(queries=queries, heads=group * kv_heads, kv_heads=kv_heads, head_dim=8, left=11, right=right)


TINY = dataclasses.replace(
    FULL,
    attention=_tiny(shapes.LONG),
    models=tuple(_tiny(shapes.ON_CPU[name]) for name in ("gpt-oss-20b", "longt5-base")),
    decode=(_tiny(_MODELS["mistral-7b"]),),
    decode_models=(_tiny(_MODELS["gpt-oss-20b"]),),
    square=64,
    rounds=1,
    backward_rounds=1,
    turn_s=0.0,
    positions=(1, 3),
    tokens=16,
    decode_rounds=1,
)
