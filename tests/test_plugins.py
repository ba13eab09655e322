"""Plug-ins by name: found, built from text, and written as text again."""

import pkgutil
from dataclasses import MISSING, FrozenInstanceError, fields, is_dataclass, replace
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import get_args

import pytest

from ptq import plugins
from ptq.cli import main
from ptq.contracts import EFFORTS
from ptq.errors import PluginError, PtqError

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "calibrators": ROOT / "calibrators",
    "reconstructors": ROOT / "ptq" / "reconstruct",
    "finishers": ROOT / "ptq" / "finish",
    "exporters": ROOT / "exporters",
}
ALL = [(kind, name) for kind in FOLDERS for name in plugins.names(kind)]


def _smallest(kind: str, name: str) -> str:
    """Text that builds the plug-in with as few options as it takes."""
    cls = plugins.load(kind, name)
    required = [f.name for f in fields(cls) if f.default is MISSING]
    values = {"sources": "gaussian(count=7)+images(some/where)"}
    return f"{name}:" + ",".join(f"{r}={values.get(r, 'some/where')}" for r in required)


def test_kinds():
    assert set(FOLDERS) == set(get_args(plugins.Kind))


@pytest.mark.parametrize("kind", FOLDERS)
def test_names_are_the_files_without_underscore(kind: str):
    files = sorted(f.stem for f in FOLDERS[kind].glob("*.py") if not f.stem.startswith("_"))
    assert plugins.names(kind) == files


def test_known_plug_ins_are_there():
    assert {"gaussian", "genie", "images"} <= set(plugins.names("calibrators"))
    assert {"genie_m", "nearest"} <= set(plugins.names("reconstructors"))
    assert "onnx_qdq" in plugins.names("exporters")


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_form_of_a_plug_in(kind: str, name: str, tmp_path: Path):
    cls = plugins.load(kind, name)
    module = import_module(cls.__module__)
    assert module.__all__ == [cls.__name__] and module.__doc__ and cls.__doc__
    assert is_dataclass(cls) and cls.__dataclass_params__.frozen
    plugin = cls.smoke(tmp_path)
    assert isinstance(plugin, cls)
    with pytest.raises(FrozenInstanceError):
        plugin.anything = 1


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_describe_builds_an_equal_object(kind: str, name: str, tmp_path: Path):
    cls = plugins.load(kind, name)
    for plugin in (plugins.build(kind, _smallest(kind, name)), cls.smoke(tmp_path)):
        assert plugins.build(kind, plugins.describe(plugin)) == plugin
        # Also where an effort would have chosen otherwise: a description leaves nothing open.
        assert plugins.build(kind, plugins.describe(plugin), "quick") == plugin


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_describe_keeps_changed_numbers(kind: str, name: str):
    plugin = plugins.build(kind, _smallest(kind, name))
    for f in fields(plugin):
        value = getattr(plugin, f.name)
        if isinstance(value, bool | int | float):
            share = isinstance(value, float) and 0 < value < 1  # may be one that has to stay below 1
            other = not value if isinstance(value, bool) else value * 5 / 7 if share else type(value)(value * 4 / 3 + 1)
            changed = replace(plugin, **{f.name: other})
            assert plugins.build(kind, plugins.describe(changed)) == changed


@pytest.mark.parametrize("path", ["photos", "a b/c d", "C:\\photos", "/data/a=b", "/data/a,b", "/data/x:y"])
def test_describe_keeps_paths(path: str):
    plugin = plugins.load("calibrators", "images")(Path(path))
    assert plugins.build("calibrators", plugins.describe(plugin)) == plugin


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_efforts_change_only_fields_that_exist(kind: str, name: str):
    cls = plugins.load(kind, name)
    assert set(cls.presets) <= set(EFFORTS) - {"full"}  # full: the defaults, which are the papers'
    for preset in cls.presets.values():
        assert set(preset) <= {f.name for f in fields(cls)}


