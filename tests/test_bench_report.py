"""The report of results: every cell is in it with its conditions, and the page needs nothing but itself."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from bench_cells import cell, conditions, figures
from matplotlib.figure import Figure
from matplotlib.text import Text

from packloop import cli
from packloop.bench.groups import groups_of, reference_of
from packloop.bench.plots import memory_plot, rates_plot
from packloop.bench.point_labels import place_labels
from packloop.bench.prices import load_prices
from packloop.bench.report import build_report, gather_cells, write_report
from packloop.bench.results import Cell, Floor, Profile, save_cell
from packloop.errors import InputError

EAGER = {"kernels.attention": "eager", "kernels.layer": "stock"}
FUSED = {"kernels.attention": "document", "kernels.layer": "fused"}


def tutorial_cells() -> list[Cell]:
    """Two ways at batches 4 and 6, of which one has no memory for 6, a wrong one, a failed one and another trainer."""
    return [
        cell("eager-4", 6000, settings=EAGER),
        cell("eager-6", None, batch=6, settings=EAGER, status="out_of_memory", reason="0.9 GiB free of 22.0"),
        cell("fused-4", 21000, settings=FUSED),
        cell("fused-6", 21500, batch=6, settings=FUSED),
        cell("odd-4", 30000, settings={"kernels.odd": 1}, status="wrong", reason="losses differ by 0.4"),
        cell("bad-4", None, settings={"kernels.bad": 1}, status="failed", reason="RuntimeError: <no> kernel | image"),
        cell("liger", 18000, who="trl", settings={"batch": 4}),
    ]


@pytest.fixture
def results(tmp_path) -> Path:
    for one in tutorial_cells():
        save_cell(tmp_path / "results", one)
    return tmp_path / "results"


class _Page(HTMLParser):
    """What a page asks of elsewhere, its ids and its links within."""

    def __init__(self, text: str):
        super().__init__()
        self.outside, self.ids, self.targets, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        if "id" in values:
            self.ids.append(values["id"])
        for key in ("src", "href", "xlink:href"):
            target = values.get(key)
            if target and target.startswith("#"):
                self.targets.append(target[1:])
            elif target and tag != "a":
                self.outside.append(target)


def test_the_page_is_one_file_without_scripts_whose_links_lead_somewhere(results, tmp_path):
    _, path = write_report([results], tmp_path / "out")
    page = _Page(path.read_text(encoding="utf-8"))
    assert page.outside == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not re.search(r"url\((?!#)|@import", path.read_text(encoding="utf-8"))
    assert len(page.ids) == len(set(page.ids))
    assert set(page.targets) <= set(page.ids)
    assert page.tags.count("svg") >= 3


def test_every_cell_is_in_both_forms_with_reason_and_conditions(results, tmp_path):
    markdown, page = write_report([results], tmp_path / "out")
    shown, text = page.read_text(encoding="utf-8"), markdown.read_text(encoding="utf-8")
    for one in tutorial_cells():
        assert one.name in shown
        assert one.name in text
    assert "RuntimeError: &lt;no&gt; kernel | image" in shown
    assert r"RuntimeError: \<no> kernel \| image" in text
    for words in ("0.9 GiB free of 22.0", "losses differ by 0.4", "out of memory", "NVIDIA H200", "580.1", "2.11.0"):
        assert words in shown
        assert words in text
    assert "1980 → 1500 MHz, 400 → 650 W" in text
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target.startswith("https://") or (tmp_path / "out" / target).is_file()
    config = (tmp_path / "out" / "conditions" / "one-packloop-fused-6.yaml").read_text(encoding="utf-8")
    assert "per_device_train_batch_size: 6" in config
    assert "commit: abcdef0123456789" in config


def test_the_conditions_of_a_row_say_what_auto_chose(tmp_path):
    asked = {"kernels": {"layer": "auto", "attention": "sdpa"}, "train": {"gradient_checkpointing": "auto"}}
    config = {"kernels": {"layer": "fused", "attention": "sdpa"}, "train": {"gradient_checkpointing": 3}}
    save_cell(tmp_path / "results", cell("a", asked=asked, config=config))
    save_cell(tmp_path / "results", cell("b", config=config))
    write_report([tmp_path / "results"], tmp_path / "report")
    one, other = (
        yaml.safe_load((tmp_path / f"report/conditions/one-packloop-{name}.yaml").read_text()) for name in "ab"
    )
    assert one["chosen_by_auto"] == ["kernels.layer", "train.gradient_checkpointing"]
    assert "asked" not in one
    assert "chosen_by_auto" not in other


def test_cells_that_computed_fewer_slots_than_tokens_say_so(tmp_path):
    tokens = {"real_tokens_per_step": 20000.0, "slot_tokens_per_step": 17000.0}
    shared = figures(20000).model_copy(update=tokens)
    save_cell(tmp_path / "results", cell("shared", figures=shared))
    save_cell(tmp_path / "results", cell("wrong", figures=shared, status="wrong", reason="losses differ"))
    save_cell(tmp_path / "results", cell("padded"))
    markdown, page = write_report([tmp_path / "results"], tmp_path / "report")
    said = "of its real tokens repeat a beginning that documents of a micro-batch share, which is computed once"
    (line,) = [line for line in markdown.read_text().splitlines() if said in line]
    assert f"shared: at least 15.0% {said}" in line
    assert f"shared: at least 15.0% {said}" in page.read_text()
    padded = build_report([cell("padded")], [])
    assert not any("computed once;" in str(block) for block in padded.blocks)


def test_a_wrong_cell_has_no_rate_in_any_table(results, tmp_path):
    markdown, _ = write_report([results], tmp_path / "out")
    (row,) = [line for line in markdown.read_text().splitlines() if "odd-4" in line and "losses differ" in line]
    assert "wrong result" in row
    assert "30,000" not in markdown.read_text()


def test_charts_are_of_one_batch_and_of_the_best_batches():
    groups = {group.title: [one.name for one in group.cells] for group in groups_of(tutorial_cells())}
    assert groups == {
        "llama2-7b, batch 4 x 2 micro-batches x 2048 tokens": ["eager-4", "fused-4", "odd-4", "bad-4", "liger"],
        "llama2-7b, batch 6 x 2 micro-batches x 2048 tokens": ["eager-6", "fused-6"],
        "llama2-7b, each at its best batch": ["eager-4", "fused-6", "odd-4", "bad-4", "liger"],
    }


def test_a_cell_without_settings_of_its_own_is_one_way_with_its_other_batches():
    plain = cell("plain", 20000).model_copy(update={"settings": {}})
    cells = [plain, cell("plain-8", 21000, batch=8), cell("b", batch=4, settings={"kernels.layer": "stock"})]
    cells.append(cell("b-8", 9000, batch=8, settings={"kernels.layer": "stock"}))
    (best,) = [group for group in groups_of(cells) if "best batch" in group.title]
    assert [one.name for one in best.cells] == ["plain-8", "b"]


def test_every_cell_is_in_a_chart_and_shapes_are_apart():
    cells = [cell("a", batch=1), cell("b", batch=2), cell("c", shape="tiny")]
    groups = groups_of(cells)
    assert {one.name for group in groups for one in group.cells} == {"a", "b", "c"}
    assert all(len({one.shape for one in group.cells}) == 1 for group in groups)


def test_the_reference_is_the_eager_cell_that_has_a_rate():
    assert reference_of(tutorial_cells()).name == "eager-4"
    assert reference_of(tutorial_cells()[2:4]) is None


def test_without_an_eager_cell_the_fastest_other_trainer_is_the_reference():
    slower = cell("slower", 17000, who="Unsloth", settings={"batch": 4})
    assert reference_of([*tutorial_cells()[2:], slower]).name == "liger"


def test_sessions_are_never_in_one_chart(tmp_path):
    cells = [cell("a", session="one"), cell("b", session="one"), cell("c", session="two"), cell("d", session="two")]
    pictures = [block for block in build_report(cells, load_prices()).blocks if hasattr(block, "svg")]
    for picture in pictures:
        names = {name for name in "abcd" if f">{name}<" in picture.svg}
        assert names in ({"a", "b"}, {"c", "d"})


def test_time_by_class_adds_up_and_stands_against_the_floor(tmp_path):
    by_class = {"base GEMM": 600.0, "attention": 200.0, "LoRA": 100.0}
    profile = Profile(step_ms=1000, busy_ms=900, idle_share=0.1, by_class_ms=by_class)
    floor = Floor(fraction=0.7, ms=700, parts_ms={}, attention="document")
    save_cell(tmp_path / "results", cell("profiled", profile=profile, floor=floor))
    save_cell(tmp_path / "results", cell("not-profiled", floor=floor))
    markdown, page = write_report([tmp_path / "results"], tmp_path / "out")
    (svg,) = [path.read_text() for path in (tmp_path / "out" / "plots").glob("*class-of-work.svg")]
    # 16,000 tokens a step.
    for words in ("base GEMM", "idle", "floor 43.8, 70% of the step", "37.5", "62.5", "ms per 1,000 real tokens"):
        assert f">{words}<" in svg
    assert "optimizer" not in svg
    (row,) = [line for line in markdown.read_text().splitlines() if "37.50" in line]
    assert [entry.strip() for entry in row.split("|")[2:-1]] == ["37.50", "12.50", "6.25", "6.25", "62.50"]
    assert "37.50" in page.read_text()


def test_names_of_points_keep_clear_of_each_other():
    figure = Figure(figsize=(9.6, 5.6), layout="constrained")
    axes = figure.add_subplot()
    points = [(10 + n % 4, 1000 + 40 * (n // 4), f"a cell called {n}") for n in range(16)]
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o")
    axes.set_xlim(0, 60)
    axes.set_ylim(0, 2000)
    place_labels(figure, axes, points)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert len(boxes) == len(points)
    for n, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[n + 1 :])
        assert box.x0 >= axes.bbox.x0
        assert box.x1 <= axes.bbox.x1


def test_points_with_long_names_are_numbered_and_have_a_key():
    cells = [cell(f"attention=document,packing=bfd,batch={n}", 9000 + 100 * n, peak_gib=20 + n) for n in range(3)]
    svg = memory_plot([(one.name, one) for one in cells], title="t", reference=None, capacities=[("A10G", 22.0)])
    for rank, one in enumerate(reversed(cells), 1):
        assert f">{rank}<" in svg
        assert f">{rank}: {one.name}<" in svg
    assert ">A10G<" in svg
    short = memory_plot([("a", cells[0]), ("b", cells[1])], title="t", reference=None, capacities=[("H200", 139.7)])
    assert ">a<" in short
    assert "H200" not in short


def test_a_chart_without_any_rate_has_no_scale():
    lost = cell("lost", None, status="failed", reason="ValueError: no")
    svg = rates_plot([("lost", lost)], title="t", reference=None)
    assert ">failed: ValueError: no<" in svg
    assert "tokens/s" not in svg


def test_pictures_beside_the_markdown_stand_alone(results, tmp_path):
    write_report([results], tmp_path / "out")
    files = list((tmp_path / "out" / "plots").glob("*.svg"))
    assert len(files) >= 3
    for path in files:
        text = path.read_text(encoding="utf-8")
        ElementTree.fromstring(text)
        assert "var(" not in text
        assert "currentColor" not in text


def test_writing_it_again_gives_the_same(results, tmp_path):
    first = [path.read_bytes() for path in write_report([results], tmp_path / "out")]
    assert first == [path.read_bytes() for path in write_report([results], tmp_path / "again")]


def test_a_directory_named_twice_counts_once(results):
    assert len(gather_cells([results, results / ".." / "results"])) == 7


def test_the_same_cell_in_two_directories_is_refused(results, tmp_path):
    save_cell(tmp_path / "other", cell("eager-4"))
    with pytest.raises(InputError, match="'eager-4' of session 'one' is given twice"):
        write_report([results, tmp_path / "other"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arrange", "code", "words"),
    [
        (lambda path: None, 2, "no such directory"),
        (lambda path: path.mkdir(), 1, "no cells"),
        (lambda path: save_cell(path, cell("x")).write_text("{"), 1, "cannot be read"),
        (lambda path: save_cell(path, cell("x")).write_text('{"schema_version": 2}'), 1, "schema version 2"),
    ],
)
def test_results_that_cannot_be_read_get_one_line(tmp_path, capsys, monkeypatch, arrange, code, words):
    arrange(tmp_path / "results")
    arguments = ["packloop", "bench", "report", str(tmp_path / "results"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused(results, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        write_report([results], tmp_path / "out")
    with pytest.raises(InputError, match="is a file; give a directory elsewhere"):
        write_report([results], tmp_path / "out" / "below")
    assert (tmp_path / "out").read_text() == "mine"


def test_another_directory_is_not_written_into(results, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="is not empty and holds neither report nor results; give a new directory"):
        write_report([results], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["adapter_config.json"]
    write_report([results], results)
    write_report([results], tmp_path / "new")
    write_report([results], tmp_path / "new")


def test_without_matplotlib_the_command_to_install_it_is_named(results, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'packloop\[bench\]'"):
        write_report([results], tmp_path / "out")


def test_cells_without_a_gpu_have_their_rows_too(tmp_path):
    on_cpu = conditions(device="CPU", device_memory_gib=None, driver=None, cuda=None, before=None, after=None)
    save_cell(tmp_path / "results", cell("a", conditions=on_cpu, memory=None))
    markdown, _ = write_report([tmp_path / "results"], tmp_path / "out")
    assert "device: CPU" in markdown.read_text()
