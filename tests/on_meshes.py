"""What the tests on 8 devices share: meshes, layouts, and what a compiled program sends."""

import re

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
COLLECTIVE = r"all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter"
BYTES = {"f32": 4, "s32": 4, "bf16": 2, "pred": 1}


def mesh_of(kind=None, **sizes):
    """A mesh of axes and sizes; `kind` None: as `jax.make_mesh` makes it by default."""
    types = {} if kind is None else {"axis_types": (kind,) * len(sizes)}
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), **types)


def put(mesh, x, *axes):
    return jax.device_put(x, NamedSharding(mesh, P(*axes)))


def spec_of(x):
    """The axes that split an array, those at the end that split nothing left out."""
    spec = list(x.sharding.spec)
    while spec and spec[-1] is None:
        spec.pop()
    return tuple(spec)


def sent(function, *arguments):
    """What a compiled program sends: a list of (collective, bytes of its result on one device)."""
    text = function.lower(*arguments).compile().as_text()
    found = []
    for line in text.splitlines():
        if match := re.search(rf"= (.*?) ({COLLECTIVE})(?:-start)?\(", line):
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            sizes = [BYTES[kind] * int(np.prod([int(n) for n in dims.split(",") if n])) for kind, dims in shapes]
            found.append((match[2], sum(sizes)))
    return found


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def assert_same(got, wanted, atol=1e-5):
    """float32, to 1e-5; infinite where the other is."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=0, atol=atol), got, wanted)
