"""Records of a run: JSON lines for programs, plain or Markdown tables for people."""

import dataclasses
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

_PACKAGES = ("jax", "jaxlib", "numpy", "tokamax", "torch", "transformers")
_TIMINGS = ("pass", "implementation", "median", "from .. to", "runs", "temporary", "error", "x ringjax")
_FIGURES = ("figure", "value", "goal", "met")


def environment(command):
    """What the figures depend on: machine, cores, versions, and the command that printed them."""
    import ringjax

    versions = {"python": platform.python_version(), "ringjax": ringjax.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "record": "environment",
        "command": command,
        "cpu": _cpu(),
        "cores": cores,
        "load_before": load,
        "versions": versions,
        "xla_flags": os.environ.get("XLA_FLAGS"),
    }


def _cpu():
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@dataclasses.dataclass
class Report:
    """All that a run found, in order; `tables` and `json_lines` say it."""

    command: str
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self.records.insert(0, environment(self.command))

    def add(self, record, **fields):
        self.records.append({"record": record, **fields})

    def timing(self, group, case, what, implementation, timing, error, temp=None, **more):
        """One row: `what` is such as "forward", `error` a share of what is allowed, `temp` bytes."""
        self.add(
            "timing",
            group=group,
            case=case,
            **{"pass": what},
            implementation=implementation,
            median_s=timing.median,
            low_s=timing.low,
            high_s=timing.high,
            runs=len(timing.seconds),
            error_of_bound=error,
            temp_bytes=temp,
            **more,
        )

    def figure(self, group, case, figure, value, goal=None, met=None, unit=""):
        """A number that follows from the timings; `goal` in words, `met` whether it was reached."""
        self.add("figure", group=group, case=case, figure=figure, value=value, unit=unit, goal=goal, met=met)

    def left_out(self, group, case, implementation, why):
        self.add("left out", group=group, case=case, implementation=implementation, why=why)

    def refused(self, group, case, why):
        self.add("refused", group=group, case=case, why=str(why))

    @property
    def is_refused(self):
        return any(record["record"] == "refused" for record in self.records)

    def json_lines(self):
        return "".join(json.dumps(record) + "\n" for record in self.records)

    def text(self, markdown=False):
        """Everything, a section for each group."""
        parts = [self.heading(markdown)]
        for group in dict.fromkeys(record["group"] for record in self.records if "group" in record):
            parts.append(self.section(group, markdown))
        return "\n".join(parts)

    def heading(self, markdown=False):
        """The command and what its figures depend on."""
        return _heading(self.records[0], markdown)

    def section(self, group, markdown=False):
        """The tables of one group, two for each case."""
        mine = [record for record in self.records if record.get("group") == group]
        lines = ["", f"### {group}" if markdown else f"== {group}", ""]
        for case in dict.fromkeys(record["case"] for record in mine):
            lines += [f"**{case}**" if markdown else case, ""]
            records = [record for record in mine if record["case"] == case]
            timings = [record for record in records if record["record"] == "timing"]
            if timings:
                lines += [*_table(_TIMINGS, list(_timing_rows(timings)), markdown), ""]
            figures = [record for record in records if record["record"] == "figure"]
            if figures:
                lines += [*_table(_FIGURES, [_figure_row(record) for record in figures], markdown), ""]
            for record in records:
                if record["record"] == "left out":
                    lines += [f"Left out: {record['implementation']}: {record['why']}.", ""]
                elif record["record"] == "refused":
                    lines += [f"REFUSED: {record['why']}", ""]
        return "\n".join(lines).rstrip() + "\n"


def write_results(path, text):
    """Puts `text` between the two marks of a Markdown file.

    Raises:
      ValueError: the file does not have both, each once and in order.
    """
    page = Path(path).read_text()
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"{path} must have one line {BEGIN} and after it one line {END}.")
    before, rest = page.split(BEGIN)
    Path(path).write_text(f"{before}{BEGIN}\n{text.strip()}\n{END}{rest.split(END)[1]}")


def duration(seconds):
    """With three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def size(count):
    """Bytes, with three digits and a unit."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"


def _heading(record, markdown):
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    load = "" if record["load_before"] is None else f", load before {record['load_before']:.1f}"
    facts = f"{record['cpu']}, {record['cores']} cores{load}. {versions}."
    if record["xla_flags"]:
        facts += f" XLA_FLAGS={record['xla_flags']}."
    return f"```\n{record['command']}\n```\n\n{facts}" if markdown else f"{record['command']}\n{facts}"


def _timing_rows(records):
    ours = {r["pass"]: r["median_s"] for r in records if r["implementation"] == "ringjax"}
    for r in records:
        base = ours.get(r["pass"])
        yield (
            r["pass"],
            r["implementation"],
            duration(r["median_s"]),
            f"{duration(r['low_s'])} .. {duration(r['high_s'])}",
            str(r["runs"]),
            "" if r["temp_bytes"] is None else size(r["temp_bytes"]),
            "" if r["error_of_bound"] is None else f"{r['error_of_bound']:.2f}",
            "" if base is None else f"{r['median_s'] / base:.2f}",
        )


def _figure_row(record):
    met = {None: "", True: "yes", False: "NO"}[record["met"]]
    value = record["value"] if isinstance(record["value"], str) else f"{record['value']:.3g}{record['unit']}"
    return record["figure"], value, record["goal"] or "", met


def _table(head, rows, markdown):
    rows = [tuple(head), *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if markdown:
        lines = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
        ]
        return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
    return [lines[0], "-" * sum((*widths, 2 * len(widths) - 2)), *lines[1:]]
