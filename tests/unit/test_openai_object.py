"""The table of what users do to openai-whisper's object, done to both objects: what its README, its notebooks and its
tests do, the public methods of its `Whisper`, and those of PyTorch's modules."""

import base64
import copy
import gzip
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch
import whisper
from whisper import DecodingOptions, timing, tokenizer
from whisper.model import Whisper as OpenAIWhisper
from whisper.model import disable_sdpa

from maxwhisper.alignment import find_alignment, keep_alignment_compiled
from maxwhisper.audio import load_audio
from maxwhisper.engine.surroundings import one_torch_thread
from maxwhisper.errors import DeviceError, MaxWhisperError, OptionError
from maxwhisper.hooks import has_hooks
from maxwhisper.whisper import Whisper, load_model
from reference.fixtures import FIXTURES, NANO

SHORT: dict[str, Any] = {"fp16": False, "language": "en", "sample_len": 5}
TEXT = [2305, 307, 264, 2199, 2848]

Model = Any
Use = Callable[[Model, torch.Tensor], Any]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    keep_alignment_compiled()
    with one_torch_thread():
        yield


# ---- what works, and gives what openai-whisper's object gives -------------------------------------------------------


def text_of(x: Model) -> torch.Tensor:
    tokens = tokenizer.get_tokenizer(True, num_languages=x.num_languages, language="en", task="transcribe")
    return torch.tensor([[*tokens.sot_sequence, *TEXT]])


def sampled(x: Model, mel: torch.Tensor) -> list[int]:
    torch.manual_seed(0)
    return whisper.decode(x, mel, DecodingOptions(**SHORT, temperature=0.4, best_of=2)).tokens


def batch(x: Model, mel: torch.Tensor) -> list[list[int]]:
    options = DecodingOptions(**SHORT, without_timestamps=True)
    return [result.tokens for result in x.decode(torch.stack([mel, mel.roll(500, 1)]), options)]


def aligned(x: Model, mel: torch.Tensor) -> list[tuple[str, float, float]]:
    tokens = tokenizer.get_tokenizer(True, num_languages=x.num_languages, language="en", task="transcribe")
    words = timing.find_alignment(x, tokens, TEXT, mel, 1500)
    assert not any(block.cross_attn._forward_hooks for block in x.decoder.blocks)
    return [(word.word, word.start, word.end) for word in words]


def steered_words(x: Model, mel: torch.Tensor) -> list[tuple[str, float, float]]:
    """The times of words, by a hook that changes what attention is asked."""
    tokens = tokenizer.get_tokenizer(True, num_languages=x.num_languages, language="en", task="transcribe")
    hook = x.decoder.blocks[0].mlp.register_forward_hook(lambda _, ins, out: -out)
    find = find_alignment if isinstance(x, Whisper) else timing.find_alignment
    words = find(x, tokens, TEXT, mel, 1500)
    hook.remove()
    return [(word.word, word.start, word.end) for word in words]


def attention_weights(x: Model, mel: torch.Tensor) -> list[Any]:
    """Looks for the weights as the notebook on multilingual speech does."""
    weights: list[Any] = [None] * x.dims.n_text_layer
    hooks = [
        block.cross_attn.register_forward_hook(lambda _, ins, outs, index=i: weights.__setitem__(index, outs[-1]))
        for i, block in enumerate(x.decoder.blocks)
    ]
    with torch.no_grad(), disable_sdpa():
        logits = x(mel[None], text_of(x))
    for hook in hooks:
        hook.remove()
    return [(each.shape, each.dtype, each.argmax(-1).tolist()) for each in weights] + logits.argmax(-1).tolist()


def cached(x: Model, mel: torch.Tensor, install: Callable[[Model], Any] | None = None) -> list[Any]:
    """Decodes as `PyTorchInference` does, with texts that change their rows."""
    tokens, features = text_of(x).repeat(2, 1), x.encoder(mel[None])
    cache, hooks = install(x) if install else x.install_kv_cache_hooks()
    found = [x.decoder(tokens[:, :4], features, kv_cache=cache)]
    for i in range(4, tokens.shape[1]):
        found.append(x.decoder(tokens[:, i : i + 1] + torch.tensor([[0], [1]]), features, kv_cache=cache))
        for block in x.decoder.blocks:
            for module in (block.attn.key, block.attn.value):
                cache[module] = cache[module][[1, 0] if i < 7 else [1, 0, 0]].detach()
        tokens = tokens if i < 7 else tokens[:1].repeat(2, 1)
        if i == 7:
            break
    for hook in hooks:
        hook.remove()
    shapes = [tuple(each.shape) for each in cache.values()]
    return [torch.cat(found, 1).argmax(-1).tolist(), len(cache), shapes]


