"""The command line: what goes to which stream, exit statuses, and what it costs to start."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest
from conftest import command, environment
from typer.testing import CliRunner

import yeam
from yeam.cli.app import app
from yeam.hub.target import Target
from yeam.plugins.registry import described

HEAVY = ("torch", "transformers", "huggingface_hub", "numpy")


def run(*words: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command, in this process."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("words", [["--help"], ["merge", "--help"], ["--version"], []], ids=" ".join)
def test_starting_is_cheap(words):
    """`yeam --help` and `import yeam` load none of the heavy packages; the time is printed."""
    code = (
        "import sys, time\n"
        "start = time.perf_counter()\n"
        f"sys.argv = ['yeam', *{words!r}]\n"
        "import yeam\n"
        "imported = time.perf_counter() - start\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "from yeam.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit:\n"
        "    pass\n"
        f"loaded += [name for name in {HEAVY!r} if name in sys.modules]\n"
        "print('loaded', loaded, 'import', round(imported, 3), 'all', round(time.perf_counter() - start, 3))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=300)
    print(words, done.stdout.splitlines()[-1])
    assert done.stdout.splitlines()[-1].startswith("loaded [] ")
    assert ("Usage: " in done.stdout + done.stderr) == (words != ["--version"])


def test_not_a_terminal(pair, tmp_path):
    """One line on stderr, without a bar or colours, whatever the environment says; nothing on stdout."""
    env = environment(FORCE_COLOR="1", TTY_COMPATIBLE="1")
    done = subprocess.run(
        command("merge", pair, tmp_path / "out"), env=env, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith(f"{tmp_path / 'out'}: 21 tensors, ") and done.stderr.count("\n") == 1
    assert done.stderr.endswith(" s\n") and "\x1b" not in done.stderr


@pytest.mark.parametrize(("options", "shows"), [([], True), (["--quiet"], False)])
def test_terminal(options, shows, pair, tmp_path):
    """On a terminal there is a bar, unless it is not wanted."""
    ours, theirs = pty.openpty()
    screen = bytearray()

    def watch() -> None:
        try:
            while data := os.read(ours, 4096):
                screen.extend(data)
        except OSError:  # the other side was closed
            pass

    watcher = threading.Thread(target=watch)
    watcher.start()
    done = subprocess.run(
        command("merge", pair, tmp_path / "out", *options), env=environment(TERM="xterm"), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=theirs, timeout=300,
    )  # fmt: skip
    os.close(theirs)
    watcher.join(timeout=300)
    os.close(ours)
    assert done.returncode == 0
    text = screen.decode()
    print(text)
    assert ("merging" in text and "21/21 tensors" in text and "B/s" in text) == shows
    assert bool(text) == shows
    assert done.stdout == b""


def test_quiet(pair, tmp_path):
    out = tmp_path / "out"
    assert run("merge", pair, out, "--quiet") == (0, "", "")
    assert run("plan", pair, "--quiet") == (0, "", "")
    assert run("inspect", out, "--quiet") == (0, "", "")
    assert run("methods", "--quiet") == (0, "", "")
    assert run("families", "--quiet") == (0, "", "")
    assert run("plugins", "--quiet") == (0, "", "")
    status, stdout, stderr = run("merge", pair, out, "--quiet")  # errors are not kept quiet
    assert (status, stdout) == (2, "") and stderr.startswith("error: ")


def test_json(pair, tmp_path):
    """One object on stdout and nothing on stderr."""
    out = tmp_path / "out"

    def only(*words: object) -> dict[str, object]:
        status, stdout, stderr = run(*words, "--json")
        assert (status, stderr) == (0, "")
        assert stdout.endswith("}\n")
        found = json.loads(stdout, parse_constant=pytest.fail)
        assert isinstance(found, dict)
        return found

    planned = only("plan", pair)
    assert planned["hash"] == yeam.plan(pair).hash() and len(planned["jobs"]) == 21
    assert planned["read_bytes"] == 2 * sum(job.nbytes for job in yeam.plan(pair).jobs)
    report = only("merge", pair, out)
    assert report == {**json.loads((out / "yeam_report.json").read_text()), "out": str(out)}
    assert report["totals"]["tensors"] == 21
    assert only("inspect", out)["tensors"] == 21
    assert {"linear", "passthrough", "yeam"} <= only("methods").keys()
    assert "llama" in only("families")
    plugins: Any = only("plugins")
    align, inject = plugins["align"]["options"], plugins["inject"]["options"]
    assert align["to"] == {"type": "str | None", "default": None, "required": False, "model": True}
    assert (
        inject["sources"]["required"]
        and inject["roles"]["default"] == ["mlp", "attention"]
        and not inject["seed"]["model"]
    )


def test_plugins_are_listed_as_recipes_take_them(pair, tmp_path):
    """Every option of the list is one that a recipe may have, and a wrong one is answered with the list's."""
    status, stdout, _ = run("plugins")
    text = " ".join(stdout.split())
    assert status == 0 and "sources (a model): required" in text and "roles: mlp, attention" in text
    assert "transplant: The recipe's result with the tokenizer" in text and "Raises" not in text
    built_in = ("align", "attention", "expand", "graft", "inject", "scale_up", "transplant")
    for name, plugin in ((name, described()[name]) for name in built_in):
        data = {**json.loads(pair.read_text()), "plugins": [{name: {"nonsense": 1}}]}
        with pytest.raises(yeam.ConfigError) as caught:
            yeam.plan(data)
        assert caught.value.remedy == f"its options are: {', '.join(plugin['options'])}"


