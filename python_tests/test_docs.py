"""The pages (README, docs, ...): links lead somewhere, Python runs, the figure shows what the rows say.

What a page says in words is not tested, but that it is not long.
"""

import importlib.util
import inspect
import itertools
import pydoc
import re
import statistics
import sys
from functools import cache
from pathlib import Path
from runpy import run_path
from types import ModuleType
from urllib.parse import unquote

import pytest

import lopt.integrations
import lopt.tasks
from lopt.rule import step

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(page for name in ("docs", "benchmarks", "lopt") for page in ROOT.glob(f"{name}/**/*.md"))]
)
FENCE = re.compile(r"^```([\w{}-]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them: lower case, spaces to hyphens, no other signs."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.+?) *$", FENCE.sub("", page.read_text()), re.MULTILINE):
        text = LINK.sub("]", heading).replace("[", "").replace("]", "")
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        found[f"{slug}-{found[slug]}" if found[slug] else slug] = 0
    return set(found)


def broken(page: Path) -> list[str]:
    """Relative links of a page to files or headings that are not there."""
    bad = []
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"\w+:", link):
            continue
        file, _, anchor = unquote(link).partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or not target.is_relative_to(ROOT):
            bad.append(f"{link}: no such file")
        elif anchor and (target.suffix != ".md" or anchor not in anchors(target)):
            bad.append(f"{link}: no such heading")
    return bad


@pytest.mark.results
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_a_broken_link_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path.resolve())
    (tmp_path / "b.md").write_text("# A `title`, twice\n```\n# none\n```\n## A title twice\n## [Linked](a.md)\n")
    links = ["b.md", "#here", "b.md#a-title-twice", "b.md#a-title-twice-1", "b.md#linked", "https://example.org/x"]
    bad = ["c.md", "#there", "b.md#none", "b.md#a-title-twice-2", "../x.md"]
    (tmp_path / "a.md").write_text("# Here\n" + " ".join(f"[x]({link})" for link in links + bad))
    found = broken((tmp_path / "a.md").resolve())
    assert [one.partition(":")[0] for one in found] == bad


def code_of(page: Path) -> str:
    """All Python blocks of a page, one after the other; line numbers of errors are those of the page."""
    text = page.read_text()
    lines = [""] * text.count("\n")
    for block in FENCE.finditer(text):
        if block[1] == "python":
            first = text.count("\n", 0, block.start(2))
            lines[first : first + block[2].count("\n")] = block[2].splitlines()
    return "\n".join(lines)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if code_of(page).strip()], ids=lambda page: str(page.relative_to(ROOT))
)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one script, in an empty folder; what a block says with ``assert`` holds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # of kernels that are compiled
    exec(compile(code_of(page), str(page), "exec"), {"__name__": "page"})


