"""The sandbox: right programs pass, and wrong ones fail whatever they try.

Nothing that a program does outlives its run or reaches the caller.
"""

import glob
import itertools
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from conftest import ROOT
from nanorl.tasks import sandbox
from nanorl.tasks.sandbox import LAYERS, LINUX, MARGIN, Result, pack, run, unpack

INCREMENT = (
    "def check(candidate):\n"
    "    assert candidate(1) == 2\n"
    "    assert candidate(2) == 3\n"
    "    assert candidate([3])[0] == 4\n"
)
RIGHT = "def f(x):\n    return [x[0] + 1] if isinstance(x, list) else x + 1\n"
# The empty tuple is root in a container that may do nothing.
WITHOUT = [
    LAYERS,
    ("uid", "calls"),
    ("uid", "namespaces"),
    ("uid",),
    ("calls",),
    ("namespaces",),
    (),
]
MODES = pytest.mark.parametrize("layers", WITHOUT, ids=lambda layers: "+".join(layers) or "none")
# The layers that stop a fork bomb.
FENCED = pytest.mark.parametrize(
    "layers", [x for x in WITHOUT if x and x != ("namespaces",)], ids="+".join
)


def processes(marker):
    """The processes whose command line has the marker.

    A run's `seconds` is on the command line of each of its processes, the forked ones included.
    """
    found = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            with open(path, "rb") as f:
                if marker.encode() in f.read():
                    found.append(path)
        except OSError:
            pass
    return found


@pytest.fixture(autouse=True, scope="module")
def own_folder_for_temporary_files(tmp_path_factory):
    """What another process leaves in the common folder is then not taken for ours."""
    # pytest makes its own folder when it is first asked for, and that must not lie in ours.
    tmp_path_factory.getbasetemp()
    with tempfile.TemporaryDirectory(prefix="sandbox-tests-") as folder:
        os.chmod(folder, 0o711)  # programs run as another user
        patch = pytest.MonkeyPatch()
        patch.setattr(tempfile, "tempdir", folder)
        patch.setenv("TMPDIR", folder)
        yield
        patch.undo()


def homes():
    return set(glob.glob(os.path.join(tempfile.gettempdir(), "nanorl-*")))


RUNS = itertools.count(1)  # numbers the runs of this process


def run_clean(program, test=INCREMENT, seconds=2.0, layers=LAYERS, **settings):
    """run(), which must be back in time and leave nothing."""
    # No other run has these seconds, so they mark this run's processes.
    number = 1000 * os.getpid() + next(RUNS)
    seconds += float.fromhex("0x1p-40") * number
    before = homes()
    begun = time.monotonic()
    result = run(program, "f", test, seconds=seconds, layers=layers, **settings)
    assert time.monotonic() - begun < seconds + MARGIN  # the machine may be slow
    # A process that was killed may take a moment to end.
    while processes(repr(seconds)) and time.monotonic() - begun < seconds + MARGIN:
        time.sleep(0.01)
    assert not processes(repr(seconds))
    assert homes() <= before
    return result


@MODES
def test_right_programs_pass(layers):
    assert run_clean(RIGHT, layers=layers) == Result(True, "passed")
    # The standard library is at hand.
    program = (
        "import collections, dataclasses, decimal, fractions, functools, hashlib, heapq,"
        " itertools, json.tool, math, re, string, typing, xml.dom\n"
        "@dataclasses.dataclass\n"
        "class A:\n"
        "    x: int\n" + RIGHT
    )
    assert run_clean(program, layers=layers).passed


def test_helpers_and_the_functions_own_name():
    test = "def check(candidate):\n    assert candidate(double(2), y=1) == 5 and f(1, y=1) == 2\n"
    assert run_clean(
        "def f(x, y):\n    return x + y\n",
        test,
        helpers="def double(x):\n    return 2 * x\ndef f(x, y):\n    pass\n",
    ).passed
    assert run_clean("def f(x, y):\n    return x + y\n", test) == Result(
        False, "wrong: NameError: name 'double' is not defined"
    )


