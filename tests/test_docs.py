"""The examples of the README and of docstrings run; nothing is undocumented."""

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from backends import ON_TENSORFLOW

import keras_fa

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^([ ]*)```python\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


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
    texts = [("README.md", (ROOT / "README.md").read_text("utf-8"))]
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
    monkeypatch.chdir(tmp_path)  # what an example writes
    code = compile(EXAMPLES[name], name, "exec")
    exec(code, {"__name__": "__main__"})


def test_examples_were_found() -> None:
    assert any(name.startswith("README.md") for name in EXAMPLES)
    assert any(name.startswith("keras_fa.conversion") for name in EXAMPLES)
    assert len(EXAMPLES) > 25


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
