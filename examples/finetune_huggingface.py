"""Fine-tuning a Hugging Face model with ringjax's attention, then generating from rings.

Two lines change: `register()`, and `attn_implementation="ringjax"`, which `from_pretrained` takes too. The losses are
those of the model's own eager attention, and so is the text. A tiny Gemma-3 with random weights stands for a real one,
and texts of many lengths are packed into rows, as trainers pack them: each is told from the next by its positions.
"""

import pydoc_data.topics

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from torch_bridge.huggingface import RingCache, register

WINDOW = 16


def build(attention: str) -> Gemma3ForCausalLM:
    """Two layers that slide for one that sees everything, over bytes; the same weights every time."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        pad_token_id=256,
        eos_token_id=None,
        bos_token_id=None,
    )
    return Gemma3ForCausalLM._from_config(config, attn_implementation=attention)


def packed(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Paragraphs of the manual that Python ships, one after the other in rows of one length; and their positions."""
    ids, positions = [], []
    for text in pydoc_data.topics.topics.values():
        for paragraph in text.split("\n\n"):
            data = paragraph.encode()[:length]
            ids += data
            positions += range(len(data))
        if len(ids) >= rows * length:
            break
    return tuple(torch.tensor(x[: rows * length]).reshape(rows, length) for x in (ids, positions))


def finetune(model: Gemma3ForCausalLM, ids: torch.Tensor, positions: torch.Tensor, steps: int, batch: int):
    """The loss of each step."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        rows = torch.arange(step * batch, (step + 1) * batch) % len(ids)
        out = model(ids[rows], position_ids=positions[rows], labels=ids[rows], use_cache=False)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    return losses


def main(length: int = 128, batch: int = 4, steps: int = 40, new: int = 96) -> dict[str, float]:
    register()
    ours, eager = build("ringjax"), build("eager")
    ids, positions = packed(batch * steps, length)
    losses, expected = (finetune(model, ids, positions, steps, batch) for model in (ours, eager))
    difference = max(abs(a - b) for a, b in zip(losses, expected, strict=True))

    eager.load_state_dict(ours.state_dict())
    prompts = ids[:2, :24]
    cache = RingCache(ours.config, length=32)
    with torch.no_grad():
        text = ours.eval().generate(prompts, past_key_values=cache, max_new_tokens=new, do_sample=False)
        same = torch.equal(text, eager.eval().generate(prompts, max_new_tokens=new, do_sample=False))
    slots = [layer.buffer.capacity for layer in cache.layers]

    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} nats per byte in {steps} steps")
    print(
        f"by eager attention: the same within {difference:.1g}; the generated text is {'' if same else 'not '}the same"
    )
    print(f"slots per row after {24 + new} tokens: {slots[0]} in a sliding layer, {slots[-1]} in the full one")
    return {
        "first": losses[0],
        "last": losses[-1],
        "difference": difference,
        "same": float(same),
        "sliding": slots[0],
        "full": slots[-1],
    }


if __name__ == "__main__":
    main()
