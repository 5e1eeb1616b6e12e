import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from polymodal.core.parts import Audio, Image, Points, Sensor, Text, Video
from polymodal.evaluation import charts
from polymodal.evaluation.examples import Confusion, Found, QuestionExample, RetrievalExample
from polymodal.evaluation.markup import Markup, element
from polymodal.evaluation.media import part_to_html
from polymodal.evaluation.report_html import ReportData, duration, report_html, write_report
from polymodal.evaluation.scores import Report, Row, Score

EVIL = "<script>alert('x')</script> & \"quoted\" $title https://example.com"
RNG = np.random.default_rng(0)
PARTS = {
    "image": Image(RNG.integers(0, 255, (24, 32, 3), dtype=np.uint8)),
    "audio": Audio(np.sin(np.arange(800) / 5).astype(np.float32), rate_hz=8000),
    "video": Video(RNG.integers(0, 255, (4, 16, 16, 3), dtype=np.uint8), fps=8.0),
    "points": Points(RNG.random((50, 6)).astype(np.float32)),
    "sensor": Sensor(RNG.normal(size=(60, 6)).astype(np.float32), rate_hz=50.0, channels=tuple("abcdef")),
}
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags are balanced and collects what the page refers to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "action", "data", "srcset")]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def full_data(text: str = "plain") -> ReportData:
    score = Score(0.9, 0.85, 0.94, 120)
    low = Score(0.3, 0.25, 0.36, 120)
    controls = {"blind": low, "shuffled": low, "majority": low, "without_audio": low}
    rows = (Row(text, score, controls, 0.01, 0.02), Row("other_family", score, {"blind": low}))
    questions = Report(text, "questions", text, Row("overall", score, controls), rows, (f"id: {text}",))
    search = Row("image -> text", score, {"chance": low}, metrics={"R@1": 0.9, "R@5": 1.0, "MRR": 0.93})
    retrieval = Report("search", "retrieval", "hits", search, (search,), skipped=7)
    examples = [
        QuestionExample("1", text, (part, Text(text)), "Red", answer)
        for part in PARTS.values()
        for answer in ("red.", text, "")
    ]
    found = tuple(Found(part, 0.5, i == 0) for i, part in enumerate(PARTS.values()))
    metrics = [
        {"stage": text, "step": i, "loss": 4 / (i + 1), "losses": {"next_token": 3 / (i + 1), "infonce": None}}
        for i in range(50)
    ]
    return ReportData(
        title=text, headline=text, reports=[questions, retrieval], metrics=metrics, examples=examples,
        mistakes=examples[1:3], confusions=[Confusion(text, text, "", 3)],
        retrieval=[RetrievalExample("text -> image", Text(text), found)], timings={text: 61.0, "b": 0.0},
        environment={text: text}, ask=[text], notes=[text],
    )  # fmt: skip


def test_the_page_is_whole_and_refers_to_nothing_outside(tmp_path):
    path = write_report(tmp_path / "deep" / "report.html", full_data())
    page = path.read_text()
    parsed = Page(page)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    anchors = {link.removeprefix("#") for link in parsed.links if link.startswith("#")}
    assert anchors == set(parsed.ids) == {
        "ask", "scores", "examples", "mistakes", "retrieval", "training", "timings", "environment",
    }  # fmt: skip
    assert all(link.startswith(("#", "data:")) for link in parsed.links)
    for loader in ("http:", "https:", "url(", "@import", "<script", "<link", "<iframe", "javascript:", "onerror"):
        assert loader not in page, loader
    assert {"audio", "img", "svg"} <= set(parsed.tags)
    for kind in ("image/png", "image/gif", "audio/wav"):
        assert f"data:{kind};base64," in page
    for words in ("90.0%", "85.0\u201394.0", "without", "1 min 01 s", "7 queries", "(empty)", "49 steps"):
        assert words in parsed.text, words


def test_all_text_is_escaped():
    page = report_html(full_data(EVIL))
    parsed = Page(page)
    assert "<script" not in page
    assert "script" not in parsed.tags
    assert parsed.text.count("<script>alert('x')</script>") > 20
    assert all(link.startswith(("#", "data:")) for link in parsed.links)
    assert re.search(r"<title>&lt;script&gt;.*\$title.*</title>", page)


def test_what_is_absent_is_left_out():
    parsed = Page(report_html(ReportData(title="Run", headline="Nothing yet.")))
    assert parsed.ids == []
    assert "nan" not in parsed.text.lower()
    only = Page(report_html(ReportData(title="Run", headline="h", ask=["polymodal chat"])))
    assert only.ids == ["ask"]


@pytest.mark.parametrize("modality", PARTS)
def test_every_modality_is_drawn(modality):
    html = part_to_html(PARTS[modality])
    Page(html)
    expected = {
        "image": "<img src=", "audio": "<audio controls", "video": "data:image/gif", "points": "<circle",
        "sensor": "<polyline",
    }  # fmt: skip
    assert expected[modality] in html
    assert f"media {modality}" in html
    assert part_to_html(PARTS[modality]) == html


def test_large_pictures_are_made_small():
    html = part_to_html(Image(RNG.integers(0, 255, (1500, 2000, 3), dtype=np.uint8)))
    assert "data:image/jpeg" in html
    assert 'width="320" height="240"' in html
    assert len(html) < 150_000