def cut_short(x: Model, mel: torch.Tensor) -> list[int]:
    """Returns a cache that is taken back to an earlier token."""
    tokens, features = text_of(x), x.encoder(mel[None])
    cache, hooks = x.install_kv_cache_hooks()
    for part in (tokens[:, :4], tokens[:, 4:5], tokens[:, 5:6]):
        x.decoder(part, features, kv_cache=cache)
    for block in x.decoder.blocks:
        for module in (block.attn.key, block.attn.value):
            cache[module] = cache[module][:, :4]
    logits = x.decoder(tokens[:, 4:5] + 7, features, kv_cache=cache)
    for hook in hooks:
        hook.remove()
    return [next(iter(cache.values())).shape[1], *logits.argmax(-1)[0].tolist()]


def copied_cache(x: Model, mel: torch.Tensor) -> list[Any]:
    tokens, features = text_of(x), x.encoder(mel[None])
    cache, hooks = x.install_kv_cache_hooks()
    x.decoder(tokens[:, :4], features, kv_cache=cache)
    for hook in hooks:
        hook.remove()
    other, hooks = x.install_kv_cache_hooks(cache)
    logits = x.decoder(tokens[:, 4:5], features, kv_cache=other)
    for hook in hooks:
        hook.remove()
    return [next(iter(each.values())).shape[1] for each in (cache, other)] + logits.argmax(-1)[0].tolist()


def own_hooks(x: Model, mel: torch.Tensor) -> list[Any]:
    return cached(x, mel, OpenAIWhisper.install_kv_cache_hooks)


def hook_outputs(x: Model, modules: list[Any], call: Callable[[], Any]) -> list[Any]:
    seen: list[Any] = []
    hooks = [module.register_forward_hook(lambda _, ins, out: seen.append(out)) for module in modules]
    call()
    for hook in hooks:
        hook.remove()
    return [(tuple(each.shape), each.dtype) for each in seen]


def steps(x: Model, mel: torch.Tensor) -> list[Any]:
    return hook_outputs(x, [x.encoder, x.decoder], lambda: x.decode(mel, DecodingOptions(**SHORT)))


def inner_steps(x: Model, mel: torch.Tensor) -> list[Any]:
    modules = [x.encoder.blocks[0], x.decoder.blocks[1].mlp, x.decoder.ln]
    return hook_outputs(x, modules, lambda: x.decode(mel, DecodingOptions(**SHORT)))


def steered(x: Model, mel: torch.Tensor) -> list[Any]:
    """Hooks that change what goes on, of attention as well, where scores are asked for."""
    hooks = [
        x.encoder.blocks[0].register_forward_hook(lambda _, ins, out: -out),
        x.decoder.blocks[1].cross_attn.register_forward_hook(
            lambda _, ins, outs: None if outs[0] is None else (outs[0] * 0, outs[1])
        ),
    ]
    result = x.decode(mel, DecodingOptions(**SHORT)).tokens
    for hook in hooks:
        hook.remove()
    return result


def gradient(x: Model, mel: torch.Tensor) -> list[Any]:
    mel = mel[None, :, :].clone().requires_grad_()
    x(mel, text_of(x)).logsumexp(-1).sum().backward()
    assert mel.grad is not None
    return [mel.grad.shape, int(mel.grad.abs().sum(1).argmax())]


def traced(x: Model, mel: torch.Tensor) -> list[int]:
    trace = torch.jit.trace(x.encoder, (mel[None],), check_trace=False)
    return trace(-mel[None]).argmax(-1).flatten().tolist()


def parts(x: Model, mel: torch.Tensor) -> list[Any]:
    """Modules inside, called one by one."""
    tokens, mask = text_of(x), x.decoder.mask
    features = x.encoder.conv2(x.encoder.conv1(mel[None])).shape
    text = x.decoder.token_embedding(tokens) + x.decoder.positional_embedding[: tokens.shape[1]]
    y = x.decoder.blocks[0](text, x.encoder(mel[None]), mask=mask)
    return [features, x.decoder.ln(y).argmax(-1).tolist(), x.decoder.blocks[0].attn.n_head]


