"""Decoding: time per token along a stream, beside rings by hand and other projects' caches; copies in the loop."""

import jax.numpy as jnp
import numpy as np

from benchmarks import reference, rings
from benchmarks.compiled import aliased_bytes, large_copies, temp_bytes
from benchmarks.timing import interleaved

PASS = "per token"


def decode(report, effort, note):
    for shape in effort.decode:
        _stream(report, shape, effort.positions, effort, note)
    for shape in effort.decode_models:
        _stream(report, shape, (2,), effort, note)


def _stream(report, shape, multiples, effort, note):
    group, size = "decode", shape.size
    # The ring is full from the first on; the others are about to go round once more.
    positions = [size if multiple == 1 else multiple * size - min(7, size - 1) for multiple in multiples]
    case = str(shape.replace(queries=effort.tokens))
    new = rings.tokens(shape, effort.tokens, seed=99)
    calls, before, details, ours = {}, {}, {}, []

    def add(build, position):
        note(f"{group}: filling to {position}: {shape}")
        last: list = []
        decoder = build(_remembered(rings.history(shape, position, seed=7), last))
        try:
            error = _hold(decoder, shape, last, new)
        except reference.Wrong as wrong:
            report.refused(group, case, wrong)
            return None
        temp = None if decoder.executable is None else temp_bytes(decoder.executable)
        calls[decoder.name], details[decoder.name] = decoder.advance, (error, temp)
        if decoder.before is not None:
            before[decoder.name] = decoder.before
        return decoder

    build = rings.ours(shape, new, positions)
    for position in positions:
        decoder = add(lambda chunks, position=position: build(position, chunks), position)
        if decoder is not None:
            ours.append(decoder)
    for layout in rings.PLAIN:
        add(lambda chunks, layout=layout: rings.plain(shape, chunks, new, layout), positions[0])
    if reasons := rings.huggingface_unsupported(shape):
        report.left_out(group, case, "transformers static", ", ".join(reasons))
    else:
        add(lambda chunks: rings.huggingface(shape, chunks, new), positions[0])

    note(f"{group}: timing {shape}")
    times = interleaved(calls, rounds=effort.decode_rounds, turn_s=effort.turn_s, before=before)
    times = {name: timing.scaled(1 / effort.tokens) for name, timing in times.items()}
    for name, timing in times.items():
        report.timing(group, case, PASS, name, timing, *details[name])
    if not ours:
        return
    medians = [times[decoder.name].median for decoder in ours]
    if len(medians) == len(multiples) > 1:
        spread = max(medians) / min(medians)
        figure = f"slowest / fastest position, {positions[0]} .. {positions[-1]}"
        report.figure(group, case, figure, spread, "at most 1.1", spread <= 1.1, "x")
    plain = [times[name].median for name in times if name.startswith("plain ring")]
    if plain and "ringjax" in times:
        ratio = times["ringjax"].median / min(plain)
        report.figure(group, case, "ringjax / the best plain ring", ratio, "at most 1.3", ratio <= 1.3, "x")
    _report_copies(report, group, case, shape, ours[0].executable)


def _report_copies(report, group, case, shape, executable):
    """Whether the loop holds or makes a second ring: from the compiler's own account and its text."""
    elements = shape.batch * shape.size * shape.kv_heads * shape.head_dim
    ring, temp = 8 * elements, temp_bytes(executable)
    copies = large_copies(executable, elements)
    report.figure(group, case, "instructions that copy keys or values", len(copies), "none", not copies)
    facts = f"{ring} B held, {aliased_bytes(executable)} B in place, {temp} B beside"
    # Half a ring is a copy of its keys.
    fine = aliased_bytes(executable) >= ring and temp < ring // 2
    report.figure(group, case, "ring", facts, "in place, less than half of it beside", fine)


def _remembered(chunks, last):
    """The chunks, of which `last` keeps the two newest."""
    for chunk in chunks:
        last[:] = [*last[-1:], chunk]
        yield chunk


def _hold(decoder, shape, last, new):
    """Runs the tokens once and checks some of them; the error as a share of what is allowed."""
    out = np.asarray(decoder.advance())
    # Before the new tokens the last W, at most, of the history.
    k, v = (np.concatenate([chunk[i] for chunk in last], axis=1)[:, -shape.size :] for i in range(2))
    k, v = (np.concatenate([x, np.moveaxis(np.asarray(y)[:, :, 0], 0, 1)], axis=1) for x, y in ((k, new.k), (v, new.v)))
    before, count, worst = k.shape[1] - out.shape[0], out.shape[0], 0.0
    for token in sorted({0, 1, min(shape.size, count) // 2, min(shape.size, count - 1), count - 1}):
        seen = slice(max(0, before + token + 1 - shape.size), before + token + 1)
        inputs = (np.asarray(new.q[token])[:, 0], k[:, seen], v[:, seen], new.sink_logits)
        exact = reference.one_query(shape, *inputs)
        plain = reference.one_query(shape, *inputs, jnp.float32)
        worst = max(worst, reference.hold(f"{decoder.name}, token {token}", out[token][:, 0], exact, plain))
    return worst
