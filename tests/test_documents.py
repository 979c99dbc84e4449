"""The documents are true: their examples run, and the commands, paths and tests they name exist.

Rules for whoever writes them. The `python` blocks of a page run from its top to its end, in one
namespace and in an empty folder, so that a later block may continue an earlier one; those of
`docs/distributed.md` run in two processes. The commands of
`bash` blocks, and of code inside of sentences, are not run but read: options, targets, subcommands
and paths have to exist. A script of the reader's own is named without a folder (`train.py`).
Messages in a table that is headed `message` are the code's, with `…` for what it fills in.
"""

import ast
import configparser
import importlib.util
import inspect
import re
import shlex
import string
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from common.arguments import read_yaml
from trainer.processes import all_ranks_finished, execute, torchrun
from transformers import HfArgumentParser

from hf_sophia.estimators import LIKELIHOODS
from hf_sophia.optim import OPTIMIZERS
from hf_sophia.run import command as hf_sophia_command
from hf_sophia.trainer.options import OPTION_TABLES, parse_optim_args

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", *PAGES]

#: What a path of the repository begins with.
FOLDERS = ("hf_sophia", "recipes", "tests", "docs", "benchmarks")

#: Libraries whose examples are left out where they are not installed.
OPTIONAL = ("trl", "peft")


def name_of(value: Any) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value)


def blocks(document: Path, language: str) -> list[tuple[int, str]]:
    """Return each fenced block of a language, with the lines above its first one."""
    text = document.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


def sentences(document: Path) -> str:
    """Return a page without its fenced blocks."""
    text = document.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def code_in_sentences(document: Path) -> list[str]:
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", sentences(document))
    return [" ".join(span.split()) for span in spans]


def run_page(document: Path) -> dict[str, Any]:
    """Run the Python blocks of a page and return its namespace; tables are put back after it."""
    namespace: dict[str, Any] = {"__name__": "document"}
    with ExitStack() as kept:
        for table in (OPTIMIZERS, OPTION_TABLES, LIKELIHOODS):
            kept.enter_context(patch.dict(table))
        for line, block in blocks(document, "python"):
            wanted = re.findall(r"^(?:from|import) (\w+)", block, flags=re.MULTILINE)
            if any(importlib.util.find_spec(lib) is None for lib in {*OPTIONAL} & {*wanted}):
                continue
            # Empty lines above it, so that a traceback names the document's own.
            exec(compile("\n" * line + block, document, "exec"), namespace)
    return namespace


DISTRIBUTED = ROOT / "docs/distributed.md"
WITH_EXAMPLES = [d for d in DOCUMENTS if blocks(d, "python") and d != DISTRIBUTED]


def test_the_readme_and_the_guides_have_examples() -> None:
    assert len(blocks(ROOT / "README.md", "python")) >= 2
    guides = {"mathematics.md", "trainer.md", "extending.md"}
    assert guides <= {document.name for document in WITH_EXAMPLES}