def stays(change: Callable[[Model], Any]) -> Use:
    """Returns a use in which a change returns the model as it was."""
    return lambda x, mel: change(x) is x and x.decode(mel, DecodingOptions(**SHORT)).tokens


def transcript(x: Model, audio: Any) -> Any:
    result = whisper.transcribe(x, audio, **SHORT, temperature=0, word_timestamps=True)
    return [(word["word"], word["start"], word["end"]) for each in result["segments"] for word in each["words"]]


WORKS: dict[str, Use] = {
    "whisper.decode": lambda x, mel: whisper.decode(x, mel, DecodingOptions(**SHORT)).tokens,
    "whisper.decode, beams": lambda x, mel: whisper.decode(x, mel, DecodingOptions(**SHORT, beam_size=3)).tokens,
    "whisper.decode, at random": sampled,
    "whisper.decode, keywords": lambda x, mel: whisper.decode(x, mel, **SHORT, task="translate").text,
    "whisper.detect_language": lambda x, mel: whisper.detect_language(x, mel[None])[0].tolist(),
    "whisper.transcribe": lambda x, mel: transcript(x, load_audio(FIXTURES / "clips" / "english-4.ogg")),
    "whisper.timing.find_alignment": aligned,
    "model.decode of a batch": batch,
    "model.decode of features": lambda x, mel: x.decode(x.embed_audio(mel[None]), DecodingOptions(**SHORT))[0].text,
    "model.detect_language": lambda x, mel: max((p, code) for code, p in x.detect_language(mel)[1].items())[1],
    "model.logits": lambda x, mel: x.logits(text_of(x), x.embed_audio(mel[None])).argmax(-1).tolist(),
    "model(mel, tokens)": lambda x, mel: x(mel[None], text_of(x)).argmax(-1).tolist(),
    "model.encoder, keywords": lambda x, mel: x.encoder(x=mel[None]).argmax(-1).tolist(),
    "model.decoder, a dict": lambda x, mel: (
        x.decoder(text_of(x), x.encoder(mel[None]), kv_cache={}).argmax(-1).tolist()
    ),
    "model.decoder, int32": lambda x, mel: x.decoder(text_of(x).int(), x.encoder(mel[None])).argmax(-1).tolist(),
    "install_kv_cache_hooks": cached,
    "install_kv_cache_hooks, cut short": cut_short,
    "install_kv_cache_hooks, a copy": copied_cache,
    "openai's hooks and dict": own_hooks,
    "times of words, with a hook": steered_words,
    "attention weights": attention_weights,
    "hooks of encoder and decoder": steps,
    "hooks inside": inner_steps,
    "hooks that change": steered,
    "gradients of mel": gradient,
    "torch.jit.trace": traced,
    "modules inside": parts,
    "is_multilingual, num_languages": lambda x, mel: (x.is_multilingual, x.num_languages, x.device, x.dims),
    "number of parameters": lambda x, mel: sum(int(np.prod(p.shape)) for p in x.parameters()),
    "names of parameters": lambda x, mel: [(name, p.shape, p.device) for name, p in x.named_parameters()],
    "names of modules": lambda x, mel: [name for name, _ in x.named_modules()],
    "state_dict": lambda x, mel: [(name, value.float().numpy().tobytes()) for name, value in x.state_dict().items()],
    "set_alignment_heads": lambda x, mel: alignment_heads(copy.deepcopy(x)),
    "eval, train": stays(lambda x: x.train().eval()),
    "float": stays(lambda x: x.float()),
    "to": stays(lambda x: x.to("cpu").to(torch.float32).to(device="cpu", dtype=torch.float32).cpu()),
    "to of encoder": lambda x, mel: x.encoder.to("cpu") is x.encoder,
    "requires_grad_(False), zero_grad": lambda x, mel: (x.requires_grad_(False) is x, x.zero_grad()),
    "copy.deepcopy": lambda x, mel: copy.deepcopy(x).decode(mel, DecodingOptions(**SHORT)).text,
    "copy.copy": lambda x, mel: copy.copy(x).decode(mel, DecodingOptions(**SHORT)).text,
}


