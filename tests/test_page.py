"""lesson/page.py in a real browser: figures, controls, texts."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_eval import evaluated, make_run, sentences, write_tsv

import data
import train
from eval import Point, full_passes, measure_all
from smartbert import entropy, infer_pools

LESSON = Path(__file__).parent.parent / "lesson"
sys.path.append(str(LESSON))
import page as script  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NASTY = '<script>alert(1)</script> <img src=x onerror=alert(2)> </script><!-- {{DATA}} & "\u2028'


def make_page(folder, task, **kind):
    """The folder of a run of an untrained model, evaluated, with its page."""
    first, second = sentences(40, 3), sentences(40, 4)
    first[7], labels = NASTY, (20 * data.TASKS[task].labels)[:40]
    for name in ("train", *data.TASKS[task].devs):
        path = folder / data.TASKS[task].folder / f"{name}.tsv"
        if task in ("mnli", "mrpc"):
            write_tsv(path, "\t".join(data.TASKS[task].columns), first, second, labels)
        if task == "cola":                              # its files have no header
            write_tsv(path, "a\t1\t\tcat", second, labels, labels, first)
    run = make_run(folder, "--max-length", "12", task=task, **kind)
    evaluated(run)
    script.main([str(run)])
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of single sentences and pairs, of two and three classes, with every metric."""
    made = {}
    for task in ("toy", "mnli", "mrpc", "cola"):
        folder = make_page(tmp_path_factory.mktemp(task), task)
        run, model = train.load_run(folder, "cpu")
        split = data.load_task(task, run.settings.data_dir)[data.TASKS[task].devs[0]]
        split = data.encode(data.load_tokenizer(folder), split, run.settings.max_length)
        rows = json.loads((folder / "eval.json").read_text())["rows"]
        made[task] = SimpleNamespace(folder=folder, rows=rows, run=run, model=model, split=split)
    return made


@pytest.fixture(scope="module")
def chromium():
    if CHROMIUM is None:
        pytest.skip("no browser here: apt-get install chromium")
    driver = pytest.importorskip("playwright.sync_api", reason="no pip install playwright here")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def show(chromium):
    """show(file or run, fragment) opens a page. In the end there must have been no message on the
    console, no dialog and no request but for the file."""
    said = []

    def open_page(path, fragment=""):
        tab = chromium.new_page()
        for event in ("console", "pageerror", "dialog", "request"):
            tab.on(event, lambda what: said.append(str(what)))
        if path.is_dir():
            path = path / "page.html"
        tab.goto(f"{path.as_uri()}#{fragment}")
        assert path.as_uri() in said.pop(0)
        return tab

    yield open_page
    assert said == []


def figures(tab):
    return tab.locator("#figures b").all_inner_texts()


def expected(row) -> list[str]:                         # as eval.py prints them
    *early, end = row["exit_histogram"]
    return [f"{row['score']:.3f}", f"{row['flops']:.3f}", f"{1 / row['flops']:.2f}×",
            f"{row['layers']:.2f}", f"{sum(early) / (sum(early) + end):.1%}"]