def test_code_keeps_its_lines(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text("text\n```python\nx = 1\n```\n```sh\nls\n```\n```python\ny = x + 1\n```\n")
    assert code_of(page).splitlines() == ["", "", "x = 1", "", "", "", "", "", "y = x + 1"]


#: Pages that may have more words: lists, and the record of what was tried.
LONG = ("docs/reference/", "docs/notebook/")


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/**/*.md")), ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_short(page: Path) -> None:
    if not str(page.relative_to(ROOT)).startswith(LONG):
        assert len(page.read_text().split()) <= 1500


#: Callbacks, whose libraries need not be installed.
LATE = {"lopt.integrations.TransformersCallback", "lopt.integrations.LightningCallback"}


def described() -> dict[str, object]:
    """What the pages of the reference name -> what it is."""
    pages = "".join(page.read_text() for page in sorted(ROOT.glob("docs/reference/*.md")))
    names = re.findall(r"^\.\. auto(?:class|function|data):: (\S+)$", pages, re.MULTILINE)
    assert len(set(names)) == len(names)
    assert set(names) >= LATE
    return {name: pydoc.locate(name) for name in names if name not in LATE}


def test_the_reference_has_what_is_public() -> None:
    found = described()
    assert [name for name, value in found.items() if value is None] == []
    for package in (lopt, lopt.tasks, lopt.integrations):
        names = {name.rpartition(".")[2] for name in {*found, *LATE} if name.startswith(package.__name__)}
        assert set(package.__all__) - {"__version__"} <= names


def test_what_the_reference_has_says_what_it_is() -> None:
    """Every class and function, and every public method of a class, has a docstring."""
    for name, value in described().items():
        if isinstance(value, type) or inspect.isfunction(value):
            assert value.__doc__, name
        if isinstance(value, type):
            own = {key: one for key, one in vars(value).items() if not key.startswith("_")}
            methods = {key: one for key, one in own.items() if inspect.isfunction(one) or isinstance(one, property)}
            assert [key for key in methods if not inspect.getdoc(getattr(value, key))] == [], name


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs/figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.results
def test_the_figure_shows_what_the_report_says(figures: ModuleType) -> None:
    """Means, shares and the ratio of every task are those of the report that is kept; a bar is the mean of its dots."""
    pytest.importorskip("matplotlib")
    report = (figures.RESULTS / "report.md").read_text()
    section = report.partition(f"\n## {figures.HORIZON} steps")[2].partition("\n## ")[0]
    summary = {row[0].partition("@")[0]: row[4::2] for row in _table(section)}  # test loss: ratio, better / won / lost
    opponents, *tasks = _table(section.partition("lopt, test loss, every task")[2])
    panels = figures.families(figures.ratios(), figures.family_of()).axes
    for axes, (opponent, title) in zip(panels, figures.OPPONENTS.items(), strict=True):
        assert axes.get_title(loc="left") == title
        said = re.findall(r"\d+\.\d+|\d+%", axes.get_xlabel())
        assert said == [cell.split()[0] for cell in summary[opponent]]
        column = [name.partition("@")[0] for name in opponents].index(opponent)
        told = [float(row[column]) for row in tasks if row[column]]
        rows = {y: x for one in axes.collections if one.get_label() == "mean" for x, y in one.get_offsets()}
        dots = [(x, y) for one in axes.collections if one.get_label() == "tasks" for x, y in one.get_offsets()]
        assert sorted(x for x, _ in dots) == pytest.approx(sorted(told), abs=0.0011)
        for y, mean in rows.items():
            assert mean == pytest.approx(statistics.geometric_mean(x for x, row in dots if y in (0, row)))


def test_each_question_of_the_results_has_its_figure_first() -> None:
    """With a caption below it; and no figure is kept that no page shows."""
    shown = set()
    for page in sorted(ROOT.glob("docs/results*.md")):
        for section in page.read_text().split("\n## ")[1:]:
            figure, caption = section.partition("\n\n")[2].split("\n\n")[:2]
            assert re.fullmatch(r"!\[[^\]]+\]\([^)]+\)", figure), section[:200]
            assert re.match(r"\*[A-Za-z].*\*$|\[", caption), section[:200]
    for page in PAGES:
        shown |= {(page.parent / link).resolve() for link in LINK.findall(page.read_text())}
    assert [file.name for file in ROOT.glob("docs/figures/*") if file not in shown] == []


@pytest.mark.results
def test_figures_of_results_show_what_their_pages_say(figures: ModuleType) -> None:
    """Dots and ends of lines are the numbers of the tables beside them."""
    pytest.importorskip("matplotlib")
    drawn = sys.modules["result_figures"]
    for page, theta, horizons in (
        ("results", "default", (200, 1000)),
        ("results-compact", "compact", (200, 1000, 5000)),
    ):
        head, *rows = _table((ROOT / f"docs/{page}.md").read_text())
        said = {row[0].partition("@")[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}
        names = {name: name for name in said}
        for measure, panel in drawn.against(theta, "lopt", names, horizons).items():
            for name, dots in panel.items():
                for steps, (ratio, low, high) in dots.items():
                    cell = said[name][f"{measure.split()[0].removesuffix('ing')}, {steps}"]
                    assert cell.startswith(f"{ratio:.2f} ({low:.2f} to {high:.2f})")
    kept = [run for run in drawn.rows_of("experiments/resnet/resnet.csv") if run.name == "lopt"]
    found = drawn.experiments()["test loss"]
    assert {name: len(values) for name, values in found.items()} == {
        "width": 24,
        "batch-size": 30,
        "dataset-size": 22,
        "horizon": 28,
        "resnet": 1,
        "transformer": 2,
    }
    assert len(kept) == 3
    assert 0.7 < found["resnet"][0] < 0.73  # 28% lower, says the page


def test_the_drawing_of_a_step(figures: ModuleType) -> None:
    """Its boxes are the phases of a step in their order; what a box says is within it, and no label meets another."""
    Bbox = pytest.importorskip("matplotlib.transforms").Bbox
    names = re.findall(r"phases\.(\w+)\(", inspect.getsource(step.run))
    assert names == [
        "begin",
        "advance",
        "accumulate",
        "apply",
        "direction",
        "finish",
    ]  # advance takes accumulate's value
    figure = figures.step()
    figure.canvas.draw()
    (axes,) = figure.axes
    boxes = {box.name: Bbox.from_bounds(box.x, box.y, box.width, box.height) for box in figures.BOXES}
    assert list(boxes) == ["accumulate", "advance", "apply", "direction"]
    places = [(text, text.get_window_extent().transformed(axes.transData.inverted())) for text in axes.texts]
    whole = Bbox.from_extents(axes.get_xlim()[0], axes.get_ylim()[0], axes.get_xlim()[1], axes.get_ylim()[1])
    for text, place in places:
        home = boxes.get(text.get_gid(), whole)
        assert home.x0 < place.x0 < place.x1 < home.x1
        assert home.y0 < place.y0 < place.y1 < home.y1
        if text.get_gid() is None:
            assert not any(place.overlaps(box) for box in boxes.values()), text.get_text()
    for (one, first), (other, second) in itertools.combinations(places, 2):
        assert not first.overlaps(second), (one.get_text(), other.get_text())
    assert min(text.get_fontsize() for text in axes.texts) >= 13  # of 11 inches: at half size, still above 6 points


def _table(text: str) -> list[list[str]]:
    """Cells of the first table of a page: its head and its rows."""
    lines = text[text.index("\n| ") :].strip().partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def test_versions_of_the_site_stand_side_by_side(tmp_path: Path) -> None:
    """The list is in order, newest first; what is made again replaces itself; the site begins with a release."""
    made = run_path(str(ROOT / "docs/versions.py"))
    built, site = tmp_path / "built", tmp_path / "site"
    (built / "docs").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"expected a built site, with docs/index\.html; run make docs"):
        made["publish"](built, site, "0.1.0")
    (built / "docs/index.html").write_text("old")
    (built / "gone.html").touch()
    for name in ("0.9.0", "main", "0.10.0"):
        names = made["publish"](built, site, name)
    (built / "docs/index.html").write_text("new")
    (built / "gone.html").unlink()
    assert made["publish"](built, site, "0.9.0") == names == ["0.10.0", "0.9.0", "main"]
    assert (site / "versions.js").read_text() == 'window.LOPT_VERSIONS = ["0.10.0", "0.9.0", "main"];\n'
    assert "url=0.10.0/docs/index.html" in (site / "index.html").read_text()
    assert [(site / name / "docs/index.html").read_text() for name in names] == ["old", "new", "old"]
    assert [(site / name / "gone.html").exists() for name in names] == [True, False, True]
    for name in ("../x", ".git", ""):
        with pytest.raises(ValueError, match="name: expected that of a version"):
            made["publish"](built, site, name)
