"""Audio: every format gives the samples that were written, and whatever is wrong with a file is one clear line."""

import itertools
import os
import wave
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import whisper.audio
from hypothesis import given
from hypothesis import strategies as st

from maxwhisper import audio as audio_module
from maxwhisper.audio import HOP_LENGTH, N_FFT, SAMPLE_RATE, load_audio, log_mel_spectrogram
from maxwhisper.errors import AudioError, MaxWhisperError, OptionError
from reference.formulas import judge_formula

TONE = 1000  # Hz
DTYPES = {"u8": np.uint8, "s16": np.int16, "s32": np.int32, "flt": np.float32, "dbl": np.float64}


def tone(seconds: float = 1.0, rate: int = SAMPLE_RATE) -> np.ndarray:
    """Returns a tone in steps of 1/128, which every sample format, 8 bit included, holds exactly."""
    return np.round(64 * np.sin(2 * np.pi * TONE * np.arange(round(seconds * rate)) / rate)) / 128


def noise(seconds: float = 1.0) -> np.ndarray:
    """Returns noise in steps of 1/128: damage to it shows everywhere, which a periodic signal could hide."""
    return np.random.default_rng(0).integers(-64, 64, round(seconds * SAMPLE_RATE)) / 128


def as_format(samples: np.ndarray, name: str) -> np.ndarray:
    """Returns (channel, sample) floats as the array that PyAV wants for a sample format."""
    packed = name.removesuffix("p")
    dtype = np.dtype(DTYPES[packed])
    if dtype.kind != "f":
        samples = samples * 2.0 ** (8 * dtype.itemsize - 1) + (128 if dtype.kind == "u" else 0)
    samples = samples.astype(dtype)
    return np.ascontiguousarray(samples) if packed != name else np.ascontiguousarray(samples.T).reshape(1, -1)


def write(
    path: Path, samples: np.ndarray, codec: str, sample_format: str, layout: str = "mono", rate: int = SAMPLE_RATE
) -> Path:
    """Encodes (sample,), the same in all channels, or (channel, sample)."""
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=rate)
        assert isinstance(stream, av.AudioStream)
        stream.layout, stream.format = layout, sample_format
        channels = np.broadcast_to(samples, (stream.layout.nb_channels, samples.shape[-1]))
        for start in range(0, samples.shape[-1], 960):
            part = as_format(channels[:, start : start + 960], sample_format)
            frame = av.AudioFrame.from_ndarray(part, format=sample_format, layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_video(path: Path, samples: np.ndarray | None = None) -> Path:
    with av.open(path, "w") as container:
        video = container.add_stream("mpeg4", rate=25)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        sound = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono") if samples is not None else None
        for _ in range(25):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))))
        container.mux(video.encode(None))
        if sound is not None and samples is not None:
            frame = av.AudioFrame.from_ndarray(as_format(samples[None], "fltp"), format="fltp", layout="mono")
            frame.sample_rate = SAMPLE_RATE
            container.mux(sound.encode(frame))
            container.mux(sound.encode(None))
    return path


def write_wave(path: Path, samples: np.ndarray, channels: int = 1, rate: int = SAMPLE_RATE) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.repeat((samples * 32768).astype("<i2"), channels).tobytes())
    return path