@pytest.mark.parametrize("task", ["toy", "mnli", "mrpc", "cola"])
def test_figures_are_those_of_eval(runs, show, task):
    """In every row of the table: four modes, eight usual thresholds, the chosen ones. Then to the
    last bit at thresholds that equal an entropy, and less and more than a float32 beside."""
    made, tab, points = runs[task], show(runs[task].folder), [Point("plain")]
    for row in made.rows:
        tab.evaluate("fragment => { location.hash = fragment; readFragment() }",
                     f"{row['mode']},{row['threshold'] or 0}")
        assert figures(tab) == expected(row), row
    full = full_passes(made.run, made.model, made.split)
    values = sorted(set(entropy(full[True].history).flatten().tolist()))
    for value in values[::len(values) // 10]:
        for mode, beside in product(("exit", "both"), (1, 1 + 1e-15, 1 + 1e-7, 1 - 1e-7)):
            points.append(Point(mode, value * beside))
    shown = tab.evaluate("points => points.map(([mode, threshold]) => measure(mode, threshold))"
                         ".map(each => [each.score, each.flops, each.layers, each.values])",
                         [[point.mode, point.threshold] for point in points])
    results = measure_all(made.model, made.split, data.TASKS[task], full, points).values()
    for result, (score, flops, layers, found) in zip(results, shown, strict=True):
        assert (score, flops, layers) == (result.score, result.flops, result.layers)
        assert result.scores.items() <= found.items()
    for x, digits in product((0.0625, 0.1875, 3.125, 3.375, 2.675, -0.3125, -0.1), (0, 2, 3)):
        assert tab.evaluate(f"fixed({x}, {digits})") == f"{x:.{digits}f}"       # as in Python


@pytest.mark.skipif(CHROMIUM is None, reason="no browser here: apt-get install chromium")
@pytest.mark.parametrize("task", ["toy", "mnli"])
def test_figures_as_dumped_by_chromium_without_a_driver(runs, task):
    row, url = runs[task].rows[-1], (runs[task].folder / "page.html").as_uri()
    url += f"#{row['mode']},{row['threshold']}"
    dumped = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--dump-dom", url],
                            capture_output=True, text=True, timeout=60, check=True).stdout
    assert re.findall(r"</small><b[^>]*>([^<]*)</b>", dumped) == expected(row)


def test_one_example_in_each_mode_and_layer(runs, show):
    """Its answer, exit and layers are those of `infer`."""
    made, tab, names = runs["mnli"], show(runs["mnli"].folder), data.TASKS["mnli"].labels
    for skip, limit in product((False, True), (None, 0.9)):
        outcome = infer_pools(made.model, data.pools(made.split), skip=skip, threshold=limit)
        for row in range(0, 40, 3):
            tab.evaluate("changes => set(changes)", {"gates": skip, "exits": limit is not None,
                                                     "threshold": 0.9, "row": row})
            answer, exit = outcome.logits[row].argmax().item(), outcome.exit[row].item()
            sign = "✓" if answer == made.split.labels[row] else "✗"
            cells = tab.locator("tr.chosen td").all_inner_texts()[1:3]
            assert cells == [f"{names[answer]}\u00a0{sign}", "end" if exit == 5 else str(exit)]
            states = tab.locator("#layers td:nth-child(2)").all_inner_texts()
            assert [each in ("ran", "exited") for each in states] == outcome.ran[row].tolist()
            assert states.count("unreached") == 5 - exit


def test_switches_slider_star_fragment_and_curves(runs, show):
    rows, tab = runs["toy"].rows, show(runs["toy"].folder)
    assert figures(tab) == expected(rows[-1])           # it opens at the * of both
    tab.get_by_label("exits").uncheck()
    assert figures(tab) == expected(rows[1]) and tab.locator("#slider").is_disabled()
    tab.get_by_label("gates").uncheck()
    assert figures(tab) == expected(rows[0])
    tab.get_by_label("exits").check()
    tab.get_by_label("gates").check()
    tab.get_by_label("exit if the entropy is below").press("Home")
    assert tab.evaluate("state.threshold") == 0 and figures(tab)[4] == "0.0%"
    tab.keyboard.press("ArrowRight")
    tab.wait_for_url("**#both,0.005,1")
    tab.locator("#star").click()
    assert figures(tab) == expected(rows[-1])
    tab.get_by_label("threshold in nats").fill(str(rows[5]["threshold"]))
    tab.get_by_label("gates").uncheck()
    assert figures(tab) == expected(rows[5])
    for k in tab.evaluate("[0, 1, 9, points.length - 9]"):
        x, y, mode = tab.evaluate("k => [across(points[k]), up(points[k]), points[k].mode]", k)
        tab.locator("#plot").click(position={"x": x, "y": y})
        said = tab.locator("#said").inner_text()
        assert said.startswith(mode) and tab.locator("#mode").inner_text() == mode
        assert f"accuracy {figures(tab)[0]}, FLOPs {figures(tab)[1]} " in said


