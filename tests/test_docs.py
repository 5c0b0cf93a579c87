"""Examples of READMEs, notebooks and docstrings run; all is documented."""

import ast
import importlib
import inspect
import json
import pkgutil
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from backends import ON_JAX
from backends import ON_TENSORFLOW

import keras_fa

ROOT = Path(__file__).resolve().parents[1]
READMES = (
    "README.md",
    "keras_fa/README.md",
    "train/README.md",
    "train/results/README.md",
)
PAGES = (*READMES, "CHANGELOG.md", "train/results/NOTES.md")
NOTEBOOKS = sorted((ROOT / "train" / "notebooks").glob("*.ipynb"))
# What makes a notebook long, and what is run in its place: all of its lines.
SHORTER = {
    "first_steps": {"EPOCHS = 30": "EPOCHS = 2"},
    "own_rule": {
        "epochs=20": "epochs=2",
        "STEPS, DECAY = 600": "STEPS, DECAY = 20",
    },
}
FENCE = re.compile(r"^([ ]*)```python\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FLAGFILE = re.compile(r"--flagfile=(\w+\.flags)")
COMMAND = re.compile(r"python (train/\w+\.py)(.*)")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def page(name: str) -> str:
    """The text of a page, by its path from the root."""
    return (ROOT / name).read_text("utf-8")


def anchors(text: str) -> set[str]:
    """What links to the headings of a page end in, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub(_unfenced, text), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    }


def _unfenced(code: re.Match) -> str:
    return "" if code[0].startswith("```") else code[0]


def fences(text: str) -> list[str]:
    """The code of all python fences in a text, without its indentation."""
    return [textwrap.dedent(code) for _, code in FENCE.findall(text)]


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Qualified name and docstring of all that has one in a source file."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)

    def walk(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node):
            yield name, ast.get_docstring(node)
        for child in ast.iter_child_nodes(node):
            inner = getattr(child, "name", None)
            yield from walk(child, f"{name}.{inner}" if inner else name)

    yield from walk(ast.parse(path.read_text("utf-8")), module)


def examples() -> dict[str, str]:
    """All examples by the name of where they stand."""
    texts = [(name, page(name)) for name in READMES]
    for folder in ("keras_fa", "train"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            texts += docstrings(path)
    return {
        f"{name}:{index}": code
        for name, text in texts
        for index, code in enumerate(fences(text))
    }


EXAMPLES = examples()


def modules() -> list[ModuleType]:
    """The package and all of its modules but those of other backends."""
    names = [
        found.name
        for found in pkgutil.walk_packages(keras_fa.__path__, "keras_fa.")
        if not found.name.startswith("keras_fa._")
    ]
    return [keras_fa, *map(importlib.import_module, names)]


def public() -> dict[str, object]:
    """Public classes, functions and methods of their own, by name."""
    found = {}
    for module in modules():
        found[module.__name__] = module
        for name, value in vars(module).items():
            ours = getattr(value, "__module__", None) == module.__name__
            if name.startswith("_") or not ours:
                continue
            if inspect.isclass(value) or inspect.isfunction(value):
                found[f"{module.__name__}.{name}"] = value
    return found


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "import tensorflow" in EXAMPLES[name] and not ON_TENSORFLOW:
        pytest.skip("an example of TensorFlow's own")
    if "keras import distribution" in EXAMPLES[name] and not ON_JAX:
        pytest.skip("an example of JAX's own")
    run([EXAMPLES[name]], name, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = json.loads(path.read_text("utf-8"))["cells"]
    codes = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    assert codes
    for long, short in SHORTER[path.stem].items():
        assert "".join(codes).count(long) == 1, long
        codes = [code.replace(long, short) for code in codes]
    run(codes, path.name, tmp_path, monkeypatch)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_was_executed(path: Path) -> None:
    """From the first cell to the last, without an error, with a figure."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in codes]
    assert counts == list(range(1, len(codes) + 1))
    outputs = [output for cell in codes for output in cell["outputs"]]
    assert all(output["output_type"] != "error" for output in outputs)
    assert any("image/png" in output.get("data", ()) for output in outputs)


def run(
    codes: list[str], name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs pieces of code, one after the other, in one namespace.

    Args:
        codes: The pieces.
        name: Where they stand.
        folder: The folder for what they write.
        monkeypatch: Pytest's.
    """
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    monkeypatch.chdir(folder)
    namespace = {"__name__": "__main__"}
    for code in codes:
        exec(compile(code, name, "exec"), namespace)
    plt.close("all")


def test_examples_were_found() -> None:
    assert any(name.startswith("README.md") for name in EXAMPLES)
    assert any(name.startswith("keras_fa/README.md") for name in EXAMPLES)
    assert any(name.startswith("keras_fa.conversion") for name in EXAMPLES)
    assert len(EXAMPLES) > 25
    assert len(NOTEBOOKS) == 2


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    links = LINK.findall(CODE.sub("", page(name)))
    for link in links:
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        found = (ROOT / name).parent / target if target else ROOT / name
        assert found.exists(), f"{name} links to {link}"
        if anchor:
            assert anchor in anchors(found.read_text("utf-8")), link


def test_reference_has_all_modules() -> None:
    lines = page("keras_fa/api.md").splitlines()
    for name in keras_fa.__all__:
        if inspect.ismodule(getattr(keras_fa, name)):
            assert f"::: keras_fa.{name}" in lines


@pytest.mark.parametrize("name", PAGES)
def test_flagfiles_exist(name: str) -> None:
    for flagfile in FLAGFILE.findall(page(name)):
        assert (ROOT / "train" / "flags" / flagfile).is_file(), flagfile


@pytest.mark.parametrize("name", PAGES)
def test_commands_have_flags_that_exist(name: str) -> None:
    sources = [p.read_text("utf-8") for p in (ROOT / "train").rglob("*.py")]
    for program, arguments in COMMAND.findall(page(name)):
        assert (ROOT / program).is_file(), program
        for flag in set(re.findall(r"--(\w+)", arguments)) - {"flagfile"}:
            spellings = {f'"{flag}"', f'"{flag.removeprefix("no")}"'}
            defined = any(s in source for source in sources for s in spellings)
            assert defined, f"{name}: {program} --{flag}"


def test_first_page_is_short_and_has_the_commands_of_ci() -> None:
    lines = page("README.md").splitlines()
    assert len(lines) <= 180
    (pattern,) = re.findall(r'grep "(\^python3 .*)"', page(".ci/run"))
    pattern = pattern.replace(r"\$", "$")
    for environment, end in (
        (".venv", " && .venv/bin/python -m pytest -n 2"),
        (".venv-jax", " && KERAS_BACKEND=jax .venv-jax/bin/pytest -n 2"),
        (".venv-torch", " && KERAS_BACKEND=torch .venv-torch/bin/pytest -n 2"),
    ):
        found = pattern.replace("$1", environment)
        (line,) = [line for line in lines if re.search(found, line)]
        assert line.endswith(end)


@pytest.mark.parametrize("name", public())
def test_public_names_are_documented(name: str) -> None:
    value = public()[name]
    own = (
        vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    )
    assert own, f"{name} has no docstring"


@pytest.mark.parametrize("module", modules(), ids=lambda m: m.__name__)
def test_all_names_what_exists(module: ModuleType) -> None:
    names = getattr(module, "__all__", [])
    assert len(set(names)) == len(names)
    assert all(hasattr(module, name) for name in names)


def test_layers_have_an_example_and_their_arguments() -> None:
    for name in keras_fa.layers.__all__:
        text = inspect.getdoc(getattr(keras_fa, name))
        assert fences(text), f"{name} has no example"
        for part in ("Args:", "Input and output", "Raises:", "Source:"):
            assert part in text, f"{name} does not say {part}"