def loudest(samples: np.ndarray, rate: int = SAMPLE_RATE) -> int:
    """Returns the loudest frequency of the middle half second, in Hz; it is resolved to 2 Hz."""
    half = samples[len(samples) // 2 - rate // 4 :][: rate // 2]
    return 2 * int(np.abs(np.fft.rfft(half)).argmax())


def message(error: type[MaxWhisperError], function: Callable[..., object], *args: object, **options: object) -> str:
    """Returns the message of the error that is raised, which must be one line."""
    with pytest.raises(error) as caught:
        function(*args, **options)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


LOSSLESS = [
    ("wav", "pcm_u8", "u8"),
    ("wav", "pcm_s16le", "s16"),
    ("wav", "pcm_s24le", "s32"),
    ("wav", "pcm_s32le", "s32"),
    ("wav", "pcm_f32le", "flt"),
    ("wav", "pcm_f64le", "dbl"),
    ("aiff", "pcm_s16be", "s16"),
    ("flac", "flac", "s16"),
    ("m4a", "alac", "s16p"),
]
LOSSY = [
    ("mp3", "libmp3lame", "fltp"),
    ("m4a", "aac", "fltp"),
    ("aac", "aac", "fltp"),
    ("opus", "libopus", "flt"),
    ("webm", "libopus", "flt"),
]
RATES_AND_LAYOUTS = [("mono", 8000), ("stereo", 44100), ("mono", 48000), ("5.1", 48000)]
UNKNOWN_TO_CODEC = {("libopus", "stereo", 44100), ("libmp3lame", "5.1", 48000)}


@pytest.mark.parametrize("layout", ["mono", "stereo"])
@pytest.mark.parametrize(("ending", "codec", "sample_format"), LOSSLESS)
def test_lossless_samples_are_exact(tmp_path: Path, ending: str, codec: str, sample_format: str, layout: str) -> None:
    audio = load_audio(write(tmp_path / f"a.{ending}", noise(), codec, sample_format, layout))
    assert audio.dtype == np.float32
    np.testing.assert_array_equal(audio, noise().astype(np.float32))


@pytest.mark.parametrize(
    ("ending", "codec", "sample_format", "layout", "rate"),
    [
        (*encoding, *source)
        for encoding, source in itertools.product(LOSSLESS + LOSSY, RATES_AND_LAYOUTS)
        if (encoding[1], *source) not in UNKNOWN_TO_CODEC
    ],
)
def test_rates_and_layouts(tmp_path: Path, ending: str, codec: str, sample_format: str, layout: str, rate: int) -> None:
    audio = load_audio(write(tmp_path / f"a.{ending}", tone(1, rate), codec, sample_format, layout, rate))
    assert loudest(audio) == TONE
    if (ending, codec, sample_format) in LOSSLESS:
        assert audio.shape == (SAMPLE_RATE,)


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = np.array([0.5, 0, -0.25, 0.5]), np.array([0, 0.25, 0.25, 0.5])
    path = write(tmp_path / "a.wav", np.stack([left, right]), "pcm_s16le", "s16", "stereo")
    np.testing.assert_array_equal(load_audio(path), (left + right) / 2)


@pytest.mark.parametrize("channels", [3, 4, 6, 8])
def test_channels_without_a_layout(tmp_path: Path, channels: int) -> None:
    assert loudest(load_audio(write_wave(tmp_path / "a.wav", tone(), channels))) == TONE


def test_other_sample_rate(tmp_path: Path) -> None:
    audio = load_audio(write_wave(tmp_path / "a.wav", tone()), sr=8000)
    assert audio.shape == (8000,)
    assert loudest(audio, 8000) == TONE


def test_sound_of_a_video(tmp_path: Path) -> None:
    assert loudest(load_audio(write_video(tmp_path / "a.mp4", tone()))) == TONE


@pytest.mark.parametrize("name", ["talk 10:30.wav", "http:a.wav", "%03d.wav", "ä ö.wav", os.fsdecode(b"\xff.wav")])
def test_odd_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write_wave(tmp_path / "a.wav", noise()).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for path in (name, Path(name), tmp_path / name):
        np.testing.assert_array_equal(load_audio(path), noise().astype(np.float32))


def test_format_changes_in_mid_stream(tmp_path: Path) -> None:
    first = write(tmp_path / "first.aac", tone(), "aac", "fltp")
    second = write(tmp_path / "second.aac", tone(1, 44100), "aac", "fltp", "stereo", 44100)
    both = tmp_path / "both.aac"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    audio, alone = load_audio(both), load_audio(first)
    assert len(audio) == len(alone) + len(load_audio(second))
    np.testing.assert_array_equal(audio[: len(alone)], alone)
    assert loudest(audio[len(alone) :]) == TONE


@pytest.mark.parametrize(
    ("sample_format", "layout", "rate"), [("flt", "mono", 16000), ("s16", "stereo", 16000), ("s16", "mono", 32000)]
)
def test_format_changes_after_samples_that_need_no_conversion(sample_format: str, layout: str, rate: int) -> None:
    def frame(samples: np.ndarray, sample_format: str, layout: str, rate: int) -> av.AudioFrame:
        channels = np.stack([samples] * av.AudioLayout(layout).nb_channels)
        frame = av.AudioFrame.from_ndarray(as_format(channels, sample_format), format=sample_format, layout=layout)
        frame.sample_rate = rate
        return frame

    frames = [frame(noise(), "s16", "mono", SAMPLE_RATE), frame(tone(1, rate), sample_format, layout, rate)]
    blocks = list(audio_module._resample(frames, SAMPLE_RATE, "a.wav"))
    assert {block.format.name for block in blocks} == {"s16"}
    audio = np.concatenate([block.to_ndarray()[0] for block in blocks]) / 32768
    assert audio.shape == (2 * SAMPLE_RATE,)
    np.testing.assert_array_equal(audio[:SAMPLE_RATE], noise())
    assert loudest(audio[SAMPLE_RATE:]) == TONE


def broken_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Writes files that hold no audio; returns what the error says of each."""
    text, empty = folder / "text.wav", folder / "empty.wav"
    text.write_text("This is no audio.\n" * 100)
    empty.touch()
    unknown = write_wave(folder / "unknown.wav", tone())
    data = unknown.read_bytes()
    unknown.write_bytes(data[:20] + b"\x77\x77" + data[22:])  # the tag of its encoding
    fast = write_wave(folder / "fast.wav", tone())
    fast.write_bytes(data[:24] + (500_000_000).to_bytes(4, "little") + data[28:])
    undecodable = write(folder / "damaged.m4a", noise(), "aac", "fltp")
    overwrite_packets(undecodable, 1.0)
    return {
        "missing": (folder / "missing.wav", "No such file"),
        "folder": (folder, "Is a directory"),
        "empty": (empty, "cannot be read as audio"),
        "text": (text, "Invalid data"),
        "video": (write_video(folder / "silent.mp4"), "no audio stream"),
        "no samples": (write_wave(folder / "header.wav", np.zeros(0)), "no audio samples"),
        "unknown encoding": (unknown, "no decoder"),
        "500 MHz": (fast, "has 500000000 samples per second, more than any recording"),
        "undecodable": (undecodable, "packets do not decode"),
        "channels": (write_wave(folder / "channels.wav", tone(), 9), "has 9 channels of which libav cannot make one"),
    }


def test_files_without_audio(tmp_path: Path) -> None:
    for case, (path, reason) in broken_files(tmp_path).items():
        text = message(AudioError, load_audio, path)
        assert text.startswith(f"{path}: ") and reason in text, case


@pytest.mark.parametrize("name", ["http://localhost:1/a.wav", "nosuchprotocol:a.wav", "a\0b.wav", ""])
def test_names_that_are_no_file(name: str) -> None:
    assert message(AudioError, load_audio, name).startswith(f"{name or repr(name)}: ")


@pytest.mark.parametrize("sr", [0, -16000])
def test_sample_rate_must_be_positive(tmp_path: Path, sr: int) -> None:
    assert str(sr) in message(OptionError, load_audio, write_wave(tmp_path / "a.wav", tone()), sr)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layout", ["mono", "stereo"])
@pytest.mark.parametrize(("codec", "sample_format"), [("pcm_f32le", "flt"), ("pcm_f64le", "dbl")])
def test_samples_that_are_not_finite(tmp_path: Path, codec: str, sample_format: str, layout: str, value: float) -> None:
    samples = np.stack([tone(), tone()])[: 1 if layout == "mono" else 2]
    samples[-1, [5000, 9000]] = value
    path = write(tmp_path / "a.wav", samples, codec, sample_format, layout)
    text = message(AudioError, load_audio, path)
    assert text.startswith(f"{path}: sample 5000 (0.312 s)")


def test_planar_samples_that_are_not_finite() -> None:
    samples = np.zeros((2, 100), np.float32)
    samples[0, 70] = samples[1, 40] = np.nan
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
    frame.sample_rate = SAMPLE_RATE
    assert "sample 40 " in message(AudioError, list, audio_module._all_finite([frame], "a"))


def overwrite_packets(path: Path, share: float) -> int:
    """Overwrites the first packets of a file and returns how many."""
    with av.open(path) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(audio=0) if packet.pos is not None]
    count = round(share * len(packets))
    data = bytearray(path.read_bytes())
    for position, size in packets[:count]:
        data[position : position + size] = b"\xff" * size
    path.write_bytes(data)
    return count


@pytest.mark.filterwarnings("ignore:.*its audio:RuntimeWarning")
def test_damaged_packets_are_left_out_with_a_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.m4a", noise(), "aac", "fltp")
    whole = load_audio(path)
    count = overwrite_packets(path, 0.5)
    with pytest.warns(RuntimeWarning, match=f"a.m4a: {count} damaged packets left out") as caught:
        audio = load_audio(path)
    assert caught[0].filename == __file__
    assert 0 < len(audio) < len(whole)
    assert capfd.readouterr().err == ""


def test_mostly_damaged_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.m4a", noise(), "aac", "fltp")
    count = overwrite_packets(path, 0.9)
    assert f"{count} packets do not decode" in message(AudioError, load_audio, path)


@pytest.mark.parametrize(("ending", "codec", "sample_format"), [("wav", "pcm_s16le", "s16"), LOSSY[0]])
def test_truncated_file_gives_what_is_there(tmp_path: Path, ending: str, codec: str, sample_format: str) -> None:
    path = write(tmp_path / f"a.{ending}", noise(4), codec, sample_format)
    whole = load_audio(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    audio = load_audio(path)
    assert len(whole) // 4 < len(audio) < len(whole)
    np.testing.assert_array_equal(audio[: len(whole) // 4], whole[: len(whole) // 4])


@pytest.fixture(scope="module")
def samples_of_formats(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("formats")
    return [
        write(folder / f"{i}.{ending}", noise(0.3), codec, sample_format)
        for i, (ending, codec, sample_format) in enumerate(LOSSLESS + LOSSY)
    ] + [write_video(folder / "video.mp4", tone(0.3))]


def samples_or_audio_error(path: Path) -> None:
    try:
        audio = load_audio(path)
    except AudioError as error:
        assert str(error).startswith(f"{path}: ")
        assert len(str(error).splitlines()) == 1
    else:
        assert audio.dtype == np.float32 and audio.ndim == 1 and audio.size
        assert audio.min() >= -1 and audio.max() < 1


@pytest.mark.filterwarnings("ignore:.*(damaged packets|its audio):RuntimeWarning")
@given(data=st.data())
def test_any_truncation_gives_samples_or_one_error(samples_of_formats: list[Path], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(samples_of_formats))
    whole = path.read_bytes()
    truncated = path.with_name(f"truncated{path.suffix}")
    truncated.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    samples_or_audio_error(truncated)


@pytest.mark.filterwarnings("ignore:.*(damaged packets|its audio):RuntimeWarning")
@given(data=st.data())
def test_any_damage_gives_samples_or_one_error(samples_of_formats: list[Path], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(samples_of_formats))
    content = bytearray(path.read_bytes())
    # Headers are where a changed byte does most.
    place = st.integers(0, min(200, len(content) - 1)) | st.integers(0, len(content) - 1)
    for position, value in data.draw(st.dictionaries(place, st.integers(0, 255), min_size=1)).items():
        content[position] = value
    damaged = path.with_name(f"damaged{path.suffix}")
    damaged.write_bytes(content)
    samples_or_audio_error(damaged)


def oracle(samples: np.ndarray, n_mels: int) -> np.ndarray:
    """openai-whisper's log-mel spectrogram, written again in float64."""
    padded = np.pad(samples.astype(np.float64), N_FFT // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP_LENGTH][:-1]
    hann = (1 - np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)) / 2
    power = np.abs(np.fft.rfft(frames * hann)) ** 2
    mel = whisper.audio.mel_filters("cpu", n_mels).double().numpy() @ power.T
    log_mel = np.log10(np.maximum(mel, 1e-10))
    return (np.maximum(log_mel, log_mel.max() - 8) + 4) / 4


def check_log_mel(audio: np.ndarray, n_mels: int, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    found = judge_formula(
        "log-mel spectrogram",
        lambda given: [torch.from_numpy(oracle(given["audio"].numpy(), n_mels))],
        {"audio": torch.from_numpy(audio)},
        [ours],
        peer=[theirs],
        longest_reduction=N_FFT,
    )
    assert found.passed, f"\n{found}"


def signals() -> dict[str, np.ndarray]:
    seconds = np.arange(3 * SAMPLE_RATE) / SAMPLE_RATE
    random = np.random.default_rng(0).standard_normal(len(seconds))
    return {
        "noise": 0.1 * random,
        "chirp": 0.5 * np.sin(2 * np.pi * (50 + 1300 * seconds) * seconds),
        "square": np.sign(np.sin(2 * np.pi * 441 * seconds + 0.1)) * 32767 / 32768,
        "loud low and quiet high tone": 0.9 * np.sin(2 * np.pi * 60 * seconds) + 1e-4 * np.sin(12000 * np.pi * seconds),
        "offset": 0.5 + 1e-3 * random,
        "syllables": np.sin(2 * np.pi * 120 * seconds) ** 9 * np.sin(2 * np.pi * 2 * seconds).clip(0) + 1e-4 * random,
        "impulses": (np.arange(len(seconds)) % 5000 == 0) * 0.9,
    }


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("signal", signals())
def test_log_mel_is_as_accurate_as_openai_whisper(signal: str, n_mels: int) -> None:
    samples = signals()[signal].astype(np.float32)
    ours, theirs = (made(samples, n_mels) for made in (log_mel_spectrogram, whisper.audio.log_mel_spectrogram))
    check_log_mel(samples, n_mels, ours, theirs)


@pytest.mark.parametrize(
    ("samples", "padding"),
    list(itertools.product([201, 319, 320, 321, 399, 400, 8000], [0, 1, HOP_LENGTH, 3 * SAMPLE_RATE])),
)
def test_log_mel_of_any_length(samples: int, padding: int) -> None:
    audio = noise()[:samples].astype(np.float32)
    ours = log_mel_spectrogram(audio, padding=padding)
    theirs = whisper.audio.log_mel_spectrogram(audio, padding=padding)
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    check_log_mel(np.pad(audio, (0, padding)), 80, ours, theirs)


def test_log_mel_of_silence_is_exact() -> None:
    silence = np.zeros(SAMPLE_RATE, np.float32)
    assert torch.equal(log_mel_spectrogram(silence), whisper.audio.log_mel_spectrogram(silence))


def test_log_mel_takes_what_openai_whisper_takes(tmp_path: Path) -> None:
    path = write_wave(tmp_path / "a.wav", noise())
    samples = load_audio(path)
    expected = log_mel_spectrogram(samples)
    for audio in (str(path), path, torch.from_numpy(samples), samples.astype(np.float64)):
        assert torch.equal(log_mel_spectrogram(audio), expected)


@pytest.mark.parametrize(
    ("audio", "options", "error", "said"),
    [
        (np.zeros(1000, np.float32), {"n_mels": 40}, OptionError, "n_mels"),
        (np.zeros(1000, np.float32), {"padding": -1}, OptionError, "padding"),
        (np.zeros(1000, np.int16), {}, OptionError, "int16"),
        (np.zeros((2, 1000), np.float32), {}, OptionError, "(2, 1000)"),
        (np.zeros(N_FFT // 2, np.float32), {}, AudioError, "200"),
        (np.array([0] * 700 + [np.nan] * 300, np.float32), {}, AudioError, "sample 700"),
        (np.array([0] * 700 + [np.inf] * 300, np.float32), {}, AudioError, "sample 700"),
        ("missing.wav", {}, AudioError, "missing.wav"),
    ],
)
def test_log_mel_refuses(
    audio: np.ndarray | str,
    options: dict[str, int],
    error: type[MaxWhisperError],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("maxwhisper.audio.Artifact", None)  # to compile one takes a minute the first time
    assert said in message(error, log_mel_spectrogram, audio, **options)
