"""The data file, the page and the pictures of an inspection show the numbers of the readings."""

import base64
import hashlib
import json
import warnings
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from lens_kernels.hf import inspect_lens
from lens_kernels.hf.inspection import figures
from lens_kernels.hf.inspection import page as inspect_page
from lens_kernels.hf.inspection.inspect import token_text
from lens_kernels.hf.inspection.results import QUANTITIES
from tests.support import inspection, tiny
from tests.support.inspection import TEXT, OddTokenizer


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("inspected")


@pytest.fixture(scope="module")
def inspected(output):
    return inspection.inspected(output)


def test_data_json_holds_every_number(inspected, output):
    whole = json.loads((output / "data.json").read_text())
    (data,), (passage,) = whole["texts"], inspected.passages
    assert data["ids"] == TEXT and data["tokens"][3] == "␣x"
    for label, reading in passage.readings.items():
        side = data["models"][label]
        for key in ("top_ids", "top_probs", *QUANTITIES):
            assert torch.equal(torch.tensor(side[key]), getattr(reading, key))
        first = side["top_ids"][1][2][0]
        assert side["top_tokens"][1][2][0] == token_text(OddTokenizer(), first)
        medians = whole["quartiles"][label]["entropy"][1]
        assert medians == pytest.approx(reading.entropy.quantile(0.5, dim=1).tolist())
    for entry, c in zip(
        data["comparisons"]["student"], passage.comparisons["student"], strict=True
    ):
        assert entry == vars(c) | {"divergence": c.divergence.tolist(), "mean": c.mean}


DEPTHS = {"student": 3, "teacher": 5}


