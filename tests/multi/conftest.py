"""Tests that need 8 devices: `tests/test_sharding.py` runs them in processes of their own, with 8 CPU devices.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 pytest tests/multi

runs them by hand. In a process with fewer devices they are not collected.
"""

import jax

collect_ignore_glob = ["test_*.py"] if jax.device_count() < 8 else []