def alignment_heads(x: Model) -> list[Any]:
    heads = np.zeros((x.dims.n_text_layer, x.dims.n_text_head), dtype=bool)
    heads[1, 1] = True
    x.set_alignment_heads(base64.b85encode(gzip.compress(heads.tobytes())))
    return x.alignment_heads.to_dense().tolist()


@pytest.mark.parametrize("use", WORKS)
def test_what_works_gives_what_openais_object_gives(
    model: Whisper, openai: OpenAIWhisper, mel: torch.Tensor, use: str
) -> None:
    assert WORKS[use](model, mel) == WORKS[use](openai, mel)


def test_what_inside_a_model_is_asked_is_said_to_be_computed_in_pytorch(
    model: Whisper, mel: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        inner_steps(model, mel)
    assert [record.getMessage() for record in caplog.records] == [
        "computed in PyTorch, not on MAX, and slower: modules inside have hooks",
        "tokens are selected by openai-whisper's loop, not in the graph: the decoder has hooks",
    ]


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_hook_of_any_kind_is_one(kind: str) -> None:
    module = torch.nn.Identity()
    hook = getattr(module, f"register_{kind}_hook")(lambda *_: None)
    assert has_hooks(module)
    hook.remove()
    assert not has_hooks(module)


def test_parameters_take_no_memory(model: Whisper) -> None:
    read = model.network.executables["encoder"].weights
    assert {p.data_ptr() for p in model.parameters()} <= {tensor.data_ptr() for tensor in read.values()}
    assert {p.data_ptr() for p in copy.deepcopy(model).parameters()} == {p.data_ptr() for p in model.parameters()}


def test_modules_inside_compute_exactly_what_openais_do(
    model: Whisper, openai: OpenAIWhisper, mel: torch.Tensor
) -> None:
    found = []
    for x in (model, openai):
        hook = x.encoder.ln_post.register_forward_hook(lambda _, ins, out: found.append(out.detach()))
        x.encoder(mel[None])
        hook.remove()
    assert len(found) == 2 and found[0].equal(found[1])


# ---- what a copy is -------------------------------------------------------------------------------------------------


def test_a_copy_has_hooks_heads_and_caches_of_its_own(model: Whisper, mel: torch.Tensor) -> None:
    seen: list[Any] = []
    hook = model.encoder.register_forward_hook(lambda *_: seen.append(0))
    copied = copy.deepcopy(model)
    hook.remove()
    model.encoder(mel)
    assert seen == []
    copied.encoder(mel)
    assert seen == [0]
    alignment_heads(copied)
    assert copied.alignment_heads.to_dense().sum() == 1 < model.alignment_heads.to_dense().sum()
    assert copied.network is model.network and copied.stepper is not model.stepper
    assert copied.decoder.blocks[0] is not model.decoder.blocks[0]


@pytest.mark.parametrize("dumps", [pickle.dumps, ForkingPickler.dumps], ids=["pickle", "multiprocessing"])
def test_a_pickle_holds_the_weights_and_gives_the_model(model: Whisper, mel: torch.Tensor, dumps: Any) -> None:
    """And leaves the model as it is: multiprocessing puts tensors into other memory, for the child to share."""
    copied = copy.deepcopy(model).train()
    alignment_heads(copied)
    restored = pickle.loads(dumps(copied))
    assert restored.decode(mel, DecodingOptions(**SHORT)).tokens == model.decode(mel, DecodingOptions(**SHORT)).tokens
    assert restored.alignment_heads.to_dense().equal(copied.alignment_heads.to_dense()) and restored.training
    assert all(a.equal(b) for a, b in zip(restored.parameters(), model.parameters(), strict=True))


def test_what_a_pickle_would_lose_is_said(model: Whisper) -> None:
    with pytest.raises(TypeError, match="pickle the model"):
        pickle.dumps(model.decoder)
    hook = model.decoder.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="hooks cannot be pickled"):
        pickle.dumps(model)
    hook.remove()


# ---- what is refused ------------------------------------------------------------------------------------------------


def set_heads(dump: Any, x: Model) -> None:
    x.set_alignment_heads(dump)


