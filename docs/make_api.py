"""Writes docs/api.md, the reference of the public names, from signatures and docstrings: python docs/make_api.py."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mergekit_bert as mb
from mergekit_bert import api

WIDTH = 110
PAGE = Path(__file__).with_name("api.md")
HEAD = """# The Python interface

Made by `python docs/make_api.py` from the docstrings of `mergekit_bert`, which the examples call `mb`. Calls return
objects, and write files only if you name one. A wrong argument raises an `MbertError` that names the parameter.

| in a signature | is |
|---|---|
| `Location` | a path, as `str` or `Path` |
| `Base` | the encoder: a name, a folder, or an `Encoder` |
| `AnyTask` | a task: its name, its YAML file, or a `Task` |
| `AnyModel` | an `Adapter`, `Merged`, `Ensemble` or `FullModel`, or its file or folder |
| `Answering` | the same, or a `Predictor` |
| `AnyComposition` | an `Adapter`, `Merged` or `Ensemble` |
| `AnyInput` | an input of a merge: a model, or its file or folder |

`data` is a folder, `"sample"`, `"synthetic"`, or rows: a list of tuples or of dicts, a dict of columns, a table of
pandas or `datasets`, `Rows`, or the path of a file; where there are several tasks, a dict of these by the tasks' names.
"""


def tree_of(thing: Any) -> Any:
    """The definition of a function or class, as it stands in its file."""
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(thing)))).body[0]


def text_of(docstring: str | None) -> str:
    """A docstring as Markdown."""
    text = inspect.cleandoc(docstring or "")
    text = re.sub(r":\w+:`~?([\w.]+\.)*(\w+)`", r"`\2`", text)
    return text.replace("``", "`")


def signature(name: str, node: ast.FunctionDef) -> str:
    """``name(…) -> …`` without ``self``, one argument a line where it is long."""
    given, returned = node.args, f" -> {ast.unparse(node.returns)}" if node.returns else ""
    before = [None] * (len(given.args) - len(given.defaults))
    places = [*zip(given.args, [*before, *given.defaults], strict=True)]
    found = [_argument(one, value) for one, value in places if one.arg not in ("self", "cls")]
    found += ["*"] if given.kwonlyargs else []
    found += [_argument(one, value) for one, value in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    found += [f"**{_argument(given.kwarg, None)}"] if given.kwarg else []
    line = f"{name}({', '.join(found)}){returned}".replace("'", "")
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {one}," for one in found), f"){returned}"]).replace("'", "")


def _argument(one: ast.arg, default: ast.expr | None) -> str:
    text = re.sub(r"InstanceOf\[([\w.]+)\]", r"\1", ast.unparse(one))
    if default is None:
        return text
    value = repr(getattr(api, default.id)) if isinstance(default, ast.Name) else ast.unparse(default)
    return f"{text} = {value}".replace("'", '"')


def fields_of(thing: Any) -> Iterator[str]:
    """The fields of a record: those with a help text as a table."""
    records = getattr(thing, "__dataclass_fields__", {})
    told = [one for one in records.values() if "help" in one.metadata]
    if told:
        yield "| option | default | |\n|---|---|---|"
        yield from (
            f"| `{one.name}` | {one.metadata['shown'] or one.default} | {one.metadata['help']} |" for one in told
        )
        yield ""
    elif records:
        yield f"Fields: {', '.join(f'`{name}`' for name in records)}.\n"


def methods_of(thing: type[Any]) -> Iterator[tuple[str, Any]]:
    """The public methods, inherited ones from this package included."""
    for name, member in inspect.getmembers(thing):
        function = member.fget if isinstance(member, property) else member
        ours = inspect.isfunction(function) and function.__module__.startswith(mb.__name__)
        if ours and not name.startswith("_"):
            yield name, member


def reference() -> str:
    """The whole page."""
    things = {name: getattr(mb, name) for name in mb.__all__}
    lines = [HEAD, "## Functions\n"]
    for name, thing in things.items():
        if not inspect.isclass(thing):
            lines += [f"### `{name}`\n", f"```python\n{signature(f'mb.{name}', tree_of(thing))}\n```\n"]
            lines += [text_of(thing.__doc__), ""]
    lines.append("## Classes\n")
    for name, thing in things.items():
        if inspect.isclass(thing):
            lines += [f"### `{name}`\n", text_of(thing.__doc__), "", *fields_of(thing)]
            for method, member in methods_of(thing):
                if isinstance(member, property):
                    lines.append(f"- `{method}`: {_first(member.fget)}")
                else:
                    lines.append(f"- `{' '.join(signature(method, tree_of(member)).split())}`: {_first(member)}")
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _first(function: Any) -> str:
    """The first paragraph of its docstring, on one line."""
    return " ".join(text_of(function.__doc__).split("\n\n")[0].split())


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
