"""Sliding-window attention over ring buffers: memory that does not grow, for JAX."""

from ringjax._attention import attend, attention, merge
from ringjax._buffer import RingBuffer, RingExport
from ringjax._window import Window

__version__ = "0.1.0"

__all__ = ["RingBuffer", "RingExport", "Window", "attend", "attention", "merge"]