@pytest.mark.parametrize("document", WITH_EXAMPLES, ids=name_of)
def test_the_examples_of_a_page_run(document, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_page(document)


@pytest.mark.distributed
def test_the_examples_for_several_processes_run(tmp_path) -> None:
    script = tmp_path / "loops.py"
    script.write_text("\n".join(block for _, block in blocks(DISTRIBUTED, "python")))
    result = execute([*torchrun(2), script], cwd=tmp_path)
    assert all_ranks_finished(result), result.stderr


def test_the_worked_optimizer_keeps_the_contract(tmp_path, monkeypatch) -> None:
    """What `docs/extending.md` builds passes what every optimizer of the table passes."""
    monkeypatch.chdir(tmp_path)
    worked = run_page(ROOT / "docs/extending.md")["SoftLion"]
    path = ROOT / "tests/optim/test_contract.py"
    spec = importlib.util.spec_from_file_location("contract_of_the_documents", path)
    contract = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(contract)
    monkeypatch.setitem(OPTIMIZERS, "soft_lion", worked)
    parameters = list(inspect.signature(worked).parameters.values())[1:]
    contract.SPECIFIED["soft_lion"] = {p.name: p.default for p in parameters}
    promises = [
        test
        for name, test in vars(contract).items()
        if name.startswith("test_") and [*inspect.signature(test).parameters] == ["name"]
    ]
    assert len(promises) >= 10
    for promise in promises:
        promise("soft_lion")
    for options, message in contract.BAD_OPTIONS:
        contract.test_bad_options_name_the_value("soft_lion", options, message)


# Commands


def commands(document: Path) -> Iterator[tuple[str, list[str]]]:
    """Every command of a page: where it stands, and its words."""
    variables: dict[str, str] = {}
    for line, block in blocks(document, "bash"):
        joined = block.replace("\\\n", " ")
        for text in joined.splitlines():
            expanded = string.Template(text).safe_substitute(variables)
            words = shlex.split(expanded, comments=True)
            if len(words) == 1 and (given := re.fullmatch(r"(\w+)=(.*)", words[0])):
                variables[given[1]] = given[2]
            elif words:
                yield f"{name_of(document)}:{line}", words
    for span in code_in_sentences(document):
        if re.match(rf"(\w+=\S* )*({'|'.join(CHECKS)}) ", span):
            yield name_of(document), shlex.split(span)


def check_hf(words: list[str]) -> None:
    program = Path(sys.executable).with_name("hf")
    told = subprocess.run([program, *words, "--help"], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE)
    target, *rest = words
    assert target in targets, f"no target {target}; there are {targets}"
    for word in rest:
        name, equals, value = word.partition("=")
        assert equals, f"{word}: one target at a time"
        assert re.search(rf"^{name} \?=", makefile, flags=re.MULTILINE), f"no variable {name}"
        if (target, name) == ("demo", "ARGS"):
            check_script(["recipes/pretrain_gpt2.py", *shlex.split(value)])


def check_python(words: list[str]) -> None:
    if words[0] != "-m":
        return check_script(words)
    module, *rest = words[1:]
    if module == "hf_sophia.run":
        return check_script(rest)
    assert module in ("pytest", "venv"), f"no check of python -m {module}"
    return check_paths(rest)


def check_launcher(words: list[str]) -> None:
    """`torchrun` and `accelerate launch`: options of theirs, then a script or `-m` and a module."""
    for index, word in enumerate(words):
        if word == "-m" or word.endswith(".py"):
            return check_python(words[index:])
    return None


def check_hf_sophia(words: list[str]) -> None:
    subcommand, *rest = words
    assert subcommand in subcommands(), f"hf-sophia has no subcommand {subcommand}"
    if subcommand == "doctor":
        while rest and rest[0].startswith("--"):
            check_named_in(ROOT / "hf_sophia/doctor.py", rest[:1])
            rest = rest[2:]
    if subcommand in ("run", "doctor"):
        check_script(rest)


def check_pip(words: list[str]) -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert words[0] == "install"
    for word in words[1:]:
        for extra in (re.search(r"(?:^\.|hf_sophia)\[([\w,-]+)\]", word) or ["", ""])[1].split(","):
            assert extra in ("", *config["options.extras_require"]), f"no extra {extra}"


CHECKS = {
    "make": check_make,
    "python": check_python,
    "python3": check_python,
    "pytest": lambda words: check_paths(words),
    "torchrun": check_launcher,
    "accelerate": check_launcher,
    "hf-sophia": check_hf_sophia,
    "hf": check_hf,
    "pip": check_pip,
    "git": lambda words: None,
    "cd": lambda words: None,
    "export": lambda words: None,
}


def subcommands() -> list[str]:
    """What the console command's own help lists."""
    with patch("builtins.print") as printed, pytest.raises(SystemExit):
        hf_sophia_command(["--help"])
    found = re.findall(r"hf-sophia (\w+)", printed.call_args.args[0])
    assert {"run", "doctor"} <= {*found}
    return found


def check_script(words: list[str]) -> None:
    """Check the options of a script of this repository; of a reader's own, those of optimizers."""
    if not words:
        return
    script, *arguments = (word for word in words if word != "...")
    path = ROOT / script
    optim, optim_args = option(arguments, "--optim"), option(arguments, "--optim_args")
    if "/" in script:
        assert path.is_file(), f"{script} does not exist"
        check_paths(arguments)
        if path.parent == ROOT / "recipes" and hasattr(import_module(path.stem), "ARGUMENTS"):
            trained_with = check_recipe(path.stem, arguments)
            optim = optim or trained_with
        else:
            check_named_in(path, [word for word in arguments if word.startswith("--")])
    if optim_args and (optim or "sophia") in OPTION_TABLES:
        parse_optim_args(optim or "sophia", optim_args)


def option(arguments: list[str], name: str) -> str | None:
    for index, word in enumerate(arguments):
        if word == name:
            return arguments[index + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def check_recipe(name: str, arguments: list[str]) -> str:
    """Parse a recipe's command line as it would; return the optimizer that it trains with."""
    recipe = import_module(name)
    parser = HfArgumentParser(recipe.ARGUMENTS, allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=recipe.CONFIG)
    parsed = parser.parse_args([word for word in arguments if word != "--help"])
    return read_yaml(ROOT / parsed.config)["optim"]


def check_named_in(path: Path, options: list[str]) -> None:
    text = path.read_text(encoding="utf-8")
    for word in options:
        assert f'"{word.partition("=")[0]}"' in text, f"{path.name} has no option {word}"


def check_paths(words: list[str]) -> None:
    for word, before in zip(words, ["", *words], strict=False):
        value = word.partition("=")[2] if word.startswith("--") else word
        written = "--output" in word or before.startswith("--output")
        if value.startswith(tuple(f"{folder}/" for folder in FOLDERS)) and not written:
            assert (ROOT / value).exists(), f"{value} does not exist"


COMMANDS = [pytest.param(w, id=f"{p} {w[0]}") for d in DOCUMENTS for p, w in commands(d)]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_names_what_exists(words) -> None:
    while re.match(r"\w+=", words[0]):
        words = words[1:]
    program, *rest = words
    program = Path(program).name
    assert program in CHECKS, f"say how to check {program}"
    CHECKS[program](rest)


@pytest.mark.parametrize(
    "text",
    [
        "make dem",
        "make demo ARGS='--learning_rat 1'",
        "python recipes/pretrain.py",
        "python recipes/pretrain_gpt2.py --rho 1",
        "python recipes/pretrain_gpt2.py --learning_rate fast",
        "python recipes/pretrain_gpt2.py --optim_args rho=big",
        "torchrun --nproc_per_node 2 recipes/pretrain_gpt2.py --config recipes/configs/no.yaml",
        "python recipes/compare_optimizers.py benchmarks/studies/gpt2_1m_2k.yaml --process 2",
        "python -m hf_sophia.run train.py --optim sophia --optim_args gamma=1",
        "hf-sophia examine train.py",
        "hf-sophia doctor --adamw_lr 1e-3 train.py",
        "pip install '.[tests]'",
        "python -m pytest tests/optimizers",
        "curl example.org",
    ],
)
def test_a_command_that_is_wrong_is_found(text) -> None:
    with pytest.raises((AssertionError, SystemExit, OSError, ValueError, ModuleNotFoundError)):
        test_a_command_names_what_exists(shlex.split(text))


# Names


def test_the_readme_names_its_commands() -> None:
    named = {words[1] for _, words in commands(ROOT / "README.md") if words[0] == "make"}
    assert {"demo", "test"} <= named


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_and_paths_lead_somewhere(document) -> None:
    text = sentences(document)
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        page = (document.parent / path).resolve() if path else document
        assert page.exists(), target
        if anchor:
            assert anchor in anchors(page), target
    for span in code_in_sentences(document):
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./*-]*", span):
            assert any(ROOT.glob(span.rstrip("/"))), span


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_rows_of_a_table_have_as_many_cells_as_its_head(document) -> None:
    for table in re.findall(r"(?:^\|.*\n)+", sentences(document), flags=re.MULTILINE):
        cells = [len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()]
        assert len(set(cells)) == 1, table


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", sentences(page), flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_test_that_a_document_names_exists(document) -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    defined = set(re.findall(r"^def (test_\w+)", "\n".join(sources), flags=re.MULTILINE))
    named = {span for span in code_in_sentences(document) if re.fullmatch(r"test_\w+", span)}
    assert named <= defined, named - defined
    # What a page says of behaviour has to be shown.
    assert named or document not in PAGES


def test_every_option_is_explained() -> None:
    named = set(code_in_sentences(ROOT / "docs/trainer.md"))
    for name, table in OPTION_TABLES.items():
        assert table.parsers.keys() <= named, name


def test_every_option_in_a_sentence_exists() -> None:
    """Of recipes, of the doctor and of benchmarks; launchers' stand in whole commands."""
    recipes = [import_module(path.stem) for path in (ROOT / "recipes").glob("*.py")]
    known = {"--config", "--help"}
    for recipe in recipes:
        parser = HfArgumentParser(getattr(recipe, "ARGUMENTS", ()), allow_abbrev=False)
        known |= {name for action in parser._actions for name in action.option_strings}
    sources = [ROOT / "hf_sophia/doctor.py", *(ROOT / "benchmarks").glob("*.py")]
    for path in [*sources, ROOT / "recipes/compare_optimizers.py"]:
        known |= set(re.findall(r'"(--[\w-]+)"', path.read_text(encoding="utf-8")))
    for document in DOCUMENTS:
        for span in code_in_sentences(document):
            if span.startswith("--"):
                assert re.match(r"[\w-]+", span)[0] in known, (name_of(document), span)


def messages_of_the_code() -> list[str]:
    """Every text of the package, with `…` for what an f-string fills in."""
    found = []
    for path in (ROOT / "hf_sophia").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = node.values
                found.append(
                    "".join(p.value if isinstance(p, ast.Constant) else "…" for p in parts)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%(\.\d)?[sdg]", "…", node.value))
    return found


def quoted_messages(document: Path) -> list[str]:
    tables = re.findall(r"^\| message \|.*\n\|[-|]+\n((?:\|.*\n)+)", sentences(document), re.M)
    rows = [row for table in tables for row in table.splitlines()]
    return [re.match(r"\| `([^`]+)`", row)[1] for row in rows]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_quoted_messages_are_the_codes(document) -> None:
    known = messages_of_the_code()
    for message in quoted_messages(document):
        pattern = re.compile(".*".join(map(re.escape, message.split("…"))))
        assert any(pattern.search(text) for text in known), message
    assert quoted_messages(document) or document.name != "trainer.md"
