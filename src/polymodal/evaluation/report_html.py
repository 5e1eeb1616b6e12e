"""The report of a run as one HTML file: no script, no other file, nothing loaded from anywhere.

``report.html`` beside this module holds the page and its style; the sections are built here.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from polymodal.core.parts import Text
from polymodal.evaluation import charts
from polymodal.evaluation.examples import Confusion, QuestionExample, RetrievalExample
from polymodal.evaluation.markup import Child, Markup, element, join
from polymodal.evaluation.media import part_to_html
from polymodal.evaluation.scores import Report, Row, Score


@dataclass(frozen=True, slots=True)
class ReportData:
    """Everything a report shows; a section whose field is empty is left out.

    Args:
        title: the name of the run.
        headline: one sentence: what was done and what came out.
        reports: what was measured; the first questions report fills the header.
        metrics: rows of the training log, each with ``stage``, ``step``, ``loss``, and where known ``losses`` (by
            objective), ``tokens_per_s`` and ``samples_per_s``.
        examples: a fair draw of answered questions; mistakes: wrong ones; confusions: the commonest.
        retrieval: searches and what they found.
        timings: seconds by what took them, in order.
        environment: facts about the machine and the software.
        ask: command lines that use the result.
        notes: what else a reader must know, such as where the run falls short.
    """

    title: str
    headline: str
    reports: Sequence[Report] = ()
    metrics: Sequence[Mapping[str, Any]] = ()
    examples: Sequence[QuestionExample] = ()
    mistakes: Sequence[QuestionExample] = ()
    confusions: Sequence[Confusion] = ()
    retrieval: Sequence[RetrievalExample] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    ask: Sequence[str] = ()
    notes: Sequence[str] = ()


def write_report(path: str | os.PathLike[str], data: ReportData) -> Path:
    """Write the report, whole or not at all; returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(report_html(data), encoding="utf-8")
    partial.replace(path)
    return path


