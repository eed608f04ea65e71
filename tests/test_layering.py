"""The house: who may import whom, what modules may be called, how long they may be. Read from the source with `ast`."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ringjax"

# An import goes from a higher rank to a lower one, never sideways. A new module takes its place here first.
RANKS = {
    "_conventions": 0,
    "_window": 1,
    "_inputs": 2,
    "_slots": 3,
    "_explicit": 3,
    "_merge": 3,
    "_quantised": 3,
    "_rotary": 3,
    "_hlo": 3,
    "_sampling": 3,
    "_schedule": 4,
    "_writing": 4,
    "_buffer": 5,
    "_kernels.tiles": 5,
    "_kernels.problem": 6,
    "_kernels.mosaic_tile": 7,
    "_kernels.mosaic_backward_tile": 7.5,
    "_kernels.mosaic_eight_bits": 7.5,
    "_kernels.mosaic_counters": 7.5,
    "_kernels.mosaic_ring_walk": 7.5,
    "_kernels.mosaic_chunk_walk": 7.5,
    "_kernels.xla": 8,  # implementations, side by side: none imports another
    "_kernels.mosaic_forward": 8,
    "_kernels.mosaic_backward_split": 8,
    "_kernels.mosaic_backward_fused": 8,
    "_kernels.mosaic_backward": 8.5,  # chooses between the two above
    "_kernels.mosaic_decode": 8,
    "_kernels.cudnn": 8,
    "_kernels.mosaic": 9,  # one row of the table, in two files
    "_kernels": 10,  # the table of implementations
    "_partition": 10.5,  # whatever runs an implementation, on a mesh too
    "_in_place": 10.6,
    "_op": 10.7,
    "_attention": 11,
    "_counting": 11,
    "_attend": 11.2,
    "_sharding": 11.5,
    "_derivative": 12,
    "_state": 12,
    "_speculative": 12.5,
    "_explain": 12,
    "_layer": 12,
    "_training": 13,
    "_generation": 13,
    "_certify": 13,
    "_plot": 13,
    "": 14,  # ringjax/__init__.py: public names only
    "nnx": 15,  # public submodules, imported only when asked for
    "linen": 15,
    "sharding": 15,
    "__main__": 16,
}

# What ringjax may import from elsewhere, beside Python itself.
EVERYWHERE = {"jax", "jaxlib", "jaxtyping", "numpy"}
ALSO = {"nnx": {"flax"}, "linen": {"flax"}}
LAZILY = {"_plot": {"matplotlib"}}  # inside a function, so that `import ringjax` stays light

# The same for torch_bridge.
BRIDGE = {
    "_by_row": 0,
    "_dlpack": 0,
    "_arguments": 1,
    "_stablehlo": 1,
    "_xformers_masks": 1,
    "_huggingface_masks": 1,
    "_launch": 2,
    "_ops": 3,
    "_held": 4,
    "_functional": 4,
    "_buffer": 5,
    "_state": 6,
    "_module": 7,
    "": 8,  # torch_bridge/__init__.py: public names only; what follows is imported only when asked for
    "_huggingface_cache": 9,
    "xformers": 10,
    "huggingface": 10,
    "legacy": 10,
}

VAGUE = {"utils", "common", "helpers", "base", "core", "misc"}
LONGEST = 500


def name_of(path: Path) -> str:
    """`ringjax/_kernels/xla.py` is `_kernels.xla`; a package is its `__init__.py`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
every_module = pytest.mark.parametrize("module", MODULES, ids=lambda name: name or "__init__")


def nodes(tree: ast.AST, bodies: bool = True):
    """All nodes of a file, or, without the bodies of its functions, those that run when it is imported."""
    for node in ast.iter_child_nodes(tree):
        if bodies or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from nodes(node, bodies)


def imports(path: Path, bodies: bool = True) -> set[str]:
    """What a file imports, by absolute name: `numpy`, `ringjax._window`, `ringjax._window.Window`."""
    folder = path.relative_to(ROOT).parent.parts
    found = set()
    for node in nodes(ast.parse(path.read_text()), bodies):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) + 1 - node.level] if node.level else ()
            source = (*above, node.module) if node.module else above
            found |= {".".join((*source, alias.name)) for alias in node.names}
    return found


