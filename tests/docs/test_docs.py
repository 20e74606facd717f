"""The documentation: the site builds without a warning, nothing in it leads nowhere, and every public name has a
runnable example, and a place in the reference. The examples themselves are run as doctests."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import pickle
import re
import subprocess
import sys
import types
from collections.abc import Iterable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PACKAGES = "revcore", "revcore_torch", "revcore_jax"


def public_modules() -> list[str]:
    """Return the modules that say what is public in them, by an ``__all__``; but for the demo, which is a command."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    named = [path for path in files if re.search(r"^__all__ = ", path.read_text(), re.MULTILINE)]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in named]
    return [name for name in names if name != "revcore.demo"]


def public_names() -> dict[str, Any]:
    """Return what the ``__all__`` of each public module names, by its full name."""
    modules = {name: importlib.import_module(name) for name in public_modules()}
    return {f"{where}.{name}": getattr(module, name) for where, module in modules.items() for name in module.__all__}


def without_example(names: Mapping[str, Any]) -> list[str]:
    """Return the functions, classes and modules that have no doctest. (Constants and names of types cannot have one.)

    >>> without_example({"len": len, "here": without_example, "union": int | str, "pair": tuple[int, int], "number": 1})
    ['len']
    """
    shown = {name: thing for name, thing in names.items() if callable(thing) or inspect.ismodule(thing)}
    shown = {name: thing for name, thing in shown.items() if not isinstance(thing, types.GenericAlias)}
    return [name for name, thing in shown.items() if ">>>" not in (getattr(thing, "__doc__", None) or "")]


def undocumented(names: Mapping[str, Any], documented: Iterable[str], pages: str) -> list[str]:
    """Return what is not in the reference: names, and the public methods and properties of classes.

    What is public under several names, as the policies are, is described under one of them, and named by the others on
    their ``pages``.

    >>> class C:
    ...     def method(self): ...
    >>> undocumented({"a.C": C, "b.C": C, "a.f": len}, {"a.C"}, "`b.C`")
    ['a.C.method', 'a.f']
    """
    known, missing = set(documented), []
    for name, thing in names.items():
        aliases = [other for other, same in names.items() if same is thing and other in known]
        if name not in known and not (aliases and name in pages):
            missing.append(name)
        elif name in known and inspect.isclass(thing):
            missing += [f"{name}.{member}" for member in methods(thing) if f"{name}.{member}" not in known]
    return missing


def methods(cls: type) -> list[str]:
    """Return the public methods and properties that a class itself defines.

    What it has from its base stays out even where a tool has set it again on the class, as ``nnx.tabulate`` does.

    >>> class Heir(Page):
    ...     feed = Page.feed
    ...     def method(self): ...
    >>> methods(Heir)
    ['method']
    """
    kinds = types.FunctionType, property, staticmethod, classmethod, functools.cached_property
    own = {name: member for name, member in vars(cls).items() if isinstance(member, kinds) and name[0] != "_"}
    return [name for name, member in own.items() if member is not getattr(cls.__base__, name, None)]


class Page(HTMLParser):
    """The places in a page that links may lead to, and its links."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.places: set[str] = set()
        self.links: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.places |= {found[key] or "" for key in ("id", "name") if key in found}
        self.links += [found[key] or "" for key in ("href", "src") if key in found and tag != "base"]


def dead_links(site: Path) -> list[str]:
    """Return the links within a site that lead to no file, or to no place in a page."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html")) if "_static" not in path.parts}
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
            place = unquote(parts.fragment)
            if not target.is_file() or (place and target in pages and place not in pages[target].places):
                dead.append(f"{path.relative_to(site)}: {link}")
    return dead


def dead_paths(page: Path) -> list[str]:
    """Return the links of a Markdown page that lead nowhere on the code host: no such file, or no such heading."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, place = link.partition("#")
        target = page.parent / path if path else page
        if ":" not in link and (not target.exists() or (place and place not in headings(target))):
            dead.append(f"{page.name}: {link}")
    return dead


def headings(page: Path) -> set[str]:
    """Return the names by which a page's headings are linked to."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def is_there(command: str) -> bool:
    """Whether the module, script or target that a command runs exists.

    >>> [is_there(c) for c in ("make demo", "make coffee", "python -m benchmarks.drift --write", "python -m nowhere")]
    [True, False, True, False]
    """
    words = command.split()
    if words[0] == "make":
        return re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE) is not None
    if words[:2] == ["python", "-m"]:
        spec = importlib.util.find_spec(words[2])
        package = spec is not None and spec.submodule_search_locations is not None
        return spec is not None and (not package or importlib.util.find_spec(f"{words[2]}.__main__") is not None)
    return words[0] == "python" and (ROOT / words[1]).is_file()


