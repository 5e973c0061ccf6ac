"""Print measures of the code's language, with the range of nine model code bases beside them.

A thermometer, not a gate: do not reword anything only for a number. Tests are not measured.
"""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = "cluster commands deployment evaluation jobs k8s slurm training tuning webapp".split()

VAGUE_NAMES = frozenset(
    """
    asked found given here kept known lies looked made meant named one ones own said seen shown
    taken there thing things told wanted whole whose words
    """.split()
)
VERBS = frozenset(
    """
    accept acquire adapt add advance aggregate align allow append apply ask assert assign attach
    await begin bind broadcast build cache calculate call can cancel cast check choose chunk
    clamp clean clear clip clone close collapse collate collect combine compare compile complete
    compress compute concat configure confirm connect consume convert copy count create cut
    debug decide decode decompress deduplicate default define delete derive describe deserialize
    detach detect determine disable discard discover dispatch divide do download draw drop dump
    emit enable encode end ensure enter enumerate escape estimate evaluate examine execute exit
    expand explain export expose extend extract fail fall fetch fill filter finalize find finish
    fit fix flatten flush follow forget format forward free freeze from gather generate get give
    group guess halve handle has hash hold identify ignore import include increase infer init
    initialize insert inspect install interrupt invert is iterate join keep kill launch lead
    learn limit link lint list listen load locate lock log look lower make map mark mask match
    maximize measure merge migrate minimize move mutate name need needs normalize note notify
    number offer open order pack pad parse partition pass patch pause peek pick place plan poll
    pop populate prepare prepend print probe process produce promote prune publish pull push put
    quote raise rank read rebuild receive record recover redirect reduce refresh refuse register
    reject relay release reload remember remove rename render repair repeat replace reply report
    represent request require rescale reserve reset resize resolve respond restart restore
    restrict resume retrieve retry return reuse rewrite rotate round run sample save scale scan
    schedule search seed select send serialize serve set shard should show shrink shuffle shut
    sign silence simplify simulate skip sleep slice sort spawn split stage standardize start
    step stop store stream strip submit subset subtract suggest sum summarize support swap sync
    take tell terminate test to tokenize track train transform translate traverse trim truncate
    try unpack unwrap update upload use uses validate verify visit wait walk warm warn watch
    wipe work wrap write yield zip
    """.split()
)
NOUN_CLAUSES = re.compile(r"^(What|Whether|Where|Of|How|Who|Whose|Which|When|Why|That)\b")
STRING_KEY = re.compile(r"""\[\s*["'][\w.-]+["']\s*\]|\.get\(\s*["'][\w.-]+["']""")
LOGGING = re.compile(
    r"\b(?:logger|logging|log|_log|LOG)\.(?:debug|info|warning|error|exception|critical)\("
)
DECISIONS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.IfExp, ast.Assert)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass
class Counts:
    """What is counted over all files."""

    lines: int = 0
    code_lines: int = 0
    long_lines: int = 0
    comments: int = 0
    names: int = 0
    vague: int = 0
    functions: int = 0
    verbs: int = 0
    function_lines: int = 0
    decisions: int = 0
    docstrings: int = 0
    noun_clauses: int = 0
    long_docstrings: int = 0
    comprehensions: int = 0
    string_keys: int = 0
    logging_calls: int = 0
    complex_functions: list[tuple[int, str]] = field(default_factory=list)


def iterate_sources() -> Iterator[Path]:
    """Iterate over the Python files of the packages."""
    for name in FOLDERS:
        yield from sorted((ROOT / name).rglob("*.py"))


def count_decisions(function: ast.AST) -> int:
    """Count the points at which a function's flow can branch."""
    points = 0
    for node in ast.walk(function):
        if isinstance(node, DECISIONS):
            points += 1
        elif isinstance(node, ast.BoolOp):
            points += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            points += 1 + len(node.ifs)
        elif isinstance(node, ast.match_case):
            points += 1
    return points


def begins_with_verb(name: str) -> bool:
    """Return whether the first word of a function's name is a verb."""
    return name.lstrip("_").split("_")[0] in VERBS


def count_tree(tree: ast.Module, path: Path, counts: Counts) -> None:
    """Count what the syntax tree of a file shows."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            counts.decisions += count_decisions(node)
            counts.function_lines += (node.end_lineno or node.lineno) - node.lineno + 1
            if not node.name.startswith("__"):
                counts.functions += 1
                counts.verbs += begins_with_verb(node.name)
            counts.complex_functions.append(
                (count_decisions(node) + 1, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
            )
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            docstring = ast.get_docstring(node)
            if docstring:
                counts.docstrings += 1
                counts.noun_clauses += bool(NOUN_CLAUSES.match(docstring))
                counts.long_docstrings += "\n" in docstring
        counts.comprehensions += isinstance(node, COMPREHENSIONS)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            counts.vague += node.id in VAGUE_NAMES
        elif isinstance(node, ast.arg):
            counts.vague += node.arg in VAGUE_NAMES


def count_lines(path: Path, counts: Counts) -> None:
    """Count what the text of a file shows."""
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            counts.comments += token.type == tokenize.COMMENT
    for line in path.read_text(encoding="utf-8").splitlines():
        counts.lines += 1
        counts.code_lines += bool(line.strip())
        counts.long_lines += len(line) > 100
        counts.string_keys += len(STRING_KEY.findall(line))
        counts.logging_calls += len(LOGGING.findall(line))


def main() -> None:
    """Measure all sources and print the table."""
    counts = Counts()
    for path in iterate_sources():
        count_tree(ast.parse(path.read_text(encoding="utf-8")), path, counts)
        count_lines(path, counts)
    thousand = counts.lines / 1000
    rows = [
        ("vague names per 1,000 lines", counts.vague / thousand, "0.0 to 0.8"),
        (
            "functions that begin with a verb, %",
            100 * counts.verbs / counts.functions,
            "46 to 70",
        ),
        (
            "docstrings that begin with a noun clause, %",
            100 * counts.noun_clauses / counts.docstrings,
            "0 to 1.6",
        ),
        (
            "docstrings longer than one line, %",
            100 * counts.long_docstrings / counts.docstrings,
            "49 to 93",
        ),
        ("comments per 100 lines", 100 * counts.comments / counts.lines, "2.7 to 8.8"),
        (
            "decision points per 100 lines of function",
            100 * counts.decisions / counts.function_lines,
            "13 to 23",
        ),
        ("comprehensions per 1,000 lines", counts.comprehensions / thousand, "5 to 15"),
        (
            "lines longer than 100 characters, %",
            100 * counts.long_lines / counts.code_lines,
            "0 to 1.8",
        ),
        ("reads by string key per 1,000 lines", counts.string_keys / thousand, "4 to 21"),
        ("logging calls per 1,000 lines", counts.logging_calls / thousand, "0.3 to 11.5"),
    ]
    print(f"{counts.lines:,} lines in {len(list(iterate_sources()))} files\n")
    print(f"{'measure':48} {'value':>8}   model code bases")
    for name, value, anchors in rows:
        print(f"{name:48} {value:8.1f}   {anchors}")
    print("\nfunctions with the most decision points:")
    for complexity, place in sorted(counts.complex_functions, reverse=True)[:10]:
        print(f"  {complexity:3}  {place}")


if __name__ == "__main__":
    main()