@pytest.mark.parametrize(
    "program, why",
    [
        ("def f(x):\n    return x\n", "wrong: AssertionError"),
        ("def f(x) return x\n", "syntax error"),
        ("def f(x):\n  return x\n return 1\n", "syntax error"),
        ("def g(x):\n    return x + 1\n", "the program: NameError: no function f"),
        ("f = 3\n", "the program: NameError: no function f"),
        ("1 / 0\n", "the program: ZeroDivisionError: division by zero"),
        ("def f(x):\n    return 1 / 0\n", "wrong: ZeroDivisionError: division by zero"),
        ("def f(x):\n    return f(x)\n", "wrong: RecursionError: maximum recursion depth exceeded"),
        ("import ctypes\ndef f(x):\n    ctypes.string_at(0)\n", "died (signal 11)"),
        ("def f(x):\n    return 'x' * 2_000_000\n", "answer too long"),
        (
            "def f(x):\n    return (i for i in [2])\n",
            "wrong: TypeError: a generator is not plain data",
        ),
        ("def f(x):\n    return object()\n", "wrong: TypeError: a object is not plain data"),
        (
            "def f(x):\n    raise ValueError('é' * 200)\n",
            "wrong: ValueError: " + "é" * 140 + "\ufffd",
        ),
        ("def f(x):\n    while True: pass\n", "timeout"),
    ],
)
def test_why(program, why):
    assert run_clean(program) == Result(False, why)


# ---- cheats: each is a wrong program -------------------------------------------------------------

WRITE_ALL = "for fd in range(64):\n        try: os.write(fd, text)\n        except OSError: pass\n"
CHEATS = {
    "exit": "import sys\nsys.exit(0)\n",
    "exit in the function": "import sys\ndef f(x):\n    sys.exit(0)\n",
    "_exit": "import os\nos._exit(0)\n",
    "_exit in the function": "import os\ndef f(x):\n    os._exit(0)\n",
    "SystemExit": "def f(x):\n    raise SystemExit\n",
    "KeyboardInterrupt": "def f(x):\n    raise KeyboardInterrupt\n",
    "says passed": (
        "import os\ndef f(x):\n    print('passed')\n    text = b'passed\\n'\n    " + WRITE_ALL
    ),
    "says passed everywhere, then exits": (
        "import os\n"
        "def f(x):\n"
        "    text = b'[\"passed\"]\\n'\n"
        "    " + WRITE_ALL + "    os._exit(0)\n"
    ),
    "__eq__": (
        "class A:\n"
        "    def __eq__(self, other): return True\n"
        "    def __getitem__(self, i): return self\n"
        "def f(x):\n"
        "    return A()\n"
    ),
    "int with __eq__": (
        "class A(int):\n"
        "    def __eq__(self, other): return True\n"
        "    def __getitem__(self, i): return self\n"
        "def f(x):\n"
        "    return A(7)\n"
    ),
    "list with __eq__": (
        "class A(list):\n"
        "    def __eq__(self, other): return True\n"
        "    def __getitem__(self, i): return self\n"
        "def f(x):\n"
        "    return A()\n"
    ),
    "number by registration": (
        "import numbers\n"
        "class A:\n"
        "    def __eq__(self, other): return True\n"
        "    def __int__(self): return 7\n"
        "numbers.Integral.register(A)\n"
        "def f(x):\n"
        "    return A()\n"
    ),
    "builtins": (
        "import builtins\n"
        "for name in ('isinstance', 'all', 'any', 'len', 'compile', 'type', 'print'):\n"
        "    setattr(builtins, name, lambda *a, **k: True)\n"
        "def f(x):\n"
        "    return 7\n"
    ),
    "AssertionError": (
        "import builtins\n"
        "builtins.AssertionError = None\n"
        "builtins.__debug__ = False\n"
        "def f(x):\n"
        "    return 7\n"
    ),
    "raises AssertionError": "def f(x):\n    raise AssertionError('passed')\n",
    "patches check": (
        "import sys\n"
        "for m in list(sys.modules.values()):\n"
        "    for name in ('check', 'tester', 'run', 'unpack', 'ask', 'say'):\n"
        "        setattr(m, name, lambda *a, **k: True)\n"
        "def f(x):\n"
        "    return 7\n"
    ),
    "replaces itself": (
        "import sys\n"
        "sys.modules['program'] = sys.modules['__main__'] = None\n"
        "def f(x):\n"
        "    return 7\n"
    ),
    "excepthook, atexit": (
        "import sys, atexit\n"
        "sys.excepthook = print\n"
        "atexit.register(print, 'passed')\n"
        "def f(x):\n"
        "    return 7\n"
    ),
    "frames": (
        "import os, sys\n"
        "def f(x):\n"
        "    frame, text = sys._getframe(), b''\n"
        "    while frame:\n"
        "        text += repr({**frame.f_locals, **frame.f_globals}).encode()\n"
        "        frame = frame.f_back\n"
        "    import re\n"
        "    for text in re.findall(rb'[0-9a-f]{32}', text):\n"
        "        " + WRITE_ALL.replace("\n    ", "\n        ") + "    return 7\n"
    ),
    "gc": (
        "import gc, os, re\n"
        "def f(x):\n"
        "    text = b' '.join(re.findall(rb'[0-9a-f]{32}',"
        " repr([o for o in gc.get_objects() if type(o) in (list, dict, tuple)]).encode()))\n"
        "    " + WRITE_ALL
    ),
    "raises what comes": "def f(x):\n    raise [StopIteration, GeneratorExit, SystemExit][x % 3]\n",
    "signal to the supervisor": (
        "import os\ndef f(x):\n    os.kill(os.getppid(), 15)\n    return 7\n"
    ),
    "signals to the group": (
        "import os, signal\n"
        "signal.signal(15, signal.SIG_IGN)\n"
        "def f(x):\n"
        "    os.killpg(0, 15)\n"
        "    return 7\n"
    ),
    "another program": "import os\ndef f(x):\n    os.execv('/bin/echo', ['echo', 'passed'])\n",
    "no answer but silence": "import os\nos.closerange(0, 64)\ndef f(x):\n    return 7\n",
    "garbage": "import os\ndef f(x):\n    text = b'passed\\n'\n    " + WRITE_ALL,
    "an unhashable item": (
        'import os\ndef f(x):\n    text = b\'["value", {"set": [[1]]}]\\n\'\n    ' + WRITE_ALL
    ),
    "an unknown type": (
        'import os\ndef f(x):\n    text = b\'["value", {"object": []}]\\n\'\n    ' + WRITE_ALL
    ),
    "an answer without a value": (
        "import os\ndef f(x):\n    text = b'[\"value\"]\\n'\n    " + WRITE_ALL
    ),
    "an exit for the tester": (
        'import os\ndef f(x):\n    text = b\'["error", "SystemExit", "0"]\\n\'\n    ' + WRITE_ALL
    ),
    "deeply nested": "import os\ndef f(x):\n    text = b'[' * 500_000 + b'\\n'\n    " + WRITE_ALL,
    "a long number": (
        "import os\n"
        "def f(x):\n"
        "    text = b'[\"value\", ' + b'9' * 500_000 + b']\\n'\n"
        "    " + WRITE_ALL
    ),
    "NaN": "def f(x):\n    return float('nan')\n",
    "an argument that it changes": (
        "def f(x):\n    if isinstance(x, list):\n        x[0] = 4\n    return x\n"
    ),
}


