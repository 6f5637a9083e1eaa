"""The page's section on chains: how the error grows along the network."""

from collections.abc import Iterable, Sequence

from ..chain import Chain
from ..judge import dtype_name
from ..results import Run
from .attempts import Attempts
from .figures import chained_points, divergence, isolated_points, scientific, worst_chains_first
from .markup import Html, element, folded, html, mark, none_of, table, table_of


def network_section(run: Run, attempts: Attempts) -> Html:
    if not run.chains:
        return none_of("chain over the whole network")
    chains = worst_chains_first(run.chains)
    shown = first_of_each_dtype(chains)
    drawn = {id(chain): chain_figure(run, chain, f"chain-{number}", attempts) for number, chain in enumerate(chains)}
    rest = [drawn[id(chain)] for chain in chains if chain not in shown]
    return html(
        element(
            "p",
            "Each submodule is fed what MAX made before it (chained); beside it, its block fed the oracle's own inputs "
            "(isolated), where a block stands at that place. The first divergence is the first submodule outside its "
            "budget: all that was fed to it was within. Point at a mark for its name and figures.",
        ),
        *(drawn[id(chain)] for chain in shown),
        folded(f"{len(rest)} more chains", *rest) if rest else "",
        element("h3", "First divergence, and what intermediates changed"),
        chain_table(chains),
    )


def first_of_each_dtype(chains: Iterable[Chain]) -> list[Chain]:
    found: dict[str, Chain] = {}
    for chain in chains:
        found.setdefault(dtype_name(chain.comparison.dtype), chain)
    return list(found.values())


def chain_figure(run: Run, chain: Chain, name: str, attempts: Attempts) -> Html:
    c, points = chain.comparison, chained_points(chain)
    names, first = list(chain.judgements), chain.first_divergence
    chart = attempts.chart(
        lambda charts: charts.along_the_network(name, names, points, isolated_points(run, chain), first)
    )
    rows = [
        (element("code", p.name), scientific(p.subject), scientific(p.peer), scientific(p.budget), mark(p.passed))
        for p in points
    ]
    return element(
        "figure",
        element("figcaption", f"{c.size}, {dtype_name(c.dtype)}, {c.device}, {c.inputs}"),
        element("div", chart, class_="scroll chart", tabindex=0),
        folded(
            f"{len(rows)} submodules in figures (relative L2)",
            table(("submodule", "MAX", "PyTorch", "budget", "verdict"), rows, class_="figures"),
        ),
    )


def chain_table(chains: Sequence[Chain]) -> Html:
    rows = []
    for chain in chains:
        c = chain.comparison
        changed = [
            f"{e.output}: {'identical' if e.identical else f'changed by {scientific(e.relative_l2)}'}"
            for e in chain.effects
        ]
        row = {"size": c.size, "dtype": dtype_name(c.dtype), "inputs": c.inputs, "submodules": len(chain.judgements)}
        row["first divergence"] = mark(chain.passed, "none", divergence(chain))
        row["changed by intermediates (relative L2)"] = "; ".join(changed) or "not run"
        rows.append(row)
    return table_of(rows)
