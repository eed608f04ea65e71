"""Times ringjax against its peers on this machine: `python -m benchmarks`, or `make bench ARGS=...`."""

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks import decode, forward
from benchmarks.effort import FULL, QUICK, TINY
from benchmarks.report import Report, write_results

GROUPS = {
    "attention": forward.attention,
    "linear": forward.linear,
    "models": forward.models,
    "decode": decode.decode,
}


def _parser():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="less of everything, in under two minutes")
    size.add_argument("--tiny", action="store_true", help="sizes for a test of this program; the figures mean nothing")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="run these groups only")
    parser.add_argument("--json", metavar="FILE", help="write JSON lines to FILE, - for stdout instead of tables")
    parser.add_argument(
        "--markdown",
        metavar="FILE",
        nargs="?",
        const="-",
        help="Markdown tables; with FILE, put them between its marks of results",
    )
    return parser


def main(arguments=None):
    """Runs the groups asked for. Returns 1 if a result was wrong, so that its speed was refused."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    effort = QUICK if options.quick else TINY if options.tiny else FULL
    start = time.monotonic()
    report = Report(shlex.join(["python", "-m", "benchmarks", *arguments]))
    tables, markdown = options.json != "-", options.markdown is not None

    def note(text):
        print(f"[{time.monotonic() - start:5.0f} s] {text}", file=sys.stderr, flush=True)

    if tables:
        print(report.heading(markdown))
    for group in GROUPS:
        if group in options.only:
            GROUPS[group](report, effort, note)
            if tables:
                print(report.section(group, markdown), flush=True)
    if not tables:
        print(report.json_lines(), end="")
    elif options.json:
        Path(options.json).write_text(report.json_lines())
    if options.markdown not in (None, "-"):
        write_results(options.markdown, report.text(markdown=True))
    return int(report.is_refused)


if __name__ == "__main__":
    sys.exit(main())
