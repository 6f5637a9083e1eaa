"""The comparison of loaders on trial: every fault of the subject's is seen, and named as a loader's."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor
from whisper.audio import SAMPLE_RATE

from maxwhisper import audio, checkpoint
from maxwhisper.checkpoint import Checkpoint
from maxwhisper.network.blocks import BLOCKS
from reference import checkpoints, transcripts, waveforms
from reference.fixtures import FIXTURES, NANO
from reference.models import trained
from reference.suite import Suite
from tests.parity import test_loading

from .checkpoints import hugging_face_names, random_tensors, write_folder

QUERY, OUT = "encoder.blocks.1.attn.query", "encoder.blocks.1.attn.out.weight"
FAULTS: dict[str, tuple[str, Callable[[dict[str, Tensor]], Tensor], str]] = {
    "bias lost": (f"{QUERY}.bias", lambda t: torch.zeros_like(t[f"{QUERY}.bias"]), "zero"),
    "rounded": (f"{QUERY}.weight", lambda t: t[f"{QUERY}.weight"].bfloat16(), "rounded to torch.bfloat16"),
    "transposed": (OUT, lambda t: t[OUT].T.contiguous(), "transposed"),
    "another layer's": (OUT, lambda t: t[OUT.replace("1", "0")], OUT.replace("1", "0")),
    "query for out": (OUT, lambda t: t[f"{QUERY}.weight"], f"{QUERY}.weight"),
    "heads exchanged": (OUT, lambda t: t[OUT].roll(64, 1), "values differ"),
    "a row lost": (OUT, lambda t: torch.cat([t[OUT][1:], t[OUT][:1] * 0]), "values differ"),
    "one value": (OUT, lambda t: t[OUT].index_fill(0, torch.tensor([5]), 0.0), "128 of 16384 values differ"),
}
"""The tensor that is wrong, what it is made from the right ones, and what is said of it."""


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Checkpoint], Checkpoint]], None]:
    """Has maxwhisper's loader change what it has read from OpenAI's files."""
    right = checkpoint._load_openai

    def plant(change: Callable[[Checkpoint], Checkpoint]) -> None:
        monkeypatch.setattr(checkpoint, "_load_openai", lambda path: change(right(path)))

    return plant


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_weights_is_red_in_its_block(fault: str, planted: Any) -> None:
    name, change, said = FAULTS[fault]
    planted(lambda c: replace(c, tensors=c.tensors | {name: change(c.tensors)}))
    with pytest.raises(pytest.fail.Exception, match=f"the loaders of weights differ in .*\n  {name}: .*{said}"):
        test_loading.check_weights(NANO)
    for dtype in (torch.float32, torch.bfloat16):
        assert_red(Suite(trained(), dtype), name, said)


def assert_red(suite: Suite, name: str, said: str) -> None:
    """Requires attention of one layer to be red, by the tensor's name, before anything is compiled."""
    wrong, right = (
        next(c for c in suite.comparisons(BLOCKS["encoder.attention"], ["speech"]) if c.layer == layer)
        for layer in (1, 0)
    )
    found = suite.judge(wrong)
    assert not found.passed and f"the loaders of weights differ in {name}: " in str(found) and said in str(found)
    assert not suite.misread(right) and not suite.subject.executables


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: replace(c, dims=replace(c.dims, n_text_head=4)), "n_text_head: it is 4, not 2"),
        (lambda c: replace(c, alignment_heads=((0, 0),)), r"alignment heads: they are \[\[0, 0\]\], not \[\[1, 0\]"),
        (
            lambda c: replace(c, tensors=dict(list(c.tensors.items())[1:])),
            "encoder.positional_embedding: it is missing",
        ),
    ],
    ids=["number of heads", "alignment heads", "a tensor left out"],
)
def test_a_fault_of_the_rest_is_named(change: Any, said: str, planted: Any) -> None:
    planted(change)
    with pytest.raises(pytest.fail.Exception, match=f"the loaders of weights differ in .*\n  {said}"):
        test_loading.check_weights(NANO)


def test_a_wrong_name_in_a_hugging_face_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path, hugging_face_names(random_tensors()))
    right = checkpoint.hugging_face_name

    def exchanged(name: str) -> str:
        both = {"query.weight": "key.weight", "key.weight": "query.weight"}
        return right(next((name.removesuffix(a) + b for a, b in both.items() if name.endswith(a)), name))

    monkeypatch.setattr(checkpoint, "hugging_face_name", exchanged)
    with pytest.raises(pytest.fail.Exception, match="attn.key.weight: it holds .*attn.query.weight"):
        test_loading.check_weights(folder)


