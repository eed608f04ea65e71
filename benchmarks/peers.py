"""Attention without history by other projects, each called as its own documentation says, for the same shapes."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

import ringjax as rj


class Implementation(NamedTuple):
    """One way to compute attention.

    Attributes:
      name: as it stands in tables.
      unsupported: from a shape to the reasons why it cannot run here; none: it can.
      build: from a shape to `f(q, k, v, sink_logits) -> out`.
    """

    name: str
    unsupported: Callable[[Any], list[str]]
    build: Callable[[Any], Callable[..., jax.Array]]


def _ringjax(shape, implementation=None):
    def attention(q, k, v, sink_logits):
        return rj.attention(
            q,
            k,
            v,
            shape.window,
            sink_logits=sink_logits,
            softcap=shape.softcap,
            implementation=implementation,
        )

    return attention


def ours(implementation=None):
    """ringjax, by one of its implementations or by the one it chooses."""
    name = "ringjax" if implementation is None else f"ringjax {implementation}"
    return Implementation(name, lambda shape: [], partial(_ringjax, implementation=implementation))


def _jax_nn(shape):
    def attention(q, k, v, sink_logits):
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=shape.is_causal,
            local_window_size=(shape.left, shape.right),
            implementation="xla",
        )

    return attention


def _jax_nn_unsupported(shape):
    return [what for what, wanted in (("sink logits", shape.sink_logits), ("softcap", shape.softcap)) if wanted]


def _tokamax(shape):
    import tokamax
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # it keeps settings there, and would read our command line for them

    def attention(q, k, v, sink_logits):
        return tokamax.dot_product_attention(
            q,
            k,
            v,
            is_causal=shape.is_causal,
            local_window_size=(shape.left, shape.right),
            logits_soft_cap=shape.softcap,
            implementation="xla_chunked",
        )

    return attention


def _tokamax_unsupported(shape):
    if importlib.util.find_spec("tokamax") is None:
        return ["not installed"]
    return ["sink logits"] if shape.sink_logits else []


JAX_NN = Implementation("jax.nn xla", _jax_nn_unsupported, _jax_nn)
TOKAMAX = Implementation("tokamax xla_chunked", _tokamax_unsupported, _tokamax)
PEERS = (JAX_NN, TOKAMAX)
"""What runs on a CPU. A benchmark for another device adds its own."""