def test_media_that_cannot_be_decoded_is_named():
    html = part_to_html(Image("/nowhere/<b>.png"))
    assert html.startswith('<div class="media missing">image cannot be shown: /nowhere/&lt;b&gt;.png: cannot be read')


def test_element_escapes_text_and_attributes():
    assert element("p", "a < b", Markup("<br/>"), None, ["c", "&"], title='"x"', class_="k") == (
        '<p title="&quot;x&quot;" class="k">a &lt; b<br/>c&amp;</p>'
    )
    assert element("line", x1=1.0, y1=2.123, stroke_width=2, hidden=True, x2=None) == (
        '<line x1="1" y1="2.12" stroke-width="2" hidden/>'
    )


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0, 7.3, [0, 2, 4, 6, 8]), (-1, 1, [-1, -0.5, 0, 0.5, 1]), (3, 3, None)],
)
def test_nice_ticks(low, high, ticks):
    found = charts.nice_ticks(low, high)
    assert found[0] <= low <= high <= found[-1]
    assert 3 <= len(found) <= 8
    assert ticks is None or found == ticks


def test_smoothing_keeps_a_line_and_its_length():
    line = np.arange(100.0)
    np.testing.assert_allclose(charts.smoothed(line), line)
    noise = RNG.normal(size=400)
    assert charts.smoothed(noise).std() < 0.4 * noise.std()
    xs, ys = charts.bucket_means(line, line * 2, 10)
    np.testing.assert_allclose(xs, np.arange(10) * 10 + 4.5)
    np.testing.assert_allclose(ys, 2 * xs)


def test_charts_survive_strange_values():
    series = {"loss": ([0.0, 1.0, 2.0], [float("nan"), 1.0, float("inf")]), "gone": ([], [])}
    svg = charts.line_chart(series, "steps", "loss")
    Page(svg)
    assert "nan" not in svg
    assert "inf" not in svg
    assert "No values were logged" in charts.line_chart({"loss": ([], [])}, "steps", "loss")
    for drawing in (
        charts.waveform(np.zeros(3)),
        charts.cloud(np.zeros((1, 3)), None),
        charts.recording(np.ones((1, 2)), None),
    ):
        Page(drawing)
        assert "nan" not in drawing


def test_score_bar_places_its_marks():
    low = Score(0.25, 0.2, 0.3, 10)
    bar = charts.score_bar(Row("f", Score(0.5, 0.4, 0.6, 10), {"blind": low, "without_image": low}))
    assert 'width="50.00%"' in bar
    assert bar.count('x="25.00%"') == 2
    assert "mark-blind" in bar
    assert "without image: 25.0%" in bar
    assert 'aria-label="f: score 50.0%; blind 25.0%; without image 25.0%"' in bar


def test_duration():
    assert [duration(s) for s in (0.04, 9.96, 38.4, 365, 7805)] == [
        "0.0 s",
        "10.0 s",
        "38 s",
        "6 min 05 s",
        "2 h 10 min",
    ]


def test_examples_come_from_a_stored_run(tmp_path: Path):
    from polymodal.evaluation.examples import confusions, question_examples, retrieval_examples
    from polymodal.evaluation.runner import evaluate
    from polymodal.evaluation.tasks import QuestionsTask, RetrievalTask

    class Model:
        def answer(self, samples, max_new_tokens):
            return ["yes" if int(sample.id[1:]) % 3 else "maybe" for sample in samples]

        def embed(self, parts):
            return np.eye(8, dtype=np.float32)[[len(part.text) % 8 if isinstance(part, Text) else 0 for part in parts]]

    questions = tmp_path / "q.jsonl"
    lines = [
        {"id": f"q{i}", "messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"},
         {"type": "text", "text": f"Is it {i}?"}]}], "meta": {"family": f"f{i % 2}", "answer": "yes"}}
        for i in range(30)
    ]  # fmt: skip
    questions.write_text("\n".join(map(json.dumps, lines)))
    stored = tmp_path / "p.jsonl"
    evaluate(Model(), QuestionsTask(data=str(questions)), predictions=stored, conditions=("full",))
    fair, wrong = question_examples(stored, per_family=3, mistakes=4)
    assert [example.family for example in fair] == ["f0"] * 3 + ["f1"] * 3
    assert [example.family for example in wrong] == ["f0", "f1", "f0", "f1"]
    assert not any(example.is_right for example in wrong)
    assert not {example.id for example in fair} & {example.id for example in wrong}
    assert [part.modality for part in fair[0].parts] == ["image", "text"]
    assert question_examples(stored, per_family=3, mistakes=4)[0][0].id == fair[0].id
    assert confusions(stored) == [Confusion("f0", "yes", "maybe", 5), Confusion("f1", "yes", "maybe", 5)]

    views = tmp_path / "v.jsonl"
    rows = [{"id": f"v{i}", "views": {"image": "a.png", "text": "x" * i}} for i in range(9)]
    views.write_text("\n".join(map(json.dumps, rows)))
    found = tmp_path / "r.jsonl"
    evaluate(Model(), RetrievalTask(data=str(views), query="image", target="text"), predictions=found)
    searches = retrieval_examples(found, num=2)
    assert len(searches) == 2
    assert [len(search.results) for search in searches] == [5, 5]
    assert searches[0].results[0].score == 1.0
    assert searches[0].query.modality == "image"
