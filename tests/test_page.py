"""lesson/page.py in a real browser: figures, controls, texts."""

import shlex
import shutil
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_eval import evaluated, make_run, sentences, write_tsv

import data
import train
from eval import Point, full_passes, measure_all
from lesson import page as script
from results import rivals
from smartbert import entropy, infer_pools

LESSON = Path(__file__).parent.parent / "lesson"
NASTY = '<script>alert(1)</script> <img src=x onerror=alert(2)> </script><!-- {{DATA}} & "\u2028'


def make_page(folder, name, **kind):
    """A run of an untrained model, its dev set, the rows of its evaluation and its page."""
    task, first, second = data.TASKS[name], sentences(40, 3), sentences(40, 4)
    first[8], labels = NASTY, (20 * task.labels)[:40]
    for split in ("train", *task.devs):
        path = folder / task.folder / f"{split}.tsv"
        if name in ("mnli", "mrpc"):
            write_tsv(path, "\t".join(task.columns), first, second, labels)
        if name == "cola":                              # its files have no header
            write_tsv(path, "a\t1\t\tcat", second, labels, labels, first)
    path = make_run(folder, "--max-length", "12", task=name, **kind)
    rows = evaluated(path)["rows"]
    script.main([str(path)])
    run, model = train.load_run(path, "cpu")
    split = data.load_task(name, run.settings.data_dir)[task.devs[0]]
    split = data.encode(data.load_tokenizer(path), split, run.settings.max_length)
    return SimpleNamespace(page=path / "page.html", rows=rows, run=run, model=model, split=split)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of single sentences and pairs, of two and three classes, with every metric."""
    names = "toy", "mnli", "mrpc", "cola"
    return {name: make_page(tmp_path_factory.mktemp(name), name) for name in names}


@pytest.fixture(scope="module")
def show():
    """show(file, fragment) opens a page in a browser; it says nothing, asks for no other file."""
    path, said = shutil.which("chromium") or shutil.which("chromium-browser"), []
    if path is None:
        pytest.skip("no browser here: apt-get install chromium")
    driver = pytest.importorskip("playwright.sync_api", reason="no pip install playwright here")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        def open_page(file, fragment=""):
            tab = browser.new_page()
            for event in ("console", "pageerror", "dialog", "request"):
                tab.on(event, lambda what: said.append(str(what)))
            tab.goto(f"{file.as_uri()}#{fragment}")
            assert file.as_uri() in said.pop(0) and said == []
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
    """In every row of the table; then to the last bit at, and a hair beside, entropies."""
    made, tab = runs[task], show(runs[task].page)
    for row in made.rows:
        tab.evaluate("fragment => { location.hash = fragment; readFragment() }",
                     f"{row['mode']},{row['threshold'] or 0}")
        assert figures(tab) == expected(row), row
    full = full_passes(made.run, made.model, made.split)
    values = entropy(full[True].history).unique()
    values, beside = values[::len(values) // 10].tolist(), (1, 1 + 1e-15, 1 + 1e-7, 1 - 1e-7)
    points = [Point(mode, x * by) for mode, x, by in product(("exit", "both"), values, beside)]
    shown = tab.evaluate("points => points.map(point => ({...measure(...point), rows: 0}))",
                         [[point.mode, point.threshold] for point in points])
    results = measure_all(made.model, made.split, data.TASKS[task], full, points).values()
    for result, each in zip(results, shown, strict=True):
        assert all(each[name] == getattr(result, name) for name in ("score", "flops", "layers"))
        assert result.scores.items() <= each["values"].items()
    for x, digits in product((0.0625, 0.1875, 3.125, 3.375, 2.675, -0.3125, -0.1), (0, 2, 3)):
        assert tab.evaluate(f"fixed({x}, {digits})") == f"{x:.{digits}f}"       # as in Python


def test_one_example_in_each_mode_and_layer(runs, show):
    """Its answer, exit and layers are those of `infer`."""
    made, tab, names = runs["mnli"], show(runs["mnli"].page), data.TASKS["mnli"].labels
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
            said, logits = tab.locator("#layers tr").nth(exit).inner_text(), outcome.logits[row]
            assert all(f"{100 * p:.0f}%" in said for p in logits.softmax(0).tolist())
            assert said.endswith(f"{entropy(logits):.3f}")


def test_controls(runs, show):
    """Switches, slider, star, fragment, curves; rows sorted, filtered and chosen."""
    rows, tab, split = runs["toy"].rows, show(runs["toy"].page), runs["toy"].split
    assert figures(tab) == expected(rows[-1])           # it opens at the * of both
    for name, row in ("exits", rows[1]), ("gates", rows[0]):
        tab.get_by_label(name).uncheck()
        assert figures(tab) == expected(row) and tab.locator("#slider").is_disabled()
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


def test_what_a_run_lacks_is_off_and_disabled(tmp_path, show):
    for kind, mode in ((["gates"], "exit"), (["exits"], "skip"), (["gates", "exits"], "plain")):
        tab = show(make_page(tmp_path, "sst2", **dict.fromkeys(kind, False)).page, "both,0.3")
        assert tab.locator("#mode").inner_text() == mode
        assert all(tab.get_by_label(name).is_disabled() for name in kind)


def test_a_large_dev_set_is_a_sample(tmp_path, show, monkeypatch):
    """And markup in a text is shown as it stands."""
    monkeypatch.setattr(script, "LARGEST", 30)
    tab, second = show(make_page(tmp_path, "mnli").page, "both,0.5,9"), sentences(40, 4)
    assert ": 30 examples, a sample of 40; all fig" in tab.locator("#run").inner_text()
    rows, texts = tab.evaluate("[D.rows, texts]")
    assert len(set(rows)) == 30
    assert all(text.endswith(second[row]) for row, text in zip(rows, texts, strict=True))
    assert tab.locator("#tokens p").text_content().startswith(NASTY + "  |  ")
    tab.get_by_label("filter").fill("<script>alert(1)</script>")
    assert tab.evaluate("order") == [rows.index(8)]


def test_the_commands_give_the_settings_again(tmp_path):
    for flags in ("", "--budget 0.7 --bf16", "--recipe release", "--method exits --eta1 0",
                  "--recipe release --budget 0.5 --epochs1 8 --out 'my run'", "--lam 0.1",
                  "--recipe release --lam 0", "--method pabee --from-run b"):
        parse = rivals.parse_all if "pabee" in flags else train.parse
        settings = parse(["--task", "cola", *shlex.split(flags)])
        command, then, _ = script.commands(train.Run(tmp_path, settings, "", True, True))
        assert parse(shlex.split(command)[2:]) == settings and settings.out in then


def test_what_is_refused(tmp_path, refused):
    refused(script.main, [make_run(tmp_path, finished=False)], "not finished")
    refused(script.main, [make_run(tmp_path, criterion="patience")], "entropy")


def test_the_toys_page_in_the_repository(show):
    """It is what the template makes of its data, and fits into windows."""
    before, after = (LESSON / "page.html").read_text().split("{{DATA}}")
    toy, tab = (LESSON / "toy.html").read_text(), show(LESSON / "toy.html", "plain")
    assert toy.startswith(before) and toy.endswith(after) and len(toy) < 600_000
    assert figures(tab)[1:] == ["1.000", "1.00×", "6.00", "0.0%"]
    tab.emulate_media(color_scheme="dark")
    for width in 400, 1280:
        tab.set_viewport_size({"width": width, "height": 800})
        assert tab.evaluate("document.documentElement.scrollWidth") == width
