"""`--name=value` over the constants at the top of a script.

A script writes its settings as plain constants, each with a comment, and calls `configure(globals())` once:

    steps = 200  # optimizer steps

`--steps=50` then sets it, `--help` shows it with its comment, `--stpes=50` is refused with the near misses named.
A value has the type of its default; a bare --flag means true. Nothing is executed."""

import ast
import difflib
import io
import sys
import tokenize


def read_constants(source):
    """The source's top-level `name = literal  # comment` lines up to its first function or class, but for names in capitals
    -> {name: (default, comment, heading)}; a `# ---- heading` line groups what follows."""
    comments, headings = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ").rstrip("- ")
            (headings if token.start[1] == 0 and token.string.startswith("# --") else comments)[
                token.start[0]
            ] = text.lstrip("- ")
    constants = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            break
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and not node.targets[0].id.isupper()
        ):
            try:
                value = ast.literal_eval(node.value)
            except ValueError:
                continue
            if isinstance(value, (bool, int, float, str)):
                above = [line for line in headings if line < node.lineno]
                constants[node.targets[0].id] = (
                    value,
                    comments.get(node.lineno, ""),
                    headings[max(above)] if above else "",
                )
    return constants


def _parse(name, text, default):
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
                text.lower()
            ]
        if isinstance(default, int):
            return int(text.replace("_", ""))
        if isinstance(default, float):
            return float(text)
        return text
    except (ValueError, KeyError):
        kind = {bool: "true or false", int: "a whole number", float: "a number"}[type(default)]
        raise SystemExit(f"--{name}={text}: {name} takes {kind} (default {default})") from None


# Constants that had another name.
RENAMED = {"run": "it is --run_name now, because torchrun takes --run for its own --run-path"}


def configure(namespace, argv=None, refused={}):
    """Apply the command line to the script whose globals() are `namespace`. Returns {name: resolved value}.
    Exits with one line for an unknown name or an ill-typed value, and after --help. refused: {name: why it does not exist}."""
    with open(namespace["__file__"], encoding="utf-8") as f:
        constants = read_constants(f.read())
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(_help(namespace, constants))
        raise SystemExit(0)
    for argument in argv:
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            raise SystemExit(f"{argument}: settings are written --name=value (--help lists them)")
        name = name.replace("-", "_")
        if name not in constants:
            near = difflib.get_close_matches(name, constants, n=3, cutoff=0.5)
            hint = (
                refused.get(name)
                or RENAMED.get(name)
                or (
                    f"did you mean --{', --'.join(near)}?" if near else "--help lists the constants"
                )
            )
            raise SystemExit(f"--{name}: no such constant: {hint}")
        if not equals and not isinstance(constants[name][0], bool):
            raise SystemExit(f"--{name} needs a value: --{name}={constants[name][0] or '...'}")
        namespace[name] = _parse(name, text if equals else "true", constants[name][0])
    return {name: namespace[name] for name in constants}


def given(argv=None):
    """Names of the constants that the command line sets."""
    return {
        argument.removeprefix("--").partition("=")[0].replace("-", "_")
        for argument in (sys.argv[1:] if argv is None else argv)
    }


def at_least(namespace, low, names):
    """Refuse constants (names separated by spaces) that are below `low` or not finite, with the value and the remedy."""
    for name in names.split():
        if not low <= namespace[name] < float("inf"):
            raise SystemExit(f"--{name}={namespace[name]}: it must be at least {low}")


def one_of(settings, name, choices):
    """Refuse a constant that is none of its choices."""
    if settings[name] not in choices:
        raise SystemExit(f"--{name}={settings[name]}: it must be one of {', '.join(choices)}")


def _help(namespace, constants):
    lines, heading = [(namespace.get("__doc__") or "").strip()], None
    width = max(len(f"--{name}={default}") for name, (default, _, _) in constants.items())
    for name, (default, comment, above) in constants.items():
        if above != heading:
            heading = above
            lines.append(f"\n{heading}")
        lines.append(f"  {f'--{name}={default}':<{width}}  {comment}")
    return "\n".join(lines)
