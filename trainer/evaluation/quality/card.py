"""The evaluation card: everything that a number about images depends on, flat, beside the number.

A field is of one of three kinds. `subject` says what was measured: two runs differ in it, or there is nothing to
compare. `protocol` says how: numbers whose cards differ there compare only with the difference named. `note` changes no
number. None is unknown, and is never filled by a guess: of samples of another program all that says how they were drawn
stays None. What does not apply has a value that says so (0, 1 or nothing at all), as the field's words tell, so that it
is told from what is unknown.

`generate` writes the first half beside the images (`images_by` to `rounding`), `evaluate` adds the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from storage.base.boundary import Count, Number, parse_json

VERSION = 1
SPACES = "fdr6"  # the extractor of a card that is of six spaces
OF_SPACES: Mapping[str, Any] = {"references_sha256": (), "divisors": (), "divisors_of": ""}  # of any other's card
SUBJECT, PROTOCOL, NOTE = "subject", "protocol", "note"


def _of(kind: str, words: str) -> Any:
    return field(default=None, metadata={"kind": kind, "words": words})


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a number depends on. A later version's card is refused by whoever reads it."""

    version: Literal[1] = 1
    # what was measured
    run: str | None = _of(SUBJECT, "folder of the run")
    step: Count | None = _of(SUBJECT, "steps done at the checkpoint")
    checkpoint_sha256: str | None = _of(SUBJECT, "SHA-256 of the file of its weights")
    # how images were drawn
    images_by: str | None = _of(NOTE, "program that drew the images, and its version")
    weights: str | None = _of(PROTOCOL, "ema: averaged; model: the last ones")
    ema_decay: Number | None = _of(PROTOCOL, "decay of the average")
    labels: str | None = _of(PROTOCOL, "random, balanced, given, or none (a model without classes)")
    classes: Count | None = _of(PROTOCOL, "how many classes labels are of")
    seed: int | None = _of(PROTOCOL, "of noise and labels")
    sampler: str | None = _of(PROTOCOL, "euler-maruyama, euler, heun, or ddpm")
    equation: str | None = _of(PROTOCOL, "sde, ode, or chain (ddpm)")
    steps: Count | None = _of(PROTOCOL, "steps of the sampler")
    calls: Count | None = _of(PROTOCOL, "calls of the model for an image")
    guided_calls: Count | None = _of(PROTOCOL, "how many of these guidance doubles")
    last_step_from: Number | None = _of(PROTOCOL, "noise level at which the last step begins")
    times_end: Number | None = _of(PROTOCOL, "noise level at which it ends")
    shift: Number | None = _of(PROTOCOL, "s of the noise levels s t / (1 + (s - 1) t)")
    guidance: Number | None = _of(PROTOCOL, "scale; 1: none, and then the interval is 0 to 1 and channels are 0")
    guidance_low: Number | None = _of(PROTOCOL, "least noise level that is guided")
    guidance_high: Number | None = _of(PROTOCOL, "largest noise level that is guided")
    guidance_channels: Count | None = _of(PROTOCOL, "latent channels guided, the first ones; 0: all")
    guidance_by: str | None = _of(PROTOCOL, "null label, weaker model, or nothing")
    weaker_sha256: str | None = _of(PROTOCOL, "SHA-256 of the weaker model's weights; empty: none")
    guidance_class: Number | None = _of(PROTOCOL, "scale of the class token; 0: none, or no class token")
    guidance_class_low: Number | None = _of(PROTOCOL, "its least noise level guided")
    guidance_class_high: Number | None = _of(PROTOCOL, "its largest noise level guided")
    class_noise: str | None = _of(PROTOCOL, "what a class token starts from: own, or mean; empty: no class token")
    precision: str | None = _of(PROTOCOL, "arithmetic, and on what")
    decoder: str | None = _of(NOTE, "name of what decodes latents")
    decoder_sha256: str | None = _of(PROTOCOL, "SHA-256 of its weight file")
    rounding: str | None = _of(PROTOCOL, "from pixels to uint8: round, or truncate")
    # what was measured with what
    images: str | None = _of(NOTE, "where the images lie")
    images_format: str | None = _of(NOTE, "folder (of PNGs, where generate wrote it), npz, or store")
    n_images: Count | None = _of(PROTOCOL, "how many images were measured")
    resolution: str | None = _of(PROTOCOL, "width × height of the images as the extractor is given them")
    crop: Count | None = _of(PROTOCOL, "side to which images were cropped before; 0: not at all")
    reference: str | None = _of(NOTE, "where the reference lies")
    reference_sha256: str | None = _of(PROTOCOL, "digest of its statistics, or of its pixels")
    references_sha256: tuple[str, ...] | None = _of(PROTOCOL, "fdr6: each space and its reference's; empty: one space")
    n_reference: Count | None = _of(PROTOCOL, "images of the reference; 0: statistics of a number that is not said")
    divisors: tuple[str, ...] | None = _of(PROTOCOL, "fdr6: each space and what its distance is over; empty: nothing")
    divisors_of: str | None = _of(PROTOCOL, "fdr6: published, or digest of the held-out images; empty: no divisors")
    extractor: str | None = _of(PROTOCOL, "network that describes images")
    extractor_sha256: str | None = _of(PROTOCOL, "SHA-256 of its weights")
    extractor_vector: str | None = _of(PROTOCOL, "which of its outputs")
    extractor_resize: str | None = _of(PROTOCOL, "resizing and normalising before it")
    extractor_precision: str | None = _of(PROTOCOL, "its arithmetic, where that is not float32; empty: it is")
    metrics_version: Count | None = _of(PROTOCOL, "version of the metrics' implementation")
    project_version: str | None = _of(NOTE, "version of what measured")
    protocol: str | None = _of(NOTE, "published protocol that was asked for; empty: none")
    departures: tuple[str, ...] | None = _of(NOTE, "in what it was not kept to")

    def __post_init__(self) -> None:
        """A card of one space has nothing of six, and nor has one of before there were these fields."""
        if self.extractor not in (None, SPACES):
            for name, nothing in OF_SPACES.items():
                if getattr(self, name) is None:
                    object.__setattr__(self, name, nothing)

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {each.name: _listed(getattr(self, each.name)) for each in fields(self)}

    @property
    def unknown(self) -> list[str]:
        """Names of the protocol's fields that are not known."""
        return [name for name in names_of(PROTOCOL) if getattr(self, name) is None]

    @property
    def of_another_program(self) -> bool:
        """Whether nothing says how the images were drawn."""
        return all(getattr(self, name) is None for name in DRAWN)


