"""What the user decides about labels, whatever the images lie in."""

from __future__ import annotations

from dataclasses import dataclass

from storage.base.errors import UserError
from storage.base.shown import shown


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """What the user decides about labels; each is an option of `index` and `precompute`."""

    column: str = ""
    unlabelled: bool = False
    partly_labelled: bool = False
    renumber: bool = False

    def __post_init__(self) -> None:
        if shown(self.column) != self.column:
            raise UserError(
                f"--label-column is a name without control characters, got '{shown(self.column)}'; rename it"
            )
        if self.unlabelled and (self.column or self.partly_labelled or self.renumber):
            raise UserError(
                "--unlabelled stores no label, so --label-column, --partly-labelled and --renumber-labels say nothing "
                "beside it; leave it or them out"
            )


AS_FOUND = LabelOptions()