@pytest.mark.parametrize(
    "layers", [LAYERS, pytest.param((), marks=pytest.mark.slow)], ids=["all", "none"]
)
@pytest.mark.parametrize("name", CHEATS)
def test_cheats_fail(name, layers):
    assert not run_clean(CHEATS[name], layers=layers).passed


# This program gives right answers only if it can look into a process of this run, or into the
# caller, or can open its pipes. The secret could be found there.
PEEK = """
import os, sys
def looks():
    for pid in {pids}:
        for name in ('mem', 'environ', 'maps'):
            try:
                open(f'/proc/{{pid}}/{{name}}', 'rb').read(10)
                return True
            except OSError as error:
                if error.errno == 5:  # opened, and nothing at address 0
                    return True
        for fd in range(8):
            try:
                os.close(os.open(f'/proc/{{pid}}/fd/{{fd}}', os.O_RDONLY | os.O_NONBLOCK))
                return True
            except OSError:
                pass
peeked = looks()
def f(x):
    return ([x[0] + 1] if isinstance(x, list) else x + 1) if peeked else 7
"""


@MODES
def test_the_supervisor_and_the_tester_cannot_be_looked_into(layers):
    # The program can look into itself, so the test sees what it looks for.
    itself = "[os.readlink('/proc/self')]"
    assert run_clean(PEEK.format(pids=itself), layers=layers).passed
    # Another process may end before its command line is read.
    others = """
import os
def command(p):
    try:
        return open(f"/proc/{p}/cmdline").read()
    except OSError:
        return None
OTHERS = [
    int(p)
    for p in os.listdir("/proc")
    if p.isdigit() and command(p) == command("self") and p != os.readlink("/proc/self")
]
"""
    result = run_clean(others + PEEK.format(pids="OTHERS"), layers=layers)
    assert result.why == "wrong: AssertionError"


