"""Tables and a plot of what `benchmarks.gpu_attention --json` wrote: `python -m benchmarks.gpu_tables FILE...`.

`--markdown docs/performance.md` puts them into that page, between its two marks. No GPU is needed. Of figures for the
same row, pass and candidate the last one counts.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from benchmarks.gpu_rows import FEATURES, GROUPS, ROWS
from benchmarks.report import write_results

PASSES = ("forward", "with backward")
NAMES = ("ringjax", "deterministic", "FlashAttention-3", "jax.nn cuDNN", "tokamax", "ringjax cudnn")
# Okabe and Ito's palette (2008), which colour-blind readers can tell apart.
LOOKS = {
    "ringjax": {"color": "#D55E00", "marker": "o", "linewidth": 2.4, "zorder": 3},
    "FlashAttention-3": {"color": "#0072B2", "marker": "s"},
    "jax.nn cuDNN": {"color": "#009E73", "marker": "^"},
    "tokamax": {"color": "#CC79A7", "marker": "D"},
}


def read(paths):
    return [json.loads(line) for path in paths for line in Path(path).read_text().splitlines() if line.strip()]


def line(record):
    """One record in words."""
    kind = record["record"]
    if kind == "environment":
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
        how = f"{record['batches']} batches of {record['batch_s'] * 1e3:.0f} ms, medians"
        return f"{record['device']}, {record['driver']}, {versions}, {record['date']}; {how}"
    if kind == "traced":
        return f"{record['row']}: traced"
    where = f"{record['row']}, {record['what']}, {record['candidate']}"
    if kind == "timing":
        spread = f"{record['low_s'] * 1e3:.3f} .. {record['high_s'] * 1e3:.3f}"
        return f"{where}: {record['seconds'] * 1e3:.3f} ms ({spread}), {record['tflops']:.0f} TFLOP/s, {_more(record)}"
    return f"{where}: {kind.upper()}: {record.get('why') or 'error {:.1e}'.format(record['error'])}"


def _more(record):
    held = record["temporary_bytes"]
    return f"error {record['error']:.1e}" + ("" if held is None else f", {held / 2**20:.0f} MiB temporary")


def _found(records):
    return {(r["row"], r["what"], r["candidate"]): r for r in records if r["record"] == "timing"}


def _markdown(head, rows):
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _cell(record, best):
    if record is None:
        return "-"
    rate = f"{record['tflops']:.0f}"
    return f"{f'**{rate}**' if best else rate} ({record['seconds'] * 1e3:.3f} ms)"


def rates(records, rows, what):
    """TFLOP/s of every candidate, the best of a row in bold; empty if nothing was timed."""
    found = _found(records)
    names = [name for name in NAMES if any((row.name, what, name) in found for row in rows)]
    lines = []
    for row in rows:
        cells = [found.get((row.name, what, name)) for name in names]
        if any(cells):
            best = max(cell["tflops"] for cell in cells if cell)
            lines.append([row.name, *(_cell(cell, cell is not None and cell["tflops"] == best) for cell in cells)])
    return _markdown([what, *names], lines) if lines else ""


def features(records):
    """What each feature costs: by how much more time a visible pair takes than in the plain row of the same shape."""
    found, lines = _found(records), []
    for row in FEATURES:
        plain = next(other for other in ROWS if (other.shape, other.size) == (row.shape, row.size) and other.is_plain)
        cells = [row.name]
        for what in PASSES:
            record, beside = found.get((row.name, what, "ringjax")), found.get((plain.name, what, "ringjax"))
            cost = f"{beside['tflops'] / record['tflops'] - 1:+.1%}" if record and beside else "-"
            cells += [_cell(record, False), cost]
        if any(cell != "-" for cell in cells[1:]):
            lines.append(cells)
    return _markdown(["", "forward", "cost", "with backward", "cost"], lines) if lines else ""


def ranges(records):
    """Errors and temporary memory of each candidate, from the least row to the greatest."""
    timed, lines = list(_found(records).values()), []
    for name in NAMES:
        for what in PASSES:
            here = [r for r in timed if (r["candidate"], r["what"]) == (name, what)]
            if here:
                errors = [r["error"] for r in here]
                held = [round(r["temporary_bytes"] / 2**20) for r in here if r["temporary_bytes"] is not None]
                memory = f"{min(held)} to {max(held)}" if held else "not known"
                lines.append([name, what, f"{min(errors):.1e} to {max(errors):.1e}", memory])
    return _markdown(["", "", "largest relative error", "temporary MiB"], lines) if lines else ""


def tables(records):
    """All of them, with what was refused or failed."""
    parts = list(dict.fromkeys(line(record) for record in records if record["record"] == "environment"))
    for what in PASSES:
        parts.append(rates(records, [row for group in ("shapes", "windows") for row in GROUPS[group]], what))
    parts += [features(records), ranges(records)]
    parts.append("\n".join(f"- {line(r)}" for r in records if r["record"] in ("failed", "refused")))
    why = dict.fromkeys((r["candidate"], r["why"]) for r in records if r["record"] == "left out")
    parts.append("\n".join(f"- {name} left out: {reason}" for name, reason in why))
    return "\n\n".join(part for part in parts if part)


def plot(records, path):
    """TFLOP/s against the window, forward and with backward."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found, rows = _found(records), GROUPS["windows"]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    at = range(len(rows))
    for ax, what in zip(axes, PASSES, strict=True):
        for name, look in LOOKS.items():
            figures = [found.get((row.name, what, name)) for row in rows]
            points = [(x, record["tflops"]) for x, record in zip(at, figures, strict=True) if record]
            if points:
                ax.plot(*zip(*points, strict=True), label=name, markersize=5, **look)
        ax.set_xticks(at, ["none" if row.size is None else str(row.size) for row in rows])
        ax.set_xlabel("window (keys seen)")
        ax.set_title("forward" if what == "forward" else "forward and backward", fontsize=11)
        ax.grid(axis="y", color="#DDDDDD")
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_ylim(bottom=0)
    axes[0].set_ylabel("TFLOP/s of visible pairs")
    axes[0].legend(frameon=False)
    b, t, n, k, h = rows[0].shape
    device = next((record["device"] for record in records if record["record"] == "environment"), "")
    figure.suptitle(f"{device}, causal, bfloat16: B={b} T={t} N={n} K={k} H={h}", fontsize=11)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_tables", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="of JSON lines")
    parser.add_argument("--plot", metavar="IMAGE", help="draw TFLOP/s against the window (matplotlib)")
    parser.add_argument("--markdown", metavar="PAGE", type=Path, help="write all of it between this page's marks")
    options = parser.parse_args(argv)
    records = read(options.files)
    text = tables(records)
    print(text)
    if options.plot:
        plot(records, options.plot)
    if options.markdown:
        if options.plot:
            link = Path(os.path.relpath(options.plot, options.markdown.parent)).as_posix()
            text += f"\n\n![TFLOP/s against the window, forward and with backward]({link})"
        write_results(options.markdown, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