def card_in(result: Mapping[str, Any]) -> Card:
    """The card of a result; of one from before there were cards, nothing is known. Raises StoreError."""
    return parse_json(Card, json.dumps(result.get("card", {})), "the card of a result", "remove it; it is made again")


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def names_of(kind: str) -> list[str]:
    """The fields of a kind, in their order."""
    return [each.name for each in fields(Card) if each.metadata.get("kind") == kind]


def words_of(name: str) -> str:
    """What a field says, for people."""
    words: str = Card.__dataclass_fields__[name].metadata.get("words", "version of the card")
    return words


DRAWN = names_of(PROTOCOL)[: names_of(PROTOCOL).index("rounding") + 1]  # what `generate` says of the protocol


OF_CLASS_TOKENS: Mapping[str, Any] = {
    "guidance_class": 0.0,
    "guidance_class_low": 0.0,
    "guidance_class_high": 1.0,
    "class_noise": "",
}
OF_METHODS = ("ema_decay", *OF_CLASS_TOKENS)


def as_of_any_method(card: Card) -> Card:
    """A card without what is its method's own: the decay of the average, and a class token that goes with the image.

    Methods differ in these however alike they are measured. A class token that has its own scale, interval or start
    stays. The decay is not known of what is returned.
    """
    own = tuple(getattr(card, name) for name in OF_CLASS_TOKENS)
    with_image = (card.guidance, card.guidance_low, card.guidance_high, "own")
    plain = own == with_image or (card.guidance == 1 and card.class_noise == "own")
    return replace(card, ema_decay=None, **(OF_CLASS_TOKENS if plain else {}))


def differences(a: Card, b: Card) -> list[tuple[str, Any, Any]]:
    """(field, a's, b's) of every field of the protocol in which two cards differ, or that one of them does not know.

    Two numbers may stand side by side only with these named, and with what neither knows (`unknown_to_both`).
    """
    return list(_differing(a, b))


def _differing(a: Card, b: Card) -> Iterator[tuple[str, Any, Any]]:
    for name in names_of(PROTOCOL):
        mine, its = getattr(a, name), getattr(b, name)
        if mine != its:
            yield name, mine, its


def unknown_to_both(a: Card, b: Card) -> list[str]:
    """Fields of the protocol that neither card knows, in which the two may differ."""
    return [name for name in a.unknown if name in b.unknown]
