"""What README.md and docs/ name exists: links, files, functions, commands. That their blocks run: test_docs_blocks.py."""

from __future__ import annotations

import ast
import importlib.util
import re

import pytest
from pages import PAGES, README, ROOT, named, of_the_site

import case_fast.models
from case_fast import cli

IN_THE_TREE = ("case_fast", "csrc", "benchmarks", "python_tests", "docs")

of_each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_the_readme_is_one_screen_and_its_picture_small():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 100
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README.read_text(encoding="utf-8"))
    assert len(pictures) == 1 and (ROOT / pictures[0]).stat().st_size <= 200_000


def test_the_readme_and_its_picture_show_the_stored_results():
    spec = importlib.util.spec_from_file_location("speed", ROOT / "docs" / "speed.py")
    speed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(speed)
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+ ms) \|$", README.read_text(encoding="utf-8"), re.MULTILINE))
    assert rows == {
        family: f"{words} | {speed.time(line['ours_ms'])} | {speed.time(line['best_peer_ms'])}"
        for family, lines in speed.measured("xeon")[0].items()
        for case, words in [speed.NAMED[family]]
        for line in lines if line["case"] == case
    }


@of_each_page
def test_every_link_of_a_page_leads_to_a_file(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert page != README or links
    missing = [link for link in links if not (page.parent / link.partition("#")[0]).exists()]
    assert not missing


def test_the_readme_leads_to_every_page():
    links = set(re.findall(r"\]\(([^)\s]+)\)", README.read_text(encoding="utf-8")))
    assert {f"docs/{page.name}" for page in PAGES[1:] if not of_the_site(page)} | {"docs/index.md"} <= links


@of_each_page
def test_every_path_that_a_page_names_exists(page):
    path = re.compile(rf"(?<![\w/.-])(?:{'|'.join(IN_THE_TREE)})/[\w./-]*\w")
    found = {found for code in named(page) for found in path.findall(code)}
    any_one = re.compile("FAMILY|MACHINE|NAME")  # of a path such as csrc/FAMILY/cpu.cpp one at least must be there
    assert not [name for name in sorted(found) if not any(ROOT.glob(any_one.sub("*", name)))]
    modules = {found for code in named(page) for found in re.findall(r"python -m ((?:python_tests|benchmarks)[\w.]+)", code)}
    assert not [name for name in sorted(modules) if not (ROOT / (name.replace(".", "/") + ".py")).is_file()]


@of_each_page
def test_every_name_of_the_package_that_a_page_names_is_there(page):
    for name in sorted({name for code in named(page) for name in re.findall(r"\bcase_fast(?:\.\w+)+", code)}):
        if name == "case_fast._native":  # left out by CASE_FAST_NATIVE=0
            continue
        value = case_fast
        for part in name.split(".")[1:]:
            if not hasattr(value, part):
                importlib.import_module(f"{value.__name__}.{part}")
            value = getattr(value, part)


@of_each_page
def test_every_command_and_option_that_a_page_names_is_there(page, capsys):
    for code in named(page):
        for command, words in re.findall(r"\bcase-fast ([a-z][a-z-]*)(.*)", code):
            assert command in cli._COMMANDS, code
            with pytest.raises(SystemExit):
                cli.main([command, "--help"])
            explained = capsys.readouterr().out
            for option in re.findall(r"--[a-z][\w.-]*", words):
                assert cli._underscored(option) in explained, f"case-fast {command} has no {option}"
            assert set(re.findall(r"--model ([\w-]+)", words)) <= set(case_fast.models.MODELS)


@of_each_page
def test_no_page_holds_a_path_of_a_machine(page):
    foreign = r"(?<![\w.:/])/(?:home|root|work|tmp|mnt|Users)\b|\.\./(?:data|paper|shared)\b"
    assert not re.findall(foreign, page.read_text(encoding="utf-8"))


def test_each_function_of_the_equations_is_in_the_file_beside_it():
    text = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    table = text.partition("## Equation, function, file")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 17
    for equation, functions, file, *_ in rows:
        body = ast.parse((ROOT / file.strip("`")).read_text(encoding="utf-8")).body
        defined = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert set(re.findall(r"`(\w+)", functions)) <= defined, equation