STEP = np.float32(waveforms.STEP)
SOUND: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "10 ms late": lambda x: np.pad(x, (160, 0))[:-160],
    "a hundredth louder": lambda x: x * np.float32(1.01),
    "the last 100 ms lost": lambda x: x[:-1600],
    "100 ms silent": lambda x: np.concatenate([x[:16000], np.zeros_like(x[:1600]), x[17600:]]),
    "at half the rate": lambda x: np.repeat(x[::2], 2)[: len(x)],
    "8 bits": lambda x: (x * 128).round() / 128,
}


@pytest.fixture
def deaf(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[np.ndarray], np.ndarray]], None]]:
    """Has maxwhisper's reader of audio change what it has read."""
    right = audio.read_audio

    def plant(change: Callable[[np.ndarray], np.ndarray]) -> None:
        monkeypatch.setattr(audio, "read_audio", lambda *given: change(right(*given)))

    transcripts.heard.cache_clear()
    yield plant
    transcripts.heard.cache_clear()


@pytest.mark.parametrize("file", ["english-1.wav", "english-3.mp3", "english-stereo.wav", "german-3.ogg"])
@pytest.mark.parametrize("fault", SOUND)
def test_a_fault_of_audio_makes_a_transcript_red(fault: str, file: str, deaf: Any) -> None:
    deaf(SOUND[fault])
    nobody = cast(Any, None)  # is asked to transcribe
    found = transcripts.compare(nobody, nobody, f"clips/{file}", "greedy")
    assert not found.equal and found.difference.startswith(f"the loaders of audio differ: {file}")


def test_a_lost_channel_is_heard_and_two_steps_of_one_sample(tmp_path: Path, deaf: Any) -> None:
    left, right = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 16000)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 16000)
    test_loading.check_audio(tmp_path / "a.wav")
    for wrong in (lambda x: left, lambda x: x + 2 * STEP * (np.arange(len(x)) == 5000)):
        deaf(wrong)
        with pytest.raises(pytest.fail.Exception, match="the loaders of audio differ: a.wav"):
            test_loading.check_audio(tmp_path / "a.wav")


LEAST: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "one step of one sample": ("english-1.wav", lambda x: x + STEP * (np.arange(len(x)) == 5000)),
    "the last sample": ("english-1.wav", lambda x: x[:-1]),
    "two steps of one sample": ("english-3.mp3", lambda x: x + 2 * STEP * (np.arange(len(x)) == 5000)),
    "four steps of noise": (
        "english-stereo.wav",
        lambda x: x + 4 * STEP * np.random.default_rng(0).uniform(-1, 1, len(x)),
    ),
}
"""By what is wrong, a clip in which nothing smaller is another sound, and what makes it of the right one."""


@pytest.mark.parametrize("wrong", LEAST)
def test_little_is_another_sound(wrong: str) -> None:
    file, change = LEAST[wrong]
    path = FIXTURES / "clips" / file
    right = waveforms.read(path)
    assert not waveforms.difference(path, right)
    assert waveforms.difference(path, change(right).astype(np.float32))


def test_a_tensor_too_many_and_the_last_bit_of_a_value_are_differences() -> None:
    dims, right = trained().dims, {"a": torch.ones(3), "b": torch.ones(2)}
    nearly = torch.tensor([1.0, 1.0, 1 + 2**-23])
    for ours, names in (
        ({**right, "c": torch.ones(1)}, {"c"}),
        ({**right, "a": nearly}, {"a"}),
        ({"a": right["a"]}, {"b"}),
        ({**right, "a": right["a"].half()}, set()),
    ):
        assert set(checkpoints.differences(dims, ours, dims, right)) == names


@pytest.mark.parametrize(("rate", "loudness", "same"), [(44100, 0.5, True), (44100, 0.75, False), (16000, 0.0, True)])
def test_a_sound_in_the_pass_band_may_differ_by_two_roundings(
    rate: int, loudness: float, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a twelfth of a step's square each; what is no number is another sound at any rate."""
    silence = np.zeros(SAMPLE_RATE, np.float32)
    info = SimpleNamespace(frames=rate, samplerate=rate, channels=1, subtype="PCM_16")
    monkeypatch.setattr(waveforms, "read", lambda path: silence)
    monkeypatch.setattr(waveforms.soundfile, "info", lambda path: info)
    tone = loudness * STEP * np.sin(2 * np.pi * 1000 / SAMPLE_RATE * np.arange(SAMPLE_RATE))
    assert (waveforms.difference(Path("a"), tone.astype(np.float32)) == "") == same
    silence_but_one = silence.copy()
    silence_but_one[99] = np.nan
    assert waveforms.difference(Path("a"), silence_but_one)
