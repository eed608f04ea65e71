"""How tokens get into a ring's arrays: each into its slot, none twice, and of those that would not last, none.

An array of a ring ("store") is [B, K, C, ...] in storage order, what is written into it [B, T, K, ...]: keys, values,
and the scales of quantised ones. All stores of a ring are written alike.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from ringjax._slots import NOTHING, position_in_slot, slot_of_position


def write(
    stores: Sequence[Array], tokens: Sequence[Array], length: Array, lengths: Array | None, *, sinks: int, slack: int
) -> list[Array]:
    """The stores after T tokens, in their dtypes, at the positions `length + t`.

    Args:
      stores: [B, K, C, ...].
      tokens: [B, T, K, ...], for each store.
      length: int32 [B], of the rows before them.
      lengths: int32 [B], how many of the tokens are real; None: all.
      sinks, slack: of the ring.
    """
    chunk, capacity = tokens[0].shape[1], stores[0].shape[2]
    tokens = [x.astype(store.dtype) for x, store in zip(tokens, stores, strict=True)]
    if chunk == 0:
        return list(stores)
    if chunk == 1 and stores[0].shape[0] == 1:
        slot = slot_of_position(length[0], sinks=sinks, capacity=capacity)
        return [_write_one(store, x, slot, lengths) for store, x in zip(stores, tokens, strict=True)]
    added = jnp.full_like(length, chunk) if lengths is None else lengths
    if 2 * chunk >= capacity or chunk > capacity - sinks:
        return _rewrite(stores, tokens, length, added, sinks, slack)
    # Only what survives is written: no slot twice, padding nowhere.
    index = jnp.arange(chunk, dtype=jnp.int32)[None]
    slots = slot_of_position(length[:, None] + index, sinks=sinks, capacity=capacity)
    return scatter(stores, tokens, jnp.where(index < added[:, None], slots, NOTHING))


def scatter(stores: Sequence[Array], tokens: Sequence[Array], slots: Array) -> list[Array]:
    """The stores with token t of row b in slot `slots[b, t]`; nowhere if that is `NOTHING`."""
    # Every index is different, the dropped ones too, as `unique_indices` promises.
    beyond = stores[0].shape[2] + jnp.arange(slots.shape[1], dtype=jnp.int32)[None]
    slots = jnp.where(slots < 0, beyond, slots)

    # Row by row: with the rows among the indices, XLA gathers them all on a mesh that has split them.
    def row(store: Array, x: Array, slots: Array) -> Array:
        x = jnp.moveaxis(x.astype(store.dtype), 0, 1)
        return store.at[:, slots].set(x, mode="drop", unique_indices=True)

    return [jax.vmap(row)(store, x, slots) for store, x in zip(stores, tokens, strict=True)]


def _write_one(store: Array, token: Array, slot: Array, lengths: Array | None) -> Array:
    """One token of a single row: a `dynamic_update_slice`, which XLA does in place in any loop."""
    token = jnp.moveaxis(token, 1, 2)
    if lengths is not None:
        before = lax.dynamic_slice_in_dim(store, slot, 1, axis=2)
        token = jnp.where(lengths[0] > 0, token, before)
    return lax.dynamic_update_slice_in_dim(store, token, slot, axis=2)


def _rewrite(
    stores: Sequence[Array], tokens: Sequence[Array], length: Array, added: Array, sinks: int, slack: int
) -> list[Array]:
    """A chunk that fills most of the ring: each slot takes the token that is its own now, or keeps what it has."""
    capacity, after = stores[0].shape[2], (length + added)[:, None]
    # As if nothing had ever been rolled back: what a slot holds after the last write to it.
    slots = jnp.arange(capacity, dtype=jnp.int32)[None]
    holds = position_in_slot(slots, after, after, sinks=sinks, slack=slack, capacity=capacity)
    index = holds - length[:, None]
    fresh = (index >= 0) & (holds >= 0)
    index = jnp.clip(index, 0, tokens[0].shape[1] - 1)

    def one(store: Array, x: Array) -> Array:
        rest = (1,) * (store.ndim - 3)
        x = jnp.moveaxis(jnp.take_along_axis(x, index.reshape(*index.shape, 1, *rest), axis=1), 2, 1)
        return jnp.where(fresh.reshape(fresh.shape[0], 1, capacity, *rest), x, store)

    return [one(store, x) for store, x in zip(stores, tokens, strict=True)]
