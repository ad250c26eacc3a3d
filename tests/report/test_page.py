import base64
import io
import math
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from csd3d import __version__
from csd3d.report.charts import Curves, chart_svg, log_ticks, ticks
from csd3d.report.page import ReportData, ViewRow, data_uri, format_value, write_report

EVIL = "<script>alert(1)</script> & \"x\" 'y' {{title}}"
VOID = {"meta", "img", "input", "path", "polyline", "br"}


class Page(HTMLParser):
    """Tags with their attributes, visible text, and a check that what opens closes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def picture(value):
    return np.full((6, 8, 3), value, np.uint8)


def full_data(tmp_path, text="Paint it a warm colour"):
    video = tmp_path / "orbit.mp4"
    video.write_bytes(b"not really a video")
    return ReportData(
        prompt=text,
        scene=text,
        warned=[text],
        before=picture(10),
        after=picture(20),
        facts={text: text},
        view_names=[text, "view 1"],
        rows=[
            ViewRow("Source", [picture(30), picture(31)], text, "source"),
            ViewRow("Edited together", [picture(40)], "", "csd_edit"),
        ],
        methods={"csd_edit": "CSD-Edit", "in2n": "IN2N"},
        results={
            "in2n": {"psnr_truth": 20.9, "warped_error": 0.08, "unet_evaluations": 48000, "odd_one": None},
            "csd_edit": {"psnr_truth": 24.1, "warped_error": 0.03, "unet_evaluations": 48000, "odd_one": math.nan},
        },
        metric_notes=text,
        videos={text: video},
        turntable=[picture(50 + i) for i in range(4)],
        mesh_note=text,
        curves=[Curves(text, {text: ([0, 1, 2], [3, 2, 1]), "b": ([0, 1], [1, 2])}, x_label=text)],
        config=text,
        environment={text: text},
    )


@pytest.fixture
def page(tmp_path):
    write_report(tmp_path / "run/report.html", full_data(tmp_path))
    return (tmp_path / "run/report.html").read_text()


def test_everything_given_is_on_the_page(page, tmp_path):
    parsed = Page(page)
    assert parsed.open == []
    assert len(parsed.all("img")) == 2 + 3
    assert len(parsed.all("video")) == len(parsed.all("canvas")) == len(parsed.all("svg")) == 1
    for heading in ("The views", "Metrics", "Videos and mesh", "Curves", "Config", "Environment"):
        assert heading in parsed.text
    assert base64.b64encode(b"not really a video").decode() in page
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["report.html"]


def test_a_row_with_names_of_its_own_stands_under_them(tmp_path):
    """Prompt-to-Prompt's edit stood under the first prompt; a name of several columns stands once over them."""
    before, after = ["a red chair"] * 2, ["a blue chair"] * 2
    rows = [
        ViewRow("Sampled", [picture(1), picture(2)], names=before),
        ViewRow("Distilled", [picture(1), picture(2)], names=before),
        ViewRow("Edited", [picture(3), picture(4)], names=after),
        ViewRow("Others", [picture(5), picture(6)]),
    ]
    write_report(tmp_path / "r.html", ReportData("x", rows=rows, view_names=["0°", "90°"]))
    page = (tmp_path / "r.html").read_text()
    heads = re.findall(r'<div class="cell head"([^>]*)>([^<]*)</div>|<h3>([^<]*)</h3>', page)
    span = ' style="grid-column: span 2"'
    assert heads == [
        (span, "a red chair", ""), ("", "", "Sampled"), ("", "", "Distilled"),
        (span, "a blue chair", ""), ("", "", "Edited"),
        ("", "0°", ""), ("", "90°", ""), ("", "", "Others"),
    ]  # fmt: skip
    told = [attrs["alt"] for attrs in Page(page).all("img")]
    assert told[:6:2] == ["Sampled, a red chair", "Distilled, a red chair", "Edited, a blue chair"]


def test_nothing_is_loaded_from_anywhere(page):
    sources = [
        attrs[key] for _, attrs in Page(page).tags for key in ("src", "href", "srcset", "poster") if key in attrs
    ]
    assert len(sources) == 6
    assert all(source.startswith("data:") for source in sources)
    assert not re.search(r"https?://|url\(|@import", page)
    assert "default-src 'none'" in page


