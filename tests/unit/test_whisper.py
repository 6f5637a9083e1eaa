"""The drop-in object: openai-whisper's attributes, its encoder, its decoding over MAX, and how it is loaded."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import whisper
from max.dtype import DType
from whisper import timing
from whisper.audio import N_SAMPLES, SAMPLE_RATE
from whisper.decoding import DecodingTask as OpenAIDecodingTask
from whisper.model import Whisper as OpenAIWhisper

import maxwhisper
from maxwhisper import cli
from maxwhisper.audio import load_audio
from maxwhisper.checkpoint import load_checkpoint
from maxwhisper.compiled import DTYPES, policy_of, programs_of, rounded, rounded_tensors, storage_dtype
from maxwhisper.decoding.cache import KeyValueCache
from maxwhisper.decoding.openai_loop import MaxInference
from maxwhisper.errors import AudioError, DeviceError, OptionError
from maxwhisper.options import within
from maxwhisper.whisper import Whisper, load_model
from reference.fixtures import FIXTURES, NANO
from reference.models import trained
from reference.suite import Suite

from .conftest import CLIPS, WINDOW


def test_attributes_are_openais(model: Whisper, openai: OpenAIWhisper) -> None:
    assert isinstance(model, OpenAIWhisper)
    assert model.dims == openai.dims and model.device == openai.device
    assert (model.is_multilingual, model.num_languages) == (openai.is_multilingual, openai.num_languages)
    assert torch.equal(model.alignment_heads.to_dense(), openai.alignment_heads.to_dense())


def test_the_library_itself_is_unchanged(model: Whisper) -> None:
    task = OpenAIDecodingTask.__init__
    assert task.__globals__["PyTorchInference"] is whisper.decoding.PyTorchInference is not MaxInference
    assert whisper.transcribe.__globals__["log_mel_spectrogram"] is whisper.audio.log_mel_spectrogram


def test_the_package_offers_what_it_lists() -> None:
    assert all(getattr(maxwhisper, name) is not None for name in maxwhisper.__all__)
    assert maxwhisper.load_model is load_model
    assert set(maxwhisper.__all__) <= set(dir(maxwhisper))
    with pytest.raises(AttributeError, match="transcribe_faster"):
        _ = maxwhisper.transcribe_faster


@pytest.mark.parametrize("load", [maxwhisper.load_audio, maxwhisper.load_model])
def test_who_expects_openais_error_for_a_file_gets_it(load: Any) -> None:
    with pytest.raises(RuntimeError, match="enormous.mp3: .*[Nn]o such file"):
        load("enormous.mp3")


# ---- encoder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_encoder_keeps_the_dtype_of_mel(model: Whisper, mels: torch.Tensor, dtype: torch.dtype) -> None:
    features = model.embed_audio(mels.to(dtype))
    assert features.dtype == dtype
    assert features.shape == (2, model.dims.n_audio_ctx, model.dims.n_audio_state)
    assert torch.equal(features, model.encoder(mels.to(dtype).float()).to(dtype))


def test_encoder_takes_a_single_window(model: Whisper, mels: torch.Tensor) -> None:
    assert torch.equal(model.encoder(mels[0]), model.encoder(mels[:1])[0])


@pytest.mark.parametrize("shape", [(80, 2999), (2, 128, 3000), (1, 1, 80, 3000), (3000,)])
def test_encoder_refuses_other_shapes(model: Whisper, shape: tuple[int, ...]) -> None:
    with pytest.raises(AudioError, match=r"mel is .*, expected \(80, 3000\)"):
        model.encoder(torch.zeros(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_encoder_refuses_what_is_not_finite(model: Whisper, mels: torch.Tensor, value: float) -> None:
    mel = mels[0].clone()
    mel[40, 1234] = value
    with pytest.raises(AudioError, match="not finite"):
        model.encoder(mel)


# ---- decoding ------------------------------------------------------------------------------------------------------


def test_languages(model: Whisper, mels: torch.Tensor) -> None:
    found, probabilities = model.detect_language(mels)
    assert [max(each, key=each.__getitem__) for each in probabilities] == ["en", "de"]
    single, _ = model.detect_language(mels[1])
    assert single == found[1]


@pytest.mark.parametrize("beam_size", [None, 3])
def test_windows_decode_together_as_they_do_alone(model: Whisper, mels: torch.Tensor, beam_size: int | None) -> None:
    together = model.decode(mels, fp16=False, beam_size=beam_size)
    assert [result.language for result in together] == ["en", "de"]
    alone = [model.decode(mel, fp16=False, beam_size=beam_size) for mel in mels]
    assert [(each.text, each.avg_logprob) for each in together] == [(each.text, each.avg_logprob) for each in alone]


def test_converted_checkpoint_says_the_same(model: Whisper, mels: torch.Tensor, tmp_path: Path) -> None:
    converted = load_model(maxwhisper.convert(NANO, tmp_path / "nano.safetensors"))
    assert converted.decode(mels[0], fp16=False).tokens == model.decode(mels[0], fp16=False).tokens


def test_silence(model: Whisper) -> None:
    assert model.transcribe(torch.zeros(N_SAMPLES), language="en")["text"] == ""


def test_progress_is_not_told_of_what_an_interrupt_leaves(model: Whisper, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model), "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.transcribe(torch.zeros(SAMPLE_RATE), progress=told.append, language="en")
    assert sum(told) == 0


def test_windows_that_are_passed_over_are_done(model: Whisper) -> None:
    told: list[float] = []
    skipped = {"no_speech_threshold": 0.0, "logprob_threshold": None}
    model.transcribe(torch.zeros(SAMPLE_RATE), progress=told.append, language="en", temperature=0.0, **skipped)
    assert sum(told) == 1


def test_clips_end_with_the_audio(model: Whisper) -> None:
    assert within("0,1000", 16000 * 3 + 1) == [0, 3] and within([5, 7.5], 16000) == [1, 1] and within("", 16000) == []
    audio = load_audio(WINDOW["en"])
    assert model.transcribe(audio, clip_timestamps="0,1000") == model.transcribe(audio)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_matrices_alone_are_rounded(dtype: str) -> None:
    """Biases, norms and positions are added in float32, as PyTorch's modules of float32 weights cast them."""
    tensors = {name: tensor.float() for name, tensor in load_checkpoint(NANO).tensors.items()}
    matrices = {name for name, x in tensors.items() if x.ndim > 1 and not name.endswith("positional_embedding")}
    found = rounded_tensors(tensors, dtype)
    assert {name for name in tensors if found[name].dtype != torch.float32} == matrices
    assert all(found[name] is tensors[name] for name in tensors.keys() - matrices)


