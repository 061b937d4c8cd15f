"""Without working kernels the reference serves, one warning says why, and what failed is not tried again and again."""

import json
import os
import stat
import subprocess
import sys

import pytest
import torch

from iabn_hub import InPlaceABN
from iabn_hub.layers.backends import building, loading


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a new process that has built nothing yet."""
    monkeypatch.setattr(loading, "_status", {})
    monkeypatch.setenv("IABN_HUB_BUILD_DIR", str(tmp_path / "kernels"))
    monkeypatch.delenv("IABN_HUB_BACKEND", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    return monkeypatch


def a_compiler(folder, script):
    path = folder / "cxx"
    path.write_text(f"#!{sys.executable}\nimport sys\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def works():
    x = torch.randn(4, 3, 5)
    return torch.allclose(InPlaceABN(3, activation="identity")(x.clone()).mean((0, 2)), torch.zeros(3), atol=1e-5)


def test_no_compiler_is_one_warning(fresh, tmp_path, caplog):
    fresh.setenv("PATH", str(tmp_path))
    assert works()
    assert works()
    assert loading.use_native("cpu").backend == "reference"
    warnings = [r.getMessage() for r in caplog.records if "native CPU kernels" in r.getMessage()]
    assert len(warnings) == 1
    assert "no C++ compiler is on the PATH" in warnings[0]
    assert "install g++ or set CXX" in warnings[0]


def test_failing_compiler_is_remembered(fresh, tmp_path):
    log = tmp_path / "calls"
    script = (
        f"open({str(log)!r}, 'a').write('call\\n')\nif '--version' in sys.argv: sys.exit()\nsys.exit('error: broken')"
    )
    fresh.setenv("CXX", str(a_compiler(tmp_path, script)))
    assert works()
    assert "error: broken" in loading.use_native("cpu").reason
    calls = log.read_text().count("call")
    fresh.setattr(loading, "_status", {})
    assert "remembered; IABN_HUB_BUILD=force tries again" in loading.use_native("cpu").reason
    assert log.read_text().count("call") == calls + 1, "only --version is asked again"
    fresh.setattr(loading, "_status", {})
    fresh.setenv("IABN_HUB_BUILD", "force")
    assert "remembered" not in loading.use_native("cpu").reason


def test_building_can_be_forbidden(fresh):
    fresh.setenv("IABN_HUB_BUILD", "0")
    assert "IABN_HUB_BUILD=0 forbids" in loading.use_native("cpu").reason
    assert works()


def test_folder_that_cannot_be_written_is_named(fresh, tmp_path):
    (tmp_path / "a_file").write_text("")
    fresh.setenv("IABN_HUB_BUILD_DIR", str(tmp_path / "a_file" / "kernels"))
    reason = loading.use_native("cpu").reason
    assert "a_file" in reason
    assert "set IABN_HUB_BUILD_DIR" in reason


def test_native_can_be_demanded(fresh, tmp_path):
    fresh.setenv("PATH", str(tmp_path))
    fresh.setenv("IABN_HUB_BACKEND", "native")
    with pytest.raises(building.BuildError, match="no C\\+\\+ compiler"):
        InPlaceABN(3)(torch.randn(4, 3))


@pytest.mark.parametrize(("name", "value"), [("IABN_HUB_BACKEND", "cuda"), ("IABN_HUB_BUILD", "yes")])
def test_misspelt_setting_is_a_sentence(fresh, name, value):
    fresh.setenv(name, value)
    if name == "IABN_HUB_BACKEND":
        with pytest.raises(building.BuildError, match=f"{name} is '{value}'"):
            loading.use_native("cpu")
    else:
        assert f"{name} is '{value}'" in loading.use_native("cpu").reason


def doctor(**environment):
    command = [sys.executable, "-m", "iabn_hub", "doctor", "--json"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=240, env=os.environ | environment
    )
    return done.returncode, json.loads(done.stdout)


def test_doctor_tells_of_a_missing_compiler(tmp_path):
    code, facts = doctor(PATH=str(tmp_path), IABN_HUB_BUILD_DIR=str(tmp_path / "kernels"), CXX="", IABN_HUB_BACKEND="")
    assert code == 0
    assert facts["compiler"].startswith("none: no C++ compiler")
    assert facts["devices"]["cpu"]["backend"] == "reference"
    assert facts["devices"]["cpu"]["self_check"].startswith("correct")


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("IABN_HUB_BACKEND") == "reference", reason="only the reference is wanted")
def test_truncated_library_is_built_again(tmp_path):
    # The fewest instruction sets build fastest.
    settings = {"IABN_HUB_BUILD_DIR": str(tmp_path / "kernels"), "IABN_HUB_BACKEND": ""}
    settings["IABN_HUB_CPU_CAPABILITY"] = "default"
    code, facts = doctor(**settings)
    assert code == 0
    if facts["devices"]["cpu"]["backend"] != "native":
        pytest.skip(facts["devices"]["cpu"]["reason"])
    library = facts["devices"]["cpu"]["library"]
    whole = os.path.getsize(library)
    os.truncate(library, whole // 2)
    code, facts = doctor(**settings)
    assert code == 0
    assert facts["devices"]["cpu"]["reason"].startswith("built with")
    assert os.path.getsize(library) == whole
    assert doctor(**settings)[1]["devices"]["cpu"]["reason"] == "built earlier, from the cache"
    assert sorted(p.suffix for p in (tmp_path / "kernels").iterdir()) == [".lock", ".sha256", ".so"]


@pytest.mark.parametrize("demanded", ["", "native"])
def test_a_device_without_native_kernels_uses_the_reference_in_silence(fresh, demanded, caplog):
    fresh.setenv("IABN_HUB_BACKEND", demanded)
    y = InPlaceABN(4, device="meta")(torch.empty(3, 4, 5, device="meta"))
    assert (y.shape, y.device.type) == ((3, 4, 5), "meta")
    assert loading.use_native("meta").backend == "reference"
    assert not caplog.records


# ---- a folder that others can write ----------------------------------------------------------------------------------


def plant(folder):
    """What another user could have put there: a library under the expected name, with its digest, and a message."""
    target = folder / f"iabn_cpu-{building.cpu_build().key()}.so"
    source = folder / "planted.c"
    source.write_text("#include <stdlib.h>\n__attribute__((constructor)) void f(void) { _exit(99); }\n")
    subprocess.run([building.compiler(), "-shared", "-fPIC", "-x", "c", str(source), "-o", str(target)], check=True)
    target.with_suffix(".sha256").write_text(loading.sha256_of(target))
    return target


@pytest.mark.parametrize("build", ["0", "1", "force"])
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_a_folder_that_others_can_write_is_not_used(fresh, tmp_path, mode, build, monkeypatch):
    folder = tmp_path / "kernels"
    folder.mkdir()
    plant(folder)
    folder.chmod(mode)
    if mode == 0o775:  # writable by a group that has other members
        monkeypatch.setattr(os, "getgid", lambda: os.stat(folder).st_gid + 1)
        os.chown(folder, -1, 65534)
    fresh.setenv("IABN_HUB_BUILD", build)
    reason = loading.use_native("cpu").reason
    assert f"{folder} can be written by other users" in reason
    assert "set IABN_HUB_BUILD_DIR to a folder that only you can write" in reason
    assert works()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can make files of others")
@pytest.mark.parametrize("planted", ["library", "digest", "failure", "folder", "parent"])
def test_what_belongs_to_others_is_not_used(fresh, tmp_path, planted, caplog):
    folder = tmp_path / "kernels"
    folder.mkdir()
    target = plant(folder)
    target.with_suffix(".failed").write_text("visit http://evil.example\n")
    place = {
        "library": target, "digest": target.with_suffix(".sha256"), "failure": target.with_suffix(".failed"),
        "folder": folder, "parent": tmp_path,
    }[planted]  # fmt: skip
    os.chown(place, 12345, -1)
    assert f"{place} belongs to another user (number 12345)" in loading.use_native("cpu").reason
    assert "evil" not in caplog.text


def test_the_folder_is_made_for_this_user_alone(fresh, tmp_path):
    fresh.setenv("CXX", str(a_compiler(tmp_path, "sys.exit()")))
    loading.use_native("cpu")
    assert stat.S_IMODE((tmp_path / "kernels").stat().st_mode) == 0o700


def test_what_a_killed_build_left_is_removed(fresh, tmp_path):
    fresh.setenv("CXX", str(a_compiler(tmp_path, "sys.exit()")))
    build = building.cpu_build()
    left = tmp_path / "kernels" / f"build-{build.name}-{build.key()}-killed"
    left.mkdir(parents=True, mode=0o700)
    (left / "driver.o").write_bytes(bytes(100))
    loading.use_native("cpu")
    assert not left.exists()


@pytest.mark.slow
def test_paths_with_spaces_quotes_and_dollars(fresh, tmp_path):
    """torch, the sources and the cache in such folders."""
    place = tmp_path / "it's $HOME my env"
    place.mkdir()
    (place / "torch").symlink_to(os.path.dirname(torch.__file__))
    (place / "iabn_hub").symlink_to(building.PACKAGE)
    (place / "csrc").symlink_to(building.sources())
    code = "from iabn_hub.layers.backends.loading import use_native as u; s = u('cpu'); print(s.backend, s.reason)"
    environment = {**os.environ, "PYTHONPATH": str(place), "IABN_HUB_BUILD_DIR": str(place / "kernels")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("native built with")
