"""The page's section on faults: which the judge caught, in the right block, by which checks."""

from collections.abc import Sequence

from ..faults import BELOW, CAUGHT, MISSED, WRONG_BLOCK, FaultResult, FaultTotals, fault_totals, outcome
from ..judge import dtype_name
from ..results import Run
from .figures import dtypes_of, fixed, largest_effect, scientific
from .markup import Html, element, folded, html, mark, none_of, table, table_of

TONE = {MISSED: "bad", WRONG_BLOCK: "bad", BELOW: "warn", CAUGHT: "good"}


def fault_section(run: Run) -> Html:
    if not run.faults:
        return none_of("faults")
    dtypes = [dtype for dtype in dtypes_of(run) if any(dtype_name(f.dtype) == dtype for f in run.faults)]
    by_fault: dict[str, dict[str, FaultResult]] = {}
    for found in run.faults:
        by_fault.setdefault(found.fault.name, {})[dtype_name(found.dtype)] = found
    ordered = sorted(by_fault.values(), key=lambda of: min(map(telling, of.values())))
    notable = [of for of in ordered if min(map(telling, of.values()))[0] < COMMON]
    rest = ordered[len(notable) :]
    header = ("fault", "block that is wrong", *dtypes)
    return html(
        element(
            "p",
            "Wrong models that the judge must catch, in the block that is wrong. Effect is how much the fault changes "
            "the block, rounding PyTorch's own error there (relative L2, on the inputs where the fault stands out "
            "most): one whose effect is below that rounding need not be caught.",
        ),
        totals_table(fault_totals(run.faults)),
        element("h3", "Not caught, or caught by one check alone") if notable else "",
        table(header, [fault_row(of, dtypes) for of in notable], class_="faults") if notable else "",
        folded(
            f"{len(rest)} faults that several checks catch in every dtype",
            table(header, [fault_row(of, dtypes) for of in rest], class_="faults"),
        )
        if rest
        else "",
    )


COMMON = 4
"""The rank of a fault that is caught by several checks."""


def telling(found: FaultResult) -> tuple[int, float]:
    """Returns what to sort by: the missed, the wrong block, below rounding, one check, and what is easily caught."""
    rank = [MISSED, WRONG_BLOCK, BELOW].index(outcome(found)) if outcome(found) != CAUGHT else COMMON
    return (3 if rank == COMMON and found.only_check else rank), found.used


def totals_table(totals: dict[str, FaultTotals]) -> Html:
    rows = [
        {
            "dtype": dtype,
            "caught": f"{t.caught} of {t.n}",
            "in the right block": t.right_block,
            "below rounding": t.below,
            "between that and the budget": t.between,
            "missed": mark(not t.missed, "0", str(t.missed)),
            "by one check alone": t.only_one,
            "published": t.published,
        }
        for dtype, t in totals.items()
    ]
    return table_of(rows, "figures")


def fault_row(of: dict[str, FaultResult], dtypes: Sequence[str]) -> list[Html]:
    fault = next(iter(of.values())).fault
    published = element("span", "published", class_="badge", title="an earlier published attempt made this mistake")
    name = element("th", fault.name, " ", published if fault.published else "", scope="row")
    place = element("td", element("code", fault.block))
    return [
        name,
        place,
        *(fault_cell(of[d]) if d in of else element("td", "not tried", class_="quiet") for d in dtypes),
    ]


def fault_cell(found: FaultResult) -> Html:
    state = outcome(found)
    alone = element("span", "only one check", class_="badge", title="nobody must delete that check")
    lines = [
        element("div", element("span", state, class_=TONE[state]), " ", alone if found.only_check else ""),
        element("div", ", ".join(check.removeprefix("isolated: ") for check in found.checks), class_="quiet"),
    ]
    if found.divergence and not found.right_block:
        lines.append(element("div", f"chain diverges at {found.divergence}", class_="quiet"))
    if effect := largest_effect(found):
        inputs, of_fault, rounding = effect
        text = f"effect {scientific(of_fault)}, rounding {scientific(rounding)}, {inputs}"
        lines.append(element("div", text, class_="quiet"))
    lines.append(element("div", f"{fixed(found.used)} of the budget", class_="quiet"))
    return element("td", *lines)