@pytest.mark.parametrize(
    ("clips", "said"),
    [("0,1000", ""), ("0,1,2", ""), ("1.5", ""), ("0,1,9,10", "9 s is behind the end of the audio, at 2 s")],
)
def test_a_clip_all_behind_the_end_is_told(clips: str, said: str, caplog: pytest.LogCaptureFixture) -> None:
    within(clips, 2 * SAMPLE_RATE)
    assert said in caplog.text if said else not caplog.text


@pytest.mark.parametrize("clips", ["soon", "0,", "-1", "nan", [0.0, -0.5]])
def test_clips_that_are_no_times(model: Whisper, clips: str | list[float]) -> None:
    with pytest.raises(OptionError, match="clip_timestamps must be seconds"):
        model.transcribe(torch.zeros(N_SAMPLES), clip_timestamps=clips)


def test_what_words_are_aligned_by_is_compiled_for_later_processes_too(model: Whisper) -> None:
    model.transcribe(torch.zeros(N_SAMPLES), language="en", word_timestamps=True)
    assert timing.dtw_cpu.stats.cache_path and timing.backtrace.stats.cache_path


# ---- loading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.bfloat16, False),
        pytest.param(torch.bfloat16, True, marks=pytest.mark.nightly),
        pytest.param(torch.float16, True, marks=pytest.mark.nightly),
    ],
)
def test_half_precision_rounds_but_transcribes(
    model: Whisper, mels: torch.Tensor, dtype: torch.dtype, words: bool
) -> None:
    reduced = load_model(NANO, dtype=str(dtype).removeprefix("torch."))
    features = reduced.encoder(mels)
    assert features.dtype == mels.dtype and features.to(dtype).equal(features)
    assert not features.equal(model.encoder(mels))
    exact = model.state_dict()
    for name, weight in reduced.state_dict().items():
        as_stored = weight.ndim == 1 or "positional_embedding" in name  # which are float32 under every dtype
        assert weight.float().equal((exact[name] if as_stored else exact[name].to(dtype)).float()), name
    clip = next(clip for clip in CLIPS if FIXTURES / clip["file"] == WINDOW["en"])
    result = reduced.transcribe(load_audio(FIXTURES / clip["file"]), language="en", word_timestamps=words)
    assert bool(result["segments"][0].get("words")) == words
    assert pickle.loads(pickle.dumps(reduced)).network.dtype == dtype
    said, heard = (set(text.lower().replace(".", "").split()) for text in (clip["text"], result["text"]))
    assert len(said & heard) > len(said) / 2


