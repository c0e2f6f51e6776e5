"""Identities are stored and hashed as ever: `data/identities.json` was written when an identity was a mapping.

Weights are a file of the bytes `weights`, whose hash is all that an identity has of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import features
from pipeline.config import PrecomputeConfig
from pipeline.encoders import vae
from pipeline.encoders.catalogue import VAES, VISION
from pipeline.plan import plan_groups
from storage import StoreError, StoreLayout, open_store
from storage.__main__ import main
from storage.codecs import codec_of
from storage.exchange import from_hdf5, from_repa_npy
from storage.exchange.incoming import ImportOptions, import_store
from storage.feature_file import open_feature_file, read_npz_array, write_feature_file
from storage.identity import FeaturesIdentity, Identity, LatentsIdentity, VectorsIdentity, identity_digest, parse
from tests.storage.edits import set_field
from tests.stores import FEATURES, make_store

WRITTEN: dict[str, tuple[str, dict[str, Any]]] = json.loads(
    (Path(__file__).parent.parent / "data" / "identities.json").read_text()
)


def require_as_written(case: str, stored: Any) -> None:
    """The same fields in the same order, and so the same bytes and digest."""
    digest, fields = WRITTEN[case]
    assert json.dumps(stored) == json.dumps(fields), case
    assert identity_digest(stored) == digest, case


def planned(resolution: int = 256, **options: Any) -> Identity:
    """The identity of the only group that the options name."""
    config = PrecomputeConfig(
        **{"data": "d", "store": "s", "latents": "none", "features": "none", "resolution": resolution, **options}
    )
    layout = StoreLayout(n_rows=4, views=config.views, resolution=resolution, shard_rows=4)
    (group,) = plan_groups(config, layout, "1" * 64)
    assert group.identity.digest == identity_digest(group.identity.plain())
    return group.identity


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of weights, and folders `4` and `16` of autoencoders with so many channels, one with a whole scale."""
    configs = {
        "4": {"block_out_channels": [1] * 4, "scaling_factor": 1},
        "16": {"block_out_channels": [1] * 4, "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
    }
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / vae.CONFIG_FILE).write_text(json.dumps(config))
        (tmp_path / name / vae.WEIGHT_FILES[0]).write_bytes(b"weights")
    (tmp_path / "weights.bin").write_bytes(b"weights")
    return tmp_path / "weights.bin"


