"""HDF5 and ONNX files can name other files: only what is in the file itself is read."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from pipeline.dataset import Slide
from pipeline.imports.h5 import read_patches

h5py = pytest.importorskip("h5py")
CORNERS = np.zeros((4, 2))
SLIDE = Slide("s", "s.svs", width=10_000, height=10_000, levels=((10_000, 10_000, 1.0),))


def coords(data: Any, **attributes: Any) -> Callable[[Any, Path], None]:
    def write(file: Any, other: Path) -> None:
        file.create_dataset("coords", data=data).attrs.update(attributes)

    return write


def external(file: Any, other: Path) -> None:
    file["coords"] = h5py.ExternalLink(str(other), "/coords")


def pipe(file: Any, other: Path) -> None:
    os.mkfifo(other.with_name("pipe"))
    file["coords"] = h5py.ExternalLink(str(other.with_name("pipe")), "/coords")


def soft(file: Any, other: Path) -> None:
    file["x"] = h5py.ExternalLink(str(other), "/coords")
    file["coords"] = h5py.SoftLink("/x")


def storage(file: Any, other: Path) -> None:
    array = file.create_dataset("coords", (4, 2), "f8", external=[(str(other), 0, 64)])
    array.attrs["patch_size_level0"] = 256


def virtual(file: Any, other: Path) -> None:
    layout = h5py.VirtualLayout((4, 2), "f8")
    layout[:] = h5py.VirtualSource(str(other), "coords", shape=(4, 2))
    file.create_virtual_dataset("coords", layout).attrs["patch_size_level0"] = 256


@pytest.mark.parametrize("write", [external, pipe, soft, storage, virtual])
def test_coordinates_in_another_file_are_not_read(
    write: Callable[[Any, Path], None], tmp_path: Path
) -> None:
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        coords(CORNERS, patch_size_level0=256)(file, other)
    assert read_patches(other, SLIDE).size == 256
    with h5py.File(tmp_path / "s.h5", "w") as file:
        write(file, other)
    with pytest.raises(UserError, match=r"s\.h5: coords is in another file or a link"):
        read_patches(tmp_path / "s.h5", SLIDE)


WRONG = [
    coords([["a", "b"]], patch_size_level0=256),
    coords(np.zeros(4, [("a", "f8"), ("b", "f8")]), patch_size_level0=256),
    coords(CORNERS.astype(complex), patch_size_level0=256),
    coords(h5py.Empty("f8"), patch_size_level0=256),
    coords(np.full((4, 2), np.nan), patch_size_level0=256),
    *(
        coords(CORNERS, patch_size_level0=value)
        for value in ("big", [1, 2], float("nan"), float("inf"), -5.0, 0, h5py.Empty("f8"))
    ),
    *(
        coords(CORNERS, patch_size=256, patch_level=value)
        for value in ("x", [0, 1], float("inf"), -1, 10**15)
    ),
    *(coords(CORNERS, patch_size=256, patch_level=0, downsample=value) for value in ([], "x", 0)),
    lambda file, _: file.create_group("coords"),
    lambda file, _: file.create_dataset("coords", (2, 2), h5py.vlen_dtype("f8")),
]


def test_coordinates_of_other_kinds_are_one_line(tmp_path: Path) -> None:
    for number, write in enumerate(WRONG):
        path = tmp_path / f"{number}.h5"
        with h5py.File(path, "w") as file:
            write(file, path)
        with pytest.raises(UserError, match=f"{number}.h5") as caught:
            read_patches(path, SLIDE)
        assert "\n" not in str(caught.value)


def test_weights_of_a_network_in_another_file_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its identity is the sum of the one file."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from pipeline.tissue.learned import _open_session

    tensor = onnx.helper.make_tensor("w", 1, [1, 3, 1, 1], np.ones(3, "f4").tobytes(), raw=True)
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"])
    ends = [
        onnx.helper.make_tensor_value_info(name, 1, [1, channels, 8, 8])
        for name, channels in (("x", 3), ("y", 1))
    ]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], [tensor])
    opset = [onnx.helper.make_opsetid("", 13)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    path = tmp_path / "model.onnx"
    assert _open_session(path, model.SerializeToString()).get_inputs()[0].name == "x"
    (tmp_path / "weights.bin").write_bytes(np.ones(3, "f4").tobytes())
    monkeypatch.chdir(tmp_path)
    for location in ("weights.bin", str(tmp_path / "weights.bin"), "../other/weights.bin"):
        outside = onnx.ModelProto()
        outside.CopyFrom(model)
        onnx.external_data_helper.set_external_data(outside.graph.initializer[0], location)
        outside.graph.initializer[0].ClearField("raw_data")
        with pytest.raises(UserError, match="not a network that onnxruntime opens"):
            _open_session(path, outside.SerializeToString())
