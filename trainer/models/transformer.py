"""DiT (arXiv 2212.09748) and SiT (arXiv 2401.08740): one transformer, with REPA's projectors beside it.

    kind  t given to the model     output
    sit   0 (image) to 1 (noise)   velocity (B, C, H, W)
    dit   0, 1, … 999              noise, then what its variance is interpolated by (B, 2C, H, W)

Nothing else differs: parameter names and shapes are those of the DiT, SiT and REPA checkpoints. Other kinds have files
of their own, which change parts of this one. What an output means is the objective's matter (`objectives/`), label
dropout and times are the training step's, so the model is the same function in training and evaluation.

Shape legend: B batch, C latent channels, H = W latent side, T = (H/p)² tokens, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from storage.base.errors import UserError
from trainer.alignment.cosine import Cosine
from trainer.alignment.kind import Alignment
from trainer.config.schema import Kind
from trainer.models.blocks import (
    Block,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    sincos_position_embedding,
    unpatchify,
)

OUTPUTS_PER_CHANNEL = {"sit": 1, "dit": 2, "lightningdit": 1, "rit": 1, "ditdh": 1}
WITH_CLASS_TOKEN = ("sit", "rit")  # kinds


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of a model. `targets` holds (block counted from 1, feature width) of each alignment target.

    `alignments` are the targets' kinds, in their order; without any they are REPA's.
    Without classes a model is unconditional: its label embedding has the null label's row alone, label 0.
    """

    kind: Kind
    input_size: int
    channels: int
    patch: int
    width: int
    depth: int
    heads: int
    n_classes: int
    qk_norm: bool = False
    targets: tuple[tuple[int, int], ...] = ()
    alignments: tuple[Alignment, ...] = ()
    class_width: int = 0  # of the class token that joins the sequence (`reg.py`, `rit.py`); 0: none
    projector_width: int = 2048
    head_width: int = 0  # of DiT^DH's head (`ditdh.py`)
    head_depth: int = 0
    head_heads: int = 0
    context: int = 0  # tokens of the label (`rit.py`) that join the sequence
    context_block: int = 1  # before this block, counted from 1

    def __post_init__(self) -> None:
        for name in ("input_size", "channels", "patch", "width", "depth", "heads", "n_classes", "projector_width"):
            least = 0 if name == "n_classes" else 1
            if getattr(self, name) < least:
                raise UserError(f"the model's {name} must be at least {least}, got {getattr(self, name)}")
        if self.input_size % self.patch:
            raise UserError(
                f"patch {self.patch} does not divide the latents' side {self.input_size}; choose --model.patch so"
            )
        unfit = [type(kind).__name__ for kind in self.kinds if not kind.takes_class_token]
        if self.aligns_class_token and unfit:
            raise UserError(
                f"{unfit[0]} aligns patch tokens only, and --model.class-token puts one before them; choose another "
                "--loss.alignment"
            )
        if self.class_width and self.kind not in WITH_CLASS_TOKEN:
            raise UserError(f"a class token joins the sequence of --model.kind sit or rit only, got {self.kind}")
        if self.width % self.heads or self.width % 4:
            raise UserError(f"width must be a multiple of heads ({self.heads}) and of 4, got {self.width}")
        if self.kind == "ditdh":
            for name in ("head_width", "head_depth", "head_heads"):
                if getattr(self, name) < 1:
                    raise UserError(f"the model's {name} must be at least 1, got {getattr(self, name)}")
            if self.head_width % self.head_heads:
                raise UserError(
                    f"head_width must be a multiple of head_heads ({self.head_heads}), got {self.head_width}"
                )
        if self.context and not 1 <= self.context_block <= self.depth:
            raise UserError(f"the context's block must lie in 1 to {self.depth}, got {self.context_block}")
        for block, _ in self.targets:
            if not 1 <= block <= self.depth:
                raise UserError(f"an alignment block must lie in 1 to {self.depth}, got {block}")

    @property
    def kinds(self) -> tuple[Alignment, ...]:
        """How each target is aligned with."""
        return self.alignments or (Cosine(),) * len(self.targets)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """What the model is given and what is drawn, without the batch axis."""
        shape = (self.channels, self.input_size, self.input_size)
        return (math.prod(shape) + self.class_width,) if self.class_width else shape

    @property
    def aligns_class_token(self) -> bool:
        """Whether projections are of the class token and the patches, as REG's, or of the patches alone."""
        return self.class_width > 0 and self.kind == "sit"

    @property
    def sequences(self) -> tuple[tuple[int, int], ...]:
        """(tokens, width) of each block, those of a head last."""
        n_patches = self.grid**2
        own = [(n_patches + n_before, self.width) for n_before in self.tokens_before]
        return (*own, *[(n_patches, self.head_width)] * self.head_depth)

    @property
    def tokens_before(self) -> tuple[int, ...]:
        """How many tokens stand before the patches, block by block: the label's, then the class token."""
        of_class = int(self.class_width > 0)
        return tuple(
            of_class + (self.context if block >= self.context_block else 0) for block in range(1, self.depth + 1)
        )

    @property
    def grid(self) -> int:
        """Tokens a side."""
        return self.input_size // self.patch

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.channels * OUTPUTS_PER_CHANNEL[self.kind]


