"""Plants one mistake after the other in a copy of the tree, and says which test caught it.

    python -m tests.mutants [--only TEXT] [--list] [--jobs N] [--save]

The mistakes stand in tests/mutants.toml: a file, a text that stands in it once, what takes its
place, and the tests that should fail. The copies lie in build/mutants; the tree itself is only
read. What a mistake changes is compiled again, the CPU kernels for the level of this machine
alone. The exit status is 0 if every mistake was caught, or is said to be none (`equivalent`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
LIST = ROOT / "tests" / "mutants.toml"
SCRATCH = ROOT / "build" / "mutants"
FILE = "mutants.csv"
GOOD = ("caught", "equivalent")
CRASHES = {-6: "abort", -7: "bus error", -8: "division by zero", -11: "segmentation fault"}


class Mutant(NamedTuple):
    """One mistake: `old`, which stands once in `file`, becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    tests: str  # arguments of pytest
    objects: str = ""  # of the compiled objects that it changes, those to build: part of their path
    equivalent: str = ""  # why no test can see it

    @property
    def target(self) -> str | None:
        """The compiled module that it is in; None for Python."""
        if not self.file.startswith("csrc/"):
            return None
        return "_emulator" if re.match(r"csrc/(cuda/|\w+/(cuda|sm90)/)", self.file) else "_C"

    def why_not(self, tree: Path) -> str | None:
        """Why it does not apply to `tree`; None if it does."""
        path = tree / self.file
        if not path.is_file():
            return f"there is no {self.file}"
        count = path.read_text().count(self.old)
        return None if count == 1 else f"its old text stands {count} times in {self.file}"


class Outcome(NamedTuple):
    """What became of a mutant: `caught` by a test, `survived`, or why it says nothing."""

    outcome: str
    by: str
    seconds: float


def read(path: Path = LIST) -> list[Mutant]:
    """Raises SystemExit where the list is no such list: the entry and its fault are named."""
    found: dict[str, Mutant] = {}
    for number, entry in enumerate(tomllib.loads(path.read_text())["mutant"], 1):
        name = entry.get("name", f"number {number}")
        missing = [x for x in ("name", "file", "old", "new", "tests") if x not in entry]
        unknown = sorted(set(entry) - set(Mutant._fields))
        if missing or unknown or name in found:
            fault = f"lacks {missing}" if missing else f"has an unknown {unknown}"
            raise SystemExit(f"mutant {name!r} {fault if missing or unknown else 'is there twice'}")
        found[name] = Mutant(**entry)
    return list(found.values())


