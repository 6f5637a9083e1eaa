"""What `maxwhisper compare` converts checkpoints into, and how it scores texts."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from whisper.model import Whisper as OpenAIWhisper

from maxwhisper.checkpoint import load_checkpoint
from maxwhisper.compare import convert, stepwise
from maxwhisper.compare.material import SIZES, checkpoint_for, dimensions, recordings
from maxwhisper.compare.scores import agreement, word_error_rate
from maxwhisper.compare.tokens import tokenizer_of
from reference.blocks import TWINS, decoder, decoder_keys_values, pytorch_whisper
from reference.chain import layers
from reference.fixtures import FIXTURES, NANO
from reference.judge import Comparison, judge

from .engines import CLIP, TEXT, named, require

# ---- conversions ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder() -> Path:
    return convert.store(load_checkpoint(NANO))


def test_a_hugging_face_folder_holds_the_checkpoint(folder: Path) -> None:
    require(named("transformers"))
    ours, theirs = load_checkpoint(NANO), load_checkpoint(convert.convert("hugging-face", folder))
    assert theirs.dims == ours.dims
    assert theirs.tensors.keys() == ours.tensors.keys()
    assert all(torch.equal(theirs.tensors[name], ours.tensors[name]) for name in ours.tensors)


def test_the_tokenizer_of_a_hugging_face_folder_is_openais(folder: Path) -> None:
    require(named("transformers"))
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file(str(convert.convert("hugging-face", folder) / "tokenizer.json"))
    ours = tokenizer_of(load_checkpoint(NANO).dims)
    for text in (TEXT, " Ärger über 3,5 €, don't!", "日本語 と 한국어", "\t\n  x  "):
        assert theirs.encode(text).ids == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    for name in ("<|endoftext|>", "<|startoftranscript|>", "<|de|>", "<|notimestamps|>", "<|0.00|>", "<|30.00|>"):
        assert theirs.token_to_id(name) == ours.encoding.encode_single_token(name)


def test_the_graph_of_a_step_is_pytorchs_decoder() -> None:
    """Exported, it takes three tokens, then one, of two texts; PyTorch's decoder takes all four at once."""
    checkpoint = load_checkpoint(NANO)
    model, oracle = (
        pytorch_whisper(checkpoint.dims, checkpoint.tensors, dtype) for dtype in (torch.float32, torch.float64)
    )
    graphs = {name: graph.module for name, graph in stepwise.graphs(checkpoint).items()}
    torch.manual_seed(0)
    tokens, features = torch.randint(50257, (2, 4)), torch.randn(1, 1500, model.dims.n_audio_state)
    with torch.inference_mode():
        cross = graphs["cross"](features)
        own = [torch.zeros(2, model.dims.n_text_head, 0, 64)] * len(cross)
        first, *own = graphs["step"](tokens[:, :3], *own, *cross)
        last, *own = graphs["step"](tokens[:, 3:], *own, *cross)
        peer, right = (logits_of(each, tokens, x) for each, x in ((model, features), (oracle, features.double())))
    twin = TWINS["decoder.prefill"]
    judgement = judge(
        *(Comparison("fixture", torch.float32, "decoder", 0, "random"), [right], [peer], [torch.cat([first, last], 1)]),
        longest_reduction=twin.longest_reduction(model.dims),
        roundings=twin.roundings(model.dims),
        n_vocab=model.dims.n_vocab,
    )
    assert judgement.passed, f"\n{judgement}"


def logits_of(model: OpenAIWhisper, tokens: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Computes logits in the dtype of the features."""
    return decoder(model, 0, tokens, **layers("cross", decoder_keys_values(model, 0, features)))[0]


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        convert.complete(tmp_path / "format", write)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_process_completes_meanwhile_stays(tmp_path: Path) -> None:
    """An engine may be reading it."""

    def write(folder: Path) -> None:
        if not (tmp_path / "format").exists():
            convert.complete(tmp_path / "format", lambda other: (other / "file").write_text("first"))
        (folder / "file").write_text("second")

    convert.complete(tmp_path / "format", write)
    assert (tmp_path / "format" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["format"]


def test_the_cache_is_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAXWHISPER_CACHE_DIR", str(tmp_path))
    checkpoint = load_checkpoint(NANO)
    folder = convert.store(checkpoint)
    again = load_checkpoint(folder / "openai" / "model.pt")
    assert convert.store(again) == folder and folder.is_relative_to(tmp_path)
    one_head = replace(again, dims=replace(again.dims, n_text_head=1))  # which no tensor tells
    assert convert.digest(one_head) != folder.name
    again.tensors["decoder.ln.bias"] = again.tensors["decoder.ln.bias"] + 1
    assert convert.digest(again) != folder.name


def test_random_weights_are_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "tiniest", dimensions(80, 1000, 64, 1, 2))
    first, second = checkpoint_for("random:tiniest"), checkpoint_for("random:tiniest")
    assert convert.digest(first) == convert.digest(second)
    assert (first.dims.n_audio_state, first.dims.n_audio_layer, first.dims.n_text_layer) == (64, 1, 2)
    assert all(tensor.isfinite().all() for tensor in first.tensors.values())
    assert not any((tensor == 0).all() or (tensor == 1).all() for tensor in first.tensors.values())


# ---- scores and texts ----------------------------------------------------------------------------------------------


def test_scores() -> None:
    assert agreement([[1, 2, 3, 4]], [[1, 9, 3, 4, 5]]) == 3 / 5
    assert agreement([[1, 2], []], [[1, 2], []]) == 1
    assert agreement([[]], [[]]) is None
    assert word_error_rate(["Hello there, you!"], ["hello their you"], ["en"]) == 1 / 3
    assert word_error_rate(["Über uns."], ["über uns"], ["de"]) == 0
    assert word_error_rate([""], ["x"], ["en"]) is None


def test_a_text_beside_the_audio_is_read_and_one_that_is_given_wins(tmp_path: Path) -> None:
    audio, given = tmp_path / "a.wav", tmp_path / "given"
    audio.write_bytes(CLIP.read_bytes())
    assert recordings([str(audio)], None)[0].text is None
    (tmp_path / "a.txt").write_text("beside")
    given.write_text("given")
    assert recordings([str(audio)], None)[0].text == "beside"
    assert recordings([str(audio)], [str(given)])[0].text == "given"
    given.write_text("given", encoding="utf-8-sig")
    assert recordings([str(audio)], [str(given)])[0].text == "given"
    (tmp_path / "a.txt").write_text("first")
    several = recordings([str(audio)] * 2, [str(given), str(tmp_path / "a.txt")])
    assert [each.text for each in several] == ["given", "first"], "in their order"


def test_five_minutes_of_speech_are_made_of_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FIXTURES))
    clips = importlib.import_module("clips")
    monkeypatch.setattr(clips, "TALK", tmp_path / "cache" / "talk.wav")
    clips.make_talk()
    [talk] = recordings([str(clips.TALK)], None)
    entries = {clip["text"]: clip for clip in json.loads((FIXTURES / "clips.json").read_text())["clips"]}
    chosen = [entries[line] for line in (talk.text or "").splitlines()]
    assert {clip["language"] for clip in chosen} == {"en"}
    assert round(talk.seconds) == round(sum(clip["duration"] for clip in chosen))
    assert 270 < talk.seconds <= 300 and len(talk.windows(80)) == 10


def test_windows_cover_all_of_a_recording() -> None:
    recording = recordings([str(CLIP)], None)[0]
    assert recording.windows(80).shape == (1, 80, 3000)
