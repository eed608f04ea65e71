"""What ptxas reports of kernels: registers spilled to memory, and warnings that cost speed."""

import re
from typing import NamedTuple

ALLOWED = 64
"""Bytes of spills that pass: in an epilogue or on edge tiles only."""

HARMLESS = {"C7519"}
"""An arrive was added. Every other C75xx says that matrix products run one by one, or that a register limit is lost."""


class Verdict(NamedTuple):
    """Of one compilation: bytes spilled by each kernel, codes of harmful warnings, and what is wrong; nothing: fine."""

    spills: list[int]
    codes: list[str]
    wrong: list[str]

    def __str__(self):
        count = f"{len(self.spills)} kernel{'' if len(self.spills) == 1 else 's'}"
        warnings = " ".join(self.codes) or "no warnings"
        return f"{count}, bytes spilled {self.spills}, {warnings}: {'; '.join(self.wrong) or 'ok'}"


def judge(reports, kernels, allowed=ALLOWED):
    """`Verdict` on the reports of a compilation, one for each kernel, that must make so many kernels."""
    spills = [max(map(int, re.findall(r"(\d+) bytes spill stores", report)), default=-1) for report in reports]
    codes = sorted({code for report in reports for code in re.findall(r"\bC75\d\d\b", report)} - HARMLESS)
    wrong = [] if len(reports) == kernels else [f"FAILED, expected {kernels} kernels"]
    if -1 in spills:
        wrong.append("FAILED, a report says nothing of spills")
    if max(spills, default=0) > allowed:
        wrong.append(f"FAILED, more than {allowed} bytes spilled")
    if codes:
        wrong.append("FAILED, products run one by one")
    return Verdict(spills, codes, wrong)
