"""Alignment of hidden states with features: one file a kind, chosen for each target.

`--loss.alignment` spells a kind and its options as `NAME` or `NAME:option=value:option=value`. A kind is a dataclass
(`kind.py`) in a file of its own, and its line in `ALIGNMENTS`; it is imported when a run names it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from storage.base.commands import imported
from storage.base.errors import UserError
from storage.base.options import one_of, options_of, parse_text, spelled

if TYPE_CHECKING:
    from trainer.alignment.kind import Alignment

COSINE = "cosine"
ALIGNMENTS = {
    COSINE: "trainer.alignment.cosine:Cosine",
    "irepa": "trainer.alignment.irepa:IREPA",
}


def alignment_named(spelling: str) -> Alignment:
    """The kind that `NAME:option=value` spells. Raises UserError, which names what there is."""
    name, *settings = spelling.split(":")
    one_of("--loss.alignment", name, ALIGNMENTS)
    kind = imported(ALIGNMENTS[name])
    options = {option.name: option for option in options_of(kind)}
    values: dict[str, Any] = {}
    for setting in settings:
        option, _, text = setting.partition("=")
        if option not in options:
            choices = f"its options are {', '.join(options)}" if options else "it has no options"
            raise UserError(f"--loss.alignment {spelling}: {name} has no option {option!r}; {choices}")
        values[option] = parse_text(f"--loss.alignment {name}:{option}", text, options[option].kind)
    alignment: Alignment = kind(**values)
    return alignment


def spelled_out(spelling: str) -> str:
    """The same with every option, so that a saved run does not depend on a default."""
    if spelling == COSINE:  # has no options; a configuration is read without loading torch
        return spelling
    name, alignment = spelling.partition(":")[0], alignment_named(spelling)
    options = [f"{o.name}={spelled(getattr(alignment, o.name))}" for o in options_of(type(alignment))]
    return ":".join([name, *options])


def described() -> list[str]:
    """A line a kind, and below it one an option, for people."""
    lines = []
    for name, spelling in ALIGNMENTS.items():
        kind = imported(spelling)
        lines.append(f"{name:12}{(kind.__doc__ or '').splitlines()[0]}")
        for option in options_of(kind):
            default = spelled(option.field.default)
            lines.append(f"{'':4}:{option.name}={default}  {option.field.metadata['help']}")
    return lines