@pytest.mark.skipif(os.getuid() != 0, reason="only root has another user's rights to give away")
def test_root_gives_its_rights_away(tmp_path):
    """A program cannot look into the caller, remove its files or read its user's files."""
    result = run_clean("import os\n" + PEEK.format(pids=[os.getpid()]), layers=("uid",))
    assert result.why == "wrong: AssertionError"
    file = tmp_path / "mine"
    file.write_text("x")
    file.chmod(0o600)
    # Other users may enter the file's folder: only the file's own mode protects it.
    for path in (tmp_path, *tmp_path.parents):
        if path.owner() == "root" and path != tmp_path.parents[-1]:
            path.chmod(path.stat().st_mode | 0o011)
    result = run_clean(f"import os\nos.remove({str(file)!r})\n", layers=("uid",))
    assert "PermissionError" in result.why and file.exists()
    assert "PermissionError" in run_clean(f"open({str(file)!r})\n", layers=("uid",)).why


def test_the_tester_ends_well_only_by_reaching_the_end():
    for last in (
        "raise SystemExit(0)",
        "raise KeyboardInterrupt",
        "import os; os._exit(0)",
        "print('passed'); os.nothing",
    ):
        assert not run_clean(RIGHT, INCREMENT + f"    {last}\n").passed
    if LINUX:
        # The test's own source can see that other processes of its user cannot read its process.
        test = INCREMENT + "    import ctypes\n    assert ctypes.CDLL(None).prctl(3) == 0\n"
        assert run_clean(RIGHT, test).passed


def test_a_death_is_not_the_exception_that_a_test_expects():
    test = (
        "def check(candidate):\n"
        "    try:\n"
        "        candidate(1)\n"
        "    except {}:\n"
        "        pass\n"
        "    else:\n"
        "        assert False\n"
    )
    for expected in ("ValueError", "Exception", "BaseException"):
        assert run_clean("def f(x):\n    raise ValueError('no')\n", test.format(expected)).passed
        for wrong in (
            "import os\n    os._exit(0)",
            "import os\n    os.closerange(3, 9)",
            "return 'x' * 2_000_000",
            (
                "import os\n"
                "    for fd in range(3, 9):\n"
                '        try: os.write(fd, b\'["value", {"object": []}]\\n\')\n'
                "        except OSError: pass"
            ),
        ):
            assert not run_clean(f"def f(x):\n    {wrong}\n", test.format(expected)).passed


@pytest.mark.parametrize(
    "line",
    [
        '["value"]',
        '["value", 1, 2]',
        '["error", "IndexError"]',
        '["more", "IndexError", "no"]',
        "[]",
    ],
)
def test_a_line_of_another_form_is_not_an_exception_either(line):
    test = "def check(candidate):\n    try: candidate(1)\n    except Exception: pass\n"
    program = f"import os\ndef f(x):\n    text = {line.encode() + bytes([10])!r}\n    {WRITE_ALL}"
    result = run_clean(program, test)
    assert not result.passed and result.why == "garbled answer"


def test_any_name_may_be_an_arguments():
    program = "def f(function, args, self, **more):\n    return [function, args, self, more]\n"
    call = "candidate(function=1, args=2, self=3, kwargs=4)"
    result = run_clean(
        program, f"def check(candidate):\n    assert {call} == [1, 2, 3, dict(kwargs=4)]\n"
    )
    assert result.passed, result.why


@pytest.mark.parametrize(
    "raised, seen",
    [
        ("ValueError('a b')", "ValueError: a b"),
        ("KeyError('k')", "KeyError: \"'k'\""),
        ("TypeError('t')", "TypeError: t"),
        (
            "UnicodeDecodeError('utf-8', b'x', 0, 1, 'y')",
            "Exception: UnicodeDecodeError: 'utf-8' codec",
        ),
        ("type('Own', (ValueError,), {})('o')", "Exception: Own: o"),
        ("SystemExit(0)", "Exception: SystemExit: 0"),
    ],
)
def test_exceptions_arrive_by_name(raised, seen):
    assert run_clean(f"def f(x):\n    raise {raised}\n").why.startswith("wrong: " + seen)


