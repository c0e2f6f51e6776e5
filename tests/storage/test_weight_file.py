"""Files of weights as data: what torch and safetensors write is read right, and what is crafted is one line, never run.

Archives are made by torch itself, then edited: a zip's records are taken apart and written anew.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import resource
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.encoders.weights import read_weights
from storage.base.errors import UserError
from storage.weights.file import open_weights
from storage.weights.tensors import Stored
from tests.examples import examples

FLAT = torch.randn(40)
STATE: dict[str, Tensor] = {
    "a.w": torch.randn(3, 4),
    "a.b": torch.randn(5).bfloat16(),
    "half": torch.randn(2, 2).half(),
    "turned": torch.randn(4, 6).t(),
    "number": torch.tensor(3.0),
    "parameter": nn.Parameter(torch.randn(2)),
    "empty": torch.zeros(0, 3),
    "view": FLAT[10:16].view(2, 3),
    "view2": FLAT[20:30:3],
    "whole": torch.arange(4),
    "flags": torch.tensor([True, False]),
}
NEWER: dict[str, Tensor] = {"f8": torch.randn(4).to(torch.float8_e4m3fn), "u16": torch.ones(3, dtype=torch.uint16)}


def saved(value: Any, path: Path, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def read(path: Path) -> dict[str, Tensor]:
    with open_weights(path) as file:
        return file.tensors({name: value for name, value in file.entries().items() if isinstance(value, Stored)})


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name].float(), value.detach().float()), name


def scripted(path: Path, module: nn.Module) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to replace TorchScript
        torch.jit.script(module).save(str(path))
    return path


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> Path:
    """The archive with each record as `change` makes it; None leaves one out."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            changed = change(name, content)
            if changed is not None:
                archive.writestr(name, changed)
    return path


@pytest.mark.parametrize("legacy", [False, True])
def test_what_torch_saves_is_read(tmp_path: Path, legacy: bool) -> None:
    state = STATE if legacy else STATE | NEWER
    beside = {"args": argparse.Namespace(p=tmp_path, n=np.float32(1)), "when": datetime.now(UTC), "rng": {1, 2}}
    tree = {"model": state, "n": np.int64(3), "opt": {"state": {0: {"step": torch.tensor(1.0)}}}, **beside}
    found = read(saved(tree, tmp_path / "x", _use_new_zipfile_serialization=not legacy))
    assert_same(
        found, {f"model.{name}": value for name, value in state.items()} | {"opt.state.0.step": torch.tensor(1.0)}
    )
    ours = torch.load(tmp_path / "x", weights_only=False)["model"]
    assert_same({name: found[f"model.{name}"] for name in ours}, ours)


def test_safetensors_are_read_under_any_name(tmp_path: Path) -> None:
    state = {name: value.detach().contiguous().clone() for name, value in STATE.items()}
    save_file(state, tmp_path / "x.pt")
    assert_same(read(tmp_path / "x.pt"), state)


class Clip(nn.Module):
    """Names as OpenAI's archives have them."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Conv2d(3, 4, 2), nn.LayerNorm(4))
        self.logit_scale = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("attn_mask", torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.visual(x) * self.logit_scale


def test_a_torchscript_archive_is_read_and_none_of_its_code(tmp_path: Path) -> None:
    module = Clip().half()
    path = scripted(tmp_path / "clip.pt", module)
    expected = {name: value.float() for name, value in module.state_dict().items()}
    assert_same(read_weights(path), expected)
    rewritten(path, lambda name, content: b"junk(" if name.endswith(".py") or "debug" in name else content)
    assert_same(read_weights(path), expected)


class Writes(nn.Module):
    """Its `__setstate__` writes a file where torch.jit.load would run it."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.weight = torch.zeros(3)
        self.path = path

    def forward(self, x: Tensor) -> Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, str, bool]:
        return self.weight, self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, str, bool]) -> None:
        self.path, self.training = state[1], state[2]
        self.weight = torch.from_file(self.path, True, 16, dtype=torch.uint8).fill_(65).float()