def test_debug(pair, tmp_path):
    """--debug adds the traceback and changes neither the message nor the status."""
    missing = ["merge", tmp_path / "nowhere.yaml"]
    status, stdout, stderr = run(*missing)
    assert (status, stdout) == (2, "") and "Traceback" not in stderr
    longer = run(*missing, "--debug", "--json")
    assert longer[0] == 2 and json.loads(longer[1])["status"] == 2
    assert longer[2].startswith("Traceback") and longer[2].endswith(stderr)


def test_defect(pair, tmp_path, monkeypatch):
    """An exception that nobody foresaw is status 1, one message, and no traceback unless asked for."""

    def broken(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("yeam.api.merge", broken)
    status, stdout, stderr = run("merge", pair, tmp_path / "out")
    assert (status, stdout) == (1, "")
    assert stderr == "error: ZeroDivisionError: by zero\n  report it, with the traceback that --debug shows\n"
    status, _, stderr = run("merge", pair, tmp_path / "out", "--debug")
    assert status == 1 and stderr.startswith("Traceback") and "in broken" in stderr


def test_secrets_are_not_printed(pair, tmp_path, monkeypatch):
    """Passwords, signatures and tokens stay out of messages, notes and tracebacks."""
    file = tmp_path / "address.yaml"
    file.write_text("merge_method: linear\nmodels: [{model: 'https://me:pass-word@hub.test/owner/name'}]\n")
    said = run("plan", file, "--debug")
    signed = "403 for https://me:pass-word@cdn.test/x?X-Amz-Signature=signature with hf_aSecretToken"

    def broken(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError(signed)

    monkeypatch.setattr("yeam.api.merge", broken)
    more = run("merge", pair, tmp_path / "out", "--debug", "--json")
    texts = "".join([*said[1:], *more[1:]])
    assert "hub.test" in texts and "https://cdn.test/x?" in texts
    assert not [secret for secret in ("pass-word", "signature", "aSecretToken") if secret in texts]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://me:pass-word@hub.test")
    assert Target("owner/name", "main", "me", False).url == "http://hub.test/owner/name"


@pytest.mark.parametrize(
    "words", [["merge", "r.yaml", "--overwrit"], ["merge"], ["mrege", "r.yaml"], ["inspect", "a", "b"]]
)
def test_usage(words):
    status, stdout, stderr = run(*words)
    assert (status, stdout) == (2, "")
    assert "Usage: " in stderr and "Traceback" not in stderr


def test_nobody_reads():
    """`yeam … | head`: no complaint when the reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run(
            command("methods", "--json"),
            env=environment(),
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
        )
    assert done.returncode == 1 and done.stderr == ""


def test_where_it_goes(llama, recipe, tmp_path, monkeypatch):
    """OUT is the argument, else `output:`, else the recipe's name in the current folder; --set changes the recipe."""
    a = llama("a")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    path = recipe(a, file="soup.yaml")
    assert run("merge", path)[0] == 0 and (here / "soup" / "model.safetensors").is_file()
    assert run("merge", path, "--set", "output=deep/er/merged")[0] == 0
    assert (here / "deep" / "er" / "merged" / "model.safetensors").is_file()
    assert run("merge", path, "argument", "--set", "output=setting")[0] == 0
    assert sorted(entry.name for entry in here.iterdir()) == ["argument", "deep", "soup"]
    status, _, stderr = run("merge", path)
    assert status == 2 and f"{here / 'soup'} exists" in stderr
    assert run("merge", path, "--overwrite", "-q") == (0, "", "")


def test_interrupt_that_is_swallowed(pair, tmp_path, monkeypatch):
    """numpy's import, for one, makes an ImportError of a KeyboardInterrupt."""

    def importing(*arguments: object, **options: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("cannot load module more than once per process") from None

    monkeypatch.setattr("yeam.api.merge", importing)
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started to ignore it
    try:
        before = signal.getsignal(signal.SIGINT)
        status, stdout, stderr = run("merge", pair, tmp_path / "out")
        after = signal.getsignal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, found)
    assert (status, stdout) == (130, "")
    assert stderr == "error: interrupted\n  run the same command again to continue\n"
    assert after is before


def test_interrupt_that_nobody_passed_on(pair, tmp_path, monkeypatch):
    """A package's bare `except:` or finaliser may swallow it without a trace: then it comes again."""

    class Finalised:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def swallows(*_args, **_options):
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGINT)
        try:
            threading.Event().wait(60)
        except KeyboardInterrupt:
            Finalised()
        threading.Event().wait(60)
        pytest.fail("the interrupt was lost")

    monkeypatch.setattr("yeam.api.merge", swallows)
    monkeypatch.setattr("sys.unraisablehook", lambda _: None)
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status, _, stderr = run("merge", pair, tmp_path / "out")
    finally:
        signal.signal(signal.SIGINT, found)
    assert status == 130
    assert stderr == "error: interrupted\n  run the same command again to continue\n"


@pytest.mark.parametrize(
    ("flag", "says"),
    [("--cuda", "--device cuda"), ("--out-shard-size=5B", "--shard-size"), ("--no-lazy-unpickle", "leave it out")],
)
def test_flags_of_mergekit(flag, says, pair, tmp_path):
    """A flag that mergekit has is a usage error with what to write here."""
    status, _, stderr = run("merge", pair, tmp_path / "out", flag)
    said = " ".join(stderr.replace("│", " ").split())
    assert status == 2 and "is an option of mergekit" in said and says in said and "Possible options" not in said
    assert not (tmp_path / "out").exists()


def test_closed_stderr(pair, tmp_path):
    """With stderr closed, no file gets its number, and the merge succeeds."""
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", "-c", 'exec "$@" 2>&-', "bash", *command("merge", pair, out)], env=environment(), timeout=300
    )
    assert done.returncode == 0 and yeam.verify(out).ok


