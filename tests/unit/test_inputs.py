"""Tensors and arrays of every kind, given to the drop-in as mel, tokens, features and audio."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from whisper import DecodingOptions

from maxwhisper.audio import as_waveform, load_audio, log_mel_spectrogram
from maxwhisper.errors import AudioError, OptionError
from maxwhisper.live import Session
from maxwhisper.whisper import Whisper, load_model
from reference.fixtures import NANO

from .command import CLIP

SHORT: dict[str, Any] = {"fp16": False, "language": "en", "sample_len": 5}


MELS: dict[str, Callable[[torch.Tensor], Any]] = {
    "float64": torch.Tensor.double,
    "requires_grad": lambda mel: mel.clone().requires_grad_(),
    "transposed": lambda mel: mel.T.contiguous().T,
    "every other": lambda mel: torch.stack([mel, -mel], -1)[..., 0],
}


@pytest.fixture(scope="module")
def features(model: Whisper, mel: torch.Tensor) -> torch.Tensor:
    return model.encoder(mel)


@pytest.fixture(scope="module")
def found(model: Whisper, mel: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    """Returns the tokens of the mel and of its language."""
    return model.decode(mel, DecodingOptions(**SHORT)).tokens, model.detect_language(mel)[0]


@pytest.mark.parametrize("form", MELS)
def test_any_form_of_a_mel_is_decoded(
    model: Whisper, mel: torch.Tensor, features: torch.Tensor, found: tuple[list[int], torch.Tensor], form: str
) -> None:
    given = MELS[form](mel)
    options = DecodingOptions(**{**SHORT, "fp16": form == "float64"})
    assert (model.decode(given, options).tokens, model.detect_language(given)[0]) == found
    with torch.no_grad():
        assert model.encoder(given).float().equal(features)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_rounded_mel_is_decoded_as_that(model: Whisper, mel: torch.Tensor, dtype: torch.dtype) -> None:
    options = DecodingOptions(**SHORT)
    assert model.decode(mel.to(dtype), options).tokens == model.decode(mel.to(dtype).float(), options).tokens


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (np.zeros((80, 3000), np.float32), "mel is a ndarray, expected a tensor"),
        (torch.zeros(80, 3000, dtype=torch.int16), "mel is torch.int16, expected floats"),
        (torch.zeros(80, 3000, dtype=torch.complex64), "mel is torch.complex64"),
        (None, "mel is a NoneType"),
    ],
    ids=["array", "int16", "complex", "none"],
)
def test_what_is_no_mel(model: Whisper, given: Any, said: str) -> None:
    for use in (model.decode, model.detect_language, model.encoder):
        with pytest.raises(OptionError, match=said):
            use(given)


ODD: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "sparse": (torch.Tensor.to_sparse, "torch.sparse_coo, expected torch.strided, as to_dense"),
    "compressed": (lambda x: x.reshape(-1, x.shape[-1]).to_sparse_csr(), "torch.sparse_csr, expected torch.strided"),
    "onednn": (lambda x: x.float().to_mkldnn(), "torch._mkldnn, expected torch.strided"),
    "meta": (lambda x: x.to("meta"), "on the device meta, which has no values, expected one on the CPU or a GPU"),
    "nested": (lambda x: torch.nested.nested_tensor([x]), "nested, expected torch.strided"),
    "jagged": (lambda x: torch.nested.nested_tensor([x], layout=torch.jagged), "nested, expected torch.strided"),
    "float8": (lambda x: x.to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
    "quantized": (lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8), "torch.qint8"),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:The PyTorch API of nested", "ignore:Sparse CSR")
@pytest.mark.parametrize("form", ODD)
def test_tensors_whose_values_do_not_stand_in_memory(
    model: Whisper, mel: torch.Tensor, features: torch.Tensor, form: str
) -> None:
    make, said = ODD[form]
    tokens = torch.tensor([[50258, 50259, 50359]])
    uses: list[tuple[str, Callable[[Any], Any], torch.Tensor]] = [
        ("mel", model.decode, mel),
        ("mel", model.detect_language, mel),
        ("mel", model.encoder, mel),
        ("mel", model.decode, features),
        ("xa", lambda x: model.decoder(tokens, x), features[None]),
        ("tokens", lambda x: model.decoder(x, features[None]), tokens),
        ("audio", model.transcribe, torch.zeros(16000)),
        ("audio", log_mel_spectrogram, torch.zeros(16000)),
    ]
    for name, use, given in uses:
        with pytest.raises(OptionError, match=f"^{name} .*{'' if name == 'tokens' else said}"):
            use(make(given))


def test_negative_views_are_heard(model: Whisper, mel: torch.Tensor, audio: np.ndarray) -> None:
    def negative(x: torch.Tensor) -> torch.Tensor:
        return torch.complex(x, -x).conj().imag

    assert negative(mel).is_neg() and model.encoder(negative(mel)).equal(model.encoder(mel))
    assert log_mel_spectrogram(negative(torch.from_numpy(audio))).equal(log_mel_spectrogram(audio))


@pytest.mark.parametrize("largest", [1e39, 1e300])
def test_a_mel_beyond_what_is_computed_in(model: Whisper, mel: torch.Tensor, largest: float) -> None:
    for use in (model.encoder, model.detect_language, model.decode):
        with pytest.raises(AudioError, match="mel holds values that are not finite"):
            use(mel.double() * largest)


@pytest.mark.parametrize("shape", [(0, 80, 3000), (0, 1500, 128)], ids=["mel", "features"])
def test_no_windows_are_refused(model: Whisper, shape: tuple[int, ...]) -> None:
    for use in (model.decode, model.detect_language, model.encoder):
        with pytest.raises(OptionError, match=r"mel is \(0, .*\), expected a window or more"):
            use(torch.zeros(shape))


@pytest.mark.parametrize("given", [[[1, 2]], torch.tensor([[1.5]]), torch.tensor([[True]]), torch.tensor([[1]]).byte()])
def test_what_is_no_text(model: Whisper, given: Any) -> None:
    with pytest.raises(OptionError, match="tokens are .* expected a tensor of torch.int64 or torch.int32"):
        model.logits(given, torch.zeros(1, 1500, 128))


@pytest.mark.parametrize("given", [np.zeros((1, 1500, 128)), torch.zeros(1, 1500, 128).int()], ids=["array", "int32"])
def test_what_are_no_features(model: Whisper, given: Any) -> None:
    with pytest.raises(OptionError, match="xa is .* expected"):
        model.decoder(torch.tensor([[1]]), given)


def read_only(audio: np.ndarray) -> np.ndarray:
    audio = audio.copy()
    audio.setflags(write=False)
    return audio


WAVEFORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "float64": lambda audio: audio.astype(np.float64),
    "big-endian": lambda audio: audio.astype(">f4"),
    "backwards": lambda audio: audio[::-1].copy()[::-1],
    "every other": lambda audio: np.repeat(audio, 2)[::2],
    "read-only": read_only,
    "list": lambda audio: audio.tolist(),
    "tensor": torch.from_numpy,
    "tensor, float64": lambda audio: torch.from_numpy(audio).double(),
    "tensor, requires_grad": lambda audio: torch.tensor(audio, requires_grad=True),
    "tensor, every other": lambda audio: torch.from_numpy(audio).repeat_interleave(2)[::2],
    "tensor, a column": lambda audio: torch.stack([torch.from_numpy(audio)] * 2, 1)[:, 0],
    "parameter": lambda audio: torch.nn.Parameter(torch.from_numpy(audio)),
}


@pytest.mark.parametrize("form", WAVEFORMS)
def test_any_form_of_a_waveform_is_heard(audio: np.ndarray, form: str) -> None:
    given = WAVEFORMS[form](audio)
    assert log_mel_spectrogram(given).equal(log_mel_spectrogram(audio))
    assert as_waveform(given).numpy().tobytes() == audio.tobytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_rounded_waveform_is_heard_as_that(audio: np.ndarray, dtype: torch.dtype) -> None:
    rounded = torch.from_numpy(audio).to(dtype)
    assert log_mel_spectrogram(rounded).equal(log_mel_spectrogram(rounded.float()))


WORDS = {**SHORT, "temperature": 0, "word_timestamps": True}


@pytest.fixture(scope="module")
def with_words(model: Whisper, audio: np.ndarray) -> dict[str, Any]:
    return model.transcribe(audio, **WORDS)


def test_a_tensor_that_requires_a_gradient_is_transcribed(
    model: Whisper, audio: np.ndarray, with_words: dict[str, Any]
) -> None:
    assert model.transcribe(torch.tensor(audio, requires_grad=True), **WORDS) == with_words


@pytest.mark.parametrize("empty", [np.array([]), np.zeros(0, np.float32), torch.zeros(0)], ids=["f64", "f32", "tensor"])
def test_no_samples_have_no_text(model: Whisper, empty: Any) -> None:
    assert model.transcribe(empty, language="en")["text"] == ""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (np.zeros(16000, np.int16), "not int16 .*; divide it by 32768"),
        (torch.zeros(16000, dtype=torch.int16), "not torch.int16 .*; divide it by 32768"),
        (torch.zeros(16000, dtype=torch.int32), "not torch.int32"),
        (np.zeros(16000, np.uint16), r"not uint16 \(16000,\)$"),
        (np.zeros(16000, bool), "not bool"),
        (np.zeros((2, 16000), np.float32), r"\(2, 16000\); take the mean of its channels"),
        (torch.zeros(16000, 2), r"\(16000, 2\); take the mean of its channels"),
        (torch.tensor(0.5), r"\(\)"),
        (b"talk.wav", r"^audio is b'talk.wav', expected the name of a file, or floats \(samples,\) in"),
        (None, "^audio is None, expected the name of a file"),
        (io.BytesIO(b"RIFF"), "^audio is <_io.BytesIO .*, expected the name of a file"),
        ({"array": np.zeros(5), "sampling_rate": 16000}, "^audio is {'array': array.*, expected the name of a file"),
        ([[0.5], [0.5, 0.5]], r"^audio is \[\[0.5\], \[0.5, 0.5\]\], expected the name of a file"),
    ],
    ids=["int16", "int16 tensor", "int32", "uint16", "bool", "channels", "last channels", "scalar", "bytes", "none"]
    + ["file", "dict", "ragged"],
)
def test_what_is_no_waveform(model: Whisper, given: Any, said: str) -> None:
    for use in (model.transcribe, log_mel_spectrogram):
        with pytest.raises(OptionError, match=said):
            use(given)


def test_words_are_found_without_hooks_that_other_threads_would_meet(
    model: Whisper, audio: np.ndarray, with_words: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for block in model.decoder.blocks:
        monkeypatch.setattr(block.cross_attn, "register_forward_hook", None)
    assert model.transcribe(audio, **WORDS) == with_words


def test_words_are_found_where_modules_inside_have_hooks(
    model: Whisper, audio: np.ndarray, with_words: dict[str, Any]
) -> None:
    hook = model.decoder.ln.register_forward_hook(lambda *_: None)
    found = model.transcribe(audio, **WORDS)
    hook.remove()
    assert [word["word"] for word in found["segments"][0]["words"]] == [
        word["word"] for word in with_words["segments"][0]["words"]
    ]


ODD_ARGUMENTS: dict[str, tuple[Callable[[Whisper, np.ndarray], Any], str]] = {
    "name": (lambda model, audio: load_model(None), "name is None, expected the name of a model, or of a file"),
    "name, bytes": (lambda model, audio: load_model(b"tiny"), "name is b'tiny', expected the name of a model"),
    "dtype": (lambda model, audio: load_model(NANO, dtype=["float32"]), "dtype .* is not known"),
    "artifacts": (lambda model, audio: load_model(NANO, artifacts=5), "artifacts is 5, expected the name of a folder"),
    "or_compile": (lambda model, audio: load_model(NANO, or_compile="False"), "or_compile is 'False', expected True"),
    "download_root": (
        lambda model, audio: load_model("tiny", download_root=5),
        "download_root is 5, expected the name",
    ),
    "file": (lambda model, audio: load_audio(None), "file is None, expected the name of a file"),
    "sr": (lambda model, audio: load_audio(CLIP, 1.5), "sr is 1.5, expected a whole number from 1 to 2147483647"),
    "sr, text": (lambda model, audio: load_audio(CLIP, "16000"), "sr is '16000', expected a whole number"),
    "sr, large": (lambda model, audio: load_audio(CLIP, 2**31), "sr is 2147483648, expected a whole number"),
    "n_mels": (lambda model, audio: log_mel_spectrogram(audio, 80.0), "n_mels is 80.0, expected a whole number"),
    "padding": (lambda model, audio: log_mel_spectrogram(audio, 80, 1.5), "padding is 1.5, expected a whole number"),
    "padding, none": (lambda model, audio: log_mel_spectrogram(audio, 80, None), "padding is None, expected"),
    "tokenizer": (lambda model, audio: model.detect_language(torch.zeros(80, 3000), 5), "tokenizer is 5, expected"),
    "progress": (lambda model, audio: model.transcribe(audio, progress=5), "progress is 5, expected a function"),
    "on_segments": (lambda model, audio: model.transcribe(audio, on_segments=5), "on_segments is 5, expected a func"),
    "clips": (lambda model, audio: model.transcribe(audio, clip_timestamps=[10**400]), "clip_timestamps must be sec"),
    "cache": (lambda model, audio: model.install_kv_cache_hooks(5), "cache is 5, expected one that install_kv_cache_h"),
    "policy": (lambda model, audio: Session(model, "align-att"), "policy is 'align-att', expected a function"),
}


@pytest.mark.parametrize("argument", ODD_ARGUMENTS)
def test_an_argument_of_another_kind_is_named(model: Whisper, audio: np.ndarray, argument: str) -> None:
    use, said = ODD_ARGUMENTS[argument]
    with pytest.raises(OptionError, match=f"^{said}"):
        use(model, audio)