# ---- values --------------------------------------------------------------------------------------

VALUES = [
    None,
    True,
    0,
    -3,
    10**300,
    0.1,
    -0.0,
    math.inf,
    -math.inf,
    1e-320,
    1 + 2j,
    complex(math.inf, -0.0),
    "",
    'é\n"\ud800',
    b"\x00\xff",
    [],
    [[1], (2,)],
    (),
    (1, [2]),
    {},
    {1: "a", (1, 2): [3], None: {}},
    set(),
    {1, (2, 3)},
    frozenset({1}),
    {frozenset({2}): {1.5}},
    [True, 1, 1.0],
    {"set": [1], "dict": 1},
]


def same(a, b):
    return type(a) is type(b) and repr(a) == repr(b)


def test_plain_values_come_back_with_their_types():
    for value in VALUES:
        assert same(unpack(pack(value)), value)
    check = (
        "def check(candidate):\n"
        "    from math import inf\n"
        f"    for v in {VALUES!r}:\n"
        "        got = candidate(v)\n"
        "        assert type(got) is type(v) and repr(got) == repr(v)\n"
    )
    check = check.replace("(inf-0j)", "complex(inf, -0.0)")
    assert run_clean("def f(x):\n    return x\n", check).passed
    check_nan = (
        "def check(candidate):\n"
        "    v = candidate(float('nan'))\n"
        "    assert v != v and type(v) is float\n"
    )
    assert run_clean("def f(x):\n    return x\n", check_nan).passed


def test_subclasses_and_numbers_become_plain():
    import collections
    import enum

    import numpy as np

    point = collections.namedtuple("point", "x y")
    cases = [
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (np.bool_(True), None),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.OrderedDict(a=1), {"a": 1}),
        (point(1, 2), (1, 2)),
        (enum.IntEnum("E", "A").A, 1),
        (np.complex128(1j), 1j),
        (np.str_("s"), "s"),
    ]
    for value, plain in cases:
        if plain is not None:
            assert same(unpack(pack([value])), [plain])
    for value in (object(), iter([]), range(3), {1: len}, [np.zeros(2)]):
        with pytest.raises(TypeError, match="not plain data"):
            pack(value)


# ---- what a program may not do -------------------------------------------------------------------


def answers(program, test_of_answer, layers=LAYERS, **settings):
    """Assert something of what the program finds out. The condition calls it `answer`."""
    test = (
        "def check(candidate):\n"
        "    answer = candidate()\n"
        f"    assert {test_of_answer}, repr(answer)[:250]\n"
    )
    result = run_clean(program, test, layers=layers, **settings)
    assert result.passed, result.why