REFUSED: dict[str, tuple[Callable[[Model], Any], type[MaxWhisperError], str]] = {
    "half": (lambda x: x.half(), OptionError, "stays in float32, not float16: load_model"),
    "double": (lambda x: x.double(), OptionError, "stays in float32, not float64"),
    "bfloat16 of encoder": (lambda x: x.encoder.bfloat16(), OptionError, "not bfloat16"),
    "to a dtype": (lambda x: x.to(torch.float16), OptionError, "not float16"),
    "to a device": (lambda x: x.to("meta"), DeviceError, "stays on cpu, where load_model.* not on meta"),
    "cuda": (lambda x: x.cuda(), DeviceError, "stays on cpu, where load_model"),
    "load_state_dict": (lambda x: x.load_state_dict(x.state_dict()), OptionError, "read the weights once: save"),
    "requires_grad_": (lambda x: x.requires_grad_(), OptionError, "MAX does not train"),
    "decoder.requires_grad_": (lambda x: x.decoder.requires_grad_(), OptionError, "MAX does not train"),
} | {
    f"alignment heads: {kind}": (partial(set_heads, dump), OptionError, said)
    for kind, dump, said in (
        ("no base85", "é", "dump is 'é', expected a mask of . layers with . heads, in gzip and base85"),
        ("nothing", b"", "dump is b'', expected a mask"),
        ("no text", None, "dump is None, expected a mask"),
        ("no gzip", b"xx", "dump is b'xx', expected a mask"),
        ("half", base64.b85encode(gzip.compress(bytes(4))[:-9]), "expected a mask"),
        ("damaged", base64.b85encode(gzip.compress(bytes(4))[:10] + b"\xff" * 12), "expected a mask"),
        ("those of tiny", whisper._ALIGNMENT_HEADS["tiny"], "expected a mask of . layers"),
    )
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_model_is_refused(model: Whisper, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available() and name == "cuda":
        pytest.skip("the error is another where there is a GPU")
    change, error, said = REFUSED[name]
    with pytest.raises(error, match=said):
        change(model)


def in_place(tensor: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return tensor.add_(0)


CHANGES: dict[str, tuple[Callable[[Model], Any], str]] = {
    "in place": (lambda x: in_place(x.decoder.ln.weight), "ln.weight was changed"),
    "in place, of the encoder": (lambda x: in_place(x.encoder.conv1.bias), "conv1.bias was changed"),
    "in place, a buffer of the encoder": (
        lambda x: in_place(x.encoder.positional_embedding),
        "positional_embedding was changed",
    ),
    "another parameter": (
        lambda x: setattr(x.decoder.ln, "weight", torch.nn.Parameter(x.decoder.ln.weight.clone())),
        "ln.weight was changed",
    ),
    "other data": (lambda x: setattr(x.decoder.ln.weight, "data", torch.zeros(128)), "ln.weight was changed"),
    "another module": (lambda x: setattr(x.decoder.blocks[0], "mlp", torch.nn.Identity()), "blocks.0.mlp was changed"),
    "a gradient": (lambda x: setattr(x.decoder.ln.weight, "requires_grad", True), "requires a gradient; MAX does not"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_weights_that_were_changed_are_noticed_when_they_are_used(mel: torch.Tensor, name: str) -> None:
    model, (change, said) = load_model(NANO), CHANGES[name]
    features = model.encoder(mel[None])
    change(model)
    with pytest.raises(OptionError, match=said):
        model.encoder(mel[None]) if "encoder" in name else model.logits(text_of(model), features)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(OptionError, match=said):
            copied(model)


def test_a_cache_that_does_not_fit_is_refused(model: Whisper, mel: torch.Tensor) -> None:
    features, tokens = model.encoder(mel[None]), text_of(model)
    cache, _ = model.install_kv_cache_hooks()
    model.decoder(tokens[:, :4], features, kv_cache=cache)
    hook = model.decoder.ln.register_forward_hook(lambda *_: None)
    with pytest.raises(OptionError, match="unlike when this cache was made"):
        model.decoder(tokens[:, 4:5], features, kv_cache=cache)
    hook.remove()
    with pytest.raises(OptionError, match="key and value modules"):
        cache[model.decoder.ln] = torch.zeros(1)
    with pytest.raises(KeyError):
        _ = cache[model.decoder.ln]
    key = model.decoder.blocks[0].attn.key
    for wrong, said in ((torch.zeros(1, 3, 5), "expected .batch, token, 128"), (torch.zeros(1, 2, 128), "differ in")):
        cache[key] = wrong
        with pytest.raises(OptionError, match=said):
            model.decoder(tokens[:, 4:5], features, kv_cache=cache)
