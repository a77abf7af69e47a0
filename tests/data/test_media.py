"""Pictures, sound and text become arrays; what is damaged is named."""

import io
import json
import tracemalloc

import numpy as np
import pytest
import soundfile
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fusion_jax.data import audio, image
from fusion_jax.data.audio import Waveforms
from fusion_jax.data.image import Augment, Pictures
from fusion_jax.data.text import ByteTokenizer, FileTokenizer, Ids
from fusion_jax.deployment.runtime import media
from fusion_jax.deployment.runtime.artifact import BadInput
from fusion_jax.errors import UserError


def sound(samples, rate, kind):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind)
    return buffer.getvalue()


NOISE = np.random.default_rng(0).normal(size=9000) * 0.1


@pytest.mark.parametrize("kind", ["AIFF", "AU", "W64", "RF64", "CAF"])
def test_containers_that_break_off_are_named(kind):
    data = sound(NOISE, 8000, kind)
    assert len(audio.decode(data)) == 18000
    with pytest.raises(UserError, match=r"breaks off|not a readable sound"):
        audio.decode(data[: len(data) // 2])


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_sound_of_any_kind_and_rate_keeps_its_pitch(kind):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(44100) / 44100)
    decoded = audio.decode(sound(np.stack([tone, tone], axis=1), 44100, kind))
    assert decoded.dtype == np.float32 and abs(len(decoded) - 16000) <= 1200  # MP3 adds frames
    spectrum = np.abs(np.fft.rfft(decoded[2000:14000]))
    assert abs(np.argmax(spectrum) * 16000 / 12000 - 440) < 2
    middle = decoded[4000:12000]
    assert abs(np.sqrt(np.mean(middle**2)) - 0.5 / np.sqrt(2)) < 0.02


def test_sound_is_cut_to_the_limit():
    data = sound(np.arange(20000) / 20000, 10000, "WAV")
    whole, cut = audio.decode(data), audio.decode(data, max_seconds=0.5)
    assert len(whole) == 32000 and len(cut) == 8000
    assert np.abs(whole[:7900] - cut[:7900]).max() < 1e-3
    example = {"audio": {"fr": data, "de": data}}
    assert Waveforms(0.5, languages=("it", "fr"))(example, None).shape == (8000,)
    assert Waveforms(0.5, languages=("it",))(example, None) is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"what is this", r"not a readable sound \(Format not recognised\); expected WAV"),
        (sound(np.zeros(9000), 8000, "WAV")[:-500], "breaks off"),
        (sound(np.random.default_rng(0).normal(size=9000), 8000, "OGG")[:-5], "breaks off"),
        (sound(np.zeros(9000), 8000, "OGG")[:20], "breaks off"),
        (sound(NOISE, 8000, "MP3")[:-2000], "breaks off"),
        (b"ID3\4\0\0\0\0\2\0" + bytes(256) + sound(NOISE, 8000, "MP3")[:-2000], "breaks off"),
        (sound(np.zeros(0), 8000, "WAV"), "no sample"),
        (sound(np.full(99, np.nan), 8000, "WAV")[:44] + b"", "breaks off|no sample"),
    ],
    ids=(
        "empty",
        "foreign",
        "cut WAV",
        "cut Ogg",
        "only a header",
        "cut MP3",
        "cut MP3 with a tag",
        "no sample",
        "no data",
    ),
)
def test_damaged_sound_is_named(data, message):
    with pytest.raises(UserError, match=f"owl.ogg: .*({message})"):
        audio.decode(data, "owl.ogg")


def test_a_small_file_of_many_channels_takes_little_memory():
    """Kilobytes that are 16 MB as numbers; and no recording has so high a rate."""
    loud = np.arange(8, dtype=np.int16) * 100  # of each channel; their mean is 350
    content = sound(np.tile(loud, (500_000, 1)), 100_000, "FLAC")
    assert len(content) < 50_000
    for read in (
        audio.decode,
        lambda content: audio.decode(content, max_seconds=9),
        lambda content: media.sound(content, 16_000, 9 * 16_000),
    ):
        tracemalloc.start()
        found = read(content)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8e6 and len(found) == 80_000
        np.testing.assert_allclose(found[100:-100], 350 / 2**15, rtol=1e-3)
    with pytest.raises(BadInput, match="655350 samples a second, and at most 192000 are read"):
        media.sound(sound(np.tile(loud, (90_000, 1)), 655_350, "FLAC"), 16_000, 16_000)


