"""What containers tell of a file beside its numbers: groups, attributes, dimensions and where these are at home."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import h5netcdf
import h5py
import numpy as np
import pytest
import xarray as xr
import zarr
from refusals import refused
from test_formats import EVERY_KIND, GROUPED, KINDS, NM, NX, NY, cube, scene_variables, write

from spectralvae.errors import InputError
from spectralvae.readers import open_reader
from spectralvae.readers.base import Place
from spectralvae.readers.containers import open_container
from spectralvae.readers.packing import text


class TestContainers:
    @EVERY_KIND
    def test_places(self, tmp_path: Path, kind: str) -> None:
        variables = {
            **scene_variables(dims=("channel", "x", "y")),
            "latitude": (("x", "y"), np.zeros((NX, NY)), {}),
            "time": (("y",), np.zeros(NY), {"units": "seconds since 2000-01-01"}),
        }
        path = write(tmp_path, kind, variables)
        assert open_reader(path).places == {
            "radiance": Place("cube", ("channel", "x", "y")),
            "wavelength": Place("wavelength", ("channel",)),
            "latitude": Place("latitude", ("x", "y")),
            "time": Place("time", ("y",)),
        }
        assert "wavelength" not in open_reader(path, wavelength=list(NM)).places

    @EVERY_KIND
    def test_attributes(self, tmp_path: Path, kind: str) -> None:
        given = {"units": "W", "number": np.float64(2.5), "vector": np.int32([1, 2]), "_FillValue": np.float32(-1)}
        path = write(tmp_path, kind, scene_variables(cube(), **given))
        with closing(open_container(path)) as container:
            found = container.attributes("cube")
            assert found.keys() == given.keys()
            for key in given.keys() - {"units"}:
                np.testing.assert_array_equal(np.ravel(found[key]), given[key])
            assert text(found["units"]) == "W"
            assert container.attributes("") == {}

    @GROUPED
    def test_groups(self, tmp_path: Path, kind: str) -> None:
        path = write(tmp_path, kind, {f"a/b/{name}": value for name, value in scene_variables().items()})
        with closing(open_container(path)) as container:
            assert container.groups() == ["a", "a/b"]
            assert container.attributes("a/b") == {}
            variables = {variable.name: variable for variable in container.variables()}
        assert variables["a/b/cube"].homes == ("a/b/y", "a/b/x", "a/b/channel")

    def test_attributes_of_hdf5(self, tmp_path: Path) -> None:
        given = {"text": "ü", "texts": np.array(["a", "b"], object), "bytes": np.bytes_(b"a"), "truth": np.bool_(True),
                 "empty": h5py.Empty("S1"), "none": np.array([], np.float32), "number": np.int16(3)}  # fmt: skip
        with h5py.File(tmp_path / "a.h5", "w") as file:
            group = file.create_group("g")
            for key, value in given.items():
                group.attrs[key] = value
            group.attrs["reference"] = group.ref
            group.attrs["compound"] = np.zeros(1, [("a", "f4")])
            file["v"] = np.zeros(2)
            file["v"].make_scale("v")
        with closing(open_container(tmp_path / "a.h5")) as container:
            found = container.attributes("g")
            assert found.keys() == given.keys()
            assert found["bytes"] == b"a"
            assert found["texts"].tolist() == ["a", "b"]
            assert container.attributes("v") == {}

    def test_dimensions_of_one_name(self, tmp_path: Path) -> None:
        sizes = {"one/a": (2, 5), "one/deep/b": (2, 5), "two/a": (3, 5)}
        for name, shape in sizes.items():
            zarr.create_array(tmp_path / "a.zarr", name=name, shape=shape, dtype="f4", dimension_names=("y", "x"))
        with closing(open_container(tmp_path / "a.zarr")) as container:
            homes = {variable.name: variable.homes for variable in container.variables()}
        assert homes == {"one/a": ("one/y", "x"), "one/deep/b": ("one/deep/y", "x"), "two/a": ("two/y", "x")}
        with h5netcdf.File(tmp_path / "a.nc", "w") as file:
            file.dimensions = {"x": 5, "y": 7}
            for name, shape in sizes.items():
                group = file.create_group(name) if name != "one/deep/b" else file["one/a"].create_group("deep")
                group.dimensions["y"] = shape[0]
                group.create_variable("v", ("y", "x"), np.float32)
        with closing(open_container(tmp_path / "a.nc")) as container:
            homes = {variable.name: variable.homes for variable in container.variables()}
        assert homes["one/a/v"] == ("one/a/y", "x")
        assert homes["one/a/deep/v"] == ("one/a/deep/y", "x")
        assert set(homes) == {"one/a/v", "one/a/deep/v", "two/a/v"}  # dimensions are no variables

    def test_coordinates_with_two_dimensions(self, tmp_path: Path) -> None:
        with h5netcdf.File(tmp_path / "a.nc", "w") as file:
            file.dimensions = {"name": 2, "length": 3}
            file.create_variable("name", ("name", "length"), "S1", data=np.array([list("abc"), list("xyz")], "S1"))
        with closing(open_container(tmp_path / "a.nc")) as container:
            (variable,) = container.variables()
            assert (variable.name, variable.homes) == ("name", ("name", "length"))
            assert container.read("name", (slice(1, 2), slice(None))).tolist() == [[b"x", b"y", b"z"]]

    @pytest.mark.parametrize("kind", ["netcdf4", "zarr3"])
    def test_texts(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / KINDS[kind]
        values = np.array(["a", "", "ü"], dtype=object)
        if kind == "netcdf4":
            xr.Dataset({"v": ("n", values), "s": ((), "one")}).to_netcdf(path, engine="h5netcdf")
        else:
            config = {"write_empty_chunks": True}
            zarr.create_array(path, name="v", shape=(3,), dtype=str, config=config)[...] = values
            zarr.create_array(path, name="s", shape=(), dtype=str, config=config)[...] = "one"
        with closing(open_container(path)) as container:
            container.check("v")
            assert container.read("v", (slice(1, 3),)).tolist() == ["", "ü"]
            assert container.read("v", (slice(0, 1),)).dtype == object
            assert container.read("s", ()).item() == "one"

    def test_only_scalars_need_no_value(self, tmp_path: Path) -> None:
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file.create_dataset("scalar", (), "i4")
            file.create_dataset("vector", (2,), "i4")
        with closing(open_container(tmp_path / "a.h5")) as container:
            container.check("scalar")
            with refused(InputError, "8 bytes", key="vector", path=tmp_path / "a.h5"):
                container.check("vector")
