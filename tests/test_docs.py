"""What the documents say is true: examples run, links lead somewhere, commands exist, the guide names real code."""

import doctest
import re
from pathlib import Path

import pytest
from test_guards import ROOMS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDE = ROOT / "docs" / "contributing.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page):
    results = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert results.failed == 0
    assert bool(results.attempted) == (">>>" in page.read_text(encoding="utf-8"))


def anchors(page):
    """The headings of a page, as links name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", prose):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target
            assert not anchor or anchor in anchors(page.parent / target if target else page), f"{target}#{anchor}"


def make_targets():
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_the_commands_of_the_readme_are_make_targets():
    named = set(re.findall(r"^    make ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert named
    assert named <= make_targets()


def test_the_fast_choice_of_tests_exists():
    (names,) = re.findall(r"^FAST = ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    found = [ROOT / "tests" / f"test_{name}.py" for name in names.replace("\\", " ").split()]
    assert len(found) > 10
    assert [path.name for path in found if not path.is_file()] == []


# The guide for contributors


def test_the_guide_names_every_make_target():
    named = set(re.findall(r"`make ([a-z-]+)`", GUIDE.read_text(encoding="utf-8")))
    assert named == make_targets() - {"clean"}


def test_the_guide_describes_every_room_in_order():
    assert (
        re.findall(r"^\| `(\w+)` \| \S.* \|.*\|$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)[: len(ROOMS)]
        == ROOMS
    )


def guide_changes():
    """Every file that a diff of the guide names, whether it is new, and its lines, each with its sign."""
    for block in re.findall(r"^```diff\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for sign, path, lines in re.findall(r"^(---|\+\+\+) (\S+)\n((?:(?!---|\+\+\+).*\n)*)", block, re.MULTILINE):
            yield path, sign == "+++", lines.splitlines()


def missing_lines(old, text):
    """The unchanged and removed lines of a diff that the text does not have.

    A removed line counts up to its first value, so that a table may grow without a change of the guide.
    """
    present = text.splitlines()
    starts = [re.split(r" = |\(", line[1:])[0] if line[:1] == "-" else line[1:] + "\n" for line in old]
    return [
        line
        for line, start in zip(old, starts, strict=True)
        if line[:1] in ("-", " ") and not any((found + "\n").startswith(start) for found in present)
    ]


def test_the_diffs_of_the_guide_fit_the_code():
    changes = list(guide_changes())
    assert len(changes) > 20
    for path, is_new, lines in changes:
        if is_new:
            assert not (ROOT / path).exists(), path
            assert (ROOT / path).parent.is_dir(), path
        else:
            assert missing_lines(lines, (ROOT / path).read_text(encoding="utf-8")) == [], path
            assert any(line.startswith("+") for line in lines), path


def test_the_check_of_diffs_can_fail():
    assert missing_lines([" a", " ab", "-b = 1", "-c = 2", "+d"], "abc\na\nc = (2, 3)\n") == [" ab", "-b = 1"]


def test_the_guide_names_files_that_exist():
    new = {path for path, is_new, _ in guide_changes() if is_new}
    named = set(re.findall(r"`((?:src|tests|native|docs|benchmarks)/[\w./-]*)`", GUIDE.read_text(encoding="utf-8")))
    assert len(named) > 30
    assert sorted(path for path in named - new if not (ROOT / path).exists()) == []


def test_the_guide_names_what_the_code_has():
    text = GUIDE.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    added = "\n".join(line for _, _, lines in guide_changes() for line in lines)
    files = [*ROOT.glob("tests/*.py"), *ROOT.glob("src/**/*.py"), *ROOT.glob("native/**/*.h")]
    known = set(re.findall(r"\w+", added + "".join(path.read_text(encoding="utf-8") for path in files)))
    named = set(re.findall(r"`(\w+)`", prose))
    assert len(named) > 30
    assert sorted(named - known) == []


def test_constraints_cover_what_the_project_asks_for():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    pinned = {
        re.split("==", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    for requirement in wanted:
        name = re.split(r"[\[<>=]", requirement)[0].lower().replace("_", "-")
        assert name in pinned | {"secateur"}, name