def test_sound_that_cannot_be_wound_is_read():
    file = io.BytesIO()
    soundfile.write(file, NOISE, 8000, format="WAV", subtype="GSM610")
    frames = soundfile.info(io.BytesIO(file.getvalue())).frames  # with what fills the last block
    assert 18_000 <= len(audio.decode(file.getvalue())) <= 2 * frames


def test_an_mp3_that_does_not_say_its_length_is_whole():
    """Of a changing rate, quiet at first: twice its length is guessed."""
    buffer, samples = io.BytesIO(), np.concatenate([np.zeros(32000), NOISE])
    soundfile.write(buffer, samples, 16000, format="MP3", bitrate_mode="VARIABLE")
    data = buffer.getvalue()
    data = data[data.find(data[:2], 10) :]  # without the first frame, which says it
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        assert file.frames > 1.2 * len(samples)
    for seconds in (None, 60):
        assert len(audio.decode(data, max_seconds=seconds)) == pytest.approx(41000, abs=2000)


def png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def test_transparency_becomes_white_in_every_mode():
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    rgba.putpixel((0, 0), (255, 0, 0, 255))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.info["transparency"] = 1
    palette.putpixel((0, 0), 0)
    for picture in (rgba, palette):
        decoded = image.decode(png(picture))
        assert decoded[0, 0].tolist() == [255, 0, 0] and decoded[1, 1].tolist() == [255] * 3


def test_deep_grey_is_scaled_and_a_turned_photograph_turned_back():
    deep = np.linspace(0, 65535, 6).astype(np.uint16).reshape(2, 3)
    decoded = image.decode(png(Image.fromarray(deep)))
    assert decoded[..., 0].tolist() == [[0, 51, 102], [153, 204, 255]]
    photo, buffer = Image.new("RGB", (6, 4)), io.BytesIO()
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(buffer, "JPEG", exif=exif)
    assert image.decode(buffer.getvalue()).shape == (6, 4, 3)


@pytest.mark.parametrize(
    ("whole", "damaged"),
    [(b"\x01\x0f\0\2", b"\x01\0\0\2"), (b"\x01\x1a\0\5", b"\x01\x1a\0\7")],
    ids=("a width of letters", "a resolution of bytes"),
)
def test_damaged_exif_is_named(whole, damaged):
    photo, buffer = Image.new("RGB", (6, 4)), io.BytesIO()
    exif = photo.getexif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "owl", 72.0
    photo.save(buffer, "JPEG", exif=exif)
    assert image.decode(buffer.getvalue()).shape == (6, 4, 3)
    with pytest.raises(UserError, match=r"owl\.jpg: not a readable picture"):
        image.decode(buffer.getvalue().replace(whole, damaged), "owl.jpg")


def test_what_is_no_picture_is_told_as_its_file():
    with pytest.raises(UserError, match=r"a\.png: .* \(cannot identify image file\); expected PNG"):
        image.decode(b"what is this", "a.png")


@pytest.mark.parametrize(("shape", "side"), [((5000, 4000), None), ((1, 50_000), 64)])
def test_an_svg_of_any_size_is_drawn_small(shape, side):
    size = 'width="{}" height="{}"'.format(*shape)
    drawing = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><rect width="9" height="9"/></svg>'
    drawn = image.decode(drawing.encode(), "x.svg", side=side)
    assert max(drawn.shape) == (side or 1024)


