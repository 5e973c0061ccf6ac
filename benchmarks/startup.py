"""Benchmark the start of short commands against a bare import of their light libraries.

    python -m benchmarks.startup [--rounds 10] [--runs RUNS]

Rounds are interleaved; the table has medians of CPU seconds, which a busy machine changes less than
wall-clock seconds.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

# What any command line of this kind imports, and one model and one table, built as it would.
BARE = """
import typer, yaml, pydantic, rich.console, rich.table
class Model(pydantic.BaseModel):
    value: int = 0
app = typer.Typer()
app.command()(lambda: None)
rich.console.Console(file=open("/dev/null", "w")).print(rich.table.Table())
"""
JOB = Path(__file__).parent.parent / "examples" / "quickstart.yaml"


def measure(command: list[str]) -> float:
    """Return the CPU seconds of a command, its children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True, timeout=120
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--runs", type=Path, help="folder of runs for `status`")
    options = parser.parse_args()
    lorafleet = str(Path(sys.executable).with_name("lorafleet"))
    commands = {
        "bare import": [sys.executable, "-c", BARE],
        "lorafleet --help": [lorafleet, "--help"],
        "lorafleet validate --no-data": [lorafleet, "validate", str(JOB), "--no-data"],
    }
    if options.runs:
        commands["lorafleet status"] = [lorafleet, "status", "--runs", str(options.runs)]
    else:
        with tempfile.TemporaryDirectory() as empty:
            commands["lorafleet list"] = [lorafleet, "list", "--runs", empty]
            print_table(commands, options.rounds)
            return
    print_table(commands, options.rounds)


def print_table(commands: dict[str, list[str]], rounds: int) -> None:
    """Measure the commands in turn, and print their medians and ratios."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds + 1):
        for name, command in commands.items():
            seconds[name].append(measure(command))
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    bare = medians["bare import"]
    print(f"{'command':30} {'CPU s':>6} {'ratio':>6}")
    for name, median in medians.items():
        print(f"{name:30} {median:6.3f} {median / bare:6.2f}")


if __name__ == "__main__":
    main()
