"""Local attention in forty lines: a whole sequence at once, in chunks, and token by token. It is one operation."""

import jax
import jax.numpy as jnp

import ringjax as rj


def main(length: int = 4096, window: int = 256, sinks: int = 4, chunk: int = 512, steps: int = 64) -> dict[str, float]:
    seen = rj.Window.causal(window, sinks=sinks)  # the last `window` tokens, and for ever the first `sinks`
    key_q, key_k, key_v = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(key_q, (1, length, 8, 64))  # 8 query heads ...
    k = jax.random.normal(key_k, (1, length, 2, 64))  # ... share 2 heads of keys and values
    v = jax.random.normal(key_v, (1, length, 2, 64))

    # Training: the whole sequence, in time and memory proportional to its length. It has gradients, jit, vmap.
    whole = jax.jit(lambda q, k, v: rj.attention(q, k, v, seen))(q, k, v)

    # A long prompt: chunk by chunk. What is remembered is a ring buffer, a value that goes in and comes out.
    attend = jax.jit(rj.attend, donate_argnames="buffer")  # donated: it is updated in place
    buffer, outs = rj.RingBuffer.empty(1, 2, 64, seen, dtype=q.dtype), []
    for start in range(0, length - steps, chunk):
        stop = min(start + chunk, length - steps)
        out, buffer = attend(q[:, start:stop], k[:, start:stop], v[:, start:stop], buffer)
        outs.append(out)

    # Decoding: a chunk of one token. The same ring, the same memory, however long the stream.
    for t in range(length - steps, length):
        out, buffer = attend(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], buffer)
        outs.append(out)

    difference = float(jnp.abs(jnp.concatenate(outs, axis=1) - whole).max())
    ring, cache = buffer.k.nbytes + buffer.v.nbytes, k.nbytes + v.nbytes
    print(f"{length} tokens, {seen}: stream and batch differ by at most {difference:.1e}")
    print(f"the ring holds {buffer.capacity} tokens in {ring:,} bytes; all keys and values are {cache:,} bytes")
    return {"difference": difference, "ring": ring, "cache": cache}


if __name__ == "__main__":
    main()