def test_svg_is_drawn_up_to_the_side_with_fonts_of_its_own():
    head = '<svg xmlns="http://www.w3.org/2000/svg" width="12pt" height="24pt">'
    square = f'{head}<rect width="100%" height="50%" fill="#0000ff"/></svg>'.encode()
    decoded = image.decode(square, "x.svg", side=64)
    assert decoded.shape == (64, 32, 3)
    assert decoded[10, 10].tolist() == [0, 0, 255] and decoded[50, 10].tolist() == [255] * 3
    text = f'{head}<text x="2" y="20" font-family="Nowhere">$</text></svg>'.encode()
    assert image.decode(text, "x.svg", side=64).min() < 50
    with pytest.raises(UserError, match=r"x\.svg: not a readable SVG"):
        image.decode(b"<svg", "x.svg")


@pytest.mark.parametrize("cut", [0, 5, 40, 200])
def test_damaged_pictures_are_named(cut):
    whole = image.encode(np.random.default_rng(0).integers(0, 255, (20, 20, 3)).astype(np.uint8))
    with pytest.raises(UserError, match=r"owl\.png: "):
        image.decode(whole[:cut], "owl.png")


def test_pictures_are_fitted_on_white_and_mirrored_only_where_allowed():
    left_red = np.zeros((10, 20, 3), np.uint8)
    left_red[:, :10, 0] = 255
    fitted = Pictures(8)({"image": left_red}, None)
    assert fitted.shape == (8, 8, 3) and (fitted[:2] == 1).all() and (fitted[-2:] == 1).all()
    assert fitted[4, 0].tolist() == [1, 0, 0] and fitted[4, 7].tolist() == [0, 0, 0]

    transform = Pictures(8, Augment(area=(1, 1), ratio=1, jitter=0))

    def mirrored(example):
        views = [transform(example, np.random.default_rng(i)) for i in range(20)]
        return [view[4, 0, 0] == 0 for view in views]

    assert 3 < sum(mirrored({"image": left_red})) < 17
    assert not any(mirrored({"image": left_red, "mirror": False}))


@given(seed=st.integers(0, 10**6), height=st.integers(1, 40), width=st.integers(1, 40))
def test_augmented_pictures_stay_in_range_and_follow_the_generator(seed, height, width):
    picture = np.random.default_rng(1).integers(0, 255, (height, width, 3)).astype(np.uint8)
    transform = Pictures(8, Augment())
    one, same = (transform({"image": picture}, np.random.default_rng(seed)) for _ in range(2))
    assert one.shape == (8, 8, 3) and one.dtype == np.float32
    assert one.min() >= 0 and one.max() <= 1 and np.array_equal(one, same)
    left, top, right, bottom = Augment().box(width, height, np.random.default_rng(seed))
    assert 0 <= left < right <= width + 1e-9 and 0 <= top < bottom <= height + 1e-9


@given(text=st.text(), length=st.integers(2, 20))
def test_bytes_come_back_and_are_cut_between_the_marks(text, length):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode(text, length)
    assert len(ids) <= length and ids[0] == 1 and ids[-1] == 2 and 0 not in ids
    assert max(ids) < tokenizer.vocabulary


def test_a_tokenizer_file_is_cut_without_losing_its_marks(tmp_path):
    words = ["[PAD]", "[CLS]", "[SEP]", "a", "red", "owl", "[UNK]"]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    built = tokenizers.Tokenizer(model)
    built.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    built.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    built.add_special_tokens(words[:3])
    built.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FileTokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.encode("a red owl") == [1, 3, 4, 5, 2]
    assert tokenizer.encode("a red owl", 4) == [1, 3, 4, 2]
    assert tokenizer.decode([1, 3, 4, 5, 2]) == "a red owl"
    ids = Ids(tokenizer, 4, ("fr", "en"))
    assert ids({"text": {"en": "a red owl"}}, None).tolist() == [1, 3, 4, 2]
    assert ids({}, None) is None
    (tmp_path / "broken.json").write_text(json.dumps({"model": None}))
    for name in ("broken.json", "lost.json"):
        with pytest.raises(UserError, match=name):
            FileTokenizer(tmp_path / name)
