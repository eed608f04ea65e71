"""Sliding-window attention over ring buffers: memory that does not grow, for JAX."""

from ringjax._attend import attend
from ringjax._attention import attention
from ringjax._buffer import RingBuffer, RingExport
from ringjax._certify import Certificate, certify
from ringjax._derivative import attention_gradients
from ringjax._explain import explain
from ringjax._generation import Generation, generate, last_calculated, prefill
from ringjax._merge import merge
from ringjax._plot import plot_ring, plot_tiles
from ringjax._rotary import apply_rotary
from ringjax._sampling import Sampling, greedy
from ringjax._speculative import Draft
from ringjax._state import BufferState, RingBufferConfig, decode, encode, init_state
from ringjax._training import chunked_value_and_grad
from ringjax._window import Window

__version__ = "0.1.0"

__all__ = [
    "BufferState",
    "Certificate",
    "Draft",
    "Generation",
    "RingBuffer",
    "RingBufferConfig",
    "RingExport",
    "Sampling",
    "Window",
    "apply_rotary",
    "attend",
    "attention",
    "certify",
    "attention_gradients",
    "chunked_value_and_grad",
    "decode",
    "encode",
    "explain",
    "generate",
    "greedy",
    "init_state",
    "last_calculated",
    "merge",
    "plot_ring",
    "plot_tiles",
    "prefill",
]
