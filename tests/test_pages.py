"""What the pages say of the repository: its files, exit codes, families and equations; and that their links lead on."""

from __future__ import annotations

import re

from mohawkify.errors import EXIT_CODES
from mohawkify.families.registry import adapter_names
from mohawkify.families.unsupported import UNSUPPORTED
from tests.test_structure import PACKAGE, ROOT, assert_none, shown, source_files
from tools.family_docs import with_reference


def documented_modules(page: str) -> dict[str, str]:
    """The files in the page's tree of the package, each with what the tree says about it."""
    block = page.partition(f"```text\n{PACKAGE}/\n")[2].partition("```")[0]
    files, folder = {}, ""
    for line in block.splitlines():
        name, _, words = line.strip().partition(" ")
        if name.endswith("/"):
            folder = name
        elif name:
            indented = len(line) - len(line.lstrip()) > 2
            files[f"{folder if indented else ''}{name}"] = words.strip()
    return files


def test_the_exit_codes_are_listed_as_they_are():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", page, re.MULTILINE)
    assert {int(code): means for code, means in rows} == EXIT_CODES


def test_architecture_page_names_every_module() -> None:
    documented = documented_modules((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    modules = {
        shown(path)
        for path in source_files().values()
        if PACKAGE in path.relative_to(ROOT).parts and path.name != "__init__.py"
    }
    assert_none(modules - documented.keys(), "give these files a line in the tree of docs/architecture.md")
    assert_none(documented.keys() - modules, "docs/architecture.md names files that are not there")
    assert_none(name for name, words in documented.items() if not words)


def heading_anchors(page: str) -> set[str]:
    """The anchors GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_in_the_pages_lead_somewhere() -> None:
    broken = []
    for page in [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md"))]:
        for link in re.findall(r"\]\(([^()\s]+)\)", page.read_text(encoding="utf-8")):
            if re.match(r"[a-z]+:", link):
                continue
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            if not target.exists():
                broken.append(f"{page.name}: {link}")
            elif anchor and anchor not in heading_anchors(target.read_text(encoding="utf-8")):
                broken.append(f"{page.name}: {link} (no such heading)")
    assert_none(broken)


def test_tests_that_the_pages_name_exist() -> None:
    pages = [ROOT / "SECURITY.md", ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {
        f"{shown(page)}: {name}"
        for page in pages
        if page.name != "log.md"  # which tells what was
        for name in re.findall(r"`(tests/[\w/]+(?:\.py)?)`", page.read_text(encoding="utf-8"))
        if not (ROOT / name).exists()
    }
    assert_none(named)


def test_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^- \[[^]]+\]\((\w+\.md)\)", index, flags=re.MULTILINE))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert_none(pages - listed, "give these pages a line in docs/index.md")
    assert_none(listed - pages, "docs/index.md lists pages that are not there")


def test_the_page_of_families_is_what_their_files_say() -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert page == with_reference(page), "renew it with tools.family_docs.with_reference"
    assert_none(UNSUPPORTED.keys() & set(adapter_names()), "these families have a file and a reason against them")


def test_pages_that_the_sources_name_exist() -> None:
    assert_none(
        f"{shown(path)}: {page}"
        for path in source_files().values()
        for page in set(re.findall(r"docs/\w+\.md", path.read_text(encoding="utf-8")))
        if not (ROOT / page).is_file()
    )


def test_equations_are_numbered_and_cited_numbers_exist() -> None:
    page = (ROOT / "docs" / "math.md").read_text(encoding="utf-8")
    numbers = [int(number) for number in re.findall(r"\\tag\{(\d+)\}", page)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert_none(
        f"{shown(path)}: docs/math.md ({number})"
        for path in source_files().values()
        for number in re.findall(r"docs/math\.md \((\d+)\)", path.read_text(encoding="utf-8"))
        if int(number) not in numbers
    )