def test_effort_fills_what_the_text_leaves_open():
    cls = plugins.load("calibrators", "genie")
    assert plugins.build("calibrators", "genie") == cls()
    assert plugins.build("calibrators", "genie", "full") == cls()
    assert plugins.build("calibrators", "genie", "quick") == cls(**cls.presets["quick"])
    assert plugins.build("calibrators", "genie:steps=7", "quick") == cls(**(cls.presets["quick"] | {"steps": 7}))
    assert cls.presets["quick"]["steps"] < cls.presets["standard"]["steps"] < cls().steps


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("genie:steps=500,count=256", {"steps": 500, "count": 256}),
        (" genie : steps=500 , count=256 ", {"steps": 500, "count": 256}),
        ("genie:lr_latent=1e-2,swing=false", {"lr_latent": 0.01, "swing": False}),
        ("genie:swing=yes", {"swing": True}),
        ("genie:", {}),
        ("images:photos/", {"path": Path("photos")}),
        ("images:photos,count=3", {"path": Path("photos"), "count": 3}),
        ("images:path=photos", {"path": Path("photos")}),
    ],
)
def test_build(text: str, expected: dict):
    cls = plugins.load("calibrators", text.partition(":")[0].strip())
    assert plugins.build("calibrators", text) == cls(**expected)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("calibrators", "geni", r"unknown calibrator 'geni'; known: .*genie.*; did you mean 'genie'\?"),
        ("calibrators", "zzz", r"unknown calibrator 'zzz'; known: [^;]*$"),
        ("reconstructors", "genie-m", r"unknown reconstructor 'genie-m'; .*did you mean 'genie_m'\?"),
        ("exporters", "onnx", r"unknown exporter 'onnx'; known: .*onnx_qdq"),
        ("calibrators", "_losses", "unknown calibrator '_losses'"),
        ("calibrators", "", "unknown calibrator ''"),
        ("calibrators", "genie:stps=3", r"genie has no option 'stps'; it has count, .*did you mean 'steps'\?"),
        ("calibrators", "genie:500", "genie has no option '500'"),
        ("reconstructors", "nearest:steps=3", "nearest has no option 'steps'; it has none"),
        ("calibrators", "genie:steps=many", r"option steps='many' of genie is not a valid int"),
        ("calibrators", "genie:steps=1.5", r"option steps='1.5' of genie is not a valid int"),
        ("calibrators", "genie:decay=fast", r"option decay='fast' of genie is not a valid float"),
        ("calibrators", "genie:swing=perhaps", r"option swing='perhaps' of genie is not a valid bool"),
        ("calibrators", "genie:steps=", r"option steps='' of genie is not a valid int"),
        ("calibrators", "images", "images needs 'path', as in 'images:PATH'"),
        ("calibrators", "images:count=5", "images needs 'path'"),
    ],
)  # fmt: skip
def test_mistakes(kind: str, text: str, message: str):
    with pytest.raises(PluginError, match=message):
        plugins.build(kind, text)


@pytest.mark.parametrize("name", plugins.names("calibrators"))
def test_batches_of_no_images_are_refused(name: str):
    separator = "," if "some/where" in _smallest("calibrators", name) else ""
    with pytest.raises(PtqError):
        plugins.build("calibrators", f"{_smallest('calibrators', name)}{separator}batch_size=0")


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_options_lists_every_field(kind: str, name: str):
    cls = plugins.load(kind, name)
    listed = plugins.options(cls)
    assert list(listed) == [f.name for f in fields(cls)]
    assert all((default is None) == (f.default is MISSING) for f, default in zip(fields(cls), listed.values()))


def test_shared_machinery_is_no_plug_in():
    for package in ("ptq.calibrators", "ptq.reconstruct", "ptq.exporters"):
        hidden = [m.name for m in pkgutil.iter_modules(import_module(package).__path__) if m.name.startswith("_")]
        assert hidden and not set(hidden) & {name for _, name in ALL}


def test_a_broken_plug_in_is_named_and_leaves_the_others_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
):
    (tmp_path / "broken_source.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = EntryPoint("broken", "broken_source:Broken", "ptq.calibrators")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry] if group == entry.group else [])
    with pytest.raises(PluginError, match=r"calibrator 'broken' cannot be imported.*a_module_that_is_not_there"):
        plugins.build("calibrators", "broken")
    assert {"broken"} == set(plugins.names("calibrators")) - set(plugins.classes("calibrators"))
    with pytest.raises(PluginError, match="did you mean 'gaussian'"):
        plugins.build("calibrators", "gausian")
    assert main(["list"]) == 0
    assert "calibrator 'broken' cannot be imported" in capsys.readouterr().err