def test_page_says_what_made_it_and_links_the_files_beside_it(tmp_path):
    for name in ("mesh/mesh.glb", "mesh-1/mesh.obj", "videos/a b.mp4", "result.png", "images/000.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "cmd.txt").write_text("launch.py 'prompt=a <b>'\n")
    write_report(tmp_path / "report.html", ReportData("a duck"))
    parsed = Page((tmp_path / "report.html").read_text())
    links = [attrs["href"] for attrs in parsed.all("a")]
    assert links == ["result.png", "mesh/mesh.glb", "mesh-1/mesh.obj", "videos/a%20b.mp4"]
    assert all((tmp_path / unquote(link)).is_file() for link in links)
    assert f"csd3d {__version__}, 20" in parsed.text
    assert "Command: launch.py 'prompt=a <b>'" in parsed.text


def test_a_name_that_is_no_text_does_not_lose_the_page(tmp_path):
    write_report(tmp_path / "report.html", ReportData("a duck", warned=["\udcff: not written"]))
    assert "Warning: ?: not written" in (tmp_path / "report.html").read_text()


def test_text_from_outside_stays_text(tmp_path):
    write_report(tmp_path / "evil.html", full_data(tmp_path, EVIL))
    hurt, clean = (tmp_path / "evil.html").read_text(), Page((tmp_path / "evil.html").read_text())
    assert "<script>alert" not in hurt
    assert clean.open == []
    assert len(clean.all("script")) == 2  # the page's own and the turntable's data
    assert clean.text.count(EVIL) >= 10  # and comes back letter for letter, braces included
    assert clean.all("svg")[0]["aria-label"].startswith(EVIL)


def test_pictures_are_embedded_unchanged():
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    head, body = data_uri(image).split(",")
    assert head == "data:image/png;base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(body)))), image)


def test_the_better_number_is_marked_in_the_right_direction(page):
    best = re.findall(r"<td class=best>([^<]*)</td>", page)
    assert best == ["24.10", "0.0300"]  # higher PSNR, lower error; counts and unknown metrics mark nobody
    assert page.index(">CSD-Edit</th>") < page.index(">IN2N</th>")  # ours first, as `methods` says
    assert "odd one" in page


def test_a_tie_marks_both_and_a_lone_method_none(tmp_path):
    for values, marks in (([24.0, 24.0], 2), ([24.0, None], 0)):
        results = {f"m{i}": {"psnr_truth": value} for i, value in enumerate(values)}
        write_report(tmp_path / "r.html", ReportData("x", results=results))
        assert (tmp_path / "r.html").read_text().count("class=best") == marks


def test_what_is_missing_leaves_no_empty_section(tmp_path):
    write_report(tmp_path / "r.html", ReportData("only a prompt", curves=[Curves("nothing", {"a": ([0], [math.nan])})]))
    parsed = Page((tmp_path / "r.html").read_text())
    assert not parsed.all("section")
    assert not parsed.all("details")
    assert "only a prompt" in parsed.text


def test_a_failed_report_does_not_touch_the_old_one(tmp_path):
    data = full_data(tmp_path)
    write_report(tmp_path / "r.html", data)
    before = (tmp_path / "r.html").read_text()
    data.videos = {"gone": tmp_path / "gone.mp4"}
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path / "r.html", data)
    assert (tmp_path / "r.html").read_text() == before


def test_values_are_written_for_people():
    assert format_value(48000, 0) == "48\u202f000"
    assert format_value(0.03124, 4) == "0.0312"
    assert format_value(None) == format_value(math.nan) == format_value(math.inf) == "–"


def points(svg):
    return [[tuple(map(float, p.split(","))) for p in line.split()] for line in re.findall(r'points="([^"]*)"', svg)]


def test_a_straight_line_is_drawn_straight_and_upward():
    ((first, middle, last),) = points(chart_svg(Curves("t", {"a": ([0, 5, 10], [1.0, 2.0, 3.0])})))
    assert middle == pytest.approx(((first[0] + last[0]) / 2, (first[1] + last[1]) / 2), abs=0.1)
    assert first[0] < last[0]
    assert first[1] > last[1]  # SVG's y points down


def test_log_axis_makes_an_exponential_straight_and_is_dropped_for_zeros():
    y = [10.0**-k for k in range(5)]
    ((_, *_), *_) = [points(chart_svg(Curves("t", {"a": (range(5), y)}, log=True)))[0]]
    line = points(chart_svg(Curves("t", {"a": (range(5), y)}, log=True)))[0]
    steps = np.diff([p[1] for p in line])
    assert steps == pytest.approx(np.full(4, steps.mean()), abs=0.11)
    bent = points(chart_svg(Curves("t", {"a": (range(5), [*y[:4], 0.0])}, log=True)))[0]
    assert np.ptp(np.diff([p[1] for p in bent])) > 10


def test_gaps_constants_and_long_series_draw():
    ((*line,),) = points(chart_svg(Curves("t", {"a": ([0, 1, 2, 3], [1.0, math.nan, math.inf, 1.0])})))
    assert len(line) == 2
    ((*line,),) = points(chart_svg(Curves("t", {"a": (range(10_000), np.sin(np.arange(10_000)))})))
    assert 200 <= len(line) <= 400
    assert chart_svg(Curves("t", {"a": ([0], [1.0])})) == ""


def test_line_colours_follow_the_legend_even_if_a_line_is_empty():
    svg = chart_svg(Curves("t", {"empty": ([], []), "b": ([0, 1], [1, 2])}))
    assert re.findall(r"line (s\d)", svg) == ["s1"]


def test_ticks_are_round_and_inside():
    assert ticks(0, 1) == pytest.approx([0, 0.5, 1.0]) or ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(-3, 97) == pytest.approx([0, 50]) or len(ticks(-3, 97)) in (3, 4, 5)
    assert log_ticks(-2.2, 0.1) == pytest.approx([-2, -1, 0])
    assert log_ticks(-2.0, -1.5) == pytest.approx([-2, math.log10(0.02)])


def test_what_no_method_was_measured_by_has_no_row(tmp_path):
    csd_edit = {"psnr_truth": None, "warped_error": 0.1}
    results = {"csd_edit": csd_edit, "in2n": dict.fromkeys(csd_edit)}
    write_report(tmp_path / "report.html", ReportData(prompt="make it night", results=results))
    text = Page((tmp_path / "report.html").read_text()).text
    assert "Disagreement between views" in text
    assert "against the truth" not in text
