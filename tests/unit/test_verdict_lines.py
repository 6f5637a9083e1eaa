"""python -m reference: a line for every block, whatever was found of it, and one line for what cannot be compared."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import reference.__main__ as lines
from maxwhisper.network.blocks import BLOCKS
from reference.judge import Comparison, Judgement, judge

BLOCK = "encoder.mlp"


def judged(subject: torch.Tensor) -> Judgement:
    of = Comparison("checkpoint", torch.float32, BLOCK, 0, "speech")
    return judge(of, [torch.ones(3, 4).double()], [torch.ones(3, 4)], [subject], longest_reduction=4)


@pytest.mark.parametrize(
    ("subject", "figures"),
    [
        (torch.ones(3, 4), "0.00e+00   0.00e+00    1.00  ok"),
        (torch.full((3, 4), torch.nan), "-          -       -  FAILED"),
    ],
    ids=["right", "no numbers"],
)
def test_a_block_has_a_line_whatever_its_values(
    subject: torch.Tensor, figures: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite: Any = SimpleNamespace(
        comparisons=lambda *_: [SimpleNamespace(layer=0)], judge=lambda *_: judged(subject), executable=lambda *_: None
    )
    monkeypatch.setattr(lines, "BLOCKS", {BLOCK: BLOCKS[BLOCK]})
    passed = lines.print_verdicts(SimpleNamespace(of=lambda _: suite))  # type: ignore[arg-type]
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith(BLOCK) and line.endswith(figures)
    assert passed == line.endswith("ok")


@pytest.mark.parametrize("wrong", [None, ("encoder.mlp", 0), ("decoder.logits.step", 1)])
def test_one_failure_in_any_block_or_layer_is_the_status(
    wrong: tuple[str, int] | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("encoder.mlp", "encoder.layer_norm", "decoder.logits.step")
    suite: Any = SimpleNamespace(
        comparisons=lambda block, _: [SimpleNamespace(block=block.name, layer=layer) for layer in (0, 1)],
        judge=lambda each, _: judged(torch.ones(3, 4) * (2 if (each.block, each.layer) == wrong else 1)),
        executable=lambda *_: None,
    )
    monkeypatch.setattr(lines, "BLOCKS", {name: BLOCKS[name] for name in names})
    monkeypatch.setattr(lines, "Halves", lambda _: SimpleNamespace(of=lambda _: suite))
    monkeypatch.setattr(sys, "argv", ["reference"])
    assert lines.main() == (wrong is not None)
    verdicts = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines()[-5:-2]}
    assert verdicts == dict.fromkeys(names, "ok") | ({wrong[0]: "FAILED"} if wrong else {})


def test_a_checkpoint_that_is_none_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["reference", "--checkpoint", "nowhere.pt"])
    assert lines.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m reference: nowhere.pt: no such file")
