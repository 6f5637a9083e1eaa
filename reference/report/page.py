"""report.html: one page without a reference to anything outside it."""

from pathlib import Path

from ..judge import severity
from ..results import Run
from .attempts import Attempts
from .figures import conclusion, failures, fixed, share
from .markup import Html, element, folded, html, mark, none_of, table
from .page_blocks import block_section, comparison_section, map_section
from .page_faults import fault_section
from .page_network import network_section

CSS = Path(__file__).with_name("page.css")
FAILURES = 20
"""How many failures have a line before the others are folded."""


def page(run: Run, machine: dict[str, str], attempts: Attempts) -> str:
    """Returns the HTML of the whole page; a section or a chart that cannot be made is a line in its place."""
    found = conclusion(run)
    contents = (
        ("failures", "Failures", attempts("failures", failure_section, run)),
        ("blocks", "MAX beside PyTorch, block by block", attempts("blocks", block_section, run, attempts)),
        ("network", "Error along the network", attempts("network", network_section, run, attempts)),
        ("maps", "Where the errors are", attempts("maps of errors", map_section, run, attempts)),
        ("faults", "The judge on trial", attempts("faults", fault_section, run)),
        ("transcripts", "Transcripts", attempts("transcripts", transcript_section, run)),
        ("comparisons", "All comparisons", attempts("comparisons", comparison_section, run)),
        ("environment", "Environment", attempts("environment", environment_section, run, machine)),
    )
    sections = [element("section", element("h2", title), body, id=id) for id, title, body in contents]
    links = [element("a", title, href=f"#{id}") for id, title, _ in contents]
    head = html(
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        element("title", f"maxwhisper parity: {found.word.lower()}"),
        element("style", Html(CSS.read_text(encoding="utf-8"))),
    )
    body = element("body", header(run), element("nav", *links), element("main", *sections))
    return f"<!doctype html>\n{element('html', element('head', head), body, lang='en')}\n"


# ---- at a glance ---------------------------------------------------------------------------------------------------


def header(run: Run) -> Html:
    found = conclusion(run)
    reason = element("span", found.reason[:1].upper() + found.reason[1:], class_="reason")
    banner = element(
        "p", element("strong", found.word), " ", reason, class_=f"conclusion {'good' if found.passed else 'bad'}"
    )
    started = f"{run.started:%Y-%m-%d %H:%M %Z}"
    origin = element("p", element("code", run.command), element("br"), started, class_="quiet")
    return element("header", element("h1", "maxwhisper beside PyTorch Whisper"), banner, tiles(run), origin)


def tiles(run: Run) -> Html:
    values = [
        (f"{run.pairs:,}", "pairs compared", f"{len(run.judgements)} comparisons, {len(run.chains)} chains"),
        (f"{run.compare_seconds:.1f} s", "comparing", f"in tests, without compiling{run.recalled_note}"),
        (f"{run.compile_seconds:.1f} s", "compiling", f"{run.graphs_compiled} graphs in {len(run.compiled)} artifacts"),
    ]
    compared = [judgement for judgement in run.judgements if judgement.pairs]
    if compared:
        largest = max(compared, key=lambda j: severity(j.ratio))
        closest = max(compared, key=lambda j: j.used)
        values += [
            (fixed(largest.ratio), "largest MAX / PyTorch", str(largest.comparison)),
            (fixed(closest.used), "of a budget used, at most", str(closest.comparison)),
        ]
    shown = [
        element("div", element("dt", name), element("dd", value), element("dd", note, class_="quiet"))
        for value, name, note in values
    ]
    return element("dl", *shown, class_="tiles")


def failure_section(run: Run) -> Html:
    found = failures(run)
    if not found:
        return element("p", "None." if run.compared else "Nothing was compared.", class_="quiet")
    texts = [folded(each.title, element("pre", each.text, tabindex=0), opened=each is found[0]) for each in found]
    rest = texts[FAILURES:]
    return html(*texts[:FAILURES], folded(f"{len(rest)} more failures", *rest) if rest else "")


def transcript_section(run: Run) -> Html:
    if not run.transcripts:
        return none_of("whole transcripts")
    ordered = sorted(run.transcripts, key=lambda transcript: transcript.equal)
    equal = sum(transcript.equal for transcript in ordered)
    rows = [(t.clip, t.decoding, t.n_compared, mark(t.equal, "equal", "differs"), t.difference) for t in ordered]
    listed = table(("clip", "decoding", "tokens or words", "result", "first difference"), rows)
    title = f"{share(equal, len(ordered), 'transcripts')} equal to PyTorch Whisper's"
    return folded(title, listed, opened=equal < len(ordered))


def environment_section(run: Run, machine: dict[str, str]) -> Html:
    compiled = [(r.name, r.graphs, f"{r.seconds:.1f} s") for r in sorted(run.compiled, key=lambda r: -r.seconds)]
    listed = table(("artifact", "graphs", "time, cache hits included"), compiled, class_="figures")
    return html(
        table(("", ""), machine.items(), class_="plain"),
        folded(f"{len(compiled)} compilations", listed) if compiled else "",
    )
