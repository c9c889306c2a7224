"""`make audit`: asks pip-audit whether the packages of requirements.txt have known vulnerabilities.

Exits with 1 if they have, else with 0. If nothing can be asked (no network, an index without such a service), one line says
so.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parent.parent / "requirements.txt"


def main() -> int:
    """Prints the findings and returns the exit code."""
    command = [sys.executable, "-m", "pip_audit", "-r", str(REQUIREMENTS), "-f", "json", "--progress-spinner", "off"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        lines, code = judged(ended.stdout, ended.stderr)
    except subprocess.TimeoutExpired:
        lines, code = ["nothing was audited: pip-audit did not answer within 300 s"], 0
    print("\n".join(lines))
    return code


def judged(out: str, errors: str) -> tuple[list[str], int]:
    """The findings of pip-audit as lines, and the exit code."""
    try:
        packages = json.loads(out)["dependencies"]
    except (ValueError, KeyError, TypeError):
        why = (errors.strip().splitlines() or ["it printed nothing"])[-1]
        return [f"nothing was audited: pip-audit could not run here: {why}"], 0
    findings = [
        f"{package['name']} {package['version']}: {found['id']}, fixed in {', '.join(found['fix_versions']) or 'no version'}"
        for package in packages
        for found in package.get("vulns", ())
    ]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    audited = len(packages) - len(skipped)
    lines = [*findings, f"{len(findings)} known vulnerabilities in {audited} packages"]
    if skipped:
        lines[-1] += f"; {len(skipped)} could not be audited, because the index knows nothing about them: {', '.join(skipped)}"
    return lines, 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
