"""`python -m treegym` and the `treegym` command."""

import contextlib
import ctypes


def tune_malloc() -> None:
    """Has glibc keep what tensors free, up to half a gigabyte, and use few arenas; before any thread has one.

    Activations come and go each step: asking the kernel for them anew takes a tenth of its time. The largest blocks
    are mapped one by one, for in a heap they leave holes.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        options = {-3: 16 << 20, -1: 512 << 20, -8: 2}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_ARENA_MAX
        for option, value in options.items():
            libc.mallopt(option, value)


def main() -> None:
    """The command."""
    tune_malloc()
    from .scenarios.commands.cli import main as command

    command()


if __name__ == "__main__":
    main()