def inside(names: set[str]) -> set[str]:
    """The modules of ringjax among them: of `ringjax._window.Window`, the longest part that is a module."""
    found = set()
    for name in names:
        first, *rest = name.split(".")
        if first == "ringjax":
            parts = len(rest)
            while ".".join(rest[:parts]) not in MODULES:
                parts -= 1
            found.add(".".join(rest[:parts]))
    return found


def outside(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - {"ringjax"} - set(sys.stdlib_module_names)


@every_module
def test_imports_point_down(module):
    assert module in RANKS, f"{module} has no rank: give it one in RANKS, above all that it imports"
    wrong = sorted(name for name in inside(imports(MODULES[module])) if RANKS.get(name, 0) >= RANKS[module])
    assert not wrong, f"{module} imports {wrong}: not below it in RANKS"


@every_module
def test_ringjax_imports_little_from_elsewhere(module):
    allowed = EVERYWHERE | ALSO.get(module, set())
    assert outside(imports(MODULES[module])) <= allowed | LAZILY.get(module, set())
    assert outside(imports(MODULES[module], bodies=False)) <= allowed


@pytest.mark.parametrize("path", sorted((ROOT / "torch_bridge").glob("*.py")), ids=lambda path: path.stem)
def test_the_bridges_imports_point_down(path):
    module = "" if path.stem == "__init__" else path.stem
    assert module in BRIDGE, f"{module} has no rank: give it one in BRIDGE, above all that it imports"
    for name in imports(path):
        first, *rest = name.split(".")
        if first == "torch_bridge":
            found = rest[0] if rest and rest[0] in BRIDGE else ""
            assert BRIDGE[found] < BRIDGE[module], f"{module} imports {name}: not below it in BRIDGE"


@pytest.mark.parametrize("folder", ["torch_bridge", "examples"])
def test_those_outside_use_public_names(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        private = [name for name in imports(path) if name.startswith("ringjax.") and "._" in name]
        assert not private, f"{path.relative_to(ROOT)} imports {private}"


def test_import_ringjax_is_light():
    """Neither flax nor torch nor matplotlib is loaded, and no device is touched: the platform can still be chosen."""
    code = """
import sys, jax, ringjax
heavy = {"flax", "torch", "torch_bridge", "xformers", "transformers", "matplotlib", "optax", "orbax", "tqdm"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
jax.config.update("jax_num_cpu_devices", 2)  # refused once a device has been touched
"""
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_public_names_are_documented():
    import ringjax

    assert sorted(set(ringjax.__all__)) == sorted(ringjax.__all__)
    for name in ringjax.__all__:
        text = getattr(ringjax, name).__doc__ or ""
        assert text and not text.startswith(f"{name}("), f"ringjax.{name} has no docstring"


def files(pattern: str = "*") -> list[Path]:
    """The files git knows or would know; an unpacked archive has no git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", pattern]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed if (ROOT / name).is_file()]


def test_no_vague_names():
    assert not [path for path in files("*.py") if VAGUE & set(path.relative_to(ROOT).with_suffix("").parts)]


def test_files_are_short():
    """Outside the kernels, a file answers one question."""
    ours = [p for p in files("*.py") if p.relative_to(ROOT).parts[0] in ("ringjax", "torch_bridge", "examples")]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in ours if "_kernels" not in p.parts}
    assert not {name: length for name, length in lengths.items() if length >= LONGEST}


def test_no_file_names_a_machine():
    """An absolute path is true on one machine only, save for what every Unix has, and the names of JAX's events."""
    absolute = re.compile(
        r"""(?:^|[\s"'`=(\[:])/(?!(?:bin|dev|etc|path|proc|sys|tmp|usr|jax)/)[a-z][\w.-]*/[\w.-]""", re.M
    )
    for path in files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # a picture
        assert not (found := absolute.search(text)), f"{path.relative_to(ROOT)}: {found[0]!r}"
