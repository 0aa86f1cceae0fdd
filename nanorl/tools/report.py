"""A run as one page to look at: `python -m nanorl.tools.report out/quickstart`.

Writes report.html into the run's folder: one file that opens without a server and without a
network. Several runs are laid over one another; that page is compare.html, in the first one's
folder. --text draws the same in the terminal, --png and --svg the headline chart, light and dark.
"""

import argparse
import os
import sys

from nanorl.report import gather, page, text
from nanorl.runtime.log import size
from nanorl.tools import figure


def arguments(given):
    parser = argparse.ArgumentParser(prog="python -m nanorl.tools.report")
    parser.add_argument("runs", nargs="+", help="folders of runs, such as out/d4, or out/d4/rl")
    parser.add_argument("--out", default="", help="write the page, or the pictures, here instead")
    parser.add_argument("--text", action="store_true", help="draw in the terminal")
    parser.add_argument("--png", action="store_true", help="the headline chart, light and dark")
    parser.add_argument("--svg", action="store_true", help="the same as SVG")
    return parser.parse_args(given)


def say(paths):
    """Draw some runs in the terminal."""
    runs = [gather.run(path) for path in paths]
    lines = []
    for run in runs:
        lines += [*text.report(run), ""]
    if len(runs) > 1:
        lines += text.comparison(runs)
    encoding = sys.stdout.encoding or "utf-8"
    print("\n".join(lines).rstrip().encode(encoding, "replace").decode(encoding))


def draw(path, kinds, out):
    """Save the headline chart of a run, light and dark, in files of some kinds."""
    run = gather.run(path)
    stem = os.path.splitext(out)[0] if out else os.path.join(run["folder"], "report")
    for kind in kinds:
        for theme in figure.THEMES:
            file = f"{stem}-{theme}.{kind}"
            figure.save(run, file, theme)
            print(f"wrote {file}")


def write(paths, out):
    """Write the page of some runs."""
    first = gather.run(paths[0])
    file = page.file_of(first["folder"], first["about"]["name"])
    if len(paths) > 1:
        file = os.path.join(first["folder"], "compare.html")
    file = out or file
    written = page.write(paths, file)
    print(f"wrote {file} ({size(written)}): open it in a browser")


def main(given=None):
    options = arguments(given)
    kinds = [kind for kind in ("png", "svg") if getattr(options, kind)]
    try:
        if options.text:
            say(options.runs)
        elif kinds:
            for path in options.runs:
                draw(path, kinds, options.out)
        else:
            write(options.runs, options.out)
    except BrokenPipeError:
        sys.exit(141)  # the reader of the output, such as head, has gone
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
