"""The tables of docs/performance.md from what `bench.py --json FILE` has measured.

    python scripts/tables.py sweep.jsonl --price 2.50

Prints Markdown: speed beside bfloat16 with the number of rows from which it is faster, memory beside its plan, and with
`--price`, dollars for an hour of the machine, what a million tokens cost. Of a line measured twice the later counts.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Key = tuple[str, int, int]
Lines = dict[Key, dict[str, dict[str, Any]]]


def lines_of(results: Iterable[dict[str, Any]]) -> Lines:
    """What is known of each shape, number of rows and context, by kind of weights."""
    lines: Lines = {}
    whole: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results:
        if "context" in result:
            key = (result["shape"], result["rows"], result["context"])
            kinds = lines.setdefault(key, {})
            kinds[result["kind"]] = kinds.get(result["kind"], {}) | result
        elif result.get("fits") is False:
            whole[result["shape"], result["kind"]] = result
    for (shape, kind), result in whole.items():
        for key, kinds in lines.items():
            if key[0] == shape:
                kinds.setdefault(kind, result)
    return dict(sorted(lines.items(), key=lambda line: (line[0][0], line[0][2], line[0][1])))


def speed_table(lines: Lines) -> Iterator[str]:
    """Tokens per second of all rows together, and the rows from which bfloat16 is the faster one."""
    yield "| shape | context | rows | INT4 tokens/s | bfloat16 tokens/s | ratio |"
    yield "|---|---:|---:|---:|---:|---:|"
    faster: dict[tuple[str, int], list[int]] = {}
    for (shape, rows, context), kinds in lines.items():
        int4, dense = (kinds.get(kind, {}) for kind in ("int4", "bfloat16"))
        ratio = ""
        if "tokens_per_s" in int4 and "tokens_per_s" in dense:
            quotient = int4["tokens_per_s"] / dense["tokens_per_s"]
            ratio = f"{quotient:.2f}"
            faster.setdefault((shape, context), []).extend([rows] if quotient > 1 else [])
        yield f"| {shape} | {context:,} | {rows} | {rate(int4)} | {rate(dense)} | {ratio} |"
    yield ""
    for (shape, context), rows_won in faster.items():
        won = f"up to {max(rows_won)} rows" if rows_won else "never"
        yield f"{shape} behind {context:,} positions: INT4 is the faster one {won}."


def memory_table(lines: Lines) -> Iterator[str]:
    """The most that torch has allocated, what was planned for it, and how far the two are apart."""
    yield "| shape | context | rows | INT4 GB | planned | off | bfloat16 GB | planned | off |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for (shape, rows, context), kinds in lines.items():
        if not any("peak_GB" in result or result.get("fits") is False for result in kinds.values()):
            continue
        cells = [cell for kind in ("int4", "bfloat16") for cell in memory_cells(kinds.get(kind, {}))]
        yield f"| {shape} | {context:,} | {rows} | {' | '.join(cells)} |"


def memory_cells(result: dict[str, Any]) -> tuple[str, str, str]:
    """Three cells of `memory_table`."""
    if "peak_GB" not in result:
        return "does not fit" if result.get("fits") is False else "", "", ""
    peak, planned = result["peak_GB"], result["planned_GB"]
    return f"{peak:.1f}", f"{planned:.1f}", f"{planned / peak - 1:+.1%}"


def price_table(lines: Lines, price: float) -> Iterator[str]:
    """Dollars for a million tokens on a machine that costs `price` an hour and does nothing else."""
    yield f"| shape | context | rows | INT4, $ a million at {price:g} an hour | bfloat16 |"
    yield "|---|---:|---:|---:|---:|"
    for (shape, rows, context), kinds in lines.items():
        cells = [cost(kinds.get(kind, {}), price) for kind in ("int4", "bfloat16")]
        yield f"| {shape} | {context:,} | {rows} | {' | '.join(cells)} |"


def rate(result: dict[str, Any]) -> str:
    """A cell of tokens per second."""
    if result.get("fits") is False:
        return "does not fit"
    return f"{result['tokens_per_s']:,.0f}" if "tokens_per_s" in result else ""


def cost(result: dict[str, Any], price: float) -> str:
    """A cell of dollars for a million tokens."""
    return f"{price / 3600 / result['tokens_per_s'] * 1e6:.2f}" if "tokens_per_s" in result else rate(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="what `bench.py --json` has written")
    parser.add_argument("--price", type=float, help="dollars for an hour of the machine")
    arguments = parser.parse_args()
    results = [json.loads(line) for path in arguments.files for line in path.read_text().splitlines()]
    lines = lines_of(results)
    tables = [speed_table(lines), memory_table(lines)]
    tables += [price_table(lines, arguments.price)] if arguments.price else []
    print("\n\n".join("\n".join(table) for table in tables))


if __name__ == "__main__":
    main()
