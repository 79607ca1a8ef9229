"""Weights out of files that hold foreign objects, and nothing of those is ever run."""

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from tools.support.tensor_pickle import Skipped, read_torch_zip
from tools.support.weight_files import read_tensors


class Configuration(dict):
    """What a trainer keeps beside its weights; tells when one is made."""

    made = 0

    def __init__(self, **values):
        super().__init__(**values)
        Configuration.made += 1

    def __setstate__(self, state):
        Configuration.made += 1


class Listed(list):
    """A list of a foreign class."""


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def weights() -> dict[str, torch.Tensor]:
    shared = torch.arange(24, dtype=torch.float32)
    return OrderedDict(
        plain=torch.randn(3, 4),
        view=shared[4:20].view(4, 4).T,
        same=shared,
        half=torch.randn(5).bfloat16(),
        count=torch.tensor(7),
        empty=torch.zeros(0, 3),
        flags=torch.tensor([True, False]),
        parameter=torch.nn.Parameter(torch.randn(2)),
    )


def equal(found: dict, wanted: dict) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        for name, tensor in wanted.items()
    )


def test_objects_beside_the_weights_are_passed_over(tmp_path):
    wanted, settings = weights(), Configuration(lr=0.1)
    settings.extra = [1]
    torch.save(
        {
            "model": wanted,
            "config": settings,
            "max_accuracy": np.float64(81.5),
            "epoch": 300,
            "history": Listed([1, 2]),
            "names": {"a", "b"},
            "dtype": torch.float32,
        },
        tmp_path / "a.pth",
    )
    Configuration.made = 0
    with pytest.raises(ValueError, match="holds more than tensors"):
        read_tensors(tmp_path / "a.pth")
    assert equal(read_tensors(tmp_path / "a.pth", skip_objects=True), wanted)
    content = read_torch_zip(tmp_path / "a.pth")
    assert type(content["config"]) is Skipped and content["epoch"] == 300
    assert Configuration.made == 0
    # Storages are shared as they were.
    found = content["model"]
    assert found["view"].untyped_storage().data_ptr() == found["same"].untyped_storage().data_ptr()


@pytest.mark.parametrize("protocol", [2, 4])
def test_bombs_do_not_go_off(tmp_path, protocol):
    target, wanted = tmp_path / "exploded", weights()
    torch.save(
        {"model": wanted, "config": Bomb(target)}, tmp_path / "a.pth", pickle_protocol=protocol
    )
    assert equal(read_torch_zip(tmp_path / "a.pth")["model"], wanted)
    torch.save({"model": {"weight": Bomb(target)}}, tmp_path / "b.pth", pickle_protocol=protocol)
    with pytest.raises(ValueError, match="no state dict"):
        read_tensors(tmp_path / "b.pth", skip_objects=True)
    assert not target.exists()
    pickle.loads(pickle.dumps(Bomb(target)))  # it would have
    assert target.is_dir()


def zipped(path: Path, data: bytes, **storages: bytes) -> Path:
    """A file like those of torch.save around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key}", content)
    return path


# Pickles by hand: what they try is in the comment.
_ID = b"ctorch\nFloatStorage\nX\x01\x00\x00\x00%bX\x03\x00\x00\x00cpuK\x02tQ"
_STORAGE = b"(X\x07\x00\x00\x00storage" + _ID % b"k"
_REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.mark.parametrize(
    "data",
    [
        # change what the function that rebuilds tensors does
        _REBUILD + b"N}X\x0c\x00\x00\x00__defaults__K\x01s\x86b.",
        # change a class that is shared by all later files
        b"cwhatever\nThing\nN}X\x06\x00\x00\x00appendK\x01s\x86b.",
        b"ccollections\nOrderedDict\nN}X\x06\x00\x00\x00updateK\x01s\x86b.",
        # a tensor that reaches beyond its storage
        _REBUILD + b"(" + _STORAGE + b"K\x00K\x09\x85K\x01\x85\x89NtR.",
        # a tensor whose storage is none, a storage that is no file, a class called as a function
        _REBUILD + b"(K\x01K\x00K\x01\x85K\x01\x85\x89NtR.",
        b"(X\x07\x00\x00\x00storage" + _ID % b"z" + b".",
        b"(X\x06\x00\x00\x00module" + _ID % b"k" + b".",
        b"ctorch\nFloatStorage\n)R.",
        # codes of copyreg, an unfinished file, no pickle
        b"\x80\x02\x82\x01.",
        b"\x80\x02}",
        b"hello",
    ],
)
def test_pickles_that_are_not_as_they_should_be(tmp_path, data):
    with pytest.raises(ValueError, match=r"a\.pth"):
        read_torch_zip(zipped(tmp_path / "a.pth", data, k=bytes(8)))
    assert Skipped().append(1) is None and "update" not in vars(Skipped)
    torch.save({"model": weights(), "config": Listed()}, tmp_path / "b.pth")
    assert read_torch_zip(tmp_path / "b.pth")["model"]["count"] == 7


def test_the_storage_of_those_pickles_is_sound(tmp_path):
    data = _REBUILD + b"(" + _STORAGE + b"K\x00K\x02\x85K\x01\x85\x89NtR."
    found = read_torch_zip(zipped(tmp_path / "a.pth", data, k=np.float32([1, 2]).tobytes()))
    assert found.tolist() == [1, 2]
    call = b"cbuiltins\neval\nX\x01\x00\x00\x001\x85R."
    assert type(read_torch_zip(zipped(tmp_path / "b.pth", call))) is Skipped


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x80\x02}q\x00."])
def test_what_is_no_zip(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ValueError, match="damaged, or no file"):
        read_torch_zip(tmp_path / "a.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("skip_objects", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_damaged_files_of_torch_are_named(tmp_path, zipped, skip_objects):
    """Cut anywhere, or with any byte of the pickles and headers changed."""
    path = tmp_path / "a.pth"
    torch.save({"model": {"w": torch.ones(3)}}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    ends = range(1, len(whole), 13)
    changed = ((at, whole[at] ^ flip) for at in range(3, len(whole), 5) for flip in (0x11, 0x80))
    damaged = [whole[:end] for end in ends]
    damaged += [whole[:at] + bytes([byte]) + whole[at + 1 :] for at, byte in changed]
    for content in damaged:
        path.write_bytes(content)
        try:
            read_tensors(path, ("model",), skip_objects)
        except ValueError as error:
            assert str(path) in str(error)
