"""Pages: every relative link and anchor leads somewhere, the README is short, YAML files parse."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SKIPPED = {".venv", ".git", "node_modules", "runs"}
PAGES = sorted(p for p in ROOT.rglob("*.md") if not SKIPPED & set(p.relative_to(ROOT).parts))
YAML_FILES = [ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff", *(ROOT / ".github").rglob("*.yml")]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """The page without its code blocks, in which brackets are no links."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Anchors of the headings as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.relative_to(ROOT)} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.relative_to(ROOT)}: no heading for {link}"


NAMED = re.compile(r"`((?:unipic_core|nodes|trainers|tests|docs|web|locales|\.github)/[\w/.-]+)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_named_files_are_there(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return
    missing = [name for name in NAMED.findall(prose(page)) if not (ROOT / name).exists()]
    assert not missing, f"{page.relative_to(ROOT)} names {missing}"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda p: p.name)
def test_yaml_parses(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_troubleshooting_quotes_real_messages() -> None:
    """Each quotation is in one string of the code, `...` standing for any text."""
    texts = []
    for path in (ROOT / "__init__.py", *(ROOT / "unipic_core").rglob("*.py"), *(ROOT / "nodes").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.JoinedStr, ast.Constant)):
                values = node.values if isinstance(node, ast.JoinedStr) else [node]
                parts = (v.value if isinstance(v, ast.Constant) else "\0" for v in values)
                texts.append("".join(part for part in parts if isinstance(part, str)))
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quotations = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(quotations) >= 10
    for quotation in quotations:
        wanted = re.compile(".*?".join(re.escape(part) for part in quotation.split("...")), re.DOTALL)
        assert any(wanted.search(text) for text in texts), f"no message of the code reads {quotation!r}"
