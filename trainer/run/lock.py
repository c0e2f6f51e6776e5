"""One process at a time writes in a folder: a run's, or that of its images."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from storage.base.errors import UserError
from trainer.ranks.world import World

LOCK_FILE = ".lock"


@contextmanager
def only_writer(folder: Path, world: World, doing: str = "training") -> Iterator[None]:
    """Hold the folder's lock; a second process on the same run would delete what the first is writing.

    The main rank holds it, every rank must ask, and all end where it cannot be had.
    """
    failure: UserError | OSError | None = None
    with ExitStack() as held:
        try:
            if world.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                fcntl.flock(held.enter_context(open(folder / LOCK_FILE, "w")), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            failure = UserError(f"another process is {doing} in {folder}; name another folder, or wait for it")
        except OSError as error:
            failure = error
        world.end_together(failure, f"the main rank could not begin in {folder}, and says why")
        yield
