"""The configuration: defaults, precedence, and one clear line for each wrong value."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import config
from config import Config, parse
from tests import ROOT


def test_defaults() -> None:
    assert parse({}) == Config(
        queue_name="issue-189",
        concurrency=2,
        num_chains=7,
        redis_url="redis://127.0.0.1:6379",
        ordered_events=False,
        stats_interval=3,
        duration=0,
        extended_stats=False,
        workers=6,
    )


def test_every_variable() -> None:
    given = {
        "QUEUE_NAME": "other",
        "CONCURRENCY": "5",
        "NUM_CHAINS": "9",
        "REDIS_URL": "rediss://user:secret@host:7000/3",
        "ORDERED_EVENTS": "true",
        "STATS_INTERVAL": "0.5",
        "DURATION": "2.5",
        "EXTENDED_STATS": "true",
        "WORKERS": "1",
    }
    assert parse(given) == Config("other", 5, 9, "rediss://user:secret@host:7000/3", True, 0.5, 2.5, True, 1)


def test_empty_means_not_set() -> None:
    assert parse(dict.fromkeys(["CONCURRENCY", "REDIS_URL", "DURATION"], "")) == Config()


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("CONCURRENCY", "0", "CONCURRENCY must be a whole number of at least 1, not '0'"),
        ("CONCURRENCY", "9" * 16, f"CONCURRENCY must have at most 15 digits, not '{'9' * 16}'"),
        ("WORKERS", "9" * 5000, f"WORKERS must have at most 15 digits, not '{'9' * 5000}'"),
        ("QUEUE_NAME", "a\udcff", r"QUEUE_NAME must be text that UTF-8 can carry, not 'a\udcff'"),
        ("QUEUE_NAME", "a\0b", r"QUEUE_NAME must not contain NUL, unlike 'a\x00b'"),
        ("NUM_CHAINS", "2.5", "NUM_CHAINS must be a whole number of at least 1, not '2.5'"),
        ("NUM_CHAINS", "100001", "NUM_CHAINS must be at most 100,000, not '100001'"),
        ("WORKERS", "1001", "WORKERS must be at most 1,000, not '1001'"),
        ("WORKERS", "-1", "WORKERS must be a whole number of at least 1, not '-1'"),
        ("ORDERED_EVENTS", "yes", "ORDERED_EVENTS must be true or false, not 'yes'"),
        ("EXTENDED_STATS", "1", "EXTENDED_STATS must be true or false, not '1'"),
        ("STATS_INTERVAL", "0", "STATS_INTERVAL must be a number of seconds, greater than 0, not '0'"),
        ("STATS_INTERVAL", "nan", "STATS_INTERVAL must be a number of seconds, greater than 0, not 'nan'"),
        ("DURATION", "-1", "DURATION must be a number of seconds, at least 0, not '-1'"),
        ("DURATION", "soon", "DURATION must be a number of seconds, at least 0, not 'soon'"),
        (
            "REDIS_URL",
            "http://h",
            "REDIS_URL must be a URL that begins with redis://, rediss://, valkey://, valkeys:// or unix://",
        ),
        ("REDIS_URL", "redis://h/12abc", "REDIS_URL must name its database by a number, not 'redis://h/12abc'"),
        ("REDIS_URL", "redis://h:0", "REDIS_URL must have a port from 1 to 65535, not 'redis://h:0'"),
        ("REDIS_URL", "redis://a..b", "REDIS_URL must name a host, not 'redis://a..b'"),
        (
            "REDIS_URL",
            "redis://h?sokcet_timeout=5",
            "REDIS_URL must only have options of redis-py's connections; did you mean socket_timeout?",
        ),
        ("REDIS_URL", "unix://", "REDIS_URL must name a socket, as in unix:///run/redis.sock, not 'unix://'"),
    ],
)
def test_wrong_values(name: str, value: str, line: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse({name: value})
    assert str(caught.value) == line


def test_a_password_is_not_shown() -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse({"REDIS_URL": "redis://user:hunter2@h/x"})
    assert "hunter2" not in str(caught.value)
    assert "user" not in str(caught.value)


@pytest.mark.parametrize("program", [["client.py"], ["worker.py"], ["-m", "harness", "local"]])
def test_a_program_ends_with_one_line(program: list[str]) -> None:
    ended = subprocess.run(
        [sys.executable, *program],
        cwd=ROOT,
        env={**os.environ, "NUM_CHAINS": "many"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == "NUM_CHAINS must be a whole number of at least 1, not 'many'\n"


def test_the_environment_wins_over_dotenv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("QUEUE_NAME=from-dotenv\nNUM_CHAINS=3\n")
    monkeypatch.setattr(config, "__file__", str(tmp_path / "config.py"))
    monkeypatch.setenv("NUM_CHAINS", "4")
    assert config.load().queue_name == "from-dotenv"
    assert config.load().num_chains == 4


def test_a_dotenv_that_is_not_utf8(tmp_path: Path) -> None:
    """the program ends with one line that names the file"""
    (tmp_path / ".env").write_bytes("QUEUE_NAME=Schlüssel\n".encode("latin-1"))
    (tmp_path / "config.py").write_bytes((ROOT / "config.py").read_bytes())
    ended = subprocess.run(
        [sys.executable, "-c", "import config; config.load()"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"{tmp_path / '.env'} is not UTF-8\n"


def test_the_example_lists_every_variable() -> None:
    text = (ROOT / ".env.example").read_text()
    assert all(f"#{field.upper()}=" in text for field in Config.__dataclass_fields__)