class DiffusionTransformer(nn.Module):
    """output, projections = DiffusionTransformer(geometry)(x, t, y)."""

    def __init__(self, config: Geometry) -> None:
        super().__init__()
        self.config = config
        self._make_embedders()
        self.pos_embed = nn.Parameter(self._position(), requires_grad=False)  # a parameter, as the checkpoints hold it
        self.blocks = nn.ModuleList(self._make_blocks())
        self.projectors = nn.ModuleList()
        self.final_layer = self._make_final_layer()
        self._initialise()
        # Drawn last, so that a seed gives the transformer the same weights with and without alignment or class token.
        for (_, width), kind in zip(config.targets, config.kinds, strict=True):
            projector = kind.projector(config.width, config.projector_width, width, config.grid)
            self.projectors.append(projector.apply(xavier))
        self._add_parts()

    def forward(self, x: Tensor, t: Tensor, y: Tensor, with_projections: bool = True) -> tuple[Tensor, list[Tensor]]:
        """Output (B, C or 2C, H, W) at latents x (B, C, H, W), times t (B,) and labels y int64 (B,).

        The second result holds a projection (B, T, target width) for each target, empty without `with_projections`.
        """
        config = self.config
        assert x.shape[1:] == config.state_shape, x.shape
        tokens, time, label = self.embed(x), self.t_embedder(t), self.y_embedder(y)
        condition = self.condition(time, label)
        projections: list[Tensor] = [tokens] * (len(config.targets) if with_projections else 0)
        for number, block in zip(range(1, config.depth + 1), self.blocks, strict=False):
            tokens = block(self.before_block(number, tokens, label), condition)
            for i in range(len(projections)):
                if config.targets[i][0] == number:
                    projections[i] = self.projectors[i](self.aligned(tokens))
        return self.output(tokens, condition, x, time), projections

    def embed(self, x: Tensor) -> Tensor:
        """Tokens (B, T, D) of latents (B, C, H, W), with their positions."""
        return self.x_embedder(x) + self.pos_embed

    def condition(self, time: Tensor, label: Tensor) -> Tensor:
        """What the blocks are modulated by (B, D), of embedded times and labels (B, D)."""
        return time + label

    def before_block(self, number: int, tokens: Tensor, label: Tensor) -> Tensor:
        """The tokens (B, T, D) that block `number`, counted from 1, is given."""
        return tokens

    def aligned(self, tokens: Tensor) -> Tensor:
        """The tokens (B, T, D) of a block that are projected."""
        return tokens

    def output(self, tokens: Tensor, condition: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """The output (B, C or 2C, H, W) of the last block's tokens; of x and embedded times besides, with a head."""
        return self._unpatchified(self.final_layer(tokens, condition))

    def _unpatchified(self, pixels: Tensor) -> Tensor:
        config = self.config
        return unpatchify(pixels, config.patch, config.grid, config.out_channels)

    def _make_embedders(self) -> None:
        config = self.config
        self.x_embedder = PatchEmbed(config.channels, config.width, config.patch)
        self.t_embedder: nn.Module = TimestepEmbedder(config.width)
        self.y_embedder = LabelEmbedder(config.n_classes, config.width)

    def _make_blocks(self) -> list[Block]:
        config = self.config
        return [Block(config.width, config.heads, config.qk_norm) for _ in range(config.depth)]

    def _make_final_layer(self) -> FinalLayer:
        return FinalLayer(self.config.width, self.config.patch, self.config.out_channels)

    def _position(self) -> Tensor:
        """Of the tokens, (1, T, D)."""
        return sincos_position_embedding(self.config.width, self.config.grid)

    def _add_parts(self) -> None:
        """Make and initialise what a kind of model has besides."""

    def _initialise(self) -> None:
        """DiT's initialisation: what a block adds starts at zero, and so does the output."""
        self.apply(xavier)
        xavier_patches(self.x_embedder)
        self._initialise_conditions()
        self._zero_output()

    def _initialise_conditions(self) -> None:
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for name, parameter in self.t_embedder.named_parameters():
            if name.startswith("mlp.") and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)

    def _zero_output(self) -> None:
        zeroed: list[nn.Module] = [self.final_layer.linear, self.final_layer.adaLN_modulation[-1]]
        zeroed += [layer for name, layer in self.blocks.named_modules() if name.endswith("adaLN_modulation.1")]
        for layer in zeroed:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)


def xavier_patches(embedder: PatchEmbed) -> None:
    """DiT's initialisation of a patch embedding, as if it were a linear layer."""
    nn.init.xavier_uniform_(embedder.proj.weight.view(len(embedder.proj.weight), -1))
    nn.init.zeros_(embedder.proj.bias)  # type: ignore[arg-type]


def xavier(module: nn.Module) -> None:
    """DiT's initialisation of linear layers, for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
