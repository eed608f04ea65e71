"""A JAX pytree of rings, held on the torch side: a handle that a step updates.

Without gradients a step is one jitted call that is given the rings (donated): XLA writes the new token in place, and
memory stays as it is. Whoever else was given the same arrays keeps them: then one step copies, and `stats()` says so.
A step whose kernels torch can launch itself writes to the same memory, which torch then has until JAX is needed again.
With gradients, keys and values of the rings are torch tensors that torch's tape knows, and a step is a node on it.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

import ringjax as rj
from torch_bridge._dlpack import (
    Lease,
    as_jax_dtype,
    count_copy,
    current_stream,
    describe,
    jax_device,
    on_device,
    torch_device,
    torch_stream,
    view_in_jax,
    view_in_torch,
)
from torch_bridge._launch import find
from torch_bridge._ops import check_no_tangents, no_second_derivative, run


class Program:
    """A pure JAX function `f(rings, *arrays) -> out, rings`, jitted in the ways that a step needs."""

    def __init__(self, f: Callable[..., Any]):
        self.f = f
        self.kept = jax.jit(f)
        self.donated = jax.jit(f, donate_argnums=0)

    @functools.cache  # noqa: B019 (programs are cached for ever themselves)
    def differentiated(self, mask: tuple[bool, ...], floats: tuple[int, ...]) -> Any:
        """Jitted `(rings, arrays) -> (out, rings), vjp`, where `vjp` is for the float leaves that `mask` names.

        The first `len(floats)` entries of the mask are for leaves of the rings, the others for the arrays.
        """

        def forward(rings: Any, arrays: Any) -> Any:
            leaves, tree = jax.tree.flatten(rings)
            every = [*(leaves[i] for i in floats), *arrays]

            def g(*wanted: Any) -> Any:
                given = iter(wanted)
                each = [next(given) if wants else x for x, wants in zip(every, mask, strict=True)]
                new = list(leaves)
                for i, x in zip(floats, each, strict=False):
                    new[i] = x
                out, after = self.f(jax.tree.unflatten(tree, new), *each[len(floats) :])
                after = jax.tree.leaves(after)
                return (out, [after[i] for i in floats]), after

            return jax.vjp(g, *(x for x, wants in zip(every, mask, strict=True) if wants), has_aux=True)

        return jax.jit(forward)


@jax.jit
def _pull(vjp: Any, cotangents: Any) -> Any:
    return vjp(cotangents)


# What ringjax does one operation after another, in one call. Outside jit it looks at values, and says what is wrong.
_selected = jax.jit(lambda held, rows: held.select(rows))
_emptied = jax.jit(lambda held, rows: held.reset(rows))


@jax.jit
def _rolled_back(held: Any, n: Any) -> tuple[Any, jax.Array]:
    """The rings, and whether a row of any is invalid now, as one is for which n was wrong, before or just now."""
    after = held.rollback(n)
    rings = jax.tree.leaves(after, is_leaf=lambda x: isinstance(x, rj.RingBuffer))
    valid = [ring.valid.all() for ring in rings if isinstance(ring, rj.RingBuffer)]
    return after, ~jnp.stack(valid).all()


def _on_host(x: Any) -> Any:
    """Integers or bools for a method of ringjax's."""
    if isinstance(x, Tensor):
        return x.detach().cpu().numpy()
    return np.asarray(x) if isinstance(x, int | list | tuple) and not isinstance(x, bool) else x


def _is_integers(x: Any, axes: tuple[int, ...]) -> bool:
    """Whether x is an array that needs no second look: integers that fit int32."""
    return isinstance(x, np.ndarray) and x.dtype.kind == "i" and x.ndim in axes and bool((np.abs(x) < 2**31).all())


