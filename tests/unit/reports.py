"""Runs that passed and failed, and their reports, for tests of what a report says."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import patch

import torch

from reference.chain import Chain, IntermediatesEffect
from reference.compile_log import CompileRecord
from reference.faults import Fault, FaultResult
from reference.judge import Comparison, Judgement, Measure, Output, explain, judge
from reference.report import write
from reference.report.markup import Html
from reference.results import Run
from reference.transcripts import Transcript

FILES = ("report.html", "report.json", "summary.md")
HOSTILE = "<script>alert('x')</script> & \"quoted\" | `ticked` $x^$"
VOID = {"meta", "br"}


def judgement(block: str = "encoder.mlp", error: float = 2e-7, **comparison: object) -> Judgement:
    """Returns a verdict on two outputs: PyTorch's error 1e-7, the budget 4e-7, MAX's error in the second as given."""
    known: dict[str, object] = {
        "size": "fixture",
        "dtype": torch.float32,
        "block": block,
        "layer": 0,
        "inputs": "speech",
    } | comparison
    outputs = (
        Output(0, (1, 5, 8), (Measure("relative L2", 1e-8, 1e-7, 4e-7),)),
        Output(1, (1, 5, 8), (Measure("relative L2", error, 1e-7, 4e-7), Measure("worst position", 0.0, 0.0, 1e-6))),
    )
    return Judgement(Comparison(**known), outputs, ())  # type: ignore[arg-type]


def explained(subject: torch.Tensor, oracle: torch.Tensor) -> Judgement:
    c = Comparison("fixture", torch.float32, "encoder.attention", 1, "speech")
    three = [oracle], [oracle.float()], [subject.float()]
    return replace(judge(c, *three, longest_reduction=8), explanations=explain(*three))


def chain(error: float = 2e-7, inputs: str = "speech") -> Chain:
    names = ["log_mel", "encoder.stem", "encoder.blocks.0.mlp", "encoder", "decoder.embedding", "step decoder"]
    judgements = {name: judgement(name) for name in names}
    judgements["decoder.embedding"] = judgement("decoder.embedding", 0.0)
    judgements["encoder.blocks.0.mlp"] = judgement("encoder.blocks.0.mlp", error)
    effects = IntermediatesEffect("encoder", True, 0.0), IntermediatesEffect("decoder", False, 3e-8)
    return Chain(Comparison("fixture", torch.float32, "chain", 0, inputs), judgements, effects)


def fault(
    name: str, dtype: torch.dtype = torch.float32, checks: tuple[str, ...] = ("chain",), **more: object
) -> FaultResult:
    wrong = Fault(name, "encoder.mlp", "encoder.blocks.1.mlp", change=lambda tensors, dims: {}, published=True)
    isolated = tuple(f"isolated: {check}" if check != "chain" else check for check in checks)
    known: dict[str, object] = {"divergence": "encoder.blocks.1.mlp" if "chain" in checks else None, "used": 30.0}
    known |= {"rounding": {"speech": 1e-3}, "effect": {"speech": 1e-2}} | more
    return FaultResult(wrong, dtype, isolated, **known)  # type: ignore[arg-type]


def passing() -> Run:
    return Run(
        judgements=[
            judgement("encoder.mlp"),
            judgement("log_mel", 5e-8),
            judgement("decoder.mlp.step", inputs="x.late"),
        ],
        chains=[chain()],
        faults=[
            fault("bias dropped", checks=("relative L2", "chain")),
            fault("bias dropped", torch.bfloat16, checks=("KL max",)),
            fault("rounded", torch.bfloat16, checks=(), effect={"speech": 1e-5}, used=0.5),
        ],
        transcripts=[Transcript("english-1.wav", "greedy", True, 41)],
        compiled=[CompileRecord("fixture, float32, parts", 19, 2.5)],
        waits=[2.5],
        test_seconds=4.0,
        started=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
        command="pytest tests/parity -k 'mlp or chain'",
    )


def failing() -> Run:
    oracle = torch.arange(40.0, dtype=torch.float64).reshape(1, 5, 8).sin()
    broken = oracle.clone()
    broken[0, 2, 3] = math.nan
    run = passing()
    run.judgements += [
        judgement("encoder", 8e-7),
        judgement("decoder.prefill", math.nan),
        judgement("decoder.step", math.inf),
        explained(oracle * 1.1, oracle),
        explained(broken, oracle),
    ]
    run.chains.append(chain(9e-7, "silence"))
    run.faults.append(fault("never seen", checks=(), used=0.2))
    run.faults.append(fault("elsewhere", checks=("worst position", "chain"), divergence="decoder.ln"))
    run.transcripts.append(Transcript("german-1.wav", "beam", False, 12, "token 3"))
    run.exit_status = 1
    return run


def written(run: Run, folder: Path, drawn: bool = True) -> tuple[str, dict, str]:
    """Writes a report, and returns page, data and summary. drawn: matplotlib draws the charts, in most of a second."""
    with nullcontext() if drawn else patch("reference.report.charts.inline", return_value=Html("<svg></svg>")):
        write(run, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    page, data, summary = ((folder / name).read_text() for name in FILES)

    def not_json(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return page, json.loads(data, parse_constant=not_json), summary


class Reader(HTMLParser):
    """Fails on elements that do not close in order; collects tags, attributes and the text outside of style."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader
