"""What `import torch_bridge` needs and what it leaves alone."""

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]


def python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_neither_xformers_nor_transformers_is_needed_or_loaded():
    result = python("""
import sys
blocked = ["xformers", "mslk", "transformers", "flax"]
sys.modules.update(dict.fromkeys(blocked))  # an import of one of them raises
import torch_bridge, torch
q = torch.ones(1, 3, 2, 8)
assert torch_bridge.attention(q, q, q, torch_bridge.Window.causal(2)).shape == q.shape
assert all(sys.modules[name] is None for name in blocked)
""")
    assert result.returncode == 0, result.stderr


def test_without_torch_it_names_the_extra():
    result = python("import sys; sys.modules['torch'] = None; import torch_bridge")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "ImportError: torch_bridge needs PyTorch: pip install 'ringjax[torch]'"


def test_public_names_are_documented():
    import torch_bridge

    assert len(set(torch_bridge.__all__)) == len(torch_bridge.__all__)
    for name in torch_bridge.__all__:
        text = getattr(torch_bridge, name).__doc__ or ""
        assert text and not text.startswith(f"{name}("), f"torch_bridge.{name} has no docstring"


def test_the_configuration_is_ringjaxs():
    import ringjax
    import torch_bridge

    assert torch_bridge.RingBufferConfig is ringjax.RingBufferConfig
    assert torch_bridge.Window is ringjax.Window