def test_every_encoder_s_identity_is_stored_as_ever(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, model in VISION.items():
        given = "" if model.family == "tiny_vit" else str(weights)
        require_as_written(name, planned(model.resolution or 256, features=name, features_weights=given).plain())
    for options in ("layer=2", "tokens=patch", "tokens=cls", "layer=2:tokens=patch:precision=bf16"):
        require_as_written(f"tiny-vit:{options}", planned(128, features=f"tiny-vit:{options}").plain())
    quantised = planned(128, flip=True, features="tiny-vit", features_dtype="int8")
    require_as_written("tiny-vit int8", quantised.plain())
    compiled = planned(128, features="tiny-vit", compile=True, precision="tf32")
    require_as_written("tiny-vit compiled", compiled.plain())
    large = planned(512, features="dinov2-vitb14", features_weights=str(weights))
    require_as_written("dinov2-vitb14 512", large.plain())
    for name, known in VAES.items():
        given = "" if name == "tiny-vae" else str(weights.parent / str(known.channels))
        if known.posterior:
            require_as_written(name, planned(128, latents=name, latents_weights=given).plain())
    require_as_written("a folder", planned(256, flip=True, latents=str(weights.parent / "16")).plain())
    deterministic = vae.Geometry(
        class_name="AutoencoderDC", channels=32, factor=32, posterior=False, scale=0.41407, shift=0.0
    )
    monkeypatch.setattr(vae, "read_geometry", lambda directory: deterministic)
    folder = str(weights.parent / "4")
    require_as_written("dc-ae-f32c32", planned(latents="dc-ae-f32c32", latents_weights=folder).plain())


def test_imported_identities_are_stored_as_ever(tmp_path: Path) -> None:
    folder, options = tmp_path / "vae-sd", ImportOptions(name="sd-vae", resolution=32)
    names = [f"00000/img{i:08d}.npy" for i in range(3)]
    (folder / "00000").mkdir(parents=True)
    for name in names:
        np.save(folder / name, np.ones((8, 4, 4), np.float32))
    (folder / "dataset.json").write_text(json.dumps({"labels": [[name, i] for i, name in enumerate(names)]}))
    import_store(str(tmp_path / "imported"), from_repa_npy.read(folder, options), options)
    require_as_written("imported", stored(tmp_path / "imported", "latents/sd-vae"))
    main(["export", str(tmp_path / "imported"), "--to", "hdf5", "--out", str(tmp_path / "x.h5")])
    import_store(str(tmp_path / "again"), from_hdf5.read(tmp_path / "x.h5", options), options)
    require_as_written("imported from an export", stored(tmp_path / "again", "latents/sd-vae"))


def stored(root: Path, group: str) -> Any:
    return json.loads((root / group / "zarr.json").read_bytes())["attributes"]["identity"]


@pytest.mark.parametrize(
    ("case", "name", "token", "side"),
    [("inception", "inception", "cls", 256), ("vectors tiny-vit", "tiny-vit", "mean", 128),
     ("vectors dinov2", "dinov2-vitb14", "cls", 256)],
)  # fmt: skip
def test_identities_of_feature_files_are_stored_as_ever(
    weights: Path, tmp_path: Path, case: str, name: str, token: features.Token, side: int
) -> None:
    identity, _ = features.resolve(name, None if name == "tiny-vit" else weights, token, (side, side))
    write_feature_file(tmp_path / "f.npz", {"features": np.zeros((1, 2), np.float32)}, identity, {"n": 1})
    require_as_written(f"feature file, {case}", json.loads(str(read_npz_array(tmp_path / "f.npz", "identity"))))
    assert open_feature_file(tmp_path / "f.npz").identity == identity


def cases() -> Iterator[tuple[str, type[Any], dict[str, Any]]]:
    for case, (_, fields) in WRITTEN.items():
        of_a_group = LatentsIdentity if fields.get("kind") == "latents" else FeaturesIdentity
        yield case, VectorsIdentity if "vector" in fields else of_a_group, fields


def test_what_is_parsed_is_written_again_to_the_byte() -> None:
    odd = {"others": 1, "token_grid": None, "patch": {"a": [None, 1.0]}, "order": [], "layer": 3, "kind": None}
    for case, kind, fields in cases():
        for written in (fields, dict(reversed(fields.items())), {**odd, **fields}, {**fields, "scale": 1e-9}):
            identity = parse(kind, written, "", "")
            assert json.dumps(identity.plain()) == json.dumps(written), case
            assert identity.digest == identity_digest(written)
    assert parse(FeaturesIdentity, odd, "", "").plain() == odd


def test_what_code_computes_with_is_checked_and_named() -> None:
    wrong = {"latent_channels": 4.0, "latent_size": [4], "latent_scale_factor": 0, "latent_shift_factor": 10**400}
    for field, value in {**wrong, "posterior": 1, "encoder": 7, "codec": "int8", "views": "all"}.items():
        with pytest.raises(StoreError, match=rf"^here is damaged \({field}.*, got .*\); restore it$"):
            parse(LatentsIdentity, {field: value}, "here", "restore it")


def test_a_user_s_own_fields_are_kept_and_decide_reuse(tmp_path: Path) -> None:
    make_store(tmp_path)
    identity = open_store(tmp_path).group(FEATURES).identity
    mine = replace(identity, others={"patch": 16})
    assert list(mine.of_samples(["original"], "d").plain())[-3:] == ["patch", "views", "index_digest"]
    assert mine.digest != identity.digest
    with pytest.raises(StoreError, match="patch: found nothing, asked for 16"):
        open_store(tmp_path).group(FEATURES, expect=mine)


def test_another_version_is_refused_as_such(tmp_path: Path) -> None:
    make_store(tmp_path)
    set_field(f"{FEATURES}/zarr.json", ("attributes", "identity", "codec"), {"name": "fp4", "block": 16})(tmp_path)
    identity = open_store(tmp_path).group(FEATURES).identity
    with pytest.raises(StoreError, match=r"a codec that this code does not know, {'name': 'fp4'.*; use the code that"):
        codec_of(identity)
    set_field(f"{FEATURES}/zarr.json", ("attributes", "format_version"), 2)(tmp_path)
    with pytest.raises(StoreError, match="has format version 2, not 1"):
        open_store(tmp_path).group(FEATURES)
