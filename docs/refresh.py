"""Writes the tables of README.md and docs/results.md from the committed records (between their markers)."""

import json
import re
from pathlib import Path

from benchmarks.step import markdown as cost_table
from flatmin.lab.display import markdown_table

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Replaces what stands between `<!-- name -->` and `<!-- /name -->`."""
    summary = json.loads((ROOT / "docs" / "records" / "digits" / "summary.json").read_text())
    cost = json.loads((ROOT / "benchmarks" / "results" / "step.json").read_text())
    tables = {"demo": markdown_table(summary), "cost": cost_table(cost)}
    for path in (ROOT / "README.md", ROOT / "docs" / "results.md"):
        text = path.read_text()
        for name, table in tables.items():
            pattern = rf"<!-- {name} -->.*?<!-- /{name} -->"
            text = re.sub(pattern, lambda _, n=name, t=table: f"<!-- {n} -->\n\n{t}\n\n<!-- /{n} -->", text, flags=re.S)
        path.write_text(text)


if __name__ == "__main__":
    main()