class _Step(torch.autograd.Function):
    """A step on torch's tape. Its inputs are the float leaves of the rings and the arrays that may want gradients."""

    @staticmethod
    def forward(ctx: Any, held: "Held", program: Program, call: str, written: Any, *tensors: Any) -> Any:
        floats = held._floats
        # What is written wants gradients from the next step on: now too, so that both run the same program.
        mask = tuple(
            wants or (n < len(floats) and floats[n] in written) for n, wants in enumerate(ctx.needs_input_grad[4:])
        )
        rings = held._tree()

        def step(*arrays: Any) -> Any:
            return program.differentiated(mask, floats)(rings, arrays)

        (out, after), vjp, leaves = run(call, step, tensors[len(floats) :])
        ctx.vjp, ctx.mask, ctx.call = vjp, mask, call
        ctx.save_for_backward(*tensors)  # torch then refuses a backward pass after a write to any of them
        ctx.set_materialize_grads(False)
        made = [view_in_torch(x) for x in after]
        held._after = leaves
        ctx.mark_non_differentiable(*(x for i, x in zip(floats, made, strict=True) if i not in written))
        ctx.shapes = [(x.shape, x.dtype) for x in (out, *after)]
        return view_in_torch(out), *made

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        saved = ctx.saved_tensors  # raises if one of them has been written to, or the tape is gone
        if any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in gradients):
            raise NotImplementedError(
                f"{ctx.call}: gradients go through a ring one at a time, got many at once (is_grads_batched)."
                "\n  Hint: call torch.autograd.grad for each; torch_bridge.attention takes many."
            )

        def pull(*cotangents: Any) -> Any:
            filled = [
                jnp.zeros(shape, dtype) if x is None else x
                for x, (shape, dtype) in zip(cotangents, ctx.shapes, strict=True)
            ]
            return _pull(ctx.vjp, (filled[0], filled[1:]))

        found = iter(run(ctx.call, pull, gradients))
        each = [next(found) if wants else None for wants in ctx.mask]
        wanted = zip(each, ctx.needs_input_grad[4:], strict=True)
        made = [view_in_torch(x) if wants and x is not None else None for x, wants in wanted]
        if torch.is_grad_enabled():  # a derivative of these may be asked for
            made = list(_Last.apply(ctx.call, len(made), *made, *saved, *gradients))
        return None, None, None, None, *made


