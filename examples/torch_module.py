"""ringjax as a torch module: training, a decoder's steps, and inference under `torch.no_grad()`.

An encoder reads a stream in chunks and keeps its last tokens in a ring; a decoder attends to them and to its own past.
The rings live in JAX, the tensors in torch; nothing is copied between them. Everything moves to a GPU with `.cuda()`.
"""

import torch
from torch import nn

import torch_bridge
from torch_bridge import CompleteRingBufferAttention, RingBufferAttention, RingBufferConfig

BATCH, HEADS, KV_HEADS, HEAD_DIM = 2, 8, 2, 16


def tokens(length: int, seed: int) -> list[torch.Tensor]:
    """Queries [B, T, N, H], keys and values [B, T, K, H]."""
    torch.manual_seed(seed)
    return [torch.randn(BATCH, length, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def encoder_and_decoder() -> torch.Tensor:
    """The two phases, with every size written out."""
    query, key, value = tokens(64, seed=0)
    decoder_query, decoder_key, decoder_value = tokens(1, seed=1)
    current_pos = 0

    config = RingBufferConfig(buffer_size=2048, block_size=128, tile_size=32, head_tile_size=4, prefill_size=512)
    model = CompleteRingBufferAttention(config)
    encoder_output, buffer_state = model(q=query, k=key, v=value, requires_grad=True)
    decoder_output = model(
        q=decoder_query,
        k=decoder_key,
        v=decoder_value,
        position=current_pos,
        is_decoder=True,
        buffer_state=buffer_state,
    )
    print(f"encoder {list(encoder_output.shape)}, decoder {list(decoder_output.shape)}, {buffer_state.last_calculated}")
    return decoder_output


class Smoother(nn.Module):
    """One layer: each token becomes a mixture of the last 16."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.qkv = nn.Linear(width, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.attention = RingBufferAttention(RingBufferConfig(buffer_size=16, slack=4))
        self.out = nn.Linear(HEADS * HEAD_DIM, width)

    def forward(self, x, state=None):
        heads = self.qkv(x).unflatten(-1, (-1, HEAD_DIM))
        q, k, v = (part.contiguous() for part in heads.split([HEADS, KV_HEADS, KV_HEADS], dim=2))
        y, state = self.attention(q, k, v, buffer_state=state)
        return self.out(y.flatten(2)), state


def train(model: Smoother, x: torch.Tensor, steps: int, chunk: int) -> tuple[float, float]:
    """The task: the mean of the last 8 inputs. Chunks of a stream; gradients flow from each to those before it."""
    padded = nn.functional.pad(x, (0, 0, 7, 0))
    target = padded.unfold(1, 8, 1).mean(-1)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    model.train()
    for _ in range(steps):
        state, loss = None, torch.zeros(())
        for start in range(0, x.shape[1], chunk):
            y, state = model(x[:, start : start + chunk], state)
            loss = loss + (y - target[:, start : start + chunk]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item() * chunk / x.shape[1])
    return losses[0], losses[-1]


@torch.no_grad()
def stream(model: Smoother, x: torch.Tensor) -> torch.Tensor:
    """Inference, a token at a time, in memory that does not grow."""
    model.eval()
    state, outs = None, []
    for t in range(x.shape[1]):
        y, state = model(x[:, t : t + 1], state)
        outs.append(y)
    return torch.cat(outs, dim=1)


def main(length: int = 96, chunk: int = 24, steps: int = 50) -> dict[str, float]:
    decoder_output = encoder_and_decoder()
    torch.manual_seed(0)
    model, x = Smoother(), torch.randn(BATCH, length, 32)
    first, last = train(model, x, steps, chunk)
    with torch.no_grad():
        whole, _ = model.eval()(x)
    torch_bridge.reset_stats()
    difference = float((stream(model, x) - whole).abs().max())
    print(f"training: loss {first:.3f} -> {last:.3f} in {steps} steps of {length // chunk} chunks")
    print(f"token by token and at once differ by at most {difference:.1e}; {torch_bridge.stats()}")
    return {
        "first": first,
        "last": last,
        "difference": difference,
        "copies": torch_bridge.stats().copies,
        "decoder": float(decoder_output.detach().abs().max()),
    }


if __name__ == "__main__":
    main()
