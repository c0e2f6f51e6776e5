"""Inception-v3 of 2015-12-05, the network that FID is defined by, in torch-fidelity's port of the TensorFlow graph.

Images of any size are resized as TensorFlow 1 did it (bilinear, no half-pixel centres) to 299 and scaled by
(x − 128)/128. Of the network are taken

    features  (2048)   the last average pool                                   FID (arXiv 1706.08500), precision, recall
    spatial   (2023)   7 channels of the 17×17 map of `mixed_6`'s first branch  sFID (arXiv 2103.03841)
    logits    (1008)   without the final bias                                  the Inception Score

as ADM's evaluator takes them (arXiv 2105.05233), so that its reference batches' statistics can be used. The network is
convolutions in float32: the numbers of one image differ in the sixth digit between devices and batch sizes.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from pipeline.encoders.precision import arithmetic
from pipeline.encoders.weights import file_sha256, read_weights
from storage.base.errors import UserError
from storage.feature_file import FEATURES, LOGITS, SPATIAL
from storage.identity import VectorsIdentity

SPATIAL_CHANNELS = 7


def describe(weights: Path | None) -> VectorsIdentity:
    """What determines the numbers. Raises UserError when the weights are missing, with what to fetch and where to."""
    path = find_weights(weights)
    sha256 = file_sha256(path)
    return VectorsIdentity(
        name="inception",
        encoder="inception-v3-2015-12-05",
        weights_sha256=sha256,
        published_weights=sha256.startswith(_expected_sha256()),
        preprocessing="TensorFlow 1 bilinear to 299, (x-128)/128",
        vector="pool_3",
    )


class Inception:
    """The network on a device."""

    def __init__(self, weights: Path | None, device: torch.device) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = find_weights(weights)
        try:
            with TemporaryDirectory() as folder:  # the library would run what is in the file: it is given a copy
                torch.save(read_weights(path), copy := Path(folder) / "inception.pth")
                network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(copy))
        except RuntimeError as error:
            first = " ".join(str(error).split())[:160]
            raise UserError(
                f"{path} holds other weights than torch-fidelity's Inception ({first}…); {_remedy()}"
            ) from None
        self._network = network.to(device)
        self._device = device
        self._spatial: list[Tensor] = []
        self._network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    @torch.inference_mode()
    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """`features`, `spatial` and `logits`, float32 (B, …), of images uint8 (B, H, W, 3)."""
        self._spatial.clear()
        with arithmetic("fp32", self._device):
            pooled, logits = self._network(images.to(self._device).permute(0, 3, 1, 2))
        # TensorFlow's maps have their channels last, and so are the reference statistics ordered.
        spatial = self._spatial[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        arrays = {FEATURES: pooled, SPATIAL: spatial, LOGITS: logits}
        return {name: array.float() for name, array in arrays.items()}

    def _keep(self, module: nn.Module, arguments: object, output: Tensor) -> None:
        self._spatial.append(output)


def find_weights(weights: Path | None) -> Path:
    """The file given, or the one in torch's cache. Raises UserError saying what to fetch and where to put it."""
    if weights is not None:
        if not weights.is_file():
            raise UserError(f"Inception's weight file {weights} does not exist; {_remedy()}")
        return weights
    cached = Path(torch.hub.get_dir()) / "checkpoints" / _file_name()
    if not cached.is_file():
        raise UserError(f"Inception's weights are not in {cached}; {_remedy()}")
    return cached


def _url() -> str:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return URL_INCEPTION_V3


def _file_name() -> str:
    return _url().rpartition("/")[2]


def _expected_sha256() -> str:
    """The first digits of the published file's hash, which torch's cache has in the file's name."""
    return _file_name().removesuffix(".pth").rpartition("-")[2]


def _remedy() -> str:
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    return f"fetch {_url()} and put it into {cache}, or pass --weights FILE"