def test_setstate_of_a_torchscript_archive_is_not_run(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious content")
    path = scripted(tmp_path / "hostile.pt", Writes(str(victim)))
    victim.write_bytes(b"precious content")
    with pytest.raises(UserError, match=r"hostile\.pt cannot be read: it holds a __torch__.* without tensors by name"):
        read_weights(path)
    assert victim.read_bytes() == b"precious content"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.load(str(path))
    assert victim.read_bytes() == b"A" * 16, "what it would have done"


class Runs:
    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call = (call, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("where", ["top", "beside", "key"])
def test_a_call_in_a_pickle_is_named_and_not_made(tmp_path: Path, legacy: bool, where: str) -> None:
    touched = tmp_path / "touched"
    for call in (Runs(os.system, f"touch {touched}"), Runs(eval, f"open({str(touched)!r}, 'w')"), Runs(exec, "1")):
        value = {"top": call, "beside": {**STATE, "x": call}, "key": {**STATE, call: 1}}[where]
        path = saved(value, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(
            UserError, match=r"holds more than tensors.*(posix\.system|builtin\w*\.(eval|exec))"
        ) as caught:
            read(path)
        assert "\n" not in str(caught.value)
    assert not touched.exists()


def pickled(change: Callable[[bytes], bytes]) -> Callable[[str, bytes], bytes]:
    return lambda name, content: change(content) if name.endswith("data.pkl") else content


HUGE = struct.pack("<i", 2**31 - 1)
CRAFTED: dict[str, Callable[[Path], Any]] = {
    "offset": lambda p: rewritten(p, pickled(lambda b: b.replace(b"QK\x00", b"QK\x63", 1))),
    "size": lambda p: rewritten(p, pickled(lambda b: b.replace(b"K\x07K\x05", b"K\x63K\x05", 1))),
    "stride": lambda p: rewritten(p, pickled(lambda b: b.replace(b"K\x05K\x01", b"K\x63K\x01", 1))),
    "negative": lambda p: rewritten(p, pickled(lambda b: b.replace(b"K\x07K\x05", b"J\xff\xff\xff\xffK\x05", 1))),
    "huge": lambda p: rewritten(p, pickled(lambda b: b.replace(b"K\x07K\x05", b"J" + HUGE + b"J" + HUGE, 1))),
    "repeated": lambda p: rewritten(
        p, pickled(lambda b: b.replace(b"K\x07K\x05", b"J" + HUGE + b"K\x05").replace(b"K\x05K\x01", b"K\x00K\x00"))
    ),
    "no record": lambda p: rewritten(p, lambda name, content: None if name.endswith("data/0") else content),
    "short record": lambda p: rewritten(p, lambda name, content: content[:8] if name.endswith("data/0") else content),
    "bomb": lambda p: rewritten(
        p, lambda name, content: bytes(1 << 27) if name.endswith("data/0") else content, zipfile.ZIP_DEFLATED
    ),
    "no pickle": lambda p: rewritten(p, lambda name, content: None if name.endswith("data.pkl") else content),
    "endless": lambda p: rewritten(p, pickled(lambda b: b[:-1])),
    "memo": lambda p: rewritten(p, pickled(lambda b: b"\x80\x02}r\xff\xff\xff\xffX\xff\xff\xff\x7f")),
    "deep": lambda p: rewritten(p, pickled(lambda b: b"\x80\x02" + b"(" * 200_000 + b"}" + b"t" * 200_000 + b".")),
    "many": lambda p: rewritten(p, pickled(lambda b: multiplied())),
    "itself": lambda p: rewritten(p, pickled(lambda b: b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.")),
    "byte order": lambda p: rewritten(p, lambda name, content: b"big" if name.endswith("byteorder") else content),
    "header": lambda p: p.write_bytes(struct.pack("<Q", 1 << 60) + b"{" + bytes(100)),
    "large header": lambda p: p.write_bytes(struct.pack("<Q", 1 << 25) + b"{" + bytes(1 << 25)),
    "header json": lambda p: p.write_bytes(struct.pack("<Q", 100) + b"{" + b"[" * 99),
    "overlap": lambda p: p.write_bytes(safetensors_header('{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,999]}}')),
    "int": lambda p: p.write_bytes(pickle.dumps(7)),
    "zip": lambda p: p.write_bytes(b"PK\x03\x04" + bytes(200)),
    "empty": lambda p: p.write_bytes(b""),
    "text": lambda p: p.write_text("junk\n"),
    "half": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "folder": lambda p: (p.unlink(), p.mkdir()),
    "pipe": lambda p: (p.unlink(), os.mkfifo(p)),
    "gone": lambda p: p.unlink(),
}


def multiplied() -> bytes:
    """Dicts that hold one another twelve times over, 12 levels deep."""
    tree: dict[str, Any] = {"x": torch.zeros(0).numpy().tolist()}
    for _ in range(12):
        tree = {str(i): tree for i in range(12)}
    return pickle.dumps(tree, protocol=2)


def safetensors_header(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode() + bytes(16)


@pytest.mark.parametrize("craft", CRAFTED)
def test_what_is_crafted_is_one_line(tmp_path: Path, craft: str) -> None:
    path = saved({"w": torch.randn(7, 5)}, tmp_path / "x.pt")
    CRAFTED[craft](path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"x\.pt") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "kB"


BASES = [(STATE, True), (STATE, False)]


@settings(max_examples=examples(150), deadline=None)
@given(data=st.data())
def test_any_edit_of_bytes_is_one_line_or_tensors(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    state, new = data.draw(st.sampled_from(BASES))
    buffer = io.BytesIO()
    torch.save({"model": state}, buffer, _use_new_zipfile_serialization=new)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "edited.pt"
    path.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    try:
        read_weights(path)
    except UserError as error:
        said = str(error)
        assert "\n" not in said and len(said) < 600, said  # noqa: PT018


def test_many_names_of_one_storage_cost_no_more_than_the_file(tmp_path: Path) -> None:
    flat = torch.zeros(1000)
    path = saved({f"w{i}": flat[i:] for i in range(100)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="declares tensors of"):
        read(path)


def test_distributed_and_other_tensors_are_named(tmp_path: Path) -> None:
    for value, says in (
        (torch.zeros(2, 2).to_sparse(), "dense"),
        (np.zeros(3), "NumPy"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = saved({"w": value, "b": torch.zeros(2)}, tmp_path / "x.pt")
        with pytest.raises(UserError, match=f"w is .*{says}|{says}"):
            read_weights(path)


@pytest.mark.slow
def test_a_distributed_tensor_says_what_to_do(tmp_path: Path) -> None:
    code = (
        "import sys, torch, torch.distributed as dist\n"
        "from torch.distributed.tensor import DTensor, init_device_mesh, Replicate\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "mesh = init_device_mesh('cpu', (1,))\n"
        "torch.save({'w': DTensor.from_local(torch.zeros(2), mesh, [Replicate()])}, sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.pt")], check=True, capture_output=True)
    with pytest.raises(UserError, match=r"w is a .*DTensor.*gather"):
        read_weights(tmp_path / "x.pt")


PREFIXED: dict[str, Callable[[str], str]] = {
    "module": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "other way": lambda name: f"_orig_mod.module.{name}",
    "twice": lambda name: f"module.module.{name}",
    "some": lambda name: f"module.{name}" if "a" in name else name,
    "within": lambda name: name.replace("a.", "a._checkpoint_wrapped_module._orig_mod."),
    "lightning": lambda name: f"model.{name}",
    "all": lambda name: f"model.module._orig_mod.{name}",
}


@pytest.mark.parametrize("prefix", PREFIXED)
@pytest.mark.parametrize("wrapper", [(), ("model",), ("state_dict",), ("state_dict", "model"), ("module",)])
def test_weights_of_an_encoder_are_found_under_any_prefix(
    tmp_path: Path, prefix: str, wrapper: tuple[str, ...]
) -> None:
    tree: dict[str, Any] = {PREFIXED[prefix](name): value for name, value in STATE.items()}
    for name in wrapper:
        tree = {name: tree, "epoch": 3}
    assert_same(read_weights(saved(tree, tmp_path / "x.pth")), STATE)


def test_two_names_of_one_weight_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.pt has w and module\.w, one weight twice"):
        read_weights(saved({"w": torch.zeros(2), "module.w": torch.ones(2)}, tmp_path / "x.pt"))
