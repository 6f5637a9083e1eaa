"""report.json: everything in a run. docs/report.md describes every field; whoever changes one raises SCHEMA_VERSION."""

import json
import math
from typing import Any

from ..chain import Chain
from ..faults import FaultResult, fault_totals, outcome
from ..judge import Comparison, Explanation, Judgement, K, Output, dtype_name
from ..results import Run
from .figures import conclusion, failures

SCHEMA_VERSION = 2
MAP_DIGITS = 4
"""Significant digits of a map of errors, which is to be looked at."""
OF_FAULTS = ("n", "caught", "right_block", "below", "between", "missed", "only_one", "published")
"""Fields of `FaultTotals`."""


def as_json(run: Run, machine: dict[str, str]) -> str:
    """Returns strict JSON: a number that is not finite is the string "NaN", "Infinity" or "-Infinity"."""
    return json.dumps(finite(as_data(run, machine)), allow_nan=False, ensure_ascii=False, indent=1) + "\n"


def finite(value: Any) -> Any:
    """Returns a value with strings in the place of numbers that JSON has not."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list | tuple) else value


def fields_of(record: Any, *names: str) -> dict[str, Any]:
    """Returns fields by name, so that one that is added to a class does not change the schema unasked."""
    return {name: getattr(record, name) for name in names}


def as_data(run: Run, machine: dict[str, str]) -> dict[str, Any]:
    found = conclusion(run)
    return {
        "schema_version": SCHEMA_VERSION,
        "passed": found.passed,
        "reason": found.reason,
        "exit_status": run.exit_status,
        "command": run.command,
        "started": run.started.isoformat(timespec="seconds"),
        "k": K,
        "totals": totals(run),
        "environment": machine,
        "compile_log": [fields_of(record, "name", "graphs", "seconds") for record in run.compiled],
        "judgements": [judgement_data(judgement) for judgement in run.judgements],
        "chains": [chain_data(chain) for chain in run.chains],
        "faults": [fault_data(fault) for fault in run.faults],
        "transcripts": [fields_of(t, "clip", "decoding", "equal", "n_compared", "difference") for t in run.transcripts],
    }


def totals(run: Run) -> dict[str, Any]:
    return {
        "pairs": run.pairs,
        "pairs_recalled": run.recalled_pairs,
        "comparisons": len(run.judgements),
        "comparisons_failed": sum(not judgement.passed for judgement in run.judgements),
        "chains": len(run.chains),
        "chains_failed": sum(not chain.passed for chain in run.chains),
        "transcripts": len(run.transcripts),
        "transcripts_failed": sum(not transcript.equal for transcript in run.transcripts),
        "faults": {dtype: fields_of(total, *OF_FAULTS) for dtype, total in fault_totals(run.faults).items()},
        "failures": len(failures(run)),
        "artifacts_compiled": len(run.compiled),
        "graphs_compiled": run.graphs_compiled,
        "compile_seconds": run.compile_seconds,
        "compare_seconds": run.compare_seconds,
        "test_seconds": run.test_seconds,
    }


def comparison_data(comparison: Comparison) -> dict[str, Any]:
    known = fields_of(comparison, "block", "layer", "size", "device", "inputs", "seed")
    return {**known, "dtype": dtype_name(comparison.dtype)}


def judgement_data(judgement: Judgement) -> dict[str, Any]:
    return {
        "comparison": comparison_data(judgement.comparison),
        "passed": judgement.passed,
        "pairs": judgement.pairs,
        "defects": judgement.defects,
        "condition": judgement.condition,
        "outputs": [output_data(output) for output in judgement.outputs],
        "explanations": [explanation_data(explanation) for explanation in judgement.explanations],
    }


def output_data(output: Output) -> dict[str, Any]:
    fields = ("name", "subject", "peer", "budget", "ratio", "used", "passed")
    return {
        **fields_of(output, "index", "shape"),
        "measures": [fields_of(measure, *fields) for measure in output.measures],
    }


def explanation_data(explanation: Explanation) -> dict[str, Any]:
    return {
        **fields_of(explanation, "output", "worst", "oracle", "peer", "subject"),
        "diagnoses": [fields_of(diagnosis, "name", "before", "after") for diagnosis in explanation.diagnoses],
        "errors": [[float(f"{x:.{MAP_DIGITS}g}") for x in row] for row in explanation.errors.tolist()],
    }


def chain_data(chain: Chain) -> dict[str, Any]:
    return {
        "comparison": comparison_data(chain.comparison),
        "passed": chain.passed,
        "first_divergence": chain.first_divergence,
        "submodules": [{"name": name, **judgement_data(judgement)} for name, judgement in chain.judgements.items()],
        "intermediates_effects": [fields_of(effect, "output", "identical", "relative_l2") for effect in chain.effects],
    }


def fault_data(found: FaultResult) -> dict[str, Any]:
    known = fields_of(found.fault, "name", "block", "path", "kind", "published")
    result = fields_of(found, "accepted", "caught", "right_block", "checks", "only_check", "divergence", "used")
    effects = {"effect": dict(found.effect), "rounding": dict(found.rounding)}
    return {**known, "dtype": dtype_name(found.dtype), "outcome": outcome(found), **result, **effects}
