"""One ring, two libraries: a torch model reads the prompt, JAX decodes with the same ring, torch goes on after it.

The layer's weights are torch parameters that JAX reads in place; the ring is handed over, not copied. JAX's loop is one
compiled program for all tokens, and so far cheaper per token than calls from Python.
"""

from functools import partial

import jax
import jax.numpy as jnp
import torch
from torch import nn

import ringjax as rj
import torch_bridge

HEADS, KV_HEADS, HEAD_DIM, WIDTH = 4, 2, 16, 64
WINDOW = rj.Window.causal(32, sinks=2)


class LanguageModel(nn.Module):
    """One layer: embedding, attention with a ring, the embedding again."""

    def __init__(self, vocabulary: int = 100):
        super().__init__()
        self.embed = nn.Parameter(torch.randn(vocabulary, WIDTH))
        self.qkv = nn.Parameter(torch.randn(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM) * WIDTH**-0.5)
        self.out = nn.Parameter(torch.randn(HEADS * HEAD_DIM, WIDTH) * WIDTH**-0.5)

    def forward(self, tokens: torch.Tensor, ring: torch_bridge.RingBuffer) -> torch.Tensor:
        x = self.embed[tokens]
        heads = (x @ self.qkv).unflatten(-1, (-1, HEAD_DIM))
        q, k, v = (part.contiguous() for part in heads.split([HEADS, KV_HEADS, KV_HEADS], dim=2))
        y, _ = torch_bridge.attend(q, k, v, ring)
        return (x + y.flatten(2) @ self.out) @ self.embed.T


def step(weights: dict[str, jax.Array], token: jax.Array, ring: rj.RingBuffer):
    """The same model in JAX: logits [B, V] after one token [B]."""
    x = weights["embed"][token][:, None]
    heads = (x @ weights["qkv"]).reshape(*x.shape[:2], -1, HEAD_DIM)
    y, ring = rj.attend(*jnp.split(heads, [HEADS, HEADS + KV_HEADS], axis=2), ring)
    x = x + y.reshape(*x.shape[:2], -1) @ weights["out"]
    return (x @ weights["embed"].T)[:, 0], ring


@partial(jax.jit, static_argnames="new", donate_argnames="ring")
def decode(weights: dict[str, jax.Array], token: jax.Array, ring: rj.RingBuffer, new: int):
    """`new` greedy tokens [B, new], each the input of the next step."""

    def body(carry, _):
        token, ring = carry
        logits, ring = step(weights, token, ring)
        token = logits.argmax(-1).astype(jnp.int32)
        return (token, ring), token

    (_, ring), tokens = jax.lax.scan(body, (token, ring), None, length=new)
    return tokens.T, ring


@torch.no_grad()
def in_torch(model: LanguageModel, token: torch.Tensor, ring: torch_bridge.RingBuffer, new: int) -> torch.Tensor:
    """The same loop in torch."""
    found = []
    for _ in range(new):
        token = model(token[:, None], ring)[:, 0].argmax(-1)
        found.append(token)
    return torch.stack(found, dim=1)


def main(prompt: int = 100, new: int = 64) -> dict[str, float]:
    torch.manual_seed(0)
    model = LanguageModel()
    tokens = torch.randint(0, 100, (2, prompt))
    ring = torch_bridge.RingBuffer.empty(2, KV_HEADS, HEAD_DIM, WINDOW, dtype=torch.float32)
    with torch.no_grad():
        first = model(tokens, ring)[:, -1].argmax(-1)
    twin = ring.clone()

    torch_bridge.reset_stats()
    weights = {name: torch_bridge.to_jax(x.detach()) for name, x in model.named_parameters()}
    held = ring.release()  # from now on the ring is JAX's ...
    before = held.k.unsafe_buffer_pointer()
    written, held = decode(weights, torch_bridge.to_jax(first.int()), held, new)
    ring.adopt(held)  # ... and now it is torch's again
    decoded = torch_bridge.to_torch(written)
    after = in_torch(model, decoded[:, -1].long(), ring, 16)
    copies = torch_bridge.stats().copies
    moved = ring.release().k.unsafe_buffer_pointer() != before

    expected = in_torch(model, first, twin, new + 16)
    agree = float((torch.cat([decoded.long(), after], dim=1) == expected).float().mean())
    print(f"{prompt} tokens by torch, {new} by JAX, 16 by torch: {agree:.0%} as by torch alone")
    print(f"copies on the way: {copies}; the ring {'moved' if moved else 'stayed where it was'}")
    return {"agree": agree, "copies": copies, "moved": float(moved)}


if __name__ == "__main__":
    main()