def test_rows_sorted_filtered_and_chosen(runs, show):
    tab, split = show(runs["toy"].folder), runs["toy"].split
    for name, key in ("level", split.levels), ("length", [len(ids) for ids in split.ids]):
        tab.get_by_label("sorted by").select_option(name)
        assert [key[row] for row in tab.evaluate("order")] == sorted(key)
    tab.get_by_label("sorted by").select_option("wrong first")
    right = tab.evaluate("order.map(row => now.rows[row].right)")
    assert right == sorted(right)
    assert tab.locator("#count").inner_text().startswith(f"900 of 900 examples; {sum(right)} ")
    tab.get_by_label("filter").fill("KING ")
    found = [row for row, (text, _) in enumerate(split.texts) if "king " in text]
    assert sorted(tab.evaluate("order")) == found
    tab.locator("#list").click(position={"x": 5, "y": 18 * 3 + 9})      # the third row
    assert tab.locator("#one").inner_text().startswith(f"Example {tab.evaluate('order[2]') + 1}: ")
    assert split.texts[tab.evaluate("order[2]")][0] in tab.locator("#tokens").inner_text()
    tab.locator("#scroll").press("ArrowDown")
    assert tab.evaluate("state.row === order[3]")
    tab.get_by_label("filter").fill("")
    tab.locator("#scroll").press("End")
    assert tab.evaluate("state.row === order.at(-1) && at('scroll').scrollTop > 9000")
    tab.locator("#overview").click(position={"x": 5, "y": 320})         # half-way down
    assert tab.evaluate("Math.abs(order.indexOf(state.row) - 450) < 4")


def test_markup_in_a_text_is_shown_as_it_stands(runs, show):
    tab = show(runs["mnli"].folder, "both,0.5,8")
    assert tab.locator("#tokens p").text_content().startswith(NASTY + "  |  ")
    assert tab.locator("script").count() == 2 and tab.locator("img").count() == 0
    tab.get_by_label("filter").fill("<script>alert(1)</script>")
    assert tab.evaluate("order") == [7]


def test_what_a_run_lacks_is_off_and_disabled(tmp_path, show):
    for kind, mode in ((["gates"], "exit"), (["exits"], "skip"), (["gates", "exits"], "plain")):
        tab = show(make_page(tmp_path, "sst2", **dict.fromkeys(kind, False)), "both,0.3")
        assert tab.locator("#mode").inner_text() == mode
        assert all(tab.get_by_label(name).is_disabled() for name in kind)


def test_a_large_dev_set_is_a_sample(tmp_path, show, monkeypatch):
    monkeypatch.setattr(script, "LARGEST", 30)
    tab = show(make_page(tmp_path, "mnli"))
    assert ": 30 examples, a sample of 40; all fig" in tab.locator("#run").inner_text()
    rows, texts, seconds = tab.evaluate("D.rows"), tab.evaluate("texts"), sentences(40, 4)
    assert len(set(rows)) == 30
    assert all(text.endswith(seconds[row]) for row, text in zip(rows, texts, strict=True))


def test_the_commands_give_the_settings_again(tmp_path):
    for flags in ("", "--budget 0.7 --bf16", "--recipe release", "--method exits --eta1 0",
                  "--recipe release --budget 0.6 --out 'my run'"):
        settings = train.parse(["--task", "cola", *shlex.split(flags)])
        run = train.Run(tmp_path, settings, "", gates=True, exits=True)
        command, then, _ = script.commands(run)
        assert train.parse(shlex.split(command)[2:]) == settings and settings.out in then


def test_what_is_refused(tmp_path, refused):
    refused(script.main, [make_run(tmp_path, finished=False)], "not finished")
    refused(script.main, [make_run(tmp_path, criterion="patience")], "entropy")
    refused(script.main, [tmp_path / "none"], "none")


def test_the_toys_page_in_the_repository(show):
    """It is what the template makes of its data, and fits into windows."""
    before, after = (LESSON / "page.html").read_text().split("{{DATA}}")
    toy, tab = (LESSON / "toy.html").read_text(), show(LESSON / "toy.html", "plain")
    assert toy.startswith(before) and toy.endswith(after) and len(toy) < 600_000
    assert figures(tab)[1:] == ["1.000", "1.00×", "6.00", "0.0%"]
    for width, scheme in product((400, 1280), ("light", "dark")):
        tab.set_viewport_size({"width": width, "height": 800})
        tab.emulate_media(color_scheme=scheme)
        assert tab.evaluate("document.documentElement.scrollWidth") == width