@MODES
def test_the_surroundings_are_empty(layers, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    answers(
        "import os\ndef f():\n    return sorted(os.environ) + os.listdir('.')",
        "set(answer) <= {'HOME', 'LANG', 'PATH', 'LD_LIBRARY_PATH', 'LC_CTYPE'}",
        layers,
    )
    # Input, output and errors are /dev/null.
    standard = (
        "import os\n"
        "def f():\n"
        "    return [os.fstat(fd).st_rdev for fd in range(3)],"
        " os.fstat(0).st_rdev == os.stat('/dev/null').st_rdev"
    )
    answers(standard, "answer == ([answer[0][0]] * 3, True)", layers)
    # Two pipes and no other: the tester's calls and the answers.
    pipes = (
        "import os\n"
        "def f():\n"
        "    found = 0\n"
        "    for fd in range(64):\n"
        "        try: found += 'pipe:' in os.readlink(f'/proc/self/fd/{fd}')\n"
        "        except OSError: pass\n"
        "    return found"
    )
    answers(pipes, "answer == 2", layers)


@MODES
def test_limits_and_rights(layers):
    if "calls" in layers:
        # The list of calls refuses getrlimit too.
        limits = (
            "def f():\n"
            "    text = open('/proc/self/limits').read()\n"
            "    return [int(next(l for l in text.splitlines()"
            " if l.startswith('Max ' + n))[26:].split()[1])"
            " for n in ('cpu time', 'address space', 'file size', 'processes', 'open files',"
            " 'core file size')]"
        )
    else:
        limits = (
            "import resource as r\n"
            "def f():\n"
            "    return [r.getrlimit(x)[1] for x in (r.RLIMIT_CPU, r.RLIMIT_AS, r.RLIMIT_FSIZE,"
            " r.RLIMIT_NPROC, r.RLIMIT_NOFILE, r.RLIMIT_CORE)]"
        )
    expected = f"answer == [4, {100 << 20}, {1 << 20}, 1, 32, 0]"
    answers(limits, expected, layers, memory=100 << 20)

    status = (
        "def f():\n"
        "    return dict(line.split(':', 1)"
        " for line in open('/proc/self/status').read().split('\\n') if line)"
    )
    no_rights = (
        "answer['CapEff'].strip('\\t0') == '' and answer['CapPrm'].strip('\\t0') == ''"
        " and answer['NoNewPrivs'] == '\\t1'"
    )
    answers(status, no_rights, layers)
    if os.uname().machine in sandbox.CALLS:
        answers(status, f"answer['Seccomp'] == '\\t{2 if 'calls' in layers else 0}'", layers)
    if os.getuid() == 0:
        if "uid" in layers:
            ids = (
                "min(map(int, (answer['Uid'] + answer['Gid'] + answer['Groups']).split())) >= 61184"
            )
        else:
            ids = "answer['Uid'].split()[0] == '0'"
        answers(status, ids, layers)


REFUSED = {
    "fork": "os.fork()",
    "a command": "os.system('true') and 1 / 0",
    "exec": "os.execv('/bin/true', ['true'])",
    "a thread": "_thread.start_new_thread(print, ())",
    "a socket": "socket.socket()",
    "a file": "open('x', 'w')",
    "a file to append to": "open('/dev/null', 'a')",
    "removal": "os.remove({mine!r})",
    "emptying": "os.open({mine!r}, os.O_TRUNC)",
    "a rename": "os.rename({mine!r}, {mine!r} + '2')",
    "a directory": "os.mkdir('x')",
    "mode": "os.chmod({mine!r}, 0)",
    "kill": "os.kill({caller}, 0)",
    "SIGIO": "fcntl.fcntl(0, fcntl.F_SETOWN, {caller})",
    "limits": "resource.prlimit({caller}, resource.RLIMIT_CORE)",
    "priority": "os.setpriority(os.PRIO_PROCESS, 0, 5)",
}


@pytest.mark.skipif(
    not LINUX or os.uname().machine not in sandbox.CALLS,
    reason="the list of calls is for Linux on x86-64 and arm64",
)
@pytest.mark.parametrize("name", REFUSED)
def test_calls_are_refused(name, tmp_path):
    """The list alone refuses them, without root's other user id: so for everybody."""
    mine = tmp_path / "mine"
    mine.write_text("x")
    action = REFUSED[name].format(mine=str(mine), caller=os.getpid())
    program = (
        "import _thread, fcntl, os, resource, socket\n"
        "def f():\n"
        "    try:\n"
        f"        {action}\n"
        "    except (OSError, RuntimeError, ZeroDivisionError) as error:\n"
        "        return 'refused'"
    )
    answers(program, "answer == 'refused'", ("calls",))
    assert mine.read_text() == "x" and mine.stat().st_mode & 0o600


@MODES
def test_network(layers):
    """The list of calls or a namespace takes the network away.

    Without either a program has the network, as the module says.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = (
            "import os, socket\n"
            "def f():\n"
            "    try:\n"
            f"        socket.create_connection(('127.0.0.1', {port}), timeout=1)\n"
            "        connected = True\n"
            "    except OSError:\n"
            "        connected = False\n"
            "    return connected, os.readlink('/proc/self/ns/net')"
        )
        # The run has a network namespace of its own if it asks for one and the machine allows it.
        own = False
        if "namespaces" in layers:
            unshare = subprocess.run(
                ["unshare", "--net"] + ["--user"] * (os.getuid() != 0) + ["true"],
                stderr=subprocess.DEVNULL,
            )
            own = unshare.returncode == 0
        refused = own or ("calls" in layers and os.uname().machine in sandbox.CALLS)
        expected = (
            f"answer[0] is {not refused}"
            f" and (answer[1] != {os.readlink('/proc/self/ns/net')!r}) is {own}"
        )
        answers(program, expected, layers)


# ---- survival ------------------------------------------------------------------------------------

IGNORE = (
    "import signal\n"
    "for s in range(1, 65):\n"
    "    try: signal.signal(s, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\n"
)
SURVIVE = {
    "a loop": "while True: pass\n",
    "a loop that no signal ends": IGNORE + "while True: pass\n",
    "an alarm that comes again": (
        "import signal\n"
        "signal.signal(signal.SIGALRM, lambda *a: None)\n"
        "while True:\n"
        "    try:\n"
        "        while True: pass\n"
        "    except BaseException: pass\n"
    ),
    "sleep": "import time\ntime.sleep(100)\n",
    "a loop in C": "import re\nre.match(r'(a+)+$', 'a' * 60 + 'b')\n",
    "a loop in the answer": (
        "class A(int):\n"
        "    def __int__(self):\n"
        "        while True: pass\n"
        "    __index__ = __trunc__ = __int__\n"
        "def f(x):\n"
        "    return A()\n"
    ),
    "10 GB": "x = bytearray(10 << 30)\n",
    "as much as there is": "x = []\nwhile True: x.append(bytearray(1 << 20))\n",
    "memory, errors ignored": (
        "x = []\nwhile True:\n    try: x.append(bytearray(1 << 20))\n    except MemoryError: pass\n"
    ),
    "output": "while True: print('x' * 100_000)\n",
    "errors": "import sys\nwhile True: sys.stderr.write('x' * 100_000)\n",
    "a flood on every descriptor": (
        "import os\n"
        "while True:\n"
        "    for fd in range(64):\n"
        "        try: os.write(fd, b'x' * 100_000)\n"
        "        except OSError: pass\n"
    ),
    "a flood of answers": (
        "import os\n"
        "while True:\n"
        "    for fd in range(3, 64):\n"
        "        try: os.write(fd, b'[\"value\", 7]\\n' * 1000)\n"
        "        except OSError: pass\n"
    ),
    "no reading": "import time\ndef f(x):\n    time.sleep(100)\n",
    "recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x):\n    return f(x)\n",
    "recursion in data": "def f(x):\n    x = []\n    x.append(x)\n    return x\n",
    "a large answer": "def f(x):\n    return list(range(10 ** 7))\n",
    "closed descriptors": "import os, time\nos.closerange(0, 1000)\ntime.sleep(100)\n",
    "a large file": "f = open('x', 'wb')\nwhile True: f.write(b'x' * 1_000_000)\n",
    "threads": (
        "import threading, time\n"
        "while True: threading.Thread(target=time.sleep, args=(100,)).start()\n"
    ),
    "an endless number": "def f(x):\n    return 10 ** 10 ** 8\n",
}


@pytest.mark.parametrize(
    "layers", [LAYERS, pytest.param(("uid",), marks=pytest.mark.slow)], ids="+".join
)
@pytest.mark.parametrize("name", SURVIVE)
def test_it_survives(name, layers):
    assert not run_clean(SURVIVE[name], seconds=0.25, layers=layers).passed


FORKS = """
import os, time
count = 0
for _ in range(30):
    try:
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                for fd in range(64):
                    try: os.close(fd)
                    except OSError: pass
            time.sleep(20)
            os._exit(0)  # should a sandbox that does not work leave it: it must not go on \
with this loop
        count += 1
    except OSError: pass
def f(x=0):
    return {}
"""


@FENCED
def test_a_fork_bomb_gets_nowhere(layers):
    answers(FORKS.format("count"), "answer == 0", layers)
    bomb = (
        "import os, time\n"
        "end = time.time() + 9\n"
        "for _ in range(6):\n"
        "    try: os.fork()\n"
        "    except OSError: pass\n"
        "while time.time() < end: pass\n"
    )
    assert not run_clean(bomb, seconds=0.25, layers=layers).passed


@pytest.mark.parametrize("layers", [(), ("namespaces",)], ids=["none", "namespaces"])
@pytest.mark.parametrize(
    "program, passed",
    [
        (FORKS.format("[x[0] + 1] if isinstance(x, list) else x + 1"), True),
        (FORKS.format("7"), False),
        (FORKS.format("7") + "while True: pass\n", False),
    ],
    ids=["passes", "fails", "hangs"],
)
def test_children_in_the_background_end_with_the_run(layers, program, passed):
    """Root keeps its user id in these layers, and then no limit holds for it.

    The program starts thirty sessions, and each leaves an orphan.
    """
    if os.getuid() == 0:
        answers(FORKS.format("count"), "answer == 30", layers, seconds=3.0)
    assert run_clean(program, layers=layers, seconds=1.5).passed == passed


def test_memory_is_bounded():
    """Measured in a process without other children: what the largest of a run's processes had."""
    code = (
        f"import resource, sys; sys.path.insert(0, {ROOT!r});"
        " from nanorl.tasks.sandbox import run\n"
        f"why = run({SURVIVE['memory, errors ignored']!r}, 'f', '',"
        " seconds=1.0, memory=150 << 20).why\n"
        "print(why, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    why, megabytes = process.stdout.split()
    assert why == "timeout" and 100 < int(megabytes) <= 150

    fits = "def f(x):\n    return bytearray(100 << 20) and x + 1\n"
    test_of_numbers = INCREMENT.replace("[3])[0]", "3)")
    assert run(fits, "f", test_of_numbers, memory=150 << 20).passed
    does_not_fit = "def f(x):\n    return bytearray(200 << 20) and x + 1\n"
    assert "MemoryError" in run(does_not_fit, "f", INCREMENT, memory=150 << 20).why


def test_a_test_that_hangs_on_the_answer_is_ended_too():
    loop = "def check(candidate):\n    for _ in range(candidate()): pass\n"
    result = run_clean("def f():\n    return 10 ** 18\n", loop, seconds=0.4)
    assert result == Result(False, "timeout")
    text = "def check(candidate):\n    'x' * candidate()\n"
    assert "MemoryError" in run_clean("def f():\n    return 10 ** 11\n", text).why


@pytest.mark.parametrize("layers", [LAYERS, ("uid",), ()], ids=["all", "uid", "none"])
def test_nothing_outlives_a_killed_trainer(layers):
    before = homes()
    seconds = 50.0123 + len(layers)
    program = (FORKS.format("7") if layers == () else "") + IGNORE + "while True: pass\n"
    code = (
        f"import sys; sys.path.insert(0, {ROOT!r}); from nanorl.tasks.sandbox import run\n"
        f"run({program!r}, 'f', '', seconds={seconds}, layers={layers!r})"
    )
    caller = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: len(processes(f"{seconds}\0")) >= 3)
    time.sleep(0.3)
    caller.kill()
    caller.wait()
    wait_until(lambda: not processes(f"{seconds}\0") and homes() <= before)


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_runs_side_by_side_in_threads():
    """The caller may have threads.

    Nothing is forked from it, and one run's descriptors do not reach another's.
    """
    results = {}

    def one(i):
        program = f"def f():\n    return {i}\n"
        test = f"def check(candidate):\n    assert candidate() == {i // 2 * 2}\n"
        results[i] = run(program, "f", test).passed

    threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: i % 2 == 0 for i in range(8)}


