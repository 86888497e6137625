"""The `lvtp` command: `lvtp demo` shows what the selectors keep and save, `lvtp info` what is installed."""

import argparse
import os
import sys
from pathlib import Path

# What `lvtp demo` imports beyond lvtp's own requirements: the `demo` extra.
DEMO_MODULES = {"transformers", "matplotlib", "PIL", "numpy"}


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0, or 2 after a message on what to put right; as shells do, 130 and 141 where
    the user or the reader of the output ends it."""
    for stream in (sys.stdout, sys.stderr):
        if stream.errors == "strict":  # a file's name need not be text
            stream.reconfigure(errors="backslashreplace")
    arguments = _parser().parse_args(argv)
    try:
        code = arguments.command(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `lvtp info | head`; what is left to flush goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


class _PrintCmakePath(argparse.Action):
    """As the action "version", which breaks long lines."""

    def __init__(self, option_strings, dest, help):
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        print(Path(__file__).parent / "lib" / "cmake")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lvtp", description="Fast, exact visual-token selectors.")
    parser.add_argument(
        "--cmake-path",
        action=_PrintCmakePath,
        help="print where CMake finds lvtp, for CMAKE_PREFIX_PATH",
    )
    commands = parser.add_subparsers(title="commands", required=True)

    demo = commands.add_parser("demo", help="prune the visual tokens of a photograph, draw what is kept, time it")
    demo.add_argument("photo", nargs="?", type=Path, metavar="PHOTO", help="default: a portrait matplotlib ships")
    demo.add_argument(
        "--model",
        metavar="ID_OR_PATH",
        help="a LLaVA-1.5 checkpoint, as in llava-hf/llava-1.5-7b-hf; default: untrained",
    )
    demo.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="default: %(default)s")
    demo.set_defaults(command=_demo)

    info = commands.add_parser("info", help="print versions and backends, and why one is missing")
    info.set_defaults(command=_info)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    try:
        from lvtp.demo import DemoError
        from lvtp.demo.run import run
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in DEMO_MODULES:
            raise
        return _fail(f'the demonstration needs {package}: pip install "lvtp[demo]"')
    except ImportError as error:  # a transformers too old for lvtp.hf
        return _fail(str(error))
    try:
        run(arguments.photo, arguments.model, arguments.out)
    except DemoError as error:
        return _fail(str(error))
    return 0


def _info(arguments: argparse.Namespace) -> int:
    import lvtp

    _print_tree(lvtp.build_info())
    return 0


def _print_tree(tree: dict, indent: str = "") -> None:
    for name, value in tree.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:")
            _print_tree(value, indent + "  ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            print(f"{indent}{name}: {text}")


def _fail(message: str) -> int:
    print(f"lvtp: {message}", file=sys.stderr)
    return 2
