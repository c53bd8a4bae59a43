"""Examples in memory and in files: the same pixels, whatever the file; and a line where they cannot be read."""

import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from bayesrule.recipes.sources import Files, Paths, Stored, measure, picture, placed, shown, stored


def png(path, width, height):
    """A file whose header promises a size and that holds nothing."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


RAMP = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40


def saved(path, mode, **options):
    """A picture of 2 x 3 pixels in one of PIL's modes."""
    image = Image.fromarray(RAMP * np.uint16(257)) if mode == "I;16" else Image.fromarray(RAMP).convert(mode)
    image.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "RGB", "RGBA", "P"])
@pytest.mark.parametrize("into", ["L", "RGB"])
def test_every_mode_gives_the_same_pixels(tmp_path, mode, into):
    path = saved(tmp_path / "a.png", mode)
    pixels = np.asarray(picture(path, into, (2, 3), resize=False))
    assert (pixels == (RAMP if into == "L" else RAMP[:, :, None])).all()
    assert measure(path)[:2] == (2, 3)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA"])
def test_what_is_transparent_is_white(tmp_path, mode):
    clear = Image.new("RGBA", (3, 2), (10, 10, 10, 0))
    path = tmp_path / ("a.png" if mode != "PA" else "a.gif")
    (clear if mode != "LA" else clear.convert("LA")).save(path)
    assert (np.asarray(picture(path, "RGB", (2, 3), resize=False)) == 255).all()


@pytest.mark.parametrize("turn", range(2, 9))
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_a_camera_that_was_turned(tmp_path, turn, ending):
    exif = Image.Exif()
    exif[0x0112] = turn
    path = saved(tmp_path / f"a.{ending}", "L", exif=exif, **({"quality": 100} if ending == "jpg" else {}))
    size = (3, 2) if turn > 4 else (2, 3)
    assert measure(path)[:2] == size
    pixels = np.asarray(picture(path, "L", size, resize=False)).astype(int)
    flipped = {
        2: RAMP[:, ::-1],
        3: RAMP[::-1, ::-1],
        4: RAMP[::-1],
        5: RAMP.T,
        6: RAMP[::-1].T,
        7: RAMP[::-1, ::-1].T,
        8: RAMP.T[::-1],
    }
    assert abs(pixels - flipped[turn]).max() <= 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"hello", "it is no PNG, JPEG, WebP, GIF or BMP image"),
        ("cut", "truncated"),
        ("bomb", "20000 x 20000 pixels are too many|decompression bomb"),
        ("large", "10000 x 9000 pixels are too many"),
        (None, "No such file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, content, message):
    path = tmp_path / "odd\nname.png"
    if content == "cut":
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:1000])
    elif content in ("bomb", "large"):
        png(path, *{"bomb": (20000, 20000), "large": (10000, 9000)}[content])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        picture(path, "L", (64, 64), resize=True)
    assert r"odd\nname.png" in str(raised.value) and "\n" not in str(raised.value)


def test_another_size_is_refused_or_resized(tmp_path):
    path = saved(tmp_path / "a.png", "L")
    with pytest.raises(ValueError, match=r"a.png has 2 x 3 pixels \(height x width\), the others 4 x 4; pass --size 32"):
        picture(path, "L", (4, 4), resize=False)
    assert picture(path, "RGB", (5, 4), resize=True).size == (4, 5)


@pytest.fixture
def files(tmp_path):
    for i in range(4):
        Image.fromarray(RAMP + np.uint8(i)).save(tmp_path / f"{i}.png")
    return Files(tmp_path, Paths([f"{i}.png".encode() for i in range(4)]), "L", (2, 3))


def test_files_are_read_in_the_order_that_is_asked_for(files):
    values = files.read(torch.tensor([3, 0, 3]))
    assert values.dtype == torch.uint8 and values.shape == (3, 1, 2, 3) and len(files) == 4 and files.shape == (1, 2, 3)
    assert values[:, 0, 0, 0].tolist() == [3, 0, 3] and files.name(2) == "2.png"


def test_a_fingerprint_is_of_content(files, tmp_path):
    first = files.fingerprint()
    assert first == files.fingerprint()
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes() + b"x")
    assert first != files.fingerprint()
    values = torch.arange(6).byte().view(3, 2)
    prints = {stored(each, "a").fingerprint() for each in (values, values.view(2, 3), values.float(), values + 1, values[:0])}
    assert len(prints) == 5


def test_threads_leave_the_filters_of_warnings_alone(files):
    before = list(warnings.filters)
    errors = []

    def work():
        try:
            for _ in range(20):
                files.read(torch.arange(4))
        except Exception as error:  # whatever it is, the test fails
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and list(warnings.filters) == before


def test_paths_are_a_sequence():
    names = [b"a", b"\xff\n", b"ccc"]
    paths = Paths(names)
    assert list(paths) == ["a", "\udcff\n", "ccc"] and list(paths[1:]) == ["\udcff\n", "ccc"]
    assert paths.shown(1) == r"\udcff\n" and shown("Å b") == "Å b"
    with pytest.raises(IndexError, match="index 3 of 3"):
        paths[3]


def test_names_say_the_place():
    source = Stored(torch.zeros(5, 1), lambda index: placed(("a", "b"), (0, 2), index))
    assert [source.name(i) for i in range(5)] == ["a[0]", "a[1]", "b[0]", "b[1]", "b[2]"]
    assert stored(torch.zeros(2, 1), "digits").name(1) == "digits[1]"
