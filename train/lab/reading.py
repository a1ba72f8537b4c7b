"""Count how much of this repository a script calls: what someone who follows every call has to read.

    python train/lab/reading.py train/minimal.py
    python train/lab/reading.py train/pre_train.py --max-steps 20 --out /tmp/reading

It runs the script in this process and lists each of our files in which a function was called, with all its
lines. Module and class bodies do not count, since an import runs them whether they are used or not. Other
processes are not seen. Nothing of ours is imported here: that would hide what the imports call.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # repository root

import inspect
import runpy
import threading

ROOT = pathlib.Path(__file__).resolve().parents[2]
PARTS = ("<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>")  # functions that the interpreter creates


def lines_called(script: str, arguments: list[str], root: pathlib.Path = ROOT) -> dict[str, int]:
    """Run a script; return the line count of each file in `root` that it called into, longest first."""
    seen = {script}

    def watch(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_flags & inspect.CO_OPTIMIZED and code.co_name not in PARTS:
            seen.add(code.co_filename)

    sys.argv = [script, *arguments]
    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    paths = [path for path in (pathlib.Path(name).resolve() for name in seen) if path.is_relative_to(root)]
    ours = {path.relative_to(root).as_posix(): path for path in paths if path.is_file()}
    counts = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in ours.items()
              if not name.startswith(".")}  # fmt: skip
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def main():
    """Print the files with their line counts, and the total."""
    if len(sys.argv) < 2 or not pathlib.Path(sys.argv[1]).is_file():
        print("error: name a script: train/lab/reading.py train/minimal.py [its flags]", file=sys.stderr)
        sys.exit(2)
    counts = lines_called(sys.argv[1], sys.argv[2:])
    for name, lines in counts.items():
        print(f"{lines:7,}  {name}")
    print(f"{sum(counts.values()):7,}  lines in {len(counts)} files")


if __name__ == "__main__":
    main()
