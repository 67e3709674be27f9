"""What the exit status of `snell` says, to people and to whoever restarts it."""

from enum import IntEnum


class Exit(IntEnum):
    """Statuses of the command; `snell keep` decides by them whether another attempt makes sense."""

    DONE = 0
    BAD_INPUT = 2  # said in one line a problem; another attempt would end the same way
    MACHINE = 74  # a full disk, a lost host: what was saved stays, another attempt may succeed
    INTERRUPTED = 75  # asked to stop, and saved
    GAVE_UP = 76  # attempt after attempt ended without a newer checkpoint
    HUNG = 77  # ended by the watchdog, which said who waits for whom
    OUT_OF_MEMORY = 78  # said what asked for how much, and what would help; another attempt would end the same way
    STOPPED = 130  # Ctrl-C, at once
