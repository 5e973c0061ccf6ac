"""Benchmark reading large data files as columns or packed, against Python objects.

    python -m benchmarks.rows [--rows 500000]

Each file is read in separate processes.
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

WORDS = "the a film plot actor scene very rather story it was and but with great awful dull".split()
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


def measure(path: Path, task: str, mode: str) -> tuple[float, float]:
    """Read a file in a new process.

    Returns:
        (CPU seconds, peak memory as a multiple of the file's size).
    """
    command = [sys.executable, "-c", READ, str(path), task, mode]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds, memory = output.split()
    return float(seconds), float(memory)


def compare(path: Path, task: str, rounds: int) -> None:
    """Measure both modes in turn, and print medians and their ratios."""
    results: dict[str, list[tuple[float, float]]] = {"as read": [], "objects": []}
    for _ in range(rounds):
        for mode in results:
            results[mode].append(measure(path, task, mode))
    seconds = {mode: statistics.median(row[0] for row in rows) for mode, rows in results.items()}
    memory = {mode: statistics.median(row[1] for row in rows) for mode, rows in results.items()}
    for mode in results:
        sys.stdout.write(
            f"  {mode:<8} {seconds[mode]:6.1f} CPU s, {memory[mode]:.2f} times the file\n"
        )
    time_ratio = seconds["objects"] / seconds["as read"]
    memory_ratio = memory["objects"] / memory["as read"]
    sys.stdout.write(f"  objects / as read: time {time_ratio:.1f}, memory {memory_ratio:.1f}\n")


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
