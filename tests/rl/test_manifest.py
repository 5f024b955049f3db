"""Published folders: whole or not there, and every kind of damage to them is noticed."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from deltarl.rl.manifest import MANIFEST, Damaged, check, publishing


def published(folder: Path) -> Path:
    with publishing(folder) as inside:
        (inside / "weights").write_bytes(bytes(range(256)) * 40)
        (inside / "adapter").mkdir()
        (inside / "adapter" / "more").write_text("more")
    return folder


def test_a_published_folder_is_sound(tmp_path):
    check(published(tmp_path / "8"))
    assert {path.name for path in tmp_path.iterdir()} == {"8"}, "nothing hidden is left"


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "weights").read_bytes())
    data[5000] ^= 1
    (folder / "weights").write_bytes(data)


DAMAGES = {
    "a flipped bit": flip_a_bit,
    "a cut file": lambda folder: os.truncate(folder / "weights", 100),
    "an empty file": lambda folder: os.truncate(folder / "adapter" / "more", 0),
    "a missing file": lambda folder: (folder / "adapter" / "more").unlink(),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "a cut manifest": lambda folder: os.truncate(folder / MANIFEST, 30),
    "a manifest of something else": lambda folder: (folder / MANIFEST).write_text('["files"]'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed_in_one_line(tmp_path, damage):
    folder = published(tmp_path / "8")
    DAMAGES[damage](folder)
    with pytest.raises(Damaged) as caught:
        check(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), publishing(tmp_path / "8") as inside:
        (inside / "weights").write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten(tmp_path):
    folder = published(tmp_path / "8")
    with pytest.raises(FileExistsError), publishing(folder):
        pass
    check(folder)


WRITER = """
    import sys
    from pathlib import Path
    from deltarl.rl.manifest import publishing
    base = Path(sys.argv[1])
    print("ready", flush=True)
    for number in range(100000):
        with publishing(base / str(number)) as inside:
            for part in range(5):
                (inside / f"part{part}").write_bytes(b"x" * 20000)
"""


def test_a_kill_leaves_whole_folders_only(tmp_path):
    for moment in (0.05, 0.11, 0.17, 0.23):
        base = tmp_path / str(moment)
        base.mkdir()
        writer = subprocess.Popen([sys.executable, "-P", "-c", textwrap.dedent(WRITER), base], stdout=subprocess.PIPE)
        writer.stdout.readline()
        time.sleep(moment)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        named = [folder for folder in base.iterdir() if folder.name.isdigit()]
        assert named
        for folder in named:
            check(folder)
        with publishing(base / f"{len(named)}"):
            pass
        assert not [folder for folder in base.iterdir() if folder.name.startswith(".")], "leftovers are cleared away"