def test_public_modules_are_found() -> None:
    assert {*PACKAGES, "revcore.parity", "revcore.weights", "revcore_jax.nnx", "revcore_jax.linen"} <= {
        *public_modules()
    }


def test_every_public_name_has_a_runnable_example() -> None:
    assert without_example(public_names()) == []


def test_a_name_without_an_example_is_found() -> None:
    class Bare:
        """Has words, and no example."""

    class Heir(Path):
        pass

    module = types.ModuleType("module", "No example.")
    names = {"Bare": Bare, "Heir": Heir, "function": lambda: None, "module": module}
    assert without_example({"shown": without_example, **names}) == list(names)


def need_sphinx() -> None:
    for package in ("sphinx", "myst_parser", "furo", "sphinx_design"):
        pytest.importorskip(package)


def build(builder: str, folder: Path) -> Any:
    """Build the site in a process of its own, for autodoc changes what it reads; return Sphinx's environment."""
    need_sphinx()
    command = [sys.executable, "-W", "ignore", "-m", "sphinx", "-W", "--keep-going", "-q", "-b", builder]
    trees = folder / "doctrees"
    done = subprocess.run([*command, "-d", trees, DOCS, folder], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return pickle.loads((trees / "environment.pickle").read_bytes())


def test_every_page_reads_without_a_warning_and_every_public_name_has_a_place(tmp_path: Path) -> None:
    """All but what ``make docs`` writes: pages are read, and what they refer to is sought."""
    documented = [*build("dummy", tmp_path).domaindata["py"]["objects"]]
    pages = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    # the names of revlib stand beside those of today, in docs/migration.md
    today = {name: thing for name, thing in public_names().items() if not name.startswith("revcore_torch.revlib.")}
    assert undocumented(today, documented, pages) == []


@pytest.mark.long
def test_the_site_leads_nowhere_astray(tmp_path: Path) -> None:
    build("html", tmp_path)
    assert dead_links(tmp_path) == []


def test_dead_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "index.html").write_text(
        '<p id="here"></p><a href="#here"><a href="#there"><a href="folder/a.html#x"><a href="folder/a.html#y">'
        '<img src="picture.png"><a href="https://example.org/nowhere">'
    )
    (tmp_path / "folder" / "a.html").write_text('<p id="x"></p><a href="../index.html#here"><a href="index.html">')
    assert dead_links(tmp_path) == [
        "folder/a.html: index.html",
        "index.html: #there",
        "index.html: folder/a.html#y",
        "index.html: picture.png",
    ]


PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]


def test_links_lead_somewhere_on_the_code_host_too(tmp_path: Path) -> None:
    assert [link for page in PAGES for link in dead_paths(page)] == []
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading: `x`\n[a](#a-heading-x) [b](#b) [c](page.md#a-heading-x) [d](nowhere.md) [e](https://e)\n"
    )
    assert dead_paths(page) == ["page.md: #b", "page.md: nowhere.md"]


def sections(page: str) -> list[tuple[list[str], list[str]]]:
    """Return the pictures and the commands of each section of a page."""
    found = re.split(r"^## ", page, flags=re.MULTILINE)
    fence = re.compile(r"^```sh\n(.*?)\n```", re.DOTALL | re.MULTILINE)
    return [(re.findall(r"!\[[^]]*\]\(([^)]+)\)", s), fence.findall(s)) for s in found]


def without_command(page: str) -> list[str]:
    """Return the pictures of a page that no command stands beside, or one that does not exist."""
    return [
        picture
        for pictures, commands in sections(page)
        for picture in pictures
        if not commands or not all(map(is_there, commands))
    ]


def test_the_gallery_has_every_picture_and_a_command_for_each() -> None:
    page = (DOCS / "gallery.md").read_text()
    shown = {(DOCS / picture).resolve() for pictures, _ in sections(page) for picture in pictures}
    made = {path.resolve() for folder in (DOCS, ROOT / "benchmarks/results") for path in folder.glob("*.png")}
    assert shown == made
    assert without_command(page) == []


def test_a_picture_without_a_command_is_found() -> None:
    assert without_command("## A\n![a](a.png)\n## B\n![b](b.png)\n```sh\npython -m nowhere\n```\n") == [
        "a.png",
        "b.png",
    ]
    assert without_command("## C\n![c](c.png)\n```sh\nmake demo\n```\n") == []