def test_full_stdout(pair, tmp_path):
    """A result that cannot be printed is one message; the merge itself is done."""
    out = tmp_path / "out"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command("merge", pair, out, "--json"), env=environment(), stdout=full, stderr=subprocess.PIPE, text=True,
            timeout=300,
        )  # fmt: skip
    assert (
        done.returncode == 2
        and done.stderr == "error: printing the result: No space left on device\n  free some space\n"
    )
    assert out.is_dir()


def test_narrow_encoding():
    """A terminal that takes ASCII only loses some marks, not the table."""
    done = subprocess.run(
        command("methods"), env=environment(PYTHONIOENCODING="ascii"), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "task_arithmetic" in done.stdout and done.stderr == ""


def test_unreadable_file(pair, tmp_path, monkeypatch):
    """What the system refuses is for the user to look at, and no defect."""

    def refused(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", "m/tokenizer.json")

    monkeypatch.setattr("yeam.api.merge", refused)
    status, _, stderr = run("merge", pair, tmp_path / "out")
    assert (status, stderr) == (
        2, "error: m/tokenizer.json: Permission denied\n  check the path and its permissions\n",
    )  # fmt: skip


def test_empty_argument(pair):
    """An unset variable does not become the current folder."""
    done = subprocess.run(
        command("merge", pair, "", "--overwrite"), env=environment(), capture_output=True, text=True, timeout=300
    )
    said = "error: argument 3 is empty\n  is a variable of the shell not set?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)
