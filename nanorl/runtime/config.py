"""`--name=value` over the constants at the top of a script.

A script writes its settings as plain constants, each with a comment, and calls
`configure(globals())` once:

    steps = 200  # optimizer steps

`--steps=50` then sets it, `--help` shows it with its comment, and `--stpes=50` is refused with the
near misses named. A value has the type of its default. A bare --flag means true. Nothing is
executed.
"""

import ast
import difflib
import io
import os
import sys
import tokenize

from nanorl.runtime import from_trl

# Constants that had another name -> what to tell who uses it.
RENAMED = {"run": "it is --run_name now, because torchrun takes --run for its own --run-path"}

BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


# ---- a script's constants ------------------------------------------------------------------------


def read_constants(source):
    """A script's source -> {name: (default, comment, heading)} of its constants.

    A constant is a line `name = literal  # comment` at the top level, before the first function or
    class. Names in capitals are none. A line `# ---- heading` groups what follows.
    """
    comments, headings = _comments(source)
    constants = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            break
        if not isinstance(node, ast.Assign):
            continue
        target = node.targets[0]
        if not isinstance(target, ast.Name) or target.id.isupper():
            continue
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            continue  # not a literal
        if not isinstance(default, (bool, int, float, str)):
            continue

        # The heading is the last one above the line.
        above = [line for line in headings if line < node.lineno]
        heading = headings[max(above)] if above else ""
        constants[target.id] = (default, comments.get(node.lineno, ""), heading)
    return constants


def _comments(source):
    """A source -> its comments and its headings, both {line number: text}."""
    comments, headings = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, column = token.start
        text = token.string.lstrip("# ").rstrip("- ").lstrip("- ")
        if column == 0 and token.string.startswith("# --"):
            headings[line] = text
        else:
            comments[line] = text
    return comments, headings


# ---- the command line ----------------------------------------------------------------------------


def configure(namespace, argv=None, refused=None):
    """Apply the command line to a script's globals, `namespace` -> {name: resolved value}.

    argv: the arguments, by default those of this process.
    refused: {name: why there is no such constant}.

    Exits with one line for an unknown name or a value of another type, and after --help.
    """
    with open(namespace["__file__"], encoding="utf-8") as f:
        constants = read_constants(f.read())
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(_help(namespace, constants))
        raise SystemExit(0)

    for argument in argv:
        name, equals, text = _split(argument)
        if not argument.startswith("--"):
            raise SystemExit(f"{argument}: settings are written --name=value (--help lists them)")
        if name not in constants:
            raise SystemExit(f"--{name}: no such constant: {_hint(name, constants, refused or {})}")
        default, _, _ = constants[name]
        if not equals:
            # Only a constant that is true or false may come without a value.
            if not isinstance(default, bool):
                raise SystemExit(f"--{name} needs a value: --{name}={default or '...'}")
            text = "true"
        namespace[name] = _parse(name, text, default)
    return {name: namespace[name] for name in constants}


def given(argv=None):
    """Names of the constants that the command line sets."""
    argv = sys.argv[1:] if argv is None else argv
    names = set()
    for argument in argv:
        name, _, _ = _split(argument)
        names.add(name)
    return names


def _split(argument):
    """--name=text -> (name, "=", text). Without a value the last two are empty."""
    name, equals, text = argument.removeprefix("--").partition("=")
    return name.replace("-", "_"), equals, text


def _hint(name, constants, refused):
    """What to tell a user who sets a constant that there is not."""
    reason = refused.get(name) or RENAMED.get(name) or from_trl.hint(name, constants)
    if reason:
        return reason
    near = difflib.get_close_matches(name, constants, n=3, cutoff=0.5)
    if near:
        return f"did you mean --{', --'.join(near)}?"
    return "--help lists the constants"


def _parse(name, text, default):
    """The value of constant `name` that `text` stands for, in the type of its default."""
    try:
        if isinstance(default, bool):
            return BOOLEANS[text.lower()]
        if isinstance(default, int):
            return int(text.replace("_", ""))
        if isinstance(default, float):
            return float(text)
        return os.path.expanduser(text)  # the shell leaves the ~ of --model=~/models as it is
    except (ValueError, KeyError):
        kind = {bool: "true or false", int: "a whole number", float: "a number"}[type(default)]
        raise SystemExit(f"--{name}={text}: {name} takes {kind} (default {default})") from None


def _help(namespace, constants):
    """The script's docstring, and below it a line a constant, grouped by their headings."""
    lines = [(namespace.get("__doc__") or "").strip()]
    settings = {name: f"--{name}={default}" for name, (default, _, _) in constants.items()}
    width = max(map(len, settings.values()))
    current = None
    for name, (_, comment, heading) in constants.items():
        if heading != current:
            current = heading
            lines.append(f"\n{heading}")
        lines.append(f"  {settings[name]:<{width}}  {comment}")
    return "\n".join(lines)


# ---- checks of values ----------------------------------------------------------------------------


def at_least(namespace, low, names):
    """Exit with one line where a constant is below `low` or not finite.

    names: of the constants, separated by spaces.
    """
    for name in names.split():
        if not low <= namespace[name] < float("inf"):
            raise SystemExit(f"--{name}={namespace[name]}: it must be at least {low}")


def one_of(settings, name, choices):
    """Exit with one line where a constant is none of its choices."""
    if settings[name] not in choices:
        raise SystemExit(f"--{name}={settings[name]}: it must be one of {', '.join(choices)}")