def test_the_callers_own_deadline_is_the_last_resort(monkeypatch, tmp_path):
    """The caller ends the run itself should the supervisor hang."""
    with open(sandbox.__file__) as f:
        source = f.read()
    path = tmp_path / "sandbox.py"
    path.write_text(re.sub(r"\n    supervise\(.*", "\n    time.sleep(60)", source))
    monkeypatch.setattr(sandbox, "__file__", str(path))
    monkeypatch.setattr(sandbox, "MARGIN", 0.2)
    assert run_clean(RIGHT, seconds=0.2) == Result(False, "timeout")


def test_it_loads_little():
    """Neither torch nor numpy: the module is the script of every process it starts."""
    code = (
        "import sys; sys.argv = ['x']; import importlib.util as u;"
        f" s = u.spec_from_file_location('sandbox', {sandbox.__file__!r});"
        " m = u.module_from_spec(s); s.loader.exec_module(m);"
        " print('numpy' in sys.modules, 'subprocess' in sys.modules)"
    )
    command = [sys.executable, "-I", "-S", "-c", code]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.stdout.split() == ["False", "False"]


def test_a_test_that_loops_over_calls_is_not_ended_by_the_program():
    """StopIteration would end map() as if all had been seen."""
    for check in (
        "def check(f):\n    assert all(map(lambda x: f(x) == x + 1, [1, 2, 3]))",
        "def check(f):\n    for y in map(f, [1, 2]):\n        assert y == 5",
    ):
        assert not run("def f(x):\n    raise StopIteration", "f", check).passed
        assert not run("def f(x):\n    raise StopAsyncIteration", "f", check).passed