class Page(HTMLParser):
    """Parses a page into tags and lens tables.

    A table is a dict ``{depth: [(text, classes, detail)]}``.
    """

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self.heads, self.open, self.row = [], [], [], [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.open += [tag] * (tag not in ("meta", "img"))
        if tag == "table" and attrs.get("class") == "lens":
            self.tables.append({})
            self.heads.append([])
        if tag == "td" and "data-detail" in attrs:
            cell = ["", attrs.get("class"), attrs["data-detail"]]
            self.tables[-1].setdefault(self.row, []).append(cell)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["td"] and self.tables and self.tables[-1]:
            self.tables[-1][self.row][-1][0] += data
        if self.open[-1:] == ["th"] and self.heads:
            self.heads[-1].append(data)
            self.row = data


def test_page_shows_every_depth_and_position(inspected, output):
    text = (output / "inspect.html").read_text(encoding="utf-8")
    assert "Tokens read: 8 of 8." in text
    models = [f"the {x} <b>LlamaForCausalLM</b> ({n} blocks)" for x, n in DEPTHS.items()]
    assert f"The next token that {' and '.join(models)} would predict" in text
    page = Page(text)
    assert not page.open and len(page.tables) == 2
    (passage,) = inspected.passages
    each = zip(page.tables, page.heads, passage.readings.items(), strict=True)
    for table, heads, (role, reading) in each:
        assert list(table) == [str(i) for i in range(reading.depths, 0, -1)]
        assert heads[1:8] == passage.tokens[1:] and heads[-8:] == passage.tokens
        for depth in range(1, reading.depths + 1):
            ids, probs = reading.top_ids[depth - 1].tolist(), reading.top_probs[depth - 1]
            assert len(table[str(depth)]) == len(TEXT)
            for x, (shown, classes, detail) in enumerate(table[str(depth)]):
                assert shown == token_text(OddTokenizer(), ids[x][0])
                assert ("right" in classes.split()) == (ids[x][:1] == TEXT[x + 1 : x + 2])
                assert detail.startswith(f"{role}, block {depth} of {reading.depths}, after token")
                assert f"entropy {reading.entropy[depth - 1, x]:.3f} nats" in detail
                for token, share in zip(ids[x], probs[x], strict=True):
                    line = f"{100 * share:7.2f} %  {token_text(OddTokenizer(), token)}"
                    assert line in detail.splitlines()
                if x + 1 < len(TEXT):
                    share, rank = reading.next_prob[depth - 1, x], reading.next_rank[depth - 1, x]
                    assert f", {100 * share:.2f} %, rank {rank}\n" in f"{detail}\n"


def test_detail_names_the_divergence_against_the_other_model(inspected):
    (passage,) = inspected.passages
    compared = passage.comparisons["student"]
    value = {(c.student_depth, c.teacher_depth): c.divergence[4] for c in compared}

    def against(role, depth):
        text = inspect_page.detail(inspected, passage, role, depth, 4)
        return [line for line in text.splitlines() if "against" in line]

    assert against("student", 1) == [
        f"jsd {value[1, 1]:.4f} against teacher block 1, a trained pair",
        f"jsd {value[1, 2]:.4f} against teacher block 2",
    ]
    trained = f"jsd {value[2, 3]:.4f} against student block 2, a trained pair"
    assert (against("teacher", 3), against("teacher", 4)) == ([trained], [])


def changed(result, name, **values):
    """Return an inspection with another name of the student and other values in its text."""
    (passage,) = result.passages
    names = {**result.names, "student": name}
    return replace(result, names=names, passages=[replace(passage, **values)])


def test_page_is_one_file_and_escapes_tokens_texts_and_names(inspected, output):
    text = (output / "inspect.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert "http:" not in text and "https:" not in text
    sources = [a.get("src") or a.get("href") for _, a in page.tags if "src" in a or "href" in a]
    assert len(sources) == 2 and all(x.startswith("data:image/svg+xml;base64,") for x in sources)
    stops = [a["tabindex"] for tag, a in page.tags if tag == "td" and "tabindex" in a]
    assert stops.count("0") == 2
    text = inspect_page.page(changed(inspected, "<b>&", text="</blockquote>"), {})
    assert "&lt;b&gt;&amp;" in text and "<blockquote>&lt;/blockquote&gt;</blockquote>" in text


@pytest.fixture(scope="module")
def drawn(inspected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return inspected.figures()


def test_pictures_are_drawn_without_a_warning(drawn, inspected, output):
    assert {"日本", "$a$"} <= set(inspected.top_tokens.values())
    names = ["lens_by_depth", "divergence_by_depth", "lens_student", "lens_teacher"]
    assert list(drawn) == names
    for name in names:
        assert (output / f"{name}.svg").stat().st_size > 5_000
        with Image.open(output / f"{name}.png") as picture:
            assert picture.size[0] > 800
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_depth_picture_shows_medians_and_quartiles(drawn, inspected):
    panels = drawn["lens_by_depth"].axes
    for axes, name in zip(panels, QUANTITIES, strict=True):
        for line, band, label in zip(axes.lines, axes.collections, inspected.names, strict=True):
            low, median, high = inspected.quartiles(label, name).tolist()
            assert line.get_label().startswith(f"{label} (")
            assert line.get_xdata()[-1] == 1 and list(line.get_ydata()) == median
            outline = band.get_paths()[0].vertices[:, 1]
            assert {*low, *high} <= {*outline}
    assert panels[3].get_yscale() == "log"


def test_divergence_picture_has_room_above_its_points(drawn, inspected):
    (axes,) = drawn["divergence_by_depth"].axes
    equal, trained = axes.lines
    means = {(c.student_depth, c.teacher_depth): c.mean for c in inspected.compared("student")}
    assert list(equal.get_xdata()) == pytest.approx([1 / 3, 2 / 3, 1])
    assert list(equal.get_ydata()) == [means[1, 2], means[2, 3], means[3, 5]]
    assert list(trained.get_ydata()) == [means[1, 1], means[2, 3]]
    low, high = axes.get_ylim()
    assert low == 0 and max(means.values()) * 1.1 < high


def test_pictures_without_values_are_left_out(inspected):
    relative = [c for c in inspected.compared("student") if not c.trained]
    (passage,) = inspected.passages
    untrained = replace(passage, comparisons={"student": relative})
    axes = figures.divergence_figure(replace(inspected, passages=[untrained])).axes[0]
    assert len(axes.lines) == 1 and axes.lines[0].get_label().startswith("student (")
    # A text of one token has no next token, so the figures cannot show the right token.
    model = tiny.model(layers=2)
    drawn = inspect_lens(model, OddTokenizer(), "3").figures()
    assert list(drawn) == ["lens_by_depth", "lens_model"]
    assert [x.get_ylabel() for x in drawn["lens_by_depth"].axes] == [*QUANTITIES.values()][:2]


def test_lens_picture_shows_the_most_probable_token_in_each_cell(drawn, inspected):
    (passage,) = inspected.passages
    for role, reading in passage.readings.items():
        axes = drawn[f"lens_{role}"].axes[0]
        cells = {t.get_position(): (t.get_text(), t.get_weight()) for t in axes.texts}
        assert len(cells) == reading.depths * len(TEXT)
        for (x, y), cell in cells.items():
            token = int(reading.top_ids[y, x, 0])
            right = [token] == TEXT[x + 1 : x + 2]
            shown = figures.fit(token_text(OddTokenizer(), token))
            assert cell == (shown, "bold" if right else "normal")
        # The y axis must point up, so that the last block is at the top.
        assert axes.get_ylim()[0] < axes.get_ylim()[1]
        (image,) = axes.images
        assert image.get_clim() == inspected.scale
        torch.testing.assert_close(torch.from_numpy(image.get_array().data), reading.entropy)
        labels = axes.get_xticklabels()
        assert [t.get_text() for t in labels] == [figures.fit(t) for t in passage.tokens]
        # Dollar signs in tokens must not be read as formulas.
        assert not any(t.get_parse_math() for t in (*labels, *axes.texts))
        assert axes.get_title() == f"{role.capitalize()}: most likely next token (bold: correct)"


def test_axes_of_a_large_picture_say_which_part_it_shows(inspected):
    (passage,) = inspected.passages
    top_ids = torch.arange(40)[:, None, None].expand(40, 30, 1)
    deep = replace(passage.readings["student"], top_ids=top_ids, entropy=torch.rand(40, 30))
    long = {"tokens": ["a"] * 30, "ids": [3] * 30, "total_tokens": 35, "readings": {"deep": deep}}
    names = {"names": {"deep": "d"}, "top_tokens": {i: f"w{i}" for i in range(40)}}
    result = replace(inspected, passages=[replace(passage, **long)], **names)
    axes = figures.lens_figure(result, "deep").axes[0]
    depths = [int(label.get_text()) for label in axes.get_yticklabels()]
    assert len(set(depths)) == 32 and depths[-1] == 40
    assert [t.get_text() for t in axes.texts] == [f"w{i - 1}" for i in depths for _ in range(24)]
    shown = torch.from_numpy(axes.images[0].get_array().data)
    assert torch.equal(shown, deep.entropy[[i - 1 for i in depths], :24])
    assert axes.get_ylabel() == "block (32 of 40)"
    assert axes.get_xlabel() == "token of the text (the first 24 of 35)"


def test_fit_cuts_long_text_and_replaces_missing_glyphs():
    assert figures.fit("␣the") == "␣the"
    assert figures.fit("日本") == "□□"
    long = figures.fit("Supercalifragilistic")
    assert long.startswith("Super") and long.endswith("…") and len(long) < 12
    assert len(figures.fit("W" * 20)) < len(figures.fit("i" * 20))


def test_colour_scale_exists_if_every_entropy_is_zero(inspected):
    (passage,) = inspected.passages
    readings = {x: replace(y, entropy=0 * y.entropy) for x, y in passage.readings.items()}
    sure = changed(inspected, "s", readings=readings)
    assert figures.lens_figure(sure, "student").axes[0].images[0].get_clim() == (0, 1)
    assert "--h:0" in inspect_page.page(sure, {})


def test_a_notebook_shows_the_page(inspected, monkeypatch):
    monkeypatch.setattr(figures, "draw", lambda _: {})
    (frame,) = Page(inspected._repr_html_()).tags
    assert frame[0] == "iframe" and len(Page(frame[1]["srcdoc"]).tables) == 2


def test_no_text_or_name_can_disguise_or_run(inspected):
    text = "a\u202eb\x1b[2Jc\n\td <script>x</script>"
    odd = changed(inspected, "good\u2066\x07model\n", text=text)
    made = inspect_page.page(odd, {})
    assert "a\\u202eb\\u001b[2Jc\n\td &lt;script&gt;" in made
    assert "<b>good\\u2066\\u0007model\\u000a</b>" in made
    assert all(c.isprintable() or c in "\n\t" for c in made)
    (policy,) = (x["content"] for tag, x in Page(made).tags if x.get("http-equiv"))
    script = made.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none';")