def report_html(data: ReportData) -> str:
    """The whole page."""
    sections = [
        _section("ask", "Ask it", "Exactly these lines, from the folder in which the command ran.", _ask(data)),
        _section("scores", "Scores beside their controls", _ABOUT_SCORES, _scores(data)),
        _section("examples", "Questions and answers", "A fair draw: right and wrong as they came.",
                 _question_cards(data.examples)),
        _section("mistakes", "Mistakes", "Where it goes wrong.", _mistakes(data)),
        _section("retrieval", "Search", _ABOUT_SEARCH, _retrieval(data)),
        _section("training", "Training", "Loss over steps; the faint line is the logged value.", _training(data)),
        _section("timings", "Time", None, _timings(data.timings)),
        _section("environment", "Environment", None, _environment(data)),
    ]  # fmt: skip
    present = [(name, title, html) for name, title, html in sections if html]
    links = [element("a", title, href=f"#{name}") for name, title, _ in present]
    body = join([_header(data), element("nav", links, aria_label="Sections"), [html for *_, html in present], _FOOTER])
    page = resources.files("polymodal.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    return Template(page).substitute(title=join(data.title), body=body)


_ABOUT_SCORES = (
    "The bar is the share of right answers, the line on it the 95 % bootstrap interval. A model that truly uses its "
    "media stands far to the right of the marks: they show what is reached without media (blind), with the media of "
    "another question (shuffled), by the most frequent answer of the family (majority) or of the wording, and with one "
    "modality withheld (without ...)."
)
_ABOUT_SEARCH = "The query on the left, the nearest first; a green frame is right. Scores are cosine similarities."
_FOOTER = element("footer", "Written by Polymodal. Every figure comes from the stored predictions beside this file.")


def _section(name: str, title: str, about: str | None, content: Markup | None) -> tuple[str, str, Markup | None]:
    if not content:
        return name, title, None
    text = element("p", about, class_="about") if about else None
    return name, title, element("section", element("h2", title), text, content, id=name)


def _header(data: ReportData) -> Markup:
    questions = next((report for report in data.reports if report.use == "questions"), None)
    main = questions or (data.reports[0] if data.reports else None)
    tiles = []
    if main is not None:
        tiles.append(_tile(main.overall.score, "right answers" if questions else main.overall.family, "main"))
        tiles += [
            _tile(main.overall.controls[name], name)
            for name in ("blind", "shuffled", "majority", "chance")
            if name in main.overall.controls
        ]
        tiles.append(_figure(f"{main.overall.score.n:,}", "questions" if questions else "queries", main.task))
    if data.timings:
        tiles.append(_figure(duration(sum(data.timings.values())), "in all", "wall time"))
    return element(
        "header",
        element("p", "Polymodal report", class_="kicker"),
        element("h1", data.title),
        element("p", data.headline, class_="lead"),
        element("div", tiles, class_="tiles") if tiles else None,
        element("ul", [element("li", note) for note in data.notes], class_="notes") if data.notes else None,
    )


def _tile(score: Score, label: str, extra: str = "") -> Markup:
    return _figure(f"{score.value:.1%}", label, _interval(score), extra)


def _figure(figure: str, label: str, small: str, extra: str = "") -> Markup:
    return element(
        "div", element("b", figure), element("span", label), element("small", small), class_=f"tile {extra}".strip()
    )


def _ask(data: ReportData) -> Markup | None:
    return element("pre", "\n".join(data.ask)) if data.ask else None


def _scores(data: ReportData) -> Markup | None:
    if not data.reports:
        return None
    controls = list(dict.fromkeys(name for report in data.reports for name in _controls(report)))
    legend = [element("li", element("span", class_="swatch"), "score")]
    legend += [element("li", charts.legend_mark(name), charts.control_label(name)) for name in _one_mark_each(controls)]
    searches = [report for report in data.reports if report.use == "retrieval"]
    tables = [_score_table([report], report.task) for report in data.reports if report.use != "retrieval"]
    tables += [_score_table(searches, "Search: from one modality to another")] if searches else []
    return join([element("ul", legend, class_="legend"), tables])


def _one_mark_each(controls: Iterable[str]) -> list[str]:
    """``without_image`` and ``without_audio`` share a mark; the legend shows it once."""
    return list(dict.fromkeys("without" if name.startswith("without") else name for name in controls))


def _score_table(reports: Sequence[Report], title: str) -> Markup:
    rows = [row for report in reports for row in report.rows]
    controls = list(dict.fromkeys(name for report in reports for name in _controls(report)))
    plain = [name for name in controls if not name.startswith("without_")]
    withheld = [name for name in controls if name.startswith("without_")]
    further = list(dict.fromkeys(name for row in rows for name in row.metrics))
    is_search = reports[0].use == "retrieval"
    head = [
        "direction" if is_search else "family",
        "",
        "score",
        *plain,
        *(["without"] if withheld else []),
        *further,
        "n",
    ]
    cells = [element("th", name, class_="wide" if i == 1 else None) for i, name in enumerate(head)]
    body = [_score_row(row, plain, withheld, further) for row in rows]
    if len(reports) == 1 and len(rows) > 1:
        body.append(_score_row(reports[0].overall, plain, withheld, further, "overall"))
    table = element("table", element("thead", element("tr", cells)), element("tbody", body))
    facts = list(dict.fromkeys(fact for report in reports for fact in _facts(report)))
    return element(
        "div", element("h3", title), element("div", table, class_="scroll"),
        element("p", [element("span", fact) for fact in facts], class_="figures"), class_="card",
    )  # fmt: skip


def _facts(report: Report) -> list[str]:
    facts = [f"Scored by {report.scoring}."]
    if report.use == "questions":
        facts.append(f"Empty answers: {report.overall.empty_rate:.1%}.")
        facts.append(f"Answers that no question of the family has: {report.overall.unknown_rate:.1%}.")
    if report.skipped:
        facts.append(f"{report.skipped} queries of one direction have nothing right to find and were left out.")
    if report.errors:
        facts.append(f"{report.task}: {len(report.errors)} samples could not be used, first: {report.errors[0]}.")
    return facts


def _controls(report: Report) -> list[str]:
    names = dict.fromkeys(name for row in report.rows for name in row.controls)
    return sorted(names, key=lambda name: (name.startswith("without"), name))


def _score_row(
    row: Row, plain: Sequence[str], withheld: Sequence[str], further: Sequence[str], kind: str | None = None
) -> Markup:
    less = [
        element("div", f"{name.removeprefix('without_')} {row.controls[name].value:.1%}")
        for name in withheld
        if name in row.controls
    ]
    cells = [
        element("td", row.family.replace("_", " ").replace("->", "\u2192"), class_="name"),
        element("td", charts.score_bar(row), class_="wide"),
        element("td", element("span", f"{row.score.value:.1%}", class_="strong"), " ",
                element("span", _interval(row.score), class_="range")),
        *(element("td", f"{row.controls[name].value:.1%}" if name in row.controls else "") for name in plain),
        *([element("td", less, class_="small")] if withheld else []),
        *(element("td", f"{row.metrics[name]:.3f}" if name in row.metrics else "") for name in further),
        element("td", f"{row.score.n:,}"),
    ]  # fmt: skip
    return element("tr", cells, class_=kind)


def _interval(score: Score) -> str:
    return f"{100 * score.low:.1f}\u2013{100 * score.high:.1f}"


def _question_cards(examples: Sequence[QuestionExample]) -> Markup | None:
    return element("div", [_question_card(example) for example in examples], class_="cards") if examples else None


def _question_card(example: QuestionExample) -> Markup:
    mark = ("right", "right") if example.is_right else ("wrong", "wrong")
    texts = [part.text for part in example.parts if isinstance(part, Text)]
    answers: list[Child] = [
        element("dt", "answer"),
        element("dd", example.prediction.strip() or "(empty)", class_=mark[0]),
    ]
    if not example.is_right:
        answers += [element("dt", "truth"), element("dd", example.answer)]
    return element(
        "article",
        element("div", element("span", example.family.replace("_", " ")),
                element("span", mark[1], class_=f"badge {mark[0]}"), class_="top"),
        [part_to_html(part) for part in example.parts if not isinstance(part, Text)],
        element("p", " ".join(texts), class_="question"),
        element("dl", answers, class_="answers"),
        class_="card", data_id=example.id,
    )  # fmt: skip


def _mistakes(data: ReportData) -> Markup | None:
    parts: list[Child] = []
    if data.confusions:
        names = ("family", "truth", "answered", "times")
        head = element("tr", [element("th", name, class_="words" if name != "times" else None) for name in names])
        rows = [
            element(
                "tr",
                element("td", confusion.family.replace("_", " "), class_="name"),
                element("td", confusion.answer, class_="words"),
                element("td", confusion.prediction or "(empty)", class_="words"),
                element("td", f"{confusion.count:,}"),
            )
            for confusion in data.confusions
        ]
        table = element("table", element("thead", head), element("tbody", rows))
        parts.append(
            element("div", element("h3", "The commonest"), element("div", table, class_="scroll"), class_="card")
        )
    if data.mistakes:
        parts.append(element("h3", "Some of them", style="margin-top:20px") if parts else None)
        parts.append(_question_cards(data.mistakes))
    return join(parts) if parts else None


def _retrieval(data: ReportData) -> Markup | None:
    return join([_search_card(example) for example in data.retrieval]) if data.retrieval else None


def _search_card(example: RetrievalExample) -> Markup:
    results = [
        element(
            "div", part_to_html(found.part),
            element("div", element("span", f"{rank}"), element("span", f"{found.score:.3f}"), class_="top"),
            class_="result right" if found.is_right else "result",
        )
        for rank, found in enumerate(example.results, 1)
    ]  # fmt: skip
    query = element("div", element("h3", example.direction), part_to_html(example.query))
    found = element("div", element("h3", "found"), element("div", results, class_="results"))
    return element("div", element("div", query, found, class_="search"), class_="card")


def _training(data: ReportData) -> Markup | None:
    stages: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in data.metrics:
        if "loss" in row or "losses" in row:
            stages[str(row.get("stage", "training"))].append(row)
    if not stages:
        return None
    return element("div", [_stage(name, rows) for name, rows in stages.items()], class_="grid-2")


def _stage(name: str, rows: Sequence[Mapping[str, Any]]) -> Markup:
    objectives = list(dict.fromkeys(key for row in rows for key in row.get("losses") or {}))
    series: dict[str, tuple[list[float], list[float]]] = {}
    if len(objectives) != 1:
        series["loss"] = _column(rows, lambda row: row.get("loss"))
    for objective in objectives:
        series[objective.replace("_", " ")] = _column(
            rows, lambda row, key=objective: (row.get("losses") or {}).get(key)
        )
    legend = [element("li", element("span", class_=f"dash series-{i % 6}"), label) for i, label in enumerate(series)]
    facts = [f"{max(int(row.get('step', 0)) for row in rows):,} steps"]
    for key, unit in (("tokens_per_s", "tokens/s"), ("samples_per_s", "samples/s")):
        speeds = sorted(float(row[key]) for row in rows if row.get(key) is not None)
        if speeds:
            facts.append(f"{speeds[len(speeds) // 2]:,.0f} {unit} (median)")
    last = {label: ys[-1] for label, (_, ys) in series.items() if ys}
    facts += [f"{label} {value:.3f} at the end" for label, value in last.items()]
    chart = charts.line_chart(series, "steps", f"loss of stage {name}")
    return element(
        "div", element("h3", name), element("ul", legend, class_="legend"), chart,
        element("div", [element("span", fact) for fact in facts], class_="figures"), class_="card",
    )  # fmt: skip


def _column(rows: Iterable[Mapping[str, Any]], value: Any) -> tuple[list[float], list[float]]:
    pairs = [(float(row.get("step", i)), value(row)) for i, row in enumerate(rows)]
    kept = [(x, float(y)) for x, y in pairs if y is not None]
    return [x for x, _ in kept], [y for _, y in kept]


def _timings(timings: Mapping[str, float]) -> Markup | None:
    if not timings:
        return None
    longest, total = max(timings.values()), sum(timings.values())
    rows = [
        element(
            "tr", element("td", name, class_="name"),
            element("td", _time_bar(seconds / (longest or 1)), class_="wide"),
            element("td", duration(seconds)), element("td", f"{seconds / (total or 1):.0%}"),
        )
        for name, seconds in timings.items()
    ]  # fmt: skip
    rows.append(element("tr", element("td", "in all"), element("td"), element("td", duration(total)), element("td"),
                        class_="overall"))  # fmt: skip
    return element("div", element("div", element("table", element("tbody", rows)), class_="scroll"), class_="card")


def _time_bar(share: float) -> Markup:
    return element("div", class_="time", style=f"width:{100 * share:.1f}%")


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``0.4 s``, ``38 s``, ``6 min 05 s``, ``2 h 10 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _environment(data: ReportData) -> Markup | None:
    if not data.environment:
        return None
    facts = [(element("dt", name), element("dd", str(value))) for name, value in data.environment.items()]
    return element("div", element("dl", facts, class_="facts"), class_="card")