class Copy:
    """A copy of the working tree, in which one mutant at a time is planted."""

    def __init__(self, folder: Path, targets: set[str], limit: int) -> None:
        self.tree = folder
        self.limit = limit
        # Where `tests` looks for the emulator, and as deep as a build of the tree: for ccache.
        self.build = folder / "build" / f"cmake-{sys.implementation.cache_tag}-mutants"
        self._copy_tree()
        modules = list((ROOT / "fused_attn").glob("_C.*"))
        if "_C" not in targets and modules:
            shutil.copy2(modules[0], folder / "fused_attn")
        else:
            targets = targets | {"_C"}
        self.environment = self._environment()
        if targets:
            self._configure()
            self._run("cmake", "--build", self.build, "--target", *sorted(targets))
        if "_C" in targets:
            self._install()

    def _copy_tree(self) -> None:
        names = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout.split("\0")  # fmt: skip
        wanted = {
            name for name in names
            if name and not name.startswith("benchmarks/results/") and (ROOT / name).is_file()
        }  # fmt: skip
        for old in self.tree.rglob("*"):  # what a run before has left; not its build
            inside = old.relative_to(self.tree)
            if inside.parts[0] != "build" and old.is_file() and inside.as_posix() not in wanted:
                old.unlink()
        for name in sorted(wanted):
            source, target = ROOT / name, self.tree / name
            if target.exists() and target.read_bytes() == source.read_bytes():
                continue  # with its time: nothing is compiled again for it
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def _environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("FUSED_ATTN_")}
        # Two texts of one length, written within a second, share a name in the cache of bytecode.
        kept |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTEST_ADDOPTS": ""}
        if shutil.which("ccache"):
            kept.setdefault("CMAKE_CXX_COMPILER_LAUNCHER", "ccache")
            kept.setdefault("CCACHE_BASEDIR", str(ROOT))
            kept.setdefault("CCACHE_NOHASHDIR", "1")
        return kept

    def _run(self, *command: object) -> str:
        done = subprocess.run(
            [str(word) for word in command],
            cwd=self.tree, env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise BuildError(done.stdout[-3000:] + done.stderr[-3000:])
        return done.stdout

    def _configure(self) -> None:
        text = (ROOT / "fused_attn" / "_version.py").read_text()
        [version] = re.findall(r'^__version__ = "(.+)"$', text, re.M)
        self._run(
            "cmake", "-S", self.tree, "-B", self.build, "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release", "-DFUSED_ATTN_CUDA=off",
            "-DFUSED_ATTN_CPU_LEVELS=native",
            f"-DFUSED_ATTN_VERSION={version}", f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={self._run(sys.executable, '-m', 'pybind11', '--cmakedir').strip()}",
        )  # fmt: skip

    def _install(self) -> None:
        [module] = self.build.glob("_C.*.so")
        shutil.copy2(module, self.tree / "fused_attn")

    @contextlib.contextmanager
    def planted(self, mutant: Mutant) -> Iterator[None]:
        """The mutant is there, compiled, until the block ends."""
        source = self.tree / mutant.file
        kept = [source]
        if mutant.target is not None:
            kept += [self.build / ".ninja_log", self.build / ".ninja_deps"]
            kept += self.build.rglob(f"{mutant.target}.*.so")
        backup = {path: path.with_name(f"{path.name}.kept") for path in kept}
        for path, copy in backup.items():
            shutil.copy2(path, copy)
        try:
            source.write_text(source.read_text().replace(mutant.old, mutant.new))
            if mutant.target is not None:
                self._compile(mutant, backup)
            yield
        finally:
            for path, copy in backup.items():  # with their times: for ninja nothing has happened
                copy.replace(path)
            if mutant.target == "_C":
                self._install()

    def _compile(self, mutant: Mutant, backup: dict[Path, Path]) -> None:
        """The objects that `mutant` changes, but those of other levels, and the module."""
        assert mutant.target is not None
        ninja = ("ninja", "-C", self.build)
        outdated = re.findall(r"Building CXX object (\S+)", self._run(*ninja, "-n", mutant.target))
        level = f"_{self.level()}."
        objects = [
            x for x in outdated
            if mutant.objects in x and ("/_C_" not in x or level in x.split("/")[1])
        ]  # fmt: skip
        if not objects:
            raise BuildError(f"nothing to compile; outdated: {outdated}")
        for path in (self.build / name for name in objects):
            backup[path] = path.with_name(f"{path.name}.kept")
            shutil.copy2(path, backup[path])
        self._run(*ninja, "-j1", *objects)
        link = self._run(*ninja, "-t", "commands", mutant.target).strip().splitlines()[-1]
        self._run("sh", "-c", f"cd {shlex.quote(str(self.build))} && {link}")
        if mutant.target == "_C":
            self._install()

    @staticmethod
    def level() -> str:
        from fused_attn.runtime import native

        return str(native.module().cpu_level())

    def test(self, tests: Sequence[str], *options: str) -> tuple[int | None, str]:
        """Exit status of pytest, None if it ran too long, and what it said."""
        command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider"]
        try:
            done = subprocess.run(
                [*command, *options, *tests],
                cwd=self.tree, env=self.environment, capture_output=True, text=True,
                timeout=self.limit, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return None, ""
        return done.returncode, done.stdout + done.stderr

    def clean(self, mutants: Sequence[Mutant]) -> list[str]:
        """The tests of `mutants` that fail where nothing is planted: they would prove nothing."""
        groups: dict[tuple[str, ...], set[str]] = {}
        for mutant in mutants:
            words = shlex.split(mutant.tests)
            at = words.index("-k") if "-k" in words else len(words)
            groups.setdefault(tuple(words[at:]), set()).update(words[:at])
        failed = []
        for options, files in groups.items():
            status, said = self.test([*sorted(files), *options])
            if status != 0:
                failed += re.findall(r"^FAILED (.+?)(?: - .*)?$", said, re.M) or [said[-2000:]]
        return failed


class BuildError(Exception):
    """A build failed; the text is the compiler's."""


def judge(copy: Copy, mutant: Mutant) -> Outcome:
    """Plants it, runs its tests, and takes it out again."""
    start = time.monotonic()
    reason = mutant.why_not(copy.tree)
    if reason is not None:
        return Outcome("does not apply", reason, 0.0)
    try:
        with copy.planted(mutant):
            status, said = copy.test(shlex.split(mutant.tests), "-x")
    except BuildError as error:
        return Outcome("does not compile", str(error)[-500:], time.monotonic() - start)
    outcome, by = verdict(status, said, copy.limit)
    if mutant.equivalent:
        survives = outcome == "survived"
        outcome = "equivalent" if survives else f"not equivalent: {outcome}"
        by = mutant.equivalent if survives else by
    return Outcome(outcome, by, time.monotonic() - start)


def verdict(status: int | None, said: str, limit: int) -> tuple[str, str]:
    """From the exit status of pytest and what it said to the outcome and the test."""
    if status is None:
        return "caught", f"its tests ran for more than {limit} s"
    if status in CRASHES:
        return "caught", CRASHES[status]
    named = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said, re.M)
    if status == 1 or (status in (2, 3) and named):
        return "caught", named[1] if named else "pytest failed"
    if status == 0 and re.search(r"\d+ passed", said):
        return "survived", ""
    return "no test ran", said.strip().splitlines()[-1][:200] if said.strip() else f"{status}"


def run(mutants: Sequence[Mutant], options: argparse.Namespace) -> int:
    """How many were neither caught nor equivalent; prints a row for each, and records it."""
    targets = {mutant.target for mutant in mutants} - {None}
    copies: queue.Queue[Copy] = queue.Queue()
    for number in range(options.jobs):
        folder = SCRATCH / str(number)
        copies.put(Copy(folder, targets, options.limit))  # type: ignore[arg-type]
    if not options.trust_tree:
        first = copies.queue[0]
        failed = first.clean(mutants)
        if failed:
            raise SystemExit("these fail with nothing planted:\n  " + "\n  ".join(failed))

    def work(mutant: Mutant) -> tuple[Mutant, Outcome]:
        copy = copies.get()
        try:
            return mutant, judge(copy, mutant)
        finally:
            copies.put(copy)

    counts: dict[str, int] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutant, found in pool.map(work, mutants):
            counts[found.outcome] = counts.get(found.outcome, 0) + 1
            print(f"{mutant.name:<52} {found.outcome:<12} {found.seconds:5.0f} s  {found.by}",
                  flush=True)  # fmt: skip
            if options.save and found.outcome in (*GOOD, "survived"):
                record(mutant, found)
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    return sum(count for outcome, count in counts.items() if outcome not in GOOD)


def record(mutant: Mutant, found: Outcome) -> None:
    from benchmarks.suites.machine import RESULTS, folder_name
    from benchmarks.suites.results import save_rows

    row = {
        "mutant": mutant.name, "file": mutant.file, "outcome": found.outcome, "by": found.by,
        "seconds": round(found.seconds),
    }  # fmt: skip
    save_rows(RESULTS / folder_name() / FILE, [row], "mutant")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--only", default="", help="only mutants whose name or file contains this")
    parser.add_argument("--list", action="store_true", help="print them, and plant nothing")
    parser.add_argument("--jobs", type=int, default=1, help="copies of the tree to work in")
    parser.add_argument("--save", action="store_true", help="record under benchmarks/results/")
    parser.add_argument("--limit", type=int, default=900, help="seconds for the tests of one")
    parser.add_argument("--trust-tree", action="store_true",
                        help="do not first run the tests with nothing planted")  # fmt: skip
    parser.add_argument("--file", type=Path, default=LIST, help="another list of mutants")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    mutants = [x for x in read(options.file) if options.only in x.name or options.only in x.file]
    if not mutants:
        parser.error(f"no mutant's name or file contains {options.only!r}")
    moved = [f"{x.name}: {reason}" for x in mutants if (reason := x.why_not(ROOT)) is not None]
    if moved:
        print("does not apply:\n  " + "\n  ".join(moved), file=sys.stderr)
        return 1
    if options.list:
        for mutant in mutants:
            print(f"{mutant.name:<52} {mutant.file}  {mutant.tests}")
        return 0
    return 1 if run(mutants, options) else 0


if __name__ == "__main__":
    sys.exit(main())