class _Last(torch.autograd.Function):
    """Gradients through a ring, on torch's tape: a derivative of theirs raises, and is not left out."""

    @staticmethod
    def forward(ctx: Any, call: str, count: int, *tensors: Tensor | None) -> Any:
        ctx.call = call
        return tuple(None if x is None else x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise no_second_derivative(ctx.call)


class Held:
    """Rings of JAX's, under torch: what `RingBuffer` and `BufferState` have in common."""

    _name = "Held"
    _held: tuple[str, type]  # what it holds, in words and as ringjax's class
    _after: list[jax.Array]  # the leaves that a step on the tape has just made

    def __init__(self, tree: Any, *, owned: bool):
        self._take(tree, owned=owned)

    @classmethod
    def from_jax(cls, held: Any) -> Self:
        """A handle on rings of ringjax's (a `RingBuffer` or a `BufferState`, as is the handle), on the same memory.

        They stay as they are: the first step copies (once), unless they are given away: `adopt`.

        Raises:
          TypeError: not of ringjax's class of the same name.
        """
        cls._check("from_jax", held)
        return cls(held, owned=False)

    def adopt(self, held: Any) -> Self:
        """Takes rings over, without a copy now or later: the caller's arrays are deleted by the next step.

        Raises:
          TypeError: not of ringjax's class of the same name.
        """
        self._check("adopt", held)
        self._take(held, owned=True)
        return self

    @classmethod
    def _check(cls, method: str, held: Any) -> None:
        what, kind = cls._held
        first = f"{cls._name}.{method}: {what} must be"
        if not isinstance(held, kind):
            raise TypeError(f"{first} a ringjax.{kind.__name__}, got {type(held).__name__}.")
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(held)):
            raise TypeError(f"{first} made of arrays, got one traced by JAX.")

    def _take(self, tree: Any, *, owned: bool) -> None:
        self._leaves, self._structure = jax.tree.flatten(tree)
        self._floats = tuple(i for i, x in enumerate(self._leaves) if jnp.issubdtype(x.dtype, jnp.floating))
        # What torch's tape knows: for each float leaf its tensor, or None if no gradient is wanted.
        self._tensors: list[Tensor | None] = [None] * len(self._floats)
        self._owned = owned
        self._device = torch_device(self._leaves[0])
        self._signature = self._structure, *[(x.shape, x.dtype) for x in self._leaves]
        # While torch steps on them: the leaves as tensors, and the stream that wrote to them last.
        self._lent: list[Tensor] | None = None
        self._stream = 0

    def _tree(self) -> Any:
        """The rings, for JAX to use."""
        if self._lent is not None:
            self._take_back()
        return self._facts()

    def _facts(self) -> Any:
        """The rings, for what is static of them: torch may be writing to them."""
        if self._structure is None:
            raise RuntimeError(
                f"{self._name}: the handle must hold its rings, got one whose rings were released.\n"
                "  Hint: adopt(...) gives it others."
            )
        return jax.tree.unflatten(self._structure, self._leaves)

    def _take_back(self) -> None:
        """Waits, on the host, for what torch has written, and makes arrays of it."""
        torch_stream(self._device, self._stream).synchronize()
        self._lent = None
        # New arrays on the same memory: the old ones may remember what they once held.
        self._leaves = [jax.make_array_from_single_device_arrays(x.shape, x.sharding, [x]) for x in self._leaves]

    def _launched(self, program: Program, arrays: Any) -> Tensor | None:
        """The output of a step whose kernels torch launches itself; None: JAX must run it."""
        if not self._owned or self._device.type != "cuda":
            return None
        launched = find(program.donated, arrays, self._facts(), self._signature)
        given = None if launched is None else launched.given(arrays)
        if launched is None or given is None:
            return None
        if torch.cuda.is_current_stream_capturing():  # of a stream that will never run; its graph's replays will
            return None if self._lent is None else launched([*self._lent, *given])[0]
        stream = current_stream(self._device.index)
        if self._lent is None:
            Lease.settle(self._device.index)  # of other handles that were dropped
            self._lent = [view_in_torch(x) for x in self._leaves]  # torch's stream now waits for JAX
        elif stream != self._stream:
            torch_stream(self._device, stream).wait_stream(torch_stream(self._device, self._stream))
            for x in self._lent:
                Lease.move(x, stream)
        self._stream = stream
        return launched([*self._lent, *given])[0]

    @property
    def requires_grad(self) -> bool:
        """Whether gradients flow back through the rings to the tokens that were written into them."""
        return any(x is not None for x in self._tensors)

    @property
    def batch(self) -> int:
        """B: rows."""
        self._facts()
        return int(self._leaves[-1].shape[0])

    @property
    def device(self) -> torch.device:
        """Where the rings are."""
        self._facts()
        return self._device

    def _step(self, call: str, program: Program, arrays: Any, *, written: Any = None) -> Tensor:
        """Runs a program on the rings and tensors (or None), puts its rings in their place; returns its output.

        `written`: indices of the float leaves that are differentiable afterwards; None: all.
        """
        self._facts()
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                f"{call}: a ring is updated in place, which torch.func's transformations cannot follow."
                "\n  Hint: torch_bridge.attention can be transformed; loss.backward() goes through rings."
            )
        check_no_tangents(call, arrays)
        tracked = torch.is_grad_enabled() and (
            self.requires_grad or any(x is not None and x.requires_grad for x in arrays)
        )
        if not tracked and (launched := self._launched(program, arrays)) is not None:
            self._tensors = [None] * len(self._floats)
            return launched
        tree = self._tree()
        if not tracked:
            step = program.donated if self._owned else program.kept
            if not self._owned:
                count_copy("shared", sum(self._leaves[i].nbytes for i in self._floats), self._name)
            out, after = run(call, functools.partial(step, tree), arrays)
            self._leaves = jax.tree.leaves(after)
            self._tensors = [None] * len(self._floats)
            self._owned = True
            result: Tensor = view_in_torch(out)
            return result
        written = self._floats if written is None else written
        inputs = [
            view_in_torch(self._leaves[i]) if x is None else x for i, x in zip(self._floats, self._tensors, strict=True)
        ]
        out, *made = _Step.apply(self, program, call, written, *inputs, *arrays)
        self._leaves, self._owned = self._after, False
        del self._after
        self._tensors = [
            new if i in written and new.requires_grad else old
            for i, new, old in zip(self._floats, made, self._tensors, strict=True)
        ]
        return out

    def _map(self, f: Callable[[Any], Any], *, owned: bool = True) -> Self:
        """Replaces the rings by a function of them, in place; no gradient flows through it.

        `owned`: whether nobody else holds what it returns, which may be a part of what it was given.
        """
        with on_device(jax_device(self._name, self.device)):
            self._take(f(self._tree()), owned=owned)
        return self

    def rollback(self, n: int | Tensor) -> Self:
        """Takes back the last n tokens, in place: one number for all rows or integers [B], at most `slack`.

        Of a `BufferState`: the decoder's.

        Raises:
          ValueError, TypeError: as ringjax's method; the rings are as they were.
        """
        count = _on_host(n)
        if _is_integers(count, axes=(0, 1)):
            with on_device(jax_device(self._name, self.device)):
                after, doubtful = _rolled_back(self._tree(), count)
                if not doubtful:
                    self._take(after, owned=self._owned)
                    return self
        return self._map(lambda held: held.rollback(count), owned=self._owned)

    def select(self, rows: Tensor | Sequence[int]) -> Self:
        """Makes row `rows[i]` the new row i; in place: beam search, forks, another batch size.

        Raises:
          ValueError, TypeError: as ringjax's method.
        """
        index = _on_host(rows)
        if _is_integers(index, axes=(1,)) and index.size and index.min() >= 0 and index.max() < self.batch:
            return self._map(lambda held: _selected(held, index))
        return self._map(lambda held: held.select(index))

    def reset(self, rows: Tensor | None = None) -> Self:
        """Empties rows, those where the bool [B] `rows` is True; None: all; in place.

        Raises:
          ValueError: as ringjax's method.
        """
        chosen = _on_host(rows)
        if chosen is None or str(getattr(chosen, "dtype", None)) == "bool":
            return self._map(lambda held: _emptied(held, chosen), owned=self._owned)
        return self._map(lambda held: held.reset(chosen))

    def to_jax(self) -> Any:
        """The rings as ringjax has them, on the same memory.

        They stay as they are: if the handle is stepped on afterwards, that step copies (once). `release` does not.

        Raises:
          ValueError: gradients flow through the rings; they do not cross to JAX.
        """
        self._without_grad("to_jax")
        self._owned = False
        return self._tree()

    def release(self) -> Any:
        """The rings as ringjax has them, without a copy now or later: the handle is empty until `adopt`.

        Raises:
          ValueError: as `to_jax`.
        """
        self._without_grad("release")
        tree = self._tree()
        self._leaves, self._structure = [], None
        return tree

    def _without_grad(self, method: str) -> None:
        if self.requires_grad:
            raise ValueError(
                f"{self._name}.{method}: the rings must not require grad, got rings that torch's tape knows.\n"
                "  Hint: detach() first: gradients do not cross to JAX this way."
            )

    def detach(self) -> Self:
        """Cuts the tape, in place: what was written so far is a constant from now on (truncated backpropagation)."""
        self._tensors = [None] * len(self._floats)
        return self

    def to(self, *arguments: Any, device: Any = None, dtype: torch.dtype | None = None) -> Self:
        """Moves the rings to a device, casts their keys and values to a dtype; in place.

        Raises:
          TypeError: anything but a device and a dtype.
        """
        for given in arguments:
            if isinstance(given, torch.dtype):
                dtype = given
            elif isinstance(given, str | torch.device | int):
                device = given
            else:
                raise TypeError(f"{self._name}.to: takes a device and a dtype, got {type(given).__name__}.")
        tree = self._tree()
        if dtype is not None:
            wanted = as_jax_dtype(f"{self._name}.to", dtype)
            tree = jax.tree.map(lambda x: x.astype(wanted) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
        if device is not None:
            device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
            tree = jax.device_put(tree, jax_device(f"{self._name}.to", device))
        self._take(tree, owned=False)
        return self

    def clone(self) -> Self:
        """Another handle on rings of its own. Gradients do not flow into it."""
        other = copy.copy(self)
        other._take(jax.tree.map(jnp.copy, self._tree()), owned=True)
        return other

    def __getstate__(self) -> Any:
        return jax.device_get(self._tree()), str(self.device)

    def __setstate__(self, state: Any) -> None:
        tree, device = state
        self._take(jax.device_put(tree, jax_device(self._name, torch.device(device)), may_alias=False), owned=True)

    def __deepcopy__(self, memo: Any) -> Self:
        return self.clone()

    def state_dict(self) -> dict[str, Tensor]:
        """The rings as tensors of their own, in storage order, for `load_state_dict` or `torch.save`."""
        paths, _ = jax.tree.flatten_with_path(self._tree())
        return {jax.tree_util.keystr(path, simple=True, separator="."): view_in_torch(x).clone() for path, x in paths}

    def load_state_dict(self, state: dict[str, Tensor]) -> Self:
        """Puts saved rings into the handle, on the handle's device.

        Raises:
          ValueError: rings of other shapes, dtypes or names.
        """
        mine = self.state_dict()
        if set(mine) != set(state):
            first = f"{self._name}.load_state_dict: the names must be the handle's, got those of another state."
            raise ValueError(f"{first}\n  handle: {', '.join(mine)}\n  given:  {', '.join(state)}")
        for name, x in mine.items():
            if (x.shape, x.dtype) != (state[name].shape, state[name].dtype):
                rule = f"{name} must be {describe(x)}, got {describe(state[name])}"
                raise ValueError(f"{self._name}.load_state_dict: {rule}.")
        leaves = [view_in_jax(state[name].detach().to(self.device, copy=True)) for name in mine]
        self._take(jax.tree.unflatten(self._structure, leaves), owned=True)
        return self