def test_weights_are_stored_in_the_dtype_of_arithmetic_but_for_float32_on_a_cpu() -> None:
    half = {"decoder.token_embedding.weight": torch.zeros(2, 2, dtype=torch.float16)}
    stored = [storage_dtype(half, device, dtype) for device in ("cpu", "gpu") for dtype in DTYPES.values()]
    assert stored == [DType.float16, DType.float16, DType.bfloat16, *DTYPES.values()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_network_that_is_loaded_is_the_one_that_is_judged(dtype: str) -> None:
    checkpoint, suite = rounded(load_checkpoint(NANO), dtype), Suite(trained(), getattr(torch, dtype))
    policy = policy_of(checkpoint.tensors, "cpu", dtype)
    loaded, judged = programs_of("network", checkpoint.dims, policy), suite.subject.programs("network")
    assert suite.policy == policy and [each.inputs for each in loaded] == [each.inputs for each in judged]
    assert all(suite.subject.tensors[name].equal(weight) for name, weight in checkpoint.tensors.items())


def test_dtypes_that_are_not_there() -> None:
    with pytest.raises(OptionError, match="dtype 'float8' is not known: expected float32 or float16 or bfloat16"):
        load_model(NANO, dtype="float8")
    assert tuple(DTYPES) == cli.DTYPES


def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maxwhisper.engine.session.accelerator_count", lambda: 0)
    for device in ("gpu", "cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0)):
        with pytest.raises(DeviceError, match="no GPU"):
            load_model(NANO, device)
    for device in ("tpu", "cuda:1", "cuda:", "CUDA", "", "auto"):
        with pytest.raises(OptionError, match=f"device '{device}' is not known: expected cpu, gpu, cuda or cuda:0"):
            load_model(NANO, device)


def test_what_load_model_is_told_reaches_whom_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def noted(name: str) -> Any:
        return lambda *given: (name, *given)

    for name in ("load_checkpoint", "rounded", "Artifacts", "Whisper"):
        monkeypatch.setattr(f"maxwhisper.whisper.{name}", noted(name))
    for or_compile in (False, True):
        found: Any = load_model("a", "cpu", "root", "folder", or_compile, "bfloat16")
        checkpoint = ("rounded", ("load_checkpoint", "a", "root"), "bfloat16")
        assert found == ("Whisper", checkpoint, "cpu", ("Artifacts", "folder", "cpu", or_compile), "bfloat16")


def test_a_model_is_loaded_by_openais_keywords() -> None:
    assert load_model(name=NANO, device=None, download_root=None).device == torch.device("cpu")


def test_an_empty_cache_is_false() -> None:
    assert not KeyValueCache() and KeyValueCache().n_token == 0
