"""README.md and docs/: their code runs, their links lead somewhere, their commands exist, and their lines are short."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from support.documents import HELPERS, PAGES, ROOT, Block, blocks_of, prose_of

import xpu_lora_compile as xlc
from xpu_lora_compile import backend, cli

NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
PYTHON = [
    pytest.param(page, block, id=f"{name}:{block.line}")
    for page, name in zip(PAGES, NAMES, strict=True)
    for block in blocks_of(page.read_text())
    if block.language == "python"
]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# Python.


@pytest.mark.parametrize("name", [name for name in NAMES if "```python" in text_of(name)])
def test_the_python_of_a_page_runs_and_prints_what_it_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    # The rewritten graph runs as it is: generating code would take longer than all else here.
    monkeypatch.setattr(backend, "generate_code", lambda graph_module, *_: graph_module.forward)
    namespace: dict[str, Any] = {"torch": torch, "xlc": xlc, **HELPERS}
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        for block in blocks_of(text_of(name)):
            if block.language == "python" and not block.not_run:
                run(block, name, namespace)


def run(block: Block, name: str, namespace: dict[str, Any]) -> None:
    exec(compile(block.setup, f"set-up of {name}:{block.line}", "exec"), namespace)  # noqa: S102
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        # With the page's lines in a traceback.
        exec(compile("\n" * (block.line - 1) + block.code, name, "exec"), namespace)  # noqa: S102
    if block.printed is not None:
        assert printed.getvalue() == block.printed, f"{name}:{block.line} prints something else"


@pytest.mark.parametrize(("page", "block"), PYTHON)
def test_the_names_that_python_uses_of_the_package_exist(page: Path, block: Block) -> None:
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if owner := {"xlc": xlc, "bank": xlc.AdapterBank, "report": xlc.Report}.get(node.value.id):
                names = (*dir(owner), *getattr(owner, "__dataclass_fields__", ()))
                assert node.attr in names, f"{page.name}: {node.value.id}.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("xpu_lora_compile"):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_a_block_that_is_not_run_says_why() -> None:
    reasons = {block.values[1].not_run for block in PYTHON} - {""}
    # tests/artifacts/test_rows_of_artifacts.py exports and serves them.
    artifacts = {"the tests of artifacts export such models", "it serves the file above"}
    assert reasons == {"it needs an NVIDIA GPU", "it needs an Intel GPU"} | artifacts


# Names in the prose.

# A path of the repository or of the package.
A_PATH = re.compile(r"[\w.]+(/[\w.]+)*(/|\.(py|json|md|sh|cpp|h|toml))")


@pytest.mark.parametrize("name", NAMES)
def test_what_the_prose_names_exists(name: str) -> None:
    everything = "\n".join(
        file.read_text(encoding="utf-8") for file in ROOT.rglob("xpu_lora_compile/**/*.py") if file.is_file()
    )
    for quoted in re.findall(r"`([^`\n]+)`", prose_of(text_of(name))):
        if used := re.match(r"xlc\.(\w+)", quoted):
            assert hasattr(xlc, used[1]), quoted
        if error := re.fullmatch(r"\w+Error", quoted):
            assert hasattr(xlc.errors, quoted) or error[0] in ("TorchRuntimeError",), quoted
        if A_PATH.fullmatch(quoted) and quoted not in OF_THE_USER:
            assert any((root / quoted).exists() for root in (ROOT, ROOT / "xpu_lora_compile")), quoted
        if variable := re.match(r"XPU_LORA_[A-Z]+", quoted):
            assert f'"{variable[0]}"' in everything, quoted


# Names of files that a reader has.
OF_THE_USER = ("my_script.py", "my_module.py")


# Links.

LINK = re.compile(r"\]\(([^)\s]+)\)")
LINKED = [*NAMES, "CONTRIBUTING.md", "CHANGELOG.md"]


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", LINKED)
def test_links_lead_to_a_file_and_a_heading(name: str) -> None:
    page = ROOT / name
    for link in LINK.findall(prose_of(page.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), f"{name}: {link}"
        assert not anchor or anchor in anchors_of(target), f"{name}: {link}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in LINK.findall(text_of("README.md"))}
    assert set(PAGES[1:]) <= linked


# Commands.

COMMAND = re.compile(
    r"(xpu-lora|python3? -m benchmarks\.\w+|python3? benchmarks/|python3? examples/|tox -e|pip install|'\.\[) ?.*"
)


def commands_of(name: str) -> list[str]:
    """The commands of a page: lines of its bash blocks, and quotations in its prose."""
    text = text_of(name)
    lines = []
    for block in blocks_of(text):
        if block.language == "bash":
            lines += block.code.replace("\\\n", " ").splitlines()
    lines += re.findall(r"`([^`\n]+)`", prose_of(text))
    parts = [part.strip() for line in lines for part in re.split(r"&&|  +#| # ", line)]
    return [found[0] for part in parts if (found := COMMAND.search(part))]


@pytest.mark.parametrize("name", [name for name in LINKED if commands_of(name)])
def test_commands_exist(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in commands_of(name):
        check_command(command, monkeypatch)


def check_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command)
    if words[0] == "xpu-lora":
        check_xpu_lora(words[1:])
    elif words[0].startswith("python") and words[1] == "-m":
        check_benchmark(words[2], words[3:], monkeypatch)
    elif words[0].startswith("python"):
        assert (ROOT / words[1]).is_file(), command
    elif words[0] == "tox":
        assert f"[tool.tox.env.{words[2]}]" in text_of("pyproject.toml"), command
    else:
        for extras in re.findall(r"\[([\w,]+)\]", command):
            for extra in extras.split(","):
                assert re.search(rf"^{extra} = \[", text_of("pyproject.toml"), re.MULTILINE), command


def check_xpu_lora(words: list[str]) -> None:
    """Have the parser of the command line read the words. A command that lacks its arguments is the name of one."""
    command: Any = typer.main.get_command(cli.app)
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, f"xpu-lora has no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    if words:
        command.make_context(command.name, list(words))


class Parsed(Exception):  # noqa: N818 - no error
    """The arguments of a benchmark could be read."""


def check_benchmark(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the benchmark's own parser read the words, and stop there."""
    import argparse

    real = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, arguments: Any = None, namespace: Any = None) -> Any:
        real(self, arguments, namespace)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT), *sys.path])
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = importlib.import_module(f"{module}.__main__")
        with pytest.raises(Parsed):
            program.main(words)


# Size.


def test_the_readme_is_one_page() -> None:
    assert len(text_of("README.md").splitlines()) <= 120


@pytest.mark.parametrize("name", [*NAMES, "CONTRIBUTING.md"])
def test_lines_of_prose_are_short(name: str) -> None:
    for number, line in enumerate(prose_of(text_of(name)).splitlines(), 1):
        assert line.startswith("|") or len(line) <= 125, f"{name}:{number} has {len(line)} characters"
