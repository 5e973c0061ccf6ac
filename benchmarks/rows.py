"""Benchmark reading large data files: in columns or packed, against Python objects, in separate processes.

python -m benchmarks.rows [--rows 500000]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WORDS = "the a film plot actor scene very rather story it was and but with great fine awful dull".split()
READ = """
import resource, sys, time
from pathlib import Path
from lorafleet.jobs.data import columns
from lorafleet.jobs.loading.job_file import load_text
from lorafleet.jobs.data.rows import load_rows
import pyarrow.json, pyarrow.compute
path, task, way = sys.argv[1:]
if way == "objects":
    columns._FEWEST_BYTES = 2**60
text = f"name: x\\ntask: {task}\\nmodel: {{model_name_or_path: asset:minilm-l6}}\\n"
text += f"data: {{train_file: {path}}}\\n"
job = load_text(text, Path("job.yaml"), ()).job
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
load_rows(job)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(time.process_time() - began, (after - before) * 1024 / Path(path).stat().st_size)
"""


SHAPES = {
    "classes.jsonl": "classification",
    "classes.csv": "classification",
    "answers.jsonl": "generation",
    "conversations.jsonl": "generation",
}
"""File -> the task that reads it."""


def write_rows(path: Path, rows: int) -> None:
    """Write rows with random texts of about 100 characters."""
    random_words = random.Random(0)
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            file.write("text,label\n")
        for number in range(rows):
            text = f"{' '.join(random_words.choices(WORDS, k=18))} {number}"
            label = random_words.choice(["good", "bad"])
            answer = " ".join(random_words.choices(WORDS, k=8))
            turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
            row: dict[str, object] = {
                "classes": {"text": text, "label": label},
                "answers": {"prompt": text, "completion": answer},
                "conversations": {"messages": turns},
            }[path.stem]  # type: ignore[assignment]
            file.write(f"{text},{label}\n" if path.suffix == ".csv" else json.dumps(row) + "\n")


def measure(path: Path, task: str, way: str) -> tuple[float, float]:
    """Read a file in a new process; returns (CPU seconds, peak memory as a multiple of its size)."""
    command = [sys.executable, "-c", READ, str(path), task, way]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds, memory = output.split()
    return float(seconds), float(memory)


def compare(path: Path, task: str, rounds: int) -> None:
    """Measure both ways in turn and print medians and their ratios."""
    results: dict[str, list[tuple[float, float]]] = {"as read": [], "objects": []}
    for _ in range(rounds):
        for way in results:
            results[way].append(measure(path, task, way))
    seconds = {way: statistics.median(row[0] for row in rows) for way, rows in results.items()}
    memory = {way: statistics.median(row[1] for row in rows) for way, rows in results.items()}
    for way in results:
        sys.stdout.write(f"  {way:<8} {seconds[way]:6.1f} CPU s, {memory[way]:.2f} times the file\n")
    faster = seconds["objects"] / seconds["as read"]
    smaller = memory["objects"] / memory["as read"]
    sys.stdout.write(f"  objects / as read: time {faster:.1f}, memory {smaller:.1f}\n")


def main() -> None:
    """Run the benchmark for each shape of file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, task in SHAPES.items():
            path = Path(folder) / name
            write_rows(path, arguments.rows)
            megabytes = path.stat().st_size / 1e6
            sys.stdout.write(f"{name}: {arguments.rows:,} rows, {megabytes:.0f} MB\n")
            compare(path, task, arguments.rounds)


if __name__ == "__main__":
    main()
