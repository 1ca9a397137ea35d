"""Calls that Windows lacks, read from the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import ROOT

FILES = [path for package in ("unipic_core", "nodes", "trainers") for path in sorted((ROOT / package).rglob("*.py"))]
ABSENT_MODULES = {"resource", "fcntl", "pwd", "grp", "termios", "pty", "tty"}
ABSENT = {
    "os": {
        "mkfifo",
        "fork",
        "getuid",
        "geteuid",
        "getgid",
        "setsid",
        "killpg",
        "sysconf",
        "chown",
        "getpgid",
        "uname",
        "nice",
    },
    "signal": {"SIGHUP", "SIGKILL", "SIGALRM", "SIGUSR1", "SIGUSR2", "alarm", "setitimer"},
}
DEVICES = ("/dev/", "/proc/", "/tmp/")
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10))}


def guarded(tree: ast.Module) -> set[ast.AST]:
    """Nodes under an `if` or a conditional expression that asks hasattr or the platform, or under a `try`."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        asks = isinstance(node, (ast.If, ast.IfExp)) and any(
            word in ast.unparse(node.test) for word in ("hasattr", "platform", "os.name")
        )
        if asks or isinstance(node, ast.Try):
            found.update(ast.walk(node))
    return found


def absent_on_windows(tree: ast.Module) -> Iterator[tuple[int, str]]:
    fine = guarded(tree)
    for node in ast.walk(tree):
        if node in fine:
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in ABSENT.get(node.value.id, ()):
                yield node.lineno, f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Import) and node.col_offset == 0:
            yield from ((node.lineno, a.name) for a in node.names if a.name in ABSENT_MODULES)
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names} & ABSENT.get(node.module or "", set())
            if (node.module in ABSENT_MODULES and node.col_offset == 0) or names:
                yield node.lineno, f"from {node.module} import {', '.join(sorted(names))}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(DEVICES):
            yield node.lineno, node.value


def without_encoding(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(k.arg in ("encoding", None) for k in node.keywords):
            continue
        called = node.func
        if isinstance(called, ast.Attribute) and called.attr in ("read_text", "write_text"):
            if len(node.args) < (1 if called.attr == "read_text" else 2):
                yield node.lineno, called.attr
        elif isinstance(called, ast.Name) and called.id == "open":
            modes = [*node.args[1:2], *(k.value for k in node.keywords if k.arg == "mode")]
            if not any(isinstance(m, ast.Constant) and "b" in str(m.value) for m in modes):
                yield node.lineno, "open"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_that_windows_lacks(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert list(absent_on_windows(tree)) == []
    assert list(without_encoding(tree)) == [], 'give encoding="utf-8": the default is the code page on Windows'


def test_no_reserved_names() -> None:
    for package in ("unipic_core", "nodes", "trainers", "tests", "docs", "workflows", "locales", "web", "pictures"):
        for path in (ROOT / package).rglob("*"):
            assert path.name.partition(".")[0].lower() not in RESERVED, path
            assert not set('<>:"|?*') & set(path.name), path


@pytest.mark.parametrize(
    "code",
    ["import os\nos.mkfifo('x')", "import signal\nx = signal.SIGHUP", "import resource", "open('/dev/null', 'rb')"],
)
def test_the_check_sees(code: str) -> None:
    assert list(absent_on_windows(ast.parse(code)))
    guard = "import sys\nif sys.platform != 'win32':\n" + "".join(f"    {line}\n" for line in code.splitlines())
    assert not list(absent_on_windows(ast.parse(guard)))


@pytest.mark.parametrize("code", ["open('x')", "p.read_text()", "p.write_text('x')"])
def test_the_check_sees_a_missing_encoding(code: str) -> None:
    assert list(without_encoding(ast.parse(code)))
