"""Compare batches of mixed adapters with PEFT, for many families of models: `python -m benchmarks.zoo`."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import peft
import torch
import transformers

import xpu_lora_compile as xlc

from . import decoders, encoders, modules, multimodal, seq2seq, speech, vision
from .check import FAILURES, NOT_RUN, VARIANTS, Report, check

KINDS = (decoders, encoders, seq2seq, speech, vision, multimodal, modules)
FAMILIES = [family for kind in KINDS for family in kind.FAMILIES]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the families, print a table, and return 1 where a check has failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="families whose names contain one of these")
    parser.add_argument("--mode", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results and the errors' texts there")
    parser.add_argument("--list", action="store_true", help="print the families' names, and stop")
    options = parser.parse_args(arguments)
    families = [
        family
        for family in FAMILIES
        if not options.only or any(part.lower() in family.name.lower() for part in options.only)
    ]
    if options.list:
        print("\n".join(family.name for family in families))
        return 0
    # Such small models run no faster with more threads, and much slower where others use the machine.
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    reports = []
    for family in families:
        report = check(family, options.mode)
        reports.append(report)
        print(f"{report.family:32} {report.seconds:5.1f} s ", *describe(report), sep="  ", flush=True)
        # After each family, since all of them take a while.
        write(reports, options.markdown, options.json)
    print(summary(reports))
    return int(any(result.outcome in FAILURES for report in reports for result in report.results.values()))


def write(reports: Sequence[Report], table: Path | None, results: Path | None) -> None:
    """Write what is known so far; what a page says before its table stays."""
    if table:
        head = table.read_text().partition("| family |")[0] if table.exists() else ""
        table.write_text(head + markdown(reports))
    if results:
        data = {"versions": versions(), "families": [report.as_json() for report in reports]}
        results.write_text(json.dumps(data, indent=1))


def describe(report: Report) -> list[str]:
    """Return each check's outcome, and why it failed."""
    cells = [f"{name}: {result.outcome}" for name, result in report.results.items()]
    reasons = dict.fromkeys(result.detail for result in report.results.values() if result.outcome in FAILURES)
    return cells + [f"\n    {reason}" for reason in reasons]


def summary(reports: Sequence[Report]) -> str:
    """Count the outcomes, and name the families that failed."""
    counts = Counter(result.outcome for report in reports for result in report.results.values())
    failed = [report.family for report in reports if any(r.outcome in FAILURES for r in report.results.values())]
    counted = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common() if outcome != NOT_RUN)
    return f"{len(reports)} families, {counted}" + (f"; failed: {', '.join(failed)}" if failed else "")


def markdown(reports: Sequence[Report]) -> str:
    """Return the table of the docs."""
    names = list(dict.fromkeys(name for report in reports for name in report.results))
    lines = ["| family | " + " | ".join(names) + " | LoRA on |", "|---" * (len(names) + 2) + "|"]
    for report in reports:
        cells = [report.results[name].outcome if name in report.results else NOT_RUN for name in names]
        lines.append(f"| {report.family} | " + " | ".join(cells) + " | `" + report.targets.replace("|", r"\|") + "` |")
    return "\n".join([*lines, "", summary(reports) + ".", f"Versions: {versions()}.", ""])


def versions() -> str:
    """Return the versions that the results are of."""
    ours = f"xpu-lora-compile {xlc.__version__}, torch {torch.__version__}"
    return f"{ours}, transformers {transformers.__version__}, PEFT {peft.__version__}"


if __name__ == "__main__":
    sys.exit(main())
