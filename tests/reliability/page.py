"""Tables of docs/reliability.md, each between two marks, which the command that counts writes."""

from collections.abc import Mapping, Sequence
from pathlib import Path


def table(first: str, kinds: Sequence[str], rows: Mapping[str, Sequence[int]]) -> str:
    """Rows of numbers as Markdown, with their sum as the last one."""
    total = [sum(column) for column in zip(*rows.values(), strict=True)]
    lines = [f"| {first} | {' | '.join(kinds)} |", "|---" * (1 + len(kinds)) + "|"]
    for name, counts in [*rows.items(), ("sum", total)]:
        lines.append(f"| {name} | {' | '.join(f'{count:,}' for count in counts)} |")
    return "\n".join(lines)


def write_table(page: Path, mark: str, text: str) -> None:
    """Put a text between `<!-- mark -->` and `<!-- end of mark -->`."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
    before, _, rest = page.read_text().partition(begin)
    page.write_text(before + begin + text + "\n" + end + rest.partition(end)[2])
